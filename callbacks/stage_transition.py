"""Phases inside one fit: a trunk that is frozen at first and trainable afterwards."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

Phase = Literal["frozen", "trainable"]


@runtime_checkable
class HasTrunk(Protocol):
    """A module that says which of its parameters are the pretrained trunk."""

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to freeze at first; the others are the head."""
        ...


class StageTransition(pl.Callback):
    """Keeps the trunk of a network as it was loaded for some epochs, then lets it train.

    While frozen, the gradients of the trunk are dropped before each optimiser step, so no optimiser touches
    its parameters: no momentum, no weight decay. `requires_grad` stays as it is, because DDP decides once, at
    the start, which parameters it reduces; so freezing saves no time. Normalisation layers of the trunk keep
    their running statistics too. Dropout stays active.

    The phase changes at the end of an epoch, is saved in checkpoints and never goes back.

    Args:
        unfreeze_at_epoch: First epoch, counted from 0, in which the trunk trains: how many are frozen.

    Raises:
        ValueError: `unfreeze_at_epoch` is negative.
    """

    def __init__(self, unfreeze_at_epoch: int) -> None:
        """Check the argument; the trunk is looked for when a fit starts."""
        if unfreeze_at_epoch < 0:
            msg = (
                f"Expected `unfreeze_at_epoch` to be 0 or more, got {unfreeze_at_epoch}; it is the number of "
                "epochs during which the trunk is frozen."
            )
            raise ValueError(msg)
        self.unfreeze_at_epoch = unfreeze_at_epoch
        self.phase: Phase = "frozen"
        self._trunk: list[nn.Parameter] = []
        self._statistics: list[nn.Module] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the trunk.

        Args:
            trainer: The trainer.
            pl_module: The module; it has to offer `trunk_parameters()`.

        Raises:
            TypeError: The module does not say what its trunk is.
            ValueError: There is no trunk, or nothing else to train while it is frozen.
        """
        if not isinstance(pl_module, HasTrunk):
            msg = (
                f"Expected a `model` with a method `trunk_parameters()`, got {type(pl_module).__name__}; add "
                "it, or take StageTransition out of `trainer.callbacks`."
            )
            raise TypeError(msg)
        self._trunk = list(pl_module.trunk_parameters())
        ids = {id(p) for p in self._trunk}
        others = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in ids]
        if not self._trunk or not others:
            lack = "nothing" if not self._trunk else "every trainable parameter"
            msg = (
                f"Expected `trunk_parameters()` of {type(pl_module).__name__} to yield some, not all, of "
                f"the trainable parameters, got {lack}; yield the pretrained part, without the head."
            )
            raise ValueError(msg)
        self._statistics = list(_with_running_statistics(pl_module, ids, inside=False))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that the trunk is frozen.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
        """
        if trainer.current_epoch < self.unfreeze_at_epoch and self.phase == "frozen":
            count = sum(p.numel() for p in self._trunk)
            rank_zero_info(
                f"StageTransition: trunk ({count:,} parameters) frozen until epoch {self.unfreeze_at_epoch}."
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure of the phase this epoch is to be trained in.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
        """
        # A checkpoint written before the end-of-epoch hook, after a validation, carries the phase of the
        # epoch before: going on from it must not train one more epoch in that phase.
        self._advance(trainer.current_epoch)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Hold the running statistics of the trunk.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
            batch: Not looked at.
            batch_idx: Not looked at.
        """
        # Before every batch: after a validation within the epoch the module is in training mode again.
        if self.phase == "frozen":
            for layer in self._statistics:
                layer.eval()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Drop the gradients of a frozen trunk.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
            optimizer: The optimiser that is about to step.
        """
        # After DDP's reduction and before clipping: the norm that is clipped is the head's own.
        if self.phase == "frozen":
            for parameter in self._trunk:
                parameter.grad = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change the phase when the last frozen epoch has ended.

        Args:
            trainer: The trainer.
            pl_module: The module that is trained.
        """
        self._advance(trainer.current_epoch + 1)

    def _advance(self, next_epoch: int) -> None:
        if self.phase == "trainable" or next_epoch < self.unfreeze_at_epoch:
            return
        self.phase = "trainable"
        for layer in self._statistics:
            layer.train()
        rank_zero_info(f"StageTransition: trunk trainable from epoch {next_epoch}.")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps.

        Returns:
            The phase.
        """
        return {"phase": self.phase}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the phase of a checkpoint.

        Args:
            state_dict: What `state_dict` returned.
        """
        self.phase = state_dict["phase"]


def _with_running_statistics(module: nn.Module, trunk: set[int], inside: bool) -> Iterator[nn.Module]:
    """Layers of the trunk that update buffers as they run; one without parameters follows its parent."""
    parameters = [id(p) for p in module.parameters()]
    if parameters:
        inside = all(p in trunk for p in parameters)
    if inside and getattr(module, "running_mean", None) is not None:
        yield module
    for child in module.children():
        yield from _with_running_statistics(child, trunk, inside)
