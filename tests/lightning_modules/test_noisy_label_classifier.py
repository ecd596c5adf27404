"""The clean class of a noisy image from wrong labels: toys with known posteriors, checkpoints, what is refused."""

import copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from tiny_nets import Segmenter, squares_loader, tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_modules import (
    EDMProcess,
    HybridSegmentation,
    IdentityTransition,
    LearnedTransition,
    NoisyLabelClassifier,
    SymmetricTransition,
    VPProcess,
)
from lightning_modules.diffusion.evaluation_noise import levels_of_bin, training_bin, training_levels
from lightning_modules.diffusion.transition import TransitionMatrix
from lightning_modules.noisy_posterior import load_noisy_classifier

MEANS = torch.tensor([-0.8, 0.0, 0.8])
PRIOR = torch.tensor([0.5, 0.2, 0.3])
TRUE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.05, 0.25, 0.7]], dtype=torch.float64)
adam = partial(torch.optim.Adam, lr=1e-2)


class Known(TransitionMatrix):
    """A matrix at hand."""

    def __init__(self, matrix: Tensor) -> None:
        self.found = matrix

    def matrix(self, num_classes: int) -> Tensor:
        return self.found


class Points(nn.Module):
    """An MLP over all pixels and the noise level; its classes come late, as NoisyResNet's do."""

    num_classes: int | None = None

    def __init__(self, pixels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.pixels, self.width = pixels, width
        self.body = nn.Sequential(nn.Linear(pixels + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def reset_classes(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.last = nn.Linear(self.width, num_classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.last(self.body(torch.cat([x.flatten(1), t[:, None]], 1)))
        return out


class Batches(Dataset[dict[str, Tensor]]):
    """Whole batches of images, of one pixel or more, whose classes are normal around three means."""

    def __init__(
        self, batches: int, size: int = 512, std: float = 0.25, seed: int = 0, noisy: bool = True, side: int = 1
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batches = []
        for b in range(batches):
            true = torch.multinomial(PRIOR, size, True, generator=generator)
            x = MEANS[true].view(-1, 1, 1, 1) + std * torch.randn(size, 1, side, side, generator=generator)
            given = torch.multinomial(TRUE[true], 1, generator=generator).squeeze(1)
            index = torch.arange(b * size, (b + 1) * size)
            self.batches.append({"image": (x + 1) / 2, "label": given if noisy else true, "index": index})

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.batches[i]


def loader(*args: Any, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Batches(*args, **kwargs), batch_size=None)


def one_batch(batch: dict[str, Tensor]) -> DataLoader[Any]:
    data = Batches(1)
    data.batches = [batch]
    return DataLoader(data, batch_size=None)


class Data(pl.LightningDataModule):
    """Data that knows how its labels became wrong, or says that it does not."""

    num_classes = 3

    def __init__(self, transition: Tensor | None = TRUE, **kwargs: Any) -> None:
        super().__init__()
        self.transition_matrix = transition
        self.kwargs = {"batches": 2, "size": 32} | kwargs

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(**self.kwargs)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(**self.kwargs, seed=1)


def classifier(transition: TransitionMatrix | None = None, **kwargs: Any) -> NoisyLabelClassifier:
    options: dict[str, Any] = {"network": Points(), "optimizer": adam, "ema_decay": 0.95} | kwargs
    return NoisyLabelClassifier(num_classes=3, transition=transition, **options)


def fitted(path: Path, **kwargs: Any) -> tuple[NoisyLabelClassifier, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    model, trainer = classifier(**kwargs), tiny_trainer(path, max_epochs=2)
    trainer.fit(model, datamodule=Data())
    return model, trainer


def exact(x: Tensor, sigma: float, std: float = 0.25) -> Tensor:
    """Bayes' posterior of the clean class of a point in [-1, 1] units."""
    return (PRIOR.log() - (x[:, None] - MEANS) ** 2 / (2 * (std**2 + sigma**2))).softmax(1)


def error(model: NoisyLabelClassifier, sigma: float) -> float:
    """Mean total variation from the exact posterior, over points of the data with noise."""
    image = Batches(1, 2000, seed=7)[0]["image"]
    x = 2 * image - 1 + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    found = model.log_posterior(x, torch.full((len(x),), sigma)).exp()
    return float((found - exact(x.flatten(), sigma)).abs().sum(1).mean() / 2)


# ---------------------------------------------------------------- what is learned


def test_the_posterior_is_that_of_the_clean_classes(tmp_path: Path) -> None:
    """Forward correction recovers it at every noise level; without (T = I) it is far off."""
    errors = {}
    for name, transition in (("corrected", Known(TRUE)), ("plain", IdentityTransition())):
        pl.seed_everything(0, verbose=False)
        model = classifier(transition, optimizer=partial(torch.optim.Adam, lr=0.03))
        tiny_trainer(tmp_path, max_epochs=6).fit(model, loader(24, 2048))
        errors[name] = [error(model, sigma) for sigma in (0.05, 0.3, 1.0)]
    assert max(errors["corrected"]) < 0.06
    assert min(errors["plain"][:2]) > 0.15


@pytest.mark.slow
def test_a_learned_matrix_becomes_the_true_one(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    model = classifier(LearnedTransition(lr_scale=3.0), process=EDMProcess(p_mean=-3.0, p_std=0.5))
    assert float((model.transition - TRUE).abs().max()) > 0.15
    trainer = tiny_trainer(tmp_path, max_epochs=40)
    trainer.fit(model, datamodule=Data(batches=40, size=512, std=0.1))
    torch.testing.assert_close(model.transition, TRUE.float(), atol=0.05, rtol=0)
    assert trainer.callback_metrics["val_transition_error"] < 0.1
    assert 1.5 < trainer.callback_metrics["val_transition_condition"] < 4


@pytest.mark.parametrize("trusted", [None, [True, False, True, False, False]])
def test_the_loss_is_a_naive_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: list[bool] | None) -> None:
    model, _ = fitted(tmp_path)
    batch = Batches(1, 5)[0] | ({} if trusted is None else {"trusted": torch.tensor(trusted)})
    monkeypatch.setattr(model, "log", lambda *_, **__: None)  # there is no trainer's loop
    monkeypatch.setattr(model, "log_dict", lambda *_, **__: None)
    torch.manual_seed(3)
    loss = model.training_step(batch, 0)
    torch.manual_seed(3)
    sigma = model.process.sample_sigma(5)
    x = 2 * batch["image"] - 1
    x = x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x)
    c_in, t = model.process.c_in(sigma), model.process.c_noise(sigma)
    q = model.network(c_in.view(-1, 1, 1, 1) * x, t).softmax(1)
    total = torch.tensor(0.0)
    for b in range(5):
        matrix = torch.eye(3) if trusted is not None and trusted[b] else TRUE
        total = total - torch.stack([q[b, i] * matrix[i, batch["label"][b]] for i in range(3)]).sum().log()
    assert float(loss) == pytest.approx(float(total) / 5, rel=1e-5)


def test_fillers_and_missing_images_leave_the_rest_of_a_batch_in_step() -> None:
    batch = {"label": torch.tensor([2, -1, 0]), "index": torch.tensor([5, -1, 7])}
    found = classifier().checked(batch | {"trusted": torch.tensor([True, False, False])}, needs_image=False)
    assert {name: values.tolist() for name, values in found.items()} == {
        "label": [2, 0], "index": [5, 7], "trusted": [True, False],
    }  # fmt: skip


class _Tells(nn.Module):
    """Logits (t, 2 t, 3 t), and in which mode it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.weight * torch.stack([t, 2 * t, 3 * t], 1)


def test_the_averaged_network_is_asked_in_evaluation_mode_without_gradient() -> None:
    model = classifier(Known(TRUE), network=_Tells()).train()
    assert isinstance(model.network, _Tells)
    with torch.no_grad():
        model.network.weight.fill_(7.0)  # the averaged one is still 1
    found = model.log_posterior(torch.zeros(2, 1, 1, 1), torch.tensor([0.5, 1.0]))
    assert isinstance(model.ema_network, _Tells)
    assert (model.ema_network.modes, model.network.modes) == ([False], [])
    assert not found.requires_grad
    c_noise = torch.tensor([0.5, 1.0]).log() / 4
    torch.testing.assert_close(found, (c_noise[:, None] * torch.tensor([1.0, 2.0, 3.0])).log_softmax(1))


@pytest.mark.parametrize("process", [EDMProcess(), VPProcess()])
def test_bins_hold_equal_shares_of_the_training_levels(process: EDMProcess | VPProcess) -> None:
    levels = training_levels(process)
    drawn = process.sample_sigma(8000, torch.Generator().manual_seed(5))
    shares = torch.bincount(training_bin(levels, drawn, 4), minlength=4) / 8000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)
    index = torch.arange(2000)
    chosen = [levels_of_bin(levels, index, number, 4) for number in range(4)]
    for number, sigma in enumerate(chosen):
        assert torch.bincount(training_bin(levels, sigma, 4), minlength=4)[number] > 1970  # ties at an edge
    # Together they are distributed as in training.
    found, expected = (x.sort().values[[800, 2000, 4000, 6000, 7200]] for x in (torch.cat(chosen), drawn))
    torch.testing.assert_close(found, expected, rtol=0.2, atol=0)


# ---------------------------------------------------------------- memorised labels


def test_the_weights_before_labels_were_memorised_are_used(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    process = EDMProcess(p_mean=-4.0, p_std=0.3)
    model = classifier(Known(TRUE), network=Points(16, width=128), process=process)
    trainer = tiny_trainer(tmp_path, max_epochs=60, check_val_every_n_epoch=2)
    held_out = loader(1, 512, seed=1, side=4, std=1.5)
    trainer.fit(model, loader(1, 48, side=4, std=1.5), held_out)
    last = float(trainer.callback_metrics["val_nll"])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model.ema_network.load_state_dict(model.predictor.state_dict())
    (best,) = trainer.validate(model, held_out, verbose=False)
    assert best["val_nll"] < last - 0.1
    levels = [best[f"val_nll_level_{k}"] for k in range(4)]
    assert sum(levels) / 4 == pytest.approx(best["val_nll"], abs=1e-5)
    # What a diffusion model loads are those.
    network = Points(16, width=128)
    file = str(tmp_path / "last.ckpt")
    found = load_noisy_classifier(network, file, "classifier_from", 3, 4, 1, process.settings())
    torch.testing.assert_close(found, TRUE, atol=1e-7, rtol=0)
    for name, value in network.state_dict().items():
        assert torch.equal(value, model.ema_network.state_dict()[name])


def test_every_buffer_fits_a_device_without_float64() -> None:
    for transition in (Known(TRUE), LearnedTransition(), None):
        tensors = classifier(transition).state_dict().values()
        assert torch.float64 not in {tensor.dtype for tensor in tensors}


def test_early_stopping_and_fixed_noise(tmp_path: Path) -> None:
    model = classifier(Known(TRUE), optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = tiny_trainer(tmp_path, max_epochs=9, callbacks=[EarlyStopping("val_nll", patience=2)])
    trainer.fit(model, datamodule=Data())
    # Nothing is trained, so a second validation finds the same to the last digit, and training stops.
    assert trainer.current_epoch == 3
    assert set(trainer.callback_metrics) >= {"train_nll", "val_nll", "val_accuracy", "train_nll_level_3"}


def test_without_validation_the_last_average_is_used_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = classifier(Known(TRUE))
    with caplog.at_level("INFO"):
        tiny_trainer(tmp_path).fit(model, loader(1, 8))
    assert "memorised labels would go unnoticed" in caplog.text
    assert model.predictor is model.ema_network


def test_tests_compare_with_true_labels(tmp_path: Path) -> None:
    model, trainer = fitted(tmp_path)
    data = Batches(2, 100, std=0.1, noisy=False)
    padded = {name: value.clone() for name, value in data[0].items()}
    padded["index"][50:] = -1
    padded["label"][50:] = 0
    (found,) = trainer.test(model, one_batch(padded), verbose=False)
    image, label = (padded[name][:50] for name in ("image", "label"))
    assert int(model.confusion("test").sum()) == 0
    at_once = model.predict_step({"image": image, "index": padded["index"][:50]}, 0)
    assert found["test_accuracy"] == pytest.approx(float((at_once["label"] == label).float().mean()))
    torch.testing.assert_close(at_once["probabilities"].sum(1), torch.ones(50))
    assert {f"test_accuracy_level_{k}" for k in range(4)} <= set(found)


# ---------------------------------------------------------------- learned T in a fit


def test_resuming_is_bit_equal(tmp_path: Path) -> None:
    def model() -> NoisyLabelClassifier:
        pl.seed_everything(0, verbose=False)
        return classifier(LearnedTransition(lr_scale=2.0, freeze_after=3))

    whole = model()
    tiny_trainer(tmp_path, max_epochs=4).fit(whole, datamodule=Data())
    first, second = model(), model()
    trainer = tiny_trainer(tmp_path, max_epochs=2)
    trainer.fit(first, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(9)
    tiny_trainer(tmp_path, max_epochs=4).fit(second, datamodule=Data(), ckpt_path=tmp_path / "half.ckpt")
    assert not torch.equal(whole.transition, first.transition)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert whole._best["val_nll"] == second._best["val_nll"]
    image = Batches(1, 4)[0]["image"]
    sigma = torch.full((4,), 0.3)
    assert torch.equal(whole.log_posterior(image, sigma), second.log_posterior(image, sigma))


def test_the_matrix_freezes_and_the_network_goes_on(tmp_path: Path) -> None:
    class After(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[Tensor, Tensor]] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert isinstance(pl_module, NoisyLabelClassifier)
            weights = torch.cat([p.detach().flatten() for p in pl_module.network.parameters()])
            self.seen.append((pl_module.current_transition().clone(), weights))

    after = After()
    model = classifier(LearnedTransition(freeze_after=2), optimizer=partial(torch.optim.AdamW, lr=0.01))
    start = model.current_transition().clone()
    tiny_trainer(tmp_path, max_epochs=4, callbacks=[after]).fit(model, datamodule=Data(None))
    matrices = [start, *(t for t, _ in after.seen)]
    moves = [not torch.equal(a, b) for a, b in pairwise(matrices)]
    assert moves == [True, True, False, False]
    assert all(not torch.equal(a[1], b[1]) for a, b in pairwise(after.seen))


def test_the_optimiser_has_the_matrix_with_its_own_rate(tmp_path: Path) -> None:
    model = classifier(
        LearnedTransition(lr_scale=5.0),
        optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        lr_scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (1 + n)),
    )
    trainer = tiny_trainer(tmp_path)
    trainer.fit(model, datamodule=Data())
    network, matrix = trainer.optimizers[0].param_groups
    assert model.learned is not None
    assert [p is model.learned.raw for p in matrix["params"]] == [True]
    assert (network["weight_decay"], matrix["weight_decay"]) == (0.1, 0.0)
    assert matrix["lr"] == pytest.approx(5 * network["lr"])
    assert network["lr"] == pytest.approx(0.01 / 3)


def test_two_processes_train_one_matrix(tmp_path: Path) -> None:
    model = classifier(LearnedTransition(freeze_after=1))
    keeps = ModelCheckpoint(tmp_path, save_last=True)
    options = {"devices": 2, "strategy": "ddp_fork", "enable_checkpointing": True, "callbacks": [keeps]}
    trainer = tiny_trainer(tmp_path, max_epochs=2, **options)
    trainer.fit(model, datamodule=Data(batches=4))
    found = load_noisy_classifier(
        Points(), str(tmp_path / "last.ckpt"), "classifier_from", 3, 1, 1, EDMProcess().settings()
    )
    assert float((found - classifier(LearnedTransition()).transition).abs().max()) > 1e-4


# ---------------------------------------------------------------- what is refused


def test_where_the_matrix_comes_from(tmp_path: Path) -> None:
    model = classifier()
    assert bool(model.current_transition().isnan().all())
    with pytest.raises(ValueError, match="Expected a `transition` to validate with"):
        tiny_trainer(tmp_path).validate(model, loader(1, 8), verbose=False)
    for data in (Data(None), None):
        with pytest.raises(ValueError, match=r"the datamodule knows none: .* LearnedTransition"):
            tiny_trainer(tmp_path).fit(model, None if data else loader(1, 8), datamodule=data)
    tiny_trainer(tmp_path).fit(model, datamodule=Data())
    assert torch.equal(model.current_transition(), TRUE.float())
    singular = SymmetricTransition(2 / 3).matrix(3)
    with pytest.raises(ValueError, match="invertible `transition_matrix`"):
        tiny_trainer(tmp_path).fit(classifier(), datamodule=Data(singular))
    with pytest.raises(ValueError, match="invertible `transition`"):
        classifier(Known(singular))
    with pytest.raises(ValueError, match=r"`transition` to be a matrix of 3 x 3 .* got shape \(4, 4\)"):
        classifier(Known(torch.eye(4)))


def test_bad_arguments_and_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_classes` >= 2"):
        NoisyLabelClassifier(Points(), 1)
    with pytest.raises(ValueError, match="`num_level_bins` >= 1"):
        classifier(num_level_bins=0)
    model = NoisyLabelClassifier(Points(), 4, transition=SymmetricTransition(0.4), optimizer=adam)
    with pytest.raises(ValueError, match="got 4 for the module and 3 from the datamodule"):
        tiny_trainer(tmp_path).fit(model, datamodule=Data())
    model = classifier(Known(TRUE))
    good = Batches(1, 4)[0]
    model.checked(good)
    for changes, message in (
        ({"label": torch.tensor([0, 1, 2, 3])}, r"labels from 0 to 2 .* got 3"),
        ({"label": torch.tensor([0, 1, -1, 2])}, r"labels from 0 to 2 .* got -1"),
        ({"image": torch.rand(4, 1, 2, 2)}, r"square images of 1 pixels with 1 channels, as before, got \[1, 2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.checked(good | changes)
    with pytest.raises(ValueError, match=r"dicts with image and label, got \['index', 'label'\]"):
        model.checked({"label": good["label"], "index": good["index"]})
    broken = good | {"image": good["image"] * torch.nan}
    with pytest.raises(FloatingPointError, match="train_nll = nan"):
        tiny_trainer(tmp_path).fit(model, one_batch(broken))
    with pytest.raises(ValueError, match=r"logits \[1, 3\] for `num_classes` = 3, got \[1, 1, 1, 1\]"):
        classifier(Known(TRUE), network=_Passes()).log_posterior(torch.zeros(1, 1, 1, 1), torch.ones(1))


class _Passes(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    _, trainer = fitted(tmp_path)
    file = str(tmp_path / "c.ckpt")
    trainer.save_checkpoint(file)
    settings = EDMProcess().settings()

    def load(network: nn.Module, **changes: Any) -> Tensor:
        fits: dict[str, Any] = {"num_classes": 3, "image_size": 1, "image_channels": 1, "process_settings": settings}
        return load_noisy_classifier(network, file, "classifier_from", **fits | changes)

    torch.testing.assert_close(load(Points()), TRUE, atol=1e-7, rtol=0)
    assert torch.equal(load(Points(), image_size=None, image_channels=None), load(Points()))
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_classes": 4}, "trained with num_classes 3, not 4; fit one"),
        ({"image_size": 32}, "trained with image_size 1, not 32"),
        ({"process_settings": VPProcess().settings()}, r"trained with process \{'class': 'EDMProcess'"),
    )
    for changes, message in cases:
        with pytest.raises(ValueError, match=f"`classifier_from` to be a classifier of the same .*{message}"):
            load(Points(), **changes)
    with pytest.raises(ValueError, match=r"`classifier_from` to hold the same module, but \d+ tensors differ"):
        load(Points(width=8))
    other = HybridSegmentation(Segmenter(), 2, objective="supervised", optimizer=adam)
    trainer = tiny_trainer(tmp_path)
    trainer.fit(other, squares_loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint of a NoisyLabelClassifier, but .* is of another module"):
        load_noisy_classifier(Points(), str(tmp_path / "other.ckpt"), "classifier_from", 3, 1, 1, settings)
    changed = copy.deepcopy(TRUE)
    changed[0] = torch.tensor([0.8, 0.1, 0.1])
    with pytest.raises(ValueError, match=r"trained with this `transition`, but entries differ by up to 0\.1"):
        tiny_trainer(tmp_path).fit(classifier(), datamodule=Data(changed), ckpt_path=file)
    with pytest.raises(ValueError, match="transition known -> learned"):
        tiny_trainer(tmp_path).fit(classifier(LearnedTransition()), datamodule=Data(), ckpt_path=file)
