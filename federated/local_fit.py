"""What a client does in a round: some epochs of a longer fit, as Lightning would run them, and nothing beside.

Rounds go on counting epochs and batches, and learning-rate schedules go on, as if one Trainer had run them all; the
optimiser starts anew, as in federated averaging (McMahan et al., AISTATS 2017). One client that trains R rounds of E
epochs with SGD without momentum so ends with the very weights that Trainer.fit(max_epochs=R * E) ends with.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]  # no __all__ there
from pytorch_lightning.utilities.warnings import PossibleUserWarning  # type: ignore[attr-defined]  # likewise
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

_DECIDED: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}
_LENGTH = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "callbacks", "plugins")
# Arguments of the Trainer that a run does not leave to the user.
DECIDED = frozenset((*_DECIDED, *_LENGTH))
# What is said a fit is noise where there are hundreds of them.
_TALKERS = ("pytorch_lightning", "lightning_fabric", "lightning", "datamodules")


@dataclass(frozen=True)
class Fitted:
    """What became of a fit.

    Attributes:
        steps: Batches that were trained on.
        loss: Mean training loss of these.
    """

    steps: int
    loss: float


@dataclass(frozen=True)
class Epochs:
    """Which epochs of a longer fit are run.

    Attributes:
        first: The first, counted from 0.
        count: How many.
        total: Epochs of the whole, which schedules and ramps end with.

    Raises:
        ValueError: They are none of the whole.
    """

    first: int
    count: int
    total: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (self.first >= 0 and self.count >= 1 and self.first + self.count <= self.total):
            msg = f"Expected epochs of a fit of {self.total}, got {self.count} from {self.first} on."
            raise ValueError(msg)


def make_trainer(options: Mapping[str, Any], **more: Any) -> Trainer:
    """Make a Trainer for one device that neither says nor writes anything.

    Args:
        options: Arguments of the user's (`precision`, `accelerator`, `gradient_clip_val`).
        more: Further arguments.

    Raises:
        ValueError: An option is decided here.
    """
    taken = sorted(options.keys() & DECIDED)
    if taken:
        msg = f"Expected `trainer` without {', '.join(taken)}, which a federated run decides; leave them out."
        raise ValueError(msg)
    # Clients of one process are no processes of a cluster, whatever scheduler started that.
    arguments = {"devices": 1, "plugins": [LightningEnvironment()], **_DECIDED, **options, **more}
    with quietly():
        return Trainer(**arguments)


def fit(
    module: LightningModule,
    datamodule: LightningDataModule,
    epochs: Epochs,
    seed: int,
    trainer_options: Mapping[str, Any],
) -> Fitted:
    """Run some epochs of a fit; the global random numbers are left as they were.

    Args:
        module: The module; what it keeps beside its weights should be as before a fit.
        datamodule: Its data.
        epochs: Which epochs.
        seed: Seed of the fit, the same for all of its parts.
        trainer_options: Further arguments of the Trainer.

    Raises:
        ValueError: A Trainer's argument is decided here.
        FloatingPointError: The loss is not finite.
    """
    part = _Part(epochs)
    with quietly(), random_numbers_kept(seed):
        trainer = make_trainer(trainer_options, max_epochs=epochs.total, callbacks=[part])
        progress = trainer.fit_loop.epoch_progress
        for counted in (progress.current, progress.total):
            _count(counted, epochs.first)
        trainer.fit(module, datamodule=datamodule)
    losses = torch.stack(part.losses).double() if part.losses else torch.zeros(1, dtype=torch.float64)
    return Fitted(len(part.losses), float(losses.mean()))


class _Part(Callback):
    """Begins a fit in the middle, and ends it before its end."""

    def __init__(self, epochs: Epochs) -> None:
        self.epochs = epochs
        self.losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches of earlier rounds, and bring the schedules to where those left them."""
        loop, first = trainer.fit_loop.epoch_loop, self.epochs.first
        batches = first * int(trainer.num_training_batches)
        steps = first * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        _count(loop.batch_progress.total, batches)
        _count(loop.automatic_optimization.optim_progress.optimizer.step.total, steps)
        _count(loop.manual_optimization.optim_step_progress.total, steps)
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LRScheduler) and not config.reduce_on_plateau:
                _advance(config.scheduler, first if config.interval == "epoch" else steps)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Keep the loss."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last epoch of the round."""
        if trainer.current_epoch + 1 >= self.epochs.first + self.epochs.count:
            trainer.should_stop = True


def _count(progress: object, done: int) -> None:
    """Let one of Lightning's counters have counted that far."""
    for name in ("ready", "started", "processed", "completed"):
        if hasattr(progress, name):
            setattr(progress, name, done)


def _advance(scheduler: LRScheduler, steps: int) -> None:
    """Step a schedule without its optimiser."""
    if steps == 0:
        return
    if type(scheduler).get_lr is LambdaLR.get_lr:
        # A function of the number of the step alone: there in one.
        scheduler.last_epoch += steps - 1
        steps = 1
    for _ in range(steps):
        scheduler.step()


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back what Lightning and the data say in every single fit; warnings about the data are still logged."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
        # pytorch-lightning 2.6 asks torch >= 2.9 in a way that is deprecated there.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        try:
            for logger in loggers:
                logger.setLevel(max(logger.level, logging.WARNING))
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def random_numbers_kept(seed: int) -> Iterator[None]:
    """Seed torch's global generators, and put them back in the end.

    Args:
        seed: The seed.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
