"""Rounds of one client are one fit, to the last bit; they say nothing, write nothing and draw no one's numbers."""

import copy
import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from ssl_toys import ToyNet
from tdsm_toys import ClassPoint
from tiny_nets import tiny_trainer
from torch.optim.lr_scheduler import ExponentialLR

from datamodules import ArraySource, GenerationDataModule, SemiSupervisedDataModule
from federated.local_fit import Epochs, fit, make_trainer
from federated.weights import load_network_state, network_state
from lightning_modules import SSLClassifier, TDSMDiffusion
from lightning_modules.diffusion.transition import SymmetricTransition
from lightning_modules.ssl.pi_model import PiModel
from lightning_modules.ssl.schedules import CosineDecay
from lightning_modules.ssl.supervised import Supervised

SIDE = 6
SEED = 5
CPU = {"accelerator": "cpu"}
Parts: TypeAlias = tuple[pl.LightningModule, pl.LightningDataModule]


def source() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (23, SIDE, SIDE), dtype=np.uint8)
    labels = np.where(np.arange(23) < 13, np.arange(23) % 3, -1)
    return ArraySource(images, labels, class_names=["a", "b", "c"])


def classifier(decay: float = 0.9, **options: Any) -> Parts:
    """BatchNorm, a schedule that is a function of the step, weight decay and a moving average."""
    sgd = partial(torch.optim.SGD, lr=0.1, weight_decay=1e-2)
    cosine = partial(CosineDecay, num_steps=18, warmup_steps=4)
    net, data = ToyNet(SIDE**2, 3, 8), SemiSupervisedDataModule(source(), batch_size=5, steps_per_epoch=3, seed=1)
    arguments = {"method": Supervised(), "lr_scheduler": cosine, **options}
    return SSLClassifier(net, num_classes=3, optimizer=sgd, ema_decay=decay, **arguments), data


def ramped() -> Parts:
    """A weight that grows over the whole fit, and a schedule that multiplies step by step."""
    return classifier(method=PiModel(), lr_scheduler=partial(ExponentialLR, gamma=0.93))


def generator() -> Parts:
    """Noise, label dropout and other classes are drawn in every step."""
    sgd = partial(torch.optim.SGD, lr=0.05)
    net = ClassPoint(1, SIDE, 16, dropout=0.2)
    drawn: dict[str, Any] = {"weighting": "reverse", "transition": SymmetricTransition(0.3), "others": "sampled"}
    module = TDSMDiffusion(
        net, 3, label_dropout=0.3, optimizer=sgd, lr_scheduler=partial(CosineDecay, num_steps=18), **drawn
    )
    return module, GenerationDataModule(source(), batch_size=4, shift=1, seed=2)


def built(parts: Callable[[], Parts]) -> Parts:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return parts()


@pytest.mark.parametrize(
    ("parts", "options"),
    [(classifier, {"accumulate_grad_batches": 2}), (ramped, {}), (generator, {"gradient_clip_val": 0.5})],
)
def test_rounds_of_one_client_are_one_fit(tmp_path: Path, parts: Callable[[], Parts], options: dict[str, Any]) -> None:
    plain, data = built(parts)
    first = network_state(plain)
    whole = tiny_trainer(tmp_path, max_epochs=6, limit_val_batches=0, **options)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        whole.fit(plain, datamodule=data)
    wanted = network_state(plain)

    pristine, data = built(parts)
    weights, steps = first, 0
    for number in range(3):
        module = copy.deepcopy(pristine)
        load_network_state(module, weights)
        found = fit(module, data, Epochs(2 * number, 2, 6), SEED, {**CPU, **options})
        weights, steps = network_state(module), steps + found.steps
    assert steps == whole.fit_loop.epoch_loop.total_batch_idx + 1
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())
    assert not any(torch.equal(weights[name], value) for name, value in first.items() if value.is_floating_point())


def test_where_a_round_begins_matters() -> None:
    # Else the test above would hold for rounds that all begin at 0.
    ends = []
    for first in (0, 2):
        module, data = built(classifier)
        fit(module, data, Epochs(first, 2, 6), SEED, CPU)
        ends.append(network_state(module))
    assert not torch.equal(ends[0]["head.weight"], ends[1]["head.weight"])


def test_the_loss_is_the_mean_over_the_batches() -> None:
    module, data = built(partial(classifier, lr_scheduler=partial(ExponentialLR, gamma=0.0)))
    losses = []

    class Watched(SSLClassifier):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            found = super().training_step(batch, batch_idx)
            losses.append(float(found["loss"].detach()))
            return found

    module.__class__ = Watched
    found = fit(module, data, Epochs(1, 2, 3), SEED, CPU)
    assert (found.steps, len(losses)) == (6, 6)
    assert found.loss == pytest.approx(float(np.mean(losses)))


def test_nothing_is_said_written_or_drawn(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    module, data = built(classifier)
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002 - that it is left alone
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(module, data, Epochs(2, 1, 3), SEED, CPU)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]  # noqa: NPY002


@pytest.mark.parametrize("option", ["max_epochs", "logger", "callbacks"])
def test_what_a_run_decides_is_no_option(option: str) -> None:
    with pytest.raises(ValueError, match=f"without {option}, which a federated run decides"):
        make_trainer({option: None, **CPU})


@pytest.mark.parametrize("epochs", [(-1, 1, 3), (0, 0, 3), (2, 2, 3)])
def test_epochs_are_some_of_the_whole(epochs: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="Expected epochs of a fit of 3"):
        Epochs(*epochs)
