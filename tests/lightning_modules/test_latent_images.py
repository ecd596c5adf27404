"""Diffusion and its classifier in the latents of an autoencoder, from the images to drawn ones."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from drawing_runs import START, Ones
from pytorch_lightning.callbacks import ModelCheckpoint
from tdsm_toys import ClassPoint
from tiny_autoencoders import fitted, tiny_autoencoder
from tiny_nets import Segmenter, tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import ArraySource, GenerationDataModule, LabelNoise
from datamodules.synthetic_images import weights_sha256
from lightning_modules import LatentSpace, NoisyLabelClassifier, NoisyResNet, TDSMDiffusion
from lightning_modules.latent_images import LatentImages

adam = partial(torch.optim.Adam, lr=1e-3)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
Make = Callable[..., pl.LightningModule]
REQUEST: dict[str, Any] = {
    "seed": torch.arange(5),
    "label": torch.tensor([0, 1, 2, 0, 1]),
    "image_size": 8,
    "sampler": "heun",
    "num_steps": 3,
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an autoencoder after one step; not to be written to."""
    return fitted(tmp_path_factory.mktemp("vae"), max_epochs=1, limit_train_batches=1)[2]


def data(**options: Any) -> GenerationDataModule:
    source = ArraySource(PIXELS, [0, 1, 2] * 8, PIXELS[:3], [0, 1, 2])
    chosen: dict[str, Any] = {"batch_size": 6, "steps_per_epoch": 2, "label_noise": LabelNoise(rate=0.3)}
    return GenerationDataModule(source, **chosen | options)


def space(vae: Path | str, sigma_data: float = 0.5) -> LatentSpace:
    return LatentSpace(tiny_autoencoder(), init_from=str(vae), sigma_data=sigma_data)


def resnet(in_channels: int = 2) -> NoisyResNet:
    return NoisyResNet(in_channels, (4,), (1,), embed_dim=8)


def classifier(latent: nn.Module | None, cache: Path | None = None) -> NoisyLabelClassifier:
    torch.manual_seed(0)
    network = resnet(3 if latent is None else 2)
    folder = None if cache is None else str(cache)
    return NoisyLabelClassifier(network, 3, optimizer=adam, latent=latent, latent_cache=folder)


def diffusion(latent: nn.Module | None, cache: Path | None = None, **options: Any) -> TDSMDiffusion:
    torch.manual_seed(0)
    network = ClassPoint(3, 8, dropout=0.2) if latent is None else ClassPoint(2, 4, dropout=0.2)
    chosen: dict[str, Any] = {"weighting": "none", "optimizer": adam, "ema_half_life": 20.0} | options
    return TDSMDiffusion(network, 3, latent=latent, latent_cache=None if cache is None else str(cache), **chosen)


def fit(model: pl.LightningModule, folder: Path, images: pl.LightningDataModule, **options: Any) -> Path:
    """Fit, and keep what came out."""
    torch.manual_seed(0)  # the seed of the run
    trainer = tiny_trainer(folder, **options)
    trainer.fit(model, datamodule=images)
    trainer.save_checkpoint(folder / "fitted.ckpt")
    return folder / "fitted.ckpt"


