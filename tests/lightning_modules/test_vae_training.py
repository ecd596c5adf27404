"""Training an autoencoder: its loss, what it measures, how it goes on, and what it refuses."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from board import board_trainer, pictures
from tiny_autoencoders import fitted, tiny_autoencoder, tiny_training
from tiny_nets import Segmenter, Squares, adamw, squares_loader, tiny_trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from callbacks import ReconstructionGrid
from lightning_modules import HybridSegmentation, KLAutoencoder
from lightning_modules.base import BaseModule
from lightning_modules.vae_training import Reconstruction, VAETraining, psnr

IMAGES = torch.stack([Squares()[i]["image"] for i in range(8)])


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> tuple[VAETraining, pl.Trainer, Path]:
    """A fit of two epochs; not to be changed."""
    return fitted(tmp_path_factory.mktemp("fit"))


def _network(model: VAETraining, averaged: bool = True) -> KLAutoencoder:
    network = model.ema_network if averaged else model.network
    assert isinstance(network, KLAutoencoder)
    return network


@pytest.mark.parametrize(("reconstruction", "power"), [("l1", 1), ("mse", 2)])
def test_the_loss_is_the_papers_over_the_number_of_values(
    reconstruction: Reconstruction, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_training(reconstruction=reconstruction, kl_weight=0.3)
    monkeypatch.setattr(BaseModule, "log", lambda *_, **__: None)
    monkeypatch.setattr(BaseModule, "log_dict", lambda *_, **__: None)
    vae = _network(model, averaged=False).vae
    posterior = vae.encode(2 * IMAGES - 1).latent_dist
    torch.manual_seed(7)
    decoded = vae.decode(posterior.mean + posterior.std * torch.randn(8, 2, 4, 4)).sample
    sums = (2 * IMAGES - 1 - decoded).abs().pow(power).sum((1, 2, 3)) + 0.3 * posterior.kl()
    torch.manual_seed(7)
    torch.testing.assert_close(model.training_step({"image": IMAGES}, 0), sums.mean() / (3 * 8 * 8))


def test_the_divergence_draws_latents_to_the_standard_normal() -> None:
    torch.manual_seed(0)
    model = tiny_training(kl_weight=1e6)
    network = _network(model, averaged=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
    divergences = []
    for _ in range(20):
        moments = network.encode(2 * IMAGES - 1)
        loss, _, kl = model._terms(2 * IMAGES - 1, network.decode(moments[:, :2]), moments)
        divergences.append(float(kl.mean()))
        optimizer.zero_grad()
        loss.mean().backward()  # type: ignore[no-untyped-call] # torch's
        optimizer.step()
    assert divergences[-1] < 0.3 * divergences[0]


def test_training_lowers_the_error_on_fixed_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_training(optimizer=partial(torch.optim.Adam, lr=1e-2))
    images = squares_loader(32, 32)
    trainer = tiny_trainer(tmp_path, max_epochs=40, check_val_every_n_epoch=40, inference_mode=False)
    (before,) = trainer.validate(model, images, verbose=False)
    trainer.fit(model, images, images)
    assert float(trainer.callback_metrics["val_reconstruction"]) < 0.5 * before["val_reconstruction"]


def test_validation_measures_the_averaged_network_on_the_means(fit: tuple[VAETraining, pl.Trainer, Path]) -> None:
    model, trainer, _ = fit
    metrics = trainer.callback_metrics
    again = model.reconstruct(IMAGES)
    assert not again.requires_grad
    assert model.network.training
    naive = [10 * torch.log10(1 / (a - b).square().mean()) for a, b in zip(again, IMAGES, strict=True)]
    assert float(metrics["val_psnr"]) == pytest.approx(float(torch.stack(naive).mean()), rel=1e-4)
    x: Tensor = model.ema_network(2 * IMAGES - 1).detach()
    assert float(metrics["val_reconstruction"]) == pytest.approx(float((x - 2 * IMAGES + 1).abs().mean()), rel=1e-4)
    expected = metrics["val_reconstruction"] + 1e-6 * metrics["val_kl"] / (3 * 8 * 8)
    assert float(metrics["val_loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_fillers_count_nowhere(fit: tuple[VAETraining, pl.Trainer, Path], tmp_path: Path) -> None:
    class Padded(Squares):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            item = super().__getitem__(i)
            return item if i < 5 else item | {"image": torch.full((3, 8, 8), 0.5), "index": torch.tensor(-1)}

    loaders = [DataLoader(data, batch_size=4) for data in (Padded(), Squares(5))]
    found = [tiny_trainer(tmp_path).validate(fit[0], loader, verbose=False)[0] for loader in loaders]
    assert found[0] == pytest.approx(found[1])


def test_psnr_of_known_errors() -> None:
    target = torch.full((3, 1, 2, 2), 0.5)
    image = target + torch.tensor([0.1, 0.0, 9.0]).view(-1, 1, 1, 1)
    expected = [20.0, 100.0, 6.0206]  # the last one is cut off at 1, so it is 0.5 away
    assert psnr(image, target).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 3}])
def test_latents_are_measured_with_the_weights_that_are_saved(options: dict[str, Any], tmp_path: Path) -> None:
    model, _, checkpoint = fitted(tmp_path, **options)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert bool(state["latents_measured"])
    with torch.no_grad():
        moments = _network(model).encode(2 * IMAGES - 1)
    torch.manual_seed(0)
    noise = torch.randn(4000, 8, 2, 4, 4)
    drawn = (moments[:, :2] + (0.5 * moments[:, 2:]).exp() * noise).transpose(0, 2).flatten(1)
    torch.testing.assert_close(state["latent_mean"], drawn.mean(1), atol=0.02, rtol=0)
    torch.testing.assert_close(state["latent_std"], drawn.std(1), rtol=0.02, atol=0)


def test_only_the_first_images_are_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_training(latent_images=3)
    tiny_trainer(tmp_path).fit(model, squares_loader())
    with torch.no_grad():
        mean = _network(model).encode(2 * IMAGES[:3] - 1)[:, :2]
    torch.testing.assert_close(model.latent_mean, mean.mean((0, 2, 3)))


def test_a_datamodule_that_sweeps_is_asked(tmp_path: Path) -> None:
    from datamodules import GenerationDataModule

    data = GenerationDataModule(batch_size=64, steps_per_epoch=1)
    torch.manual_seed(0)
    model = VAETraining(tiny_autoencoder(1), optimizer=adamw)
    tiny_trainer(tmp_path, limit_val_batches=0).fit(model, datamodule=data)
    images = torch.cat([batch["image"] for batch in data.sweep_dataloader()])
    assert len(images) == data.num_images
    with torch.no_grad():
        mean = _network(model).encode(2 * images - 1)[:, :2]
    torch.testing.assert_close(model.latent_mean, mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_resumed_fit_is_bit_equal(tmp_path: Path) -> None:
    whole, _, _ = fitted(tmp_path / "whole", max_epochs=2)
    _, _, checkpoint = fitted(tmp_path / "part", max_epochs=1)
    torch.manual_seed(1)
    resumed = tiny_training()
    torch.rand(5)
    tiny_trainer(tmp_path, max_epochs=2).fit(
        resumed, squares_loader(), squares_loader(), ckpt_path=str(checkpoint), weights_only=True
    )
    theirs = whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.state_dict().items())


def test_another_architecture_does_not_go_on(fit: tuple[VAETraining, pl.Trainer, Path], tmp_path: Path) -> None:
    other = VAETraining(tiny_autoencoder(1), optimizer=adamw)
    with pytest.raises(ValueError, match=r"autoencoder .*'in_channels': 3.* -> .*'in_channels': 1"):
        tiny_trainer(tmp_path).fit(other, squares_loader(), ckpt_path=str(fit[2]), weights_only=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"reconstruction": "l3"}, "one of l1, mse, got 'l3'"),
        ({"kl_weight": -1.0}, "`kl_weight` >= 0"),
        ({"latent_images": 0}, "`latent_images` to be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_training(**arguments)


def test_batches_without_images_and_data_without_numbers_are_refused(tmp_path: Path) -> None:
    class Endless(IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter([Squares()[i] for i in range(4)])

    with pytest.raises(ValueError, match="use a datamodule whose batches have it"):
        tiny_training().training_step({"index": torch.zeros(2)}, 0)
    with pytest.raises(TypeError, match=r"use GenerationDataModule, or a datamodule with sweep_dataloader\(\)"):
        tiny_trainer(tmp_path, max_steps=1).fit(tiny_training(), DataLoader(Endless(), batch_size=2))


# -------------------------------------------------------------------- its picture


def test_reconstructions_stand_beside_the_originals(tmp_path: Path) -> None:
    model = tiny_training()
    trainer = board_trainer(tmp_path, ReconstructionGrid(num_images=3), max_epochs=1)
    trainer.fit(model, squares_loader(), squares_loader())
    (picture,) = pictures(tmp_path)["val/reconstruction"].values()
    assert picture.shape == (24 + 3 * 132, 3 * 132 + 4, 3)
    again = model.reconstruct(IMAGES[:3])
    for i in range(3):
        top = 24 + i * 132
        # The caption covers the lower left, so one pixel of the upper right is looked at.
        for column, image in enumerate((IMAGES[i], again[i], 4 * (IMAGES[i] - again[i]).abs())):
            expected = (image[:, 1, 6].clamp(0, 1) * 255).round().byte().tolist()
            assert picture[top + 24, 4 + column * 132 + 104].tolist() == pytest.approx(expected, abs=1)


def test_a_module_that_does_not_reconstruct_is_refused(tmp_path: Path) -> None:
    module = HybridSegmentation(Segmenter(), 2, "supervised", optimizer=adamw)
    trainer = board_trainer(tmp_path, ReconstructionGrid(), max_epochs=1)
    with pytest.raises(TypeError, match=r"reconstruct\(image\), got HybridSegmentation"):
        trainer.fit(module, squares_loader(), squares_loader())
