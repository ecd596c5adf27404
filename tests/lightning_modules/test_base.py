from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from segmentation_models_pytorch import Unet
from tiny_nets import PointNet, Segmenter, adamw, squares_loader, tiny_trainer, tiny_unet
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from callbacks import StageTransition
from lightning_modules import HybridSegmentation


def _fit(model: pl.LightningModule, path: Path, **kwargs: Any) -> pl.Trainer:
    trainer = tiny_trainer(path, **{"max_epochs": 2} | kwargs)
    trainer.fit(model, squares_loader(), squares_loader())
    return trainer


def _segmenter(network: nn.Module, **kwargs: Any) -> HybridSegmentation:
    return HybridSegmentation(network, 2, objective="supervised", **{"optimizer": adamw} | kwargs)


def _network(module: pl.LightningModule) -> nn.Module:
    assert isinstance(module.network, nn.Module)
    return module.network


class _History(pl.Callback):
    """The trained weights after every optimiser step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in _network(pl_module).parameters()]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_a_naive_loop_over_the_optimiser_steps(accumulate: int, tmp_path: Path) -> None:
    history = _History()
    model = _segmenter(Segmenter(), ema_decay=0.5)
    _fit(model, tmp_path, max_epochs=8, callbacks=[history], accumulate_grad_batches=accumulate)
    steps = history.weights[accumulate - 1 :: accumulate]
    assert len(steps) == 16 // accumulate
    expected = steps[0]
    for n, weights in enumerate(steps[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights
    averaged = torch.cat([p.flatten() for p in model.ema_network.parameters()])
    torch.testing.assert_close(averaged, expected)


def test_the_average_copies_batch_norm_statistics_and_is_not_trained(tmp_path: Path) -> None:
    model = _segmenter(Segmenter())
    trainer = _fit(model, tmp_path)
    for own, averaged in zip(model.network.buffers(), model.ema_network.buffers(), strict=True):
        assert torch.equal(own, averaged)
    assert all(p.grad is None and not p.requires_grad for p in model.ema_network.parameters())
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.network.parameters()}


def test_decay_zero_trains_without_an_average(tmp_path: Path) -> None:
    model = _segmenter(Segmenter(), ema_decay=0.0)
    _fit(model, tmp_path)
    assert model.ema_network is model.network
    assert not any(name.startswith("ema.") for name in model.state_dict())


def test_randomness_is_a_function_of_the_batch_number(tmp_path: Path) -> None:
    """Whatever else draws random numbers between the batches changes nothing."""

    class Disturb(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.rand(7)

    ends = []
    for callbacks in ([], [Disturb()]):
        pl.seed_everything(5)
        model = HybridSegmentation(tiny_unet(dropout=0.3), 2, optimizer=adamw)
        _fit(model, tmp_path, callbacks=callbacks)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    pl.seed_everything(6)
    other = HybridSegmentation(tiny_unet(dropout=0.3), 2, optimizer=adamw)
    _fit(other, tmp_path)
    assert not torch.equal(other.state_dict()["network.unet.conv_in.weight"], ends[0]["network.unet.conv_in.weight"])


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_unet(),
        lambda: Segmenter(),
        lambda: Unet("resnet18", encoder_weights=None, classes=2, decoder_channels=(16, 16, 8, 8, 8)),
    ],
)
def test_trunk_and_head_share_all_parameters_and_have_their_own_learning_rates(
    build: Callable[[], nn.Module],
) -> None:
    model = _segmenter(build(), trunk_lr_scale=0.1)
    optimizer: Any = model.configure_optimizers()
    trunk, head = optimizer.param_groups
    assert (trunk["lr"], head["lr"]) == pytest.approx((1e-4, 1e-3))
    ids = [id(p) for p in (*trunk["params"], *head["params"])]
    assert sorted(ids) == sorted(id(p) for p in model.network.parameters())
    assert trunk["params"][0] is next(iter(model.trunk_parameters()))
    assert sum(p.numel() for p in head["params"]) < sum(p.numel() for p in trunk["params"])


def test_a_network_without_a_known_head_cannot_have_two_learning_rates() -> None:
    model = HybridSegmentation(PointNet(3, 5), 2, optimizer=adamw, trunk_lr_scale=0.1)
    with pytest.raises(TypeError, match=r"trunk_parameters.* got PointNet; add the two methods"):
        model.configure_optimizers()


def test_a_schedule_that_overrides_the_trunks_learning_rate_is_refused() -> None:
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=10)
    with pytest.raises(ValueError, match=r"keeps `trunk_lr_scale` 0.1, but OneCycleLR sets one rate for all"):
        _segmenter(tiny_unet(), trunk_lr_scale=0.1, lr_scheduler=one_cycle).configure_optimizers()
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=[1e-4, 1e-3], total_steps=10)
    _segmenter(tiny_unet(), trunk_lr_scale=0.1, lr_scheduler=one_cycle).configure_optimizers()


def test_schedules_step_with_the_optimiser_and_plateaus_with_the_epoch(tmp_path: Path) -> None:
    model = _segmenter(Segmenter(), lr_scheduler=partial(LambdaLR, lr_lambda=lambda step: 0.5**step))
    trainer = _fit(model, tmp_path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**4)
    model = _segmenter(Segmenter(), lr_scheduler=partial(ReduceLROnPlateau, patience=0, threshold=1e9))
    trainer = _fit(model, tmp_path, max_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**3)


def test_fit_without_an_optimizer_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected an `optimizer` for fit, got None; give model.init_args.optimizer"):
        _fit(_segmenter(Segmenter(), optimizer=None), tmp_path)


def test_models_of_segmentation_models_pytorch_train_as_they_are(tmp_path: Path) -> None:
    network = Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=2)
    model = _segmenter(network, mask_loss="dice_ce")
    trainer = _fit(model, tmp_path, max_epochs=1)
    assert 0 <= trainer.callback_metrics["val_jaccard"] <= 1
    assert model.segment(torch.rand(2, 3, 8, 8)).shape == (2, 2, 8, 8)


def test_stage_transition_freezes_the_trunk_of_a_module(tmp_path: Path) -> None:
    model = HybridSegmentation(tiny_unet(), 2, optimizer=adamw)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    _fit(model, tmp_path, max_epochs=1, callbacks=[StageTransition(unfreeze_at_epoch=1)])
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"unet.conv_out.weight", "unet.conv_out.bias"}
