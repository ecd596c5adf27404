"""Features of trained classifiers and of Inception: whose weights, which images, and what is said without them."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from tiny_nets import tiny_trainer
from torch import Tensor, nn

from datamodules import SemiSupervisedDataModule
from lightning_modules import ClassifierFeatures, InceptionFeatures, SSLClassifier, Supervised, WideResNet
from lightning_modules.checkpoints import file_sha256


def net() -> WideResNet:
    return WideResNet(10, 1, in_channels=1, width=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SSLClassifier]:
    folder = tmp_path_factory.mktemp("classifier")
    model = SSLClassifier(net(), Supervised(), 10, optimizer=partial(torch.optim.SGD, lr=0.1), ema_decay=0.9)
    trainer = tiny_trainer(folder, max_epochs=1)
    trainer.fit(model, SemiSupervisedDataModule(batch_size=16, steps_per_epoch=3))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", model


def test_features_are_those_of_the_averaged_network(checkpoint: tuple[Path, SSLClassifier]) -> None:
    path, model = checkpoint
    extractor = ClassifierFeatures(net(), str(path), 10, "digits")
    image = torch.rand(5, 1, 8, 8)
    features, probabilities = extractor(image)
    average: Any = model.ema_network
    with torch.no_grad():
        assert torch.equal(features, average.embed(image))
        assert torch.equal(probabilities, average(image).softmax(1))
        assert not torch.allclose(features, model.network.eval().embed(image))  # type: ignore[operator]
    assert features.shape == (5, extractor.num_features)
    assert (extractor.name, extractor.fingerprint) == ("digits", file_sha256(path))
    assert not features.requires_grad


def test_an_image_has_the_same_features_in_training_and_at_low_precision(
    checkpoint: tuple[Path, SSLClassifier],
) -> None:
    extractor = ClassifierFeatures(net(), str(checkpoint[0]), 10)
    image = torch.rand(5, 1, 8, 8)
    expected = extractor(image)[0]
    extractor.train()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = extractor(image)[0]
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


def test_a_classifier_that_is_not_there_or_of_other_classes(
    checkpoint: tuple[Path, SSLClassifier], tmp_path: Path
) -> None:
    lost = ClassifierFeatures(net(), str(tmp_path / "lost.ckpt"), 10)  # nothing is read before it is needed
    with pytest.raises(FileNotFoundError, match="Expected `weights` to be a checkpoint file, but there is none at"):
        _ = lost.fingerprint
    with pytest.raises(FileNotFoundError, match="run the fit that writes it first"):
        lost(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"`weights` to hold a network like this one, but 2 tensors of .* head\."):
        _ = ClassifierFeatures(net(), str(checkpoint[0]), 11).fingerprint
    with pytest.raises(TypeError, match="got Linear without embed; use WideResNet or TimmClassifier"):
        ClassifierFeatures(nn.Linear(2, 2), "x.ckpt", 2)
    with pytest.raises(ValueError, match=r"`name` of letters, digits and _-\. only, got 'a/b'"):
        ClassifierFeatures(net(), "x.ckpt", 2, "a/b")


# ---------------------------------------------------------------- Inception


class FakeInception(nn.Module):
    """Stands for torch-fidelity's: takes 8-bit colour images only."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        self.features_list, self.path = features_list, feature_extractor_weights_path
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(x)
        return x.double().mean((1, 2, 3))[:, None].expand(-1, 2048), torch.zeros(len(x), 1008)


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.usefixtures("fidelity")
def test_inception_sees_three_channels_of_8_bits(weights: Path) -> None:
    extractor = InceptionFeatures(str(weights))
    image = torch.tensor([0.0, 0.5, 1.0, 1.5]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    features, probabilities = extractor(image)
    assert (features.shape, features.dtype) == ((4, 2048), torch.float32)
    assert features[:, 0].tolist() == [0, 128, 255, 255]
    assert torch.allclose(probabilities, torch.full((4, 1008), 1 / 1008))
    network: Any = extractor._network
    assert network.seen[0].shape == (4, 3, 2, 2)
    assert network.seen[0].dtype == torch.uint8
    assert (network.features_list, network.path) == (["2048", "logits_unbiased"], str(weights))
    assert not network.training
    assert extractor.fingerprint == file_sha256(weights)
    with pytest.raises(ValueError, match=r"Expected `image` \[B, 1 or 3, H, W\], got \(4, 2, 2, 2\)"):
        extractor(image.expand(4, 2, 2, 2))


@pytest.mark.usefixtures("fidelity")
def test_a_file_that_is_not_inceptions(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is none at .*lost.pth .* download https://github.com/toshas"):
        _ = InceptionFeatures(str(tmp_path / "lost.pth")).fingerprint
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"`weights` to hold tensors, but .* cannot be read"):
        _ = InceptionFeatures(str(tmp_path / "other.pth")).fingerprint
    torch.save({"weight": torch.zeros(2)}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="`weights` to be Inception's, but"):
        _ = InceptionFeatures(str(tmp_path / "plain.pth")).fingerprint
    # torch-fidelity would run what this pickle asks for.
    torch.save({"fc.weight": pl.Trainer}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"`weights` to hold tensors, but .* cannot be read: UnpicklingError"):
        _ = InceptionFeatures(str(tmp_path / "code.pth")).fingerprint


@pytest.mark.usefixtures("fidelity")
def test_nothing_is_fetched_unless_asked() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"Expected `weights` of Inception, got None; download .*`download: true`"
    ):
        InceptionFeatures()
    with pytest.raises(ValueError, match="either `weights` or `download`, got both"):
        InceptionFeatures("inception.pth", download=True)
    asked = InceptionFeatures(download=True)
    assert asked.fingerprint.startswith("https://github.com/toshas/")
    network: Any = asked._network
    assert network.path is None


def test_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"install `fewlight\[fid\]`, or measure with ClassifierFeatures"):
        _ = InceptionFeatures(str(weights)).fingerprint