def test_from_an_autoencoder_to_drawn_images(vae: Path, tmp_path: Path) -> None:
    judge = classifier(space(vae), tmp_path / "a")
    from_ = str(fit(judge, tmp_path, data(val_share=0.25)))
    found = torch.load(from_, weights_only=True)["noisy_labels"]
    assert (found["image_size"], found["image_channels"]) == (8, 3)
    options: dict[str, Any] = {"weighting": "posterior", "classifier": resnet(), "classifier_from": from_}
    model = diffusion(space(vae), tmp_path / "b", **options)
    fit(model, tmp_path, data())
    assert model.weighting.classifier is not None
    for name, value in model.weighting.classifier.network.state_dict().items():
        assert torch.equal(value, judge.predictor.state_dict()[name])
    # Neither the classifier nor the autoencoder is trained.
    trained = [id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]]
    assert trained == [id(p) for p in model.network.parameters()]
    averaged = torch.load(vae, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        if name.startswith("images.latent.vae."):
            assert torch.equal(value, averaged[f"ema.module.vae.{name.removeprefix('images.latent.vae.')}"])
    drawn = model.draw(REQUEST)["image"]
    assert drawn.shape == (5, 3, 8, 8)
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1
    assert (drawn.std(0) > 0).any()
    one = {name: value[3:4] if isinstance(value, Tensor) else value for name, value in REQUEST.items()}
    assert torch.equal(model.draw(one)["image"][0], drawn[3])


class Listens(pl.Callback):
    """Writes down what batches hold and what the network is given."""

    def __init__(self) -> None:
        self.keys: list[set[str]] = []
        self.inputs: list[Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = pl_module.get_submodule("network")
        network.register_forward_pre_hook(lambda _, values: self.inputs.append(values[0].clone()))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.keys.append(set(batch))


@pytest.mark.parametrize("make", [diffusion, classifier])
def test_the_cache_changes_nothing(make: Make, vae: Path, tmp_path: Path) -> None:
    without, cached = Listens(), Listens()
    for listens, cache in ((without, None), (cached, tmp_path / "cache")):
        fit(make(space(vae), cache), tmp_path, data(flip=True, val_share=0.25), callbacks=[listens])
    assert without.keys == [{"image", "label", "index", "flip"}] * 2
    assert cached.keys == [{"label", "index", "flip"}] * 2
    assert len(cached.inputs) == 2
    for ours, theirs in zip(without.inputs, cached.inputs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_mirrored_images_have_latents_of_their_own(vae: Path, tmp_path: Path) -> None:
    images, source = LatentImages(space(vae), str(tmp_path)), data(flip=True)
    source.setup()
    trainer = tiny_trainer(tmp_path)
    vars(trainer)["datamodule"] = source
    images.prepare(trainer, 8)
    batch = next(iter(source.train_dataloader()))
    assert 0 < int(batch["flip"].sum()) < 6
    assert "image" not in batch

    def latents(**changes: Tensor) -> Tensor:
        torch.manual_seed(0)
        return images.of_training({**batch, **changes})

    shown = torch.from_numpy(PIXELS).movedim(-1, 1)[batch["index"]] / 255
    flipped = torch.where(batch["flip"].view(-1, 1, 1, 1), shown.flip(-1), shown)
    torch.testing.assert_close(latents(), latents(image=flipped), atol=1e-5, rtol=1e-4)
    same = (latents() - latents(image=shown)).abs().amax((1, 2, 3)) < 1e-3
    assert torch.equal(same, ~batch["flip"])


def test_latents_are_drawn_anew_for_training_and_are_means_otherwise(vae: Path) -> None:
    images = LatentImages(space(vae), None)
    image = torch.rand(3, 3, 8, 8)
    assert torch.equal(images.of(image), images.of(image))
    torch.manual_seed(0)
    first, *others = [images.of_training({"image": image}) for _ in range(200)]
    assert not torch.equal(first, others[0])
    drawn = torch.stack([first, *others])
    torch.testing.assert_close(drawn.mean(0), images.of(image), atol=5 * float(drawn.std(0).max()) / 200**0.5, rtol=0)


def test_a_fit_goes_on_and_draws_without_the_autoencoders_file(vae: Path, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = diffusion(space(vae), tmp_path / "cache", label_dropout=0.2)
    options: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [saver]}
    ended = fit(whole, tmp_path, data(flip=True), **options)
    rest = diffusion(space("gone.ckpt"), tmp_path / "cache", label_dropout=0.2)
    half = str(tmp_path / "epoch=0.ckpt")
    tiny_trainer(tmp_path, max_epochs=2).fit(rest, datamodule=data(flip=True), ckpt_path=half, weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    drawing = diffusion(space("gone.ckpt"), label_dropout=0.2)
    requests: Any = DataLoader([REQUEST], batch_size=None)  # type: ignore[arg-type]  # a list is a data set too
    (found,) = tiny_trainer(tmp_path).predict(drawing, requests, ckpt_path=ended, weights_only=True) or []
    assert isinstance(found, Mapping)
    assert torch.equal(found["image"], whole.draw(REQUEST)["image"])
    # What a folder of drawn images compares: the autoencoder is part of it.
    assert weights_sha256(drawing) == weights_sha256(whole)
    drawing.images.get_parameter("latent.vae.decoder.conv_out.bias")[0] += 1
    assert weights_sha256(drawing) != weights_sha256(whole)
    other = diffusion(space(vae, sigma_data=1.0), label_dropout=0.2)
    with pytest.raises(ValueError, match=r"latent_deviation 0\.5 -> 1\.0"):
        tiny_trainer(tmp_path).predict(other, requests, ckpt_path=ended, weights_only=True)


class Witness(pl.Callback):
    """Writes down what each process ended with."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        file = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}"
        latent = pl_module.get_submodule("images.latent")
        assert isinstance(latent, LatentSpace)
        file.write_text(f"{weights_sha256(pl_module)} {latent.fingerprint()}")


def test_two_processes_have_one_autoencoder(vae: Path, tmp_path: Path) -> None:
    two: dict[str, Any] = {"strategy": f"ddp_{START}", "devices": 2, "callbacks": [Witness()]}
    fit(diffusion(space(vae), tmp_path / "cache"), tmp_path, data(), **two)
    first, second = (tmp_path / name for name in ("rank0", "rank1"))
    assert first.read_text() == second.read_text()
    assert first.read_text().endswith(space(vae).fingerprint())


def test_classifiers_of_another_space_are_refused(vae: Path, tmp_path: Path) -> None:
    other = fitted(tmp_path / "other", max_epochs=1)[2]
    spaces = {"pixels": None, "latents": space(vae), "other": space(other), "wider": space(vae, sigma_data=1.0)}
    made = {name: fit(classifier(latent), tmp_path / name, data()) for name, latent in spaces.items()}
    pairs = [("pixels", "latents"), ("latents", "pixels"), ("other", "latents"), ("wider", "latents")]
    for theirs, ours in pairs:
        latent = None if spaces[ours] is None else space(vae)
        judge = resnet(3 if theirs == "pixels" else 2)
        options = {"weighting": "posterior", "classifier": judge, "classifier_from": str(made[theirs])}
        with pytest.raises(
            ValueError,
            match=r"`classifier_from` .*trained with space (pixels|latents of deviation .*), not (pixels|latents)",
        ):
            fit(diffusion(latent, tmp_path / "cache" if latent else None, **options), tmp_path, data())
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_leaves_the_cache_alone(vae: Path, tmp_path: Path) -> None:
    fit(diffusion(space(vae), tmp_path / "cache"), tmp_path, data(), fast_dev_run=True)
    assert not (tmp_path / "cache").exists()


class Three(Ones):
    """Data that cannot be swept."""

    num_classes = 3


def test_what_cannot_work_is_refused_before_the_first_step(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`latent` to be a LatentSpace, got Segmenter"):
        classifier(Segmenter())
    with pytest.raises(ValueError, match="`latent` with `latent_cache`, got None"):
        classifier(None, tmp_path / "cache")
    with pytest.raises(TypeError, match=r"`sweep_dataloader` and `leave_out_images` for `latent_cache`, got Three"):
        fit(diffusion(space(vae), tmp_path / "cache"), tmp_path, Three())
    for make in (classifier, diffusion):
        model = make(space("gone.ckpt"))
        with pytest.raises(FileNotFoundError, match=r"`init_from` .* there is none at gone\.ckpt"):
            fit(model, tmp_path, data())
        assert model.trainer.global_step == 0
    used = data()
    fit(diffusion(space(vae), tmp_path / "cache"), tmp_path, used)
    with pytest.raises(ValueError, match=r"batches with `image`, got \['index', 'label'\]; only a fit with `latent_ca"):
        fit(diffusion(space(vae)), tmp_path, used)
