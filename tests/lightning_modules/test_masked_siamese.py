"""MaskedSiamese: its loss and schedules, what is averaged, how it goes on, and on two processes."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny_nets import tiny_trainer
from torch import Tensor

from datamodules import DigitsSource, MultiCrop, SemiSupervisedDataModule
from lightning_modules import MaskedSiamese, ViTEncoder, WarmUpCosine
from lightning_modules.networks.prototypes import sinkhorn
from lightning_modules.networks.vit_encoder import SiameseNetwork, load_encoder


def _encoder() -> ViTEncoder:
    return ViTEncoder(image_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2, in_channels=1)


def _module(**changes: Any) -> MaskedSiamese:
    torch.manual_seed(0)
    options: dict[str, Any] = {"head_width": 16, "head_dim": 8, "num_prototypes": 12, "focal_views": 2}
    return MaskedSiamese(_encoder(), **options | {"optimizer": partial(torch.optim.AdamW, lr=2e-3)} | changes)


def _data(**changes: Any) -> SemiSupervisedDataModule:
    crops = MultiCrop(focal_size=6, flip=False, blur_radius=0.5)
    options: dict[str, Any] = {"batch_size": 16, "unlabeled_ratio": 1, "steps_per_epoch": 4, "crops": crops}
    return SemiSupervisedDataModule(DigitsSource(), **options | changes)


def _trained(
    path: Path, module: MaskedSiamese, ckpt_path: str | None = None, seed: int = 5, **options: Any
) -> pl.Trainer:
    options = {"limit_val_batches": 0, "max_epochs": 2} | options
    trainer = tiny_trainer(path, **options)
    torch.manual_seed(seed)
    trainer.fit(module, datamodule=_data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.fixture
def unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module without a trainer has nowhere to log to, and one process."""
    monkeypatch.setattr(MaskedSiamese, "log", lambda *_, **__: None)
    monkeypatch.setattr(MaskedSiamese, "log_dict", lambda *_, **__: None)
    monkeypatch.setattr(MaskedSiamese, "trainer", type("One", (), {"world_size": 1})())


