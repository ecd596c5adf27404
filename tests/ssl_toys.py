"""A host without a trainer, a network and data of a few numbers, for tests of semi-supervised methods."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_modules.ssl.base import Batch, Method, Split, view_keys


class ToyNet(nn.Module):
    """An MLP with BatchNorm over flattened images; it embeds."""

    def __init__(self, num_inputs: int = 2, num_classes: int = 3, width: int = 32) -> None:
        super().__init__()
        self.num_features = width
        self.num_classes = num_classes
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(num_inputs, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)

    def embed(self, image: Tensor) -> Tensor:
        features: Tensor = self.body(image)
        return features

    def classify(self, embedding: Tensor) -> Tensor:
        logits: Tensor = self.head(embedding)
        return logits

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.embed(image))


class ToyHost:
    """What a method may ask for (`Host`), in one process and without Lightning.

    `unlabeled_images` are what `sweep` reads; their first `num_labeled` are the labelled ones.
    """

    def __init__(
        self,
        method: Method,
        network: nn.Module | None = None,
        num_classes: int = 3,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        num_labeled: int = 6,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(24, 2, 1, 1, generator=generator) if images is None else images
        self.labels = torch.arange(len(self.images)) % num_classes if labels is None else labels
        self.network = ToyNet(self.images[0].numel(), num_classes) if network is None else network
        self.ema_network = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.num_classes = num_classes
        self.num_labeled = num_labeled
        self.num_unlabeled = len(self.images)
        self.progress = 0.5
        self.batch_number = 10
        self.batches_per_epoch = 10
        self.current_epoch = 0
        self.method = method
        method.setup(self)

    def teacher(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.ema_network(image)
        return logits

    def new_network(self) -> nn.Module:
        network = copy.deepcopy(self.network)
        for part in network.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
        return network

    def load_trained(self, network: nn.Module, path: str, argument: str) -> None:
        network.load_state_dict(torch.load(path, weights_only=True))

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors)

    def labels_of(self, split: Split) -> Tensor:
        given = self.labels[: self.num_labeled]
        if split == "labeled":
            return given
        return torch.cat([given, torch.full((self.num_unlabeled - self.num_labeled,), -1)])

    @torch.no_grad()
    def sweep(self, function: Callable[[Tensor], Tensor], split: Split) -> Tensor:
        training = self.network.training
        self.network.eval()
        result = function(self.images[: self.num_labeled] if split == "labeled" else self.images)
        self.network.train(training)
        return result


def toy_batch(host: ToyHost, size: int = 6, ratio: int = 2, noise: float = 0.05) -> tuple[Batch, Batch]:
    """A batch with all the views that the host's method declares."""
    views = host.method.views
    labeled = torch.arange(size) % host.num_labeled
    unlabeled = torch.arange(size * ratio) % host.num_unlabeled

    def seen(index: Tensor, keys: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            scale = noise * (4 if "strong" in key else 1)
            yield key, host.images[index] + scale * torch.randn_like(host.images[index])

    first = dict(seen(labeled, view_keys(views.labeled, labeled=True)))
    second = dict(seen(unlabeled, view_keys(views.unlabeled)))
    return (
        first | {"label": host.labels[labeled], "index": labeled},
        second | ({"index": unlabeled} if views.unlabeled else {}),
    )
