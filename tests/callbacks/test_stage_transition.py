"""A trunk that is frozen for some epochs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import StageTransition


class TwoParts(pl.LightningModule):
    """Trunk and head, each with a normalisation without parameters; AdamW with weight decay."""

    def __init__(self, trunk: Literal["some", "none", "all"] = "some") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1))
        self.which = trunk
        self.seen: list[dict[str, Tensor]] = []

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        if self.which == "some":
            yield from self.trunk.parameters()
        elif self.which == "all":
            yield from self.parameters()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.head(self.trunk(batch[0])).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.head(self.trunk(batch[0])).square().mean())

    def on_train_epoch_end(self) -> None:
        self.seen.append({name: value.detach().clone() for name, value in self.state_dict().items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(12, 3, generator=torch.Generator().manual_seed(1))), batch_size=4)


def fit(
    folder: Path,
    unfreeze_at_epoch: int,
    epochs: int,
    ckpt_path: str | None = None,
    module: pl.LightningModule | None = None,
    at_validation: bool = False,
) -> TwoParts:
    module = module or TwoParts()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        val_check_interval=1,  # after every batch: validation must not thaw the running statistics
        callbacks=[
            ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=not at_validation),
            StageTransition(unfreeze_at_epoch),
        ],
    )
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    assert isinstance(module, TwoParts) or ckpt_path is None
    return module if isinstance(module, TwoParts) else TwoParts()


def test_frozen_bit_equal_then_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = TwoParts().state_dict()
    with caplog.at_level("INFO"):
        after = fit(tmp_path, unfreeze_at_epoch=2, epochs=3).seen
    trunk = [name for name in start if name.startswith("trunk.")]
    assert {"trunk.1.running_mean", "trunk.2.running_mean", "trunk.1.num_batches_tracked"} <= set(trunk)
    for name in trunk:
        assert torch.equal(after[0][name], start[name])
        assert torch.equal(after[1][name], start[name])
        assert not torch.equal(after[2][name], start[name])
    for name in start:
        if name.startswith("head."):
            assert not torch.equal(after[0][name], start[name])
    assert caplog.text.count("trunk (24 parameters) frozen until epoch 2") == 1
    assert caplog.text.count("trunk trainable from epoch 2") == 1


def test_zero_epochs_is_no_freezing(tmp_path: Path) -> None:
    start = TwoParts().state_dict()
    after = fit(tmp_path, unfreeze_at_epoch=0, epochs=1).seen
    assert not torch.equal(after[0]["trunk.0.weight"], start["trunk.0.weight"])


@pytest.mark.parametrize("at_validation", [False, True])
@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_going_on_equals_going_through(tmp_path: Path, killed_after: int, at_validation: bool) -> None:
    straight = fit(tmp_path / "a", 2, 4, at_validation=at_validation).seen
    checkpoint = max((tmp_path / "a").glob(f"epoch={killed_after}*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    resumed = fit(tmp_path / "b", 2, 4, ckpt_path=str(checkpoint)).seen
    for name, value in straight[-1].items():
        assert torch.equal(resumed[-1][name], value), name


def test_the_phase_is_kept_and_never_goes_back() -> None:
    transition = StageTransition(5)
    assert transition.state_dict() == {"phase": "frozen"}
    transition.load_state_dict({"phase": "trainable"})
    transition._advance(0)
    assert transition.state_dict() == {"phase": "trainable"}


def test_the_optimiser_meets_no_gradient_of_the_trunk(tmp_path: Path) -> None:
    class Watching(TwoParts):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            assert all(p.grad is None for p in self.trunk.parameters())
            assert all(p.grad is not None for p in self.head.parameters())
            assert all(p.requires_grad for p in self.parameters())

    fit(tmp_path, unfreeze_at_epoch=1, epochs=1, module=Watching())


def test_wrong_settings(tmp_path: Path) -> None:
    class NoTrunk(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: list[Tensor]) -> None:
            return None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1)

    with pytest.raises(ValueError, match="`unfreeze_at_epoch` to be 0 or more, got -1"):
        StageTransition(-1)
    with pytest.raises(TypeError, match=r"method `trunk_parameters\(\)`, got NoTrunk"):
        fit(tmp_path, 1, 1, module=NoTrunk())
    with pytest.raises(ValueError, match="got nothing; yield the pretrained part"):
        fit(tmp_path, 1, 1, module=TwoParts("none"))
    with pytest.raises(ValueError, match="got every trainable parameter"):
        fit(tmp_path, 1, 1, module=TwoParts("all"))