def _views(count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sides = {"random": 8, "random_2": 8, "focal": 6, **{f"focal_{n}": 6 for n in range(2, count + 1)}}
    return {name: torch.rand(5, 1, side, side, generator=generator) for name, side in sides.items()}


@pytest.mark.usefixtures("unlogged")
def test_the_loss_written_out_pair_by_pair() -> None:
    module, views = _module(patch_drop=0.0, me_max_weight=0.7), _views()
    loss = module.training_step({"unlabeled": views}, 0)
    network, target = module.network, module.target
    assert isinstance(network, SiameseNetwork)
    assert isinstance(target, SiameseNetwork)
    anchors = [views["random_2"], views["focal"], views["focal_2"]]
    tokens = torch.cat([network.encoder.norm(network.encoder(view)) for view in anchors])
    p = module.prototypes(network.head(tokens)).exp()
    targets = module.prototypes(target.head(target.encoder.norm(target.encoder(views["random"])))).exp()
    targets = sinkhorn(targets**4 / (targets**4).sum(1, keepdim=True), 3)
    pairs = [-(targets[i] * p[5 * v + i].log()).sum() for v in range(3) for i in range(5)]
    mean = p.mean(0)
    gap = math.log(12) + (mean * mean.log()).sum()
    torch.testing.assert_close(loss, torch.stack(pairs).mean() + 0.7 * gap)


@pytest.mark.usefixtures("unlogged")
def test_patches_are_dropped_from_random_anchors_only() -> None:
    module = _module(patch_drop=0.5)
    counts: list[int] = []

    def remember(_: object, inputs: tuple[Tensor]) -> None:
        counts.append(inputs[0].shape[1])

    for network in (module.network, module.target):
        assert isinstance(network, SiameseNetwork)
        network.encoder.blocks[0].register_forward_pre_hook(remember)
    module.training_step({"unlabeled": _views()}, 0)
    assert counts == [1 + 8, 1 + 9, 1 + 16]  # random anchor, focal anchors, target


@pytest.mark.usefixtures("unlogged")
def test_the_target_gets_no_gradient_and_its_norms_take_the_batchs_statistics() -> None:
    module = _module()
    module.eval()
    before = {name: value.clone() for name, value in module.target.named_buffers()}
    module.training_step({"unlabeled": _views()}, 0).backward()  # type: ignore[no-untyped-call] # torch's
    assert all(parameter.grad is None for parameter in module.target.parameters())
    moved = [name for name, value in module.target.named_buffers() if not torch.equal(value, before[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"running_mean", "running_var", "num_batches_tracked"}
    assert module.prototypes.weight.grad is not None


def test_the_momentum_and_the_weight_decay_over_a_fit() -> None:
    module = _module()
    module._num_steps = 1000
    assert module.momentum_at(0) == pytest.approx(0.996)
    assert module.momentum_at(1000) == pytest.approx(0.9992)
    assert module.momentum_at(1250) == pytest.approx(1)
    assert module.weight_decay_at(0) == pytest.approx(0.04)
    assert module.weight_decay_at(625) == pytest.approx(0.22)
    assert module.weight_decay_at(1000) == pytest.approx(0.4 - 0.36 * (1 + math.cos(0.8 * math.pi)) / 2)


def test_parameters_are_averaged_and_buffers_are_not() -> None:
    module = _module(momentum=0.5)
    module._num_steps = 8
    assert module.ema is not None
    expected = {name: value.clone() for name, value in module.target.named_parameters()}
    before = {name: value.clone() for name, value in module.target.named_buffers()}
    for momentum in (0.5, 0.55, 0.6):
        with torch.no_grad():
            for parameter in module.network.parameters():
                parameter.add_(torch.randn_like(parameter))
            for value in module.network.buffers():
                value.add_(1)
        for name, value in module.network.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * value.detach()
        module.update_ema()
    for name, value in module.target.named_parameters():
        torch.testing.assert_close(value, expected[name])
    assert all(torch.equal(value, before[name]) for name, value in module.target.named_buffers())


def test_weight_decay_is_for_matrices_of_the_network(tmp_path: Path) -> None:
    module = _module(weight_decay=(0.1, 0.5))
    trainer = _trained(tmp_path, module, max_steps=3)
    decayed, others = trainer.optimizers[0].param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert "prototypes.weight" in {names[id(parameter)] for parameter in others["params"]}
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(p.ndim <= 1 or p is module.prototypes.weight for p in others["params"])
    assert len(names) - len(list(module.target.parameters())) == len(decayed["params"]) + len(others["params"])
    assert others["weight_decay"] == 0
    assert decayed["weight_decay"] == pytest.approx(module.weight_decay_at(2))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_networks_gradient_is_clipped_and_the_prototypes_is_not(algorithm: str) -> None:
    module = _module()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    module.configure_gradient_clipping(torch.optim.SGD(module.parameters()), 3.0, algorithm)
    gradients = [p.grad for p in module.network.parameters() if p.grad is not None]
    if algorithm == "norm":
        assert float(torch.stack([g.norm() for g in gradients]).norm()) == pytest.approx(3, rel=1e-4)
    else:
        assert {float(g.max()) for g in gradients} == {3.0}
    assert module.prototypes.weight.grad is not None
    assert bool((module.prototypes.weight.grad == 10).all())


def test_the_learning_rate_warms_up_and_stops_early_on_its_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = WarmUpCosine(optimizer, num_steps=100, warmup_steps=10)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2e-4)
    assert rates[5] == pytest.approx(6e-4)
    assert rates[10] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(1e-6 + 0.999e-3 * 0.5 * (1 + math.cos(math.pi * 90 / 115)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 5, "warmup_steps": 5}, "`warmup_steps` from 0 to below"),
        ({"num_steps": 5, "start": 2.0}, r"`start` in \[0, 1\]"),
        ({"num_steps": 5, "stretch": 0.5}, "`stretch` >= 1"),
    ],
)
def test_impossible_schedules(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmUpCosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), **arguments)


class _Losses(pl.Callback):
    """Keeps the losses of a fit."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.seen.append(float(trainer.callback_metrics["train_loss"]))


def test_a_fit_learns_uses_many_prototypes_and_is_read_as_an_encoder(tmp_path: Path) -> None:
    module, losses = _module(optimizer=partial(torch.optim.AdamW, lr=1e-2)), _Losses()
    trainer = _trained(tmp_path, module, max_epochs=5, callbacks=[losses])
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert sum(losses.seen[-4:]) < 0.9 * sum(losses.seen[:4])
    assert metrics["train_prototypes_used"] >= 6
    assert 0 <= metrics["train_me_max"] < 0.5 * math.log(12)
    assert 0 < metrics["train_target_entropy"] < metrics["train_entropy"] <= math.log(12)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    encoder = _encoder().eval()
    load_encoder(encoder, tmp_path / "last.ckpt")
    image = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(encoder(image), module(image), rtol=0, atol=0)


def _collapsed(network: SiameseNetwork) -> None:
    """Everything gets the same embedding: the last layer's bias."""
    last = network.head[6]
    torch.nn.init.zeros_(last.weight)  # type: ignore[arg-type]


