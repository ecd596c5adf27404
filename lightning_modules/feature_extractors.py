"""What drawn and real images are compared by: features and class probabilities of a network that is not trained."""

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_modules.checkpoints import file_sha256, load_network
from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl.companions import with_classes

_INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class ClassifierFeatures(nn.Module):
    """Features and verdicts of a classifier that a fit here has trained, best on clean labels.

    The averaged weights are taken where the checkpoint has them. They are read on first use.

    Args:
        network: The network that was trained, with `embed`, `classify` and `num_features` (WideResNet,
            TimmClassifier).
        weights: Checkpoint of its SSLClassifier.
        num_classes: Classes K.
        name: Part of the name of every value that is logged.

    Attributes:
        num_features: Features D of an image.

    Raises:
        TypeError: The network has no features to give.
        ValueError: `name` cannot be part of the name of a metric.
    """

    def __init__(self, network: nn.Module, weights: str, num_classes: int, name: str = "classifier") -> None:
        super().__init__()
        for needed in ("embed", "classify", "num_features"):
            if not hasattr(network, needed):
                msg = (
                    f"Expected a `network` with embed(image), classify(embedding) and num_features, got "
                    f"{type(network).__name__} without {needed}; use WideResNet or TimmClassifier, or add it."
                )
                raise TypeError(msg)
        self.name = _checked(name)
        self.weights = str(Path(weights).expanduser())
        self.network = with_classes(network, num_classes).requires_grad_(False).eval()
        self.num_features = int(getattr(network, "num_features"))  # noqa: B009 - nn.Module does not know it
        self._loaded = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the checkpoint.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is no checkpoint, or of another network.
        """
        self._load()
        return file_sha256(self.weights)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images.

        Args:
            image: [B, C, H, W] in [0, 1].

        Returns:
            Features [B, D] and probabilities [B, K], float32.

        Raises:
            FileNotFoundError: There is no checkpoint.
            ValueError: It is none, or of another network.
        """
        self._load()
        network, device = self.network, image.device
        with evaluating(network), torch.autocast(device.type, enabled=False):
            features: Tensor = network.embed(image.float())  # type: ignore[operator]  # checked in the constructor
            logits: Tensor = network.classify(features)  # type: ignore[operator]
        return features.float(), logits.float().softmax(1)

    def _load(self) -> None:
        if not self._loaded:
            load_network(self.network, self.weights, "weights")
            self._loaded = True


class InceptionFeatures(nn.Module):
    """The Inception network of published FID values: 2048 features, 1008 classes of ImageNet.

    Needs the extra `fewlight[fid]` (torch-fidelity) and its weight file, which is read on first use. Images become 8
    bits, grey ones three equal channels; the network itself resizes them to 299 x 299 as TensorFlow did.

    Args:
        weights: The file; None only with `download`.
        download: Let torch-fidelity fetch its weights once into torch's cache (95 MB from github.com).
        name: Part of the name of every value that is logged.

    Attributes:
        num_features: Features D of an image.

    Raises:
        FileNotFoundError: There is no `weights`, and `download` is off.
        ValueError: Both are given, or `name` cannot be part of the name of a metric.
    """

    num_features = 2048

    def __init__(self, weights: str | None = None, download: bool = False, name: str = "inception") -> None:
        super().__init__()
        if weights is None and not download:
            msg = f"Expected `weights` of Inception, got None; {_REMEDY}"
            raise FileNotFoundError(msg)
        if weights is not None and download:
            msg = "Expected either `weights` or `download`, got both; leave one out."
            raise ValueError(msg)
        self.name = _checked(name)
        self.weights = None if weights is None else str(Path(weights).expanduser())
        self._network: nn.Module | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weight file, or the address of what was fetched.

        Raises:
            FileNotFoundError: There is no such file.
            ImportError: torch-fidelity is not installed.
        """
        self._load()
        return _INCEPTION_URL if self.weights is None else file_sha256(self.weights)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images.

        Args:
            image: [B, 1 or 3, H, W] in [0, 1].

        Returns:
            Features [B, 2048] and probabilities [B, 1008], float32.

        Raises:
            FileNotFoundError: There is no weight file.
            ImportError: torch-fidelity is not installed.
            ValueError: The images have other than 1 or 3 channels, or the file does not hold the weights.
        """
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            msg = f"Expected `image` [B, 1 or 3, H, W], got {tuple(image.shape)}; Inception knows colour images only."
            raise ValueError(msg)
        network = self._load().to(image.device)
        pixels = (image.float().clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
        with torch.autocast(image.device.type, enabled=False):
            features, logits = network(pixels)
        return features.float(), logits.float().softmax(1)

    def _load(self) -> nn.Module:
        if self._network is None:
            try:
                module = import_module("torch_fidelity.feature_extractor_inceptionv3")
            except ImportError as error:
                msg = (
                    "Expected the package torch-fidelity for InceptionFeatures, but it cannot be imported "
                    f"({error}); install `fewlight[fid]`, or measure with ClassifierFeatures."
                )
                raise ImportError(msg) from error
            if self.weights is not None:
                self._require_plain(self.weights)
            built = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=self.weights
            )
            self._network = nn.Module.eval(built)
        return self._network

    def _require_plain(self, weights: str) -> None:
        """Read the file as tensors first: torch-fidelity would run what is in it."""
        if not Path(weights).is_file():
            msg = f"Expected `weights` to be a file, but there is none at {weights} (looked in {Path.cwd()}); {_REMEDY}"
            raise FileNotFoundError(msg)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its zip reader and unpickler raise
            msg = f"Expected `weights` to hold tensors, but {weights} cannot be read: {type(error).__name__}; {_REMEDY}"
            raise ValueError(msg) from error
        if not isinstance(state, dict) or "fc.weight" not in state:
            msg = f"Expected `weights` to be Inception's, but {weights} is something else; {_REMEDY}"
            raise ValueError(msg)


_REMEDY = f"download {_INCEPTION_URL} and give its path, set `download: true`, or measure with ClassifierFeatures."


def _checked(name: str) -> str:
    if not name or not all(letter.isalnum() or letter in "_-." for letter in name):
        msg = f"Expected `name` of letters, digits and _-. only, got {name!r}; it becomes part of names of metrics."
        raise ValueError(msg)
    return name