def test_a_collapse_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(MaskedSiamese, "say", lambda _, message: said.append(message))
    module = _module(optimizer=partial(torch.optim.SGD, lr=0.0))
    for network in (module.network, module.target):
        assert isinstance(network, SiameseNetwork)
        _collapsed(network)
    trainer = _trained(tmp_path, module, max_epochs=1)
    assert float(trainer.callback_metrics["train_prototypes_used"]) == 1
    assert float(trainer.callback_metrics["train_me_max"]) > 0.05
    assert any("nearest to one prototype" in message for message in said)
    said.clear()
    _trained(tmp_path, _module(), max_epochs=1)
    assert said == []


def test_a_fit_gone_on_with_is_bit_equal(tmp_path: Path) -> None:
    schedule = partial(WarmUpCosine, num_steps=8, warmup_steps=2)
    straight, second = (_module(lr_scheduler=schedule) for _ in range(2))
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    _trained(tmp_path, straight, enable_checkpointing=True, callbacks=[keep])
    torch.nn.init.zeros_(second.prototypes.weight)
    assert _trained(tmp_path, second, str(tmp_path / "epoch=0.ckpt"), seed=99).global_step == 8
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def _without_chance(path: Path, batch_size: int, **options: Any) -> tuple[MaskedSiamese, pl.Trainer]:
    """Two steps whose views are the whole images, without BatchNorm: what is left depends on the whole batch."""
    module = _module(patch_drop=0.0, sharpening=0.5, optimizer=partial(torch.optim.SGD, lr=0.5))
    for network in (module.network, module.target):
        assert isinstance(network, SiameseNetwork)
        network.head[1] = network.head[4] = torch.nn.Identity()
    crops = MultiCrop(6, None, (1.0, 1.0), (1.0, 1.0), flip=False, jitter=0, grey=0, blur=0)
    options = {"limit_val_batches": 0, "max_epochs": 1, "limit_train_batches": 2} | options
    trainer = tiny_trainer(path, **options)
    torch.manual_seed(5)
    trainer.fit(module, datamodule=_data(batch_size=batch_size, crops=crops))
    return module, trainer


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_their_batches_together(tmp_path: Path) -> None:
    one, alone = _without_chance(tmp_path / "one", 16)
    two, both = _without_chance(tmp_path / "two", 8, devices=2, strategy="ddp_fork")
    start = _module(patch_drop=0.0).network.state_dict()
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(two.network.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    moved = one.network.state_dict()["encoder.cls_token"] - start["encoder.cls_token"]
    assert moved.abs().max() > 1e-3
    used = [float(trainer.callback_metrics["train_prototypes_used"]) for trainer in (alone, both)]
    assert used[0] == used[1] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_drop": 1.0}, r"`patch_drop` in \[0, 1\), got 1.0"),
        ({"momentum": 1.5}, r"`momentum` in \[0, 1\), got 1.5"),
        ({"sharpening": 0.0}, r"`sharpening` in \(0, 1\], got 0.0"),
        ({"random_views": 0, "focal_views": 0}, "not both 0, got 0, 0"),
        ({"sinkhorn_iterations": -1}, "`sinkhorn_iterations`, .* >= 0"),
        ({"stretch": 0.5}, "`stretch` >= 1"),
        ({"num_prototypes": 1}, "`num_prototypes` >= 2"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _module(**arguments)


def test_data_without_the_views(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`unlabeled` to name views out of .*got 'random'.*`crops`"):
        tiny_trainer(tmp_path).fit(_module(), datamodule=_data(crops=None))
    with pytest.raises(
        ValueError, match=r"random, random_2, focal, focal_2 under `unlabeled`, got focal, random; .*random_2, f"
    ):
        _module()._views_of({"unlabeled": {"random": torch.rand(1), "focal": torch.rand(1)}})
    with pytest.raises(ValueError, match="Expected an `optimizer` for fit"):
        _module(optimizer=None).configure_optimizers()
    with pytest.raises(ValueError, match=r"`trainer.max_steps` or `trainer.max_epochs`, got neither"):
        _trained(tmp_path, _module(), max_epochs=-1)
