"""When pictures are drawn, where they go, and what is said when there is none."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info

EvalSplit = Literal["val", "test"]
TITLES: dict[EvalSplit, str] = {"val": "Validation", "test": "Test"}


class Picture(pl.Callback):
    """Decides in which epochs a picture is drawn; subclasses draw it.

    Args:
        every_n_epochs: Epochs between pictures; the last epoch always has one.

    Raises:
        ValueError: `every_n_epochs` is below 1.
    """

    def __init__(self, every_n_epochs: int) -> None:
        """Check the argument."""
        require_positive(every_n_epochs=every_n_epochs)
        self.every_n_epochs = every_n_epochs
        self._said: set[str] = set()

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this epoch has a picture."""
        epoch = trainer.current_epoch + 1
        return epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs or _reaches_max_steps(trainer, epoch)

    def is_due_after_validation(self, trainer: pl.Trainer) -> bool:
        """Whether this validation has a picture: one on its own always, within a fit if the epoch has one."""
        alone = trainer.state.fn == TrainerFn.VALIDATING
        return not trainer.sanity_checking and (alone or self.is_due(trainer))

    def validates(self, trainer: pl.Trainer) -> bool:
        """Whether a fit has a validation that could have the picture."""
        # A datamodule may well have a `val_dataloader` that returns no loader.
        known = trainer.val_dataloaders is not None
        return trainer.enable_validation and (any(trainer.num_val_batches) or not known)

    def say(self, line: str) -> None:
        """Tell the user something once, from rank zero."""
        if line not in self._said:
            self._said.add(line)
            rank_zero_info(f"{type(self).__name__}: {line}")

    def sink(self, trainer: pl.Trainer) -> Callable[..., object] | None:
        """`add_image` of the first logger that takes pictures; where none does, say so."""
        add_image = image_sink(trainer)
        if add_image is None:
            self.say("no logger takes images (TensorBoardLogger does), nothing is drawn.")
        return add_image


def _reaches_max_steps(trainer: pl.Trainer, epoch: int) -> bool:
    """Whether this many epochs are all that `max_steps` allows."""
    batches = trainer.num_training_batches
    if trainer.max_steps < 0 or not math.isfinite(batches):
        return False
    return epoch * math.ceil(batches / trainer.accumulate_grad_batches) >= trainer.max_steps


class EvaluationPicture(Picture):
    """A picture of what a validation or test has found, drawn before the module forgets it.

    Args:
        every_n_epochs: Epochs between pictures; the last epoch always has one.

    Raises:
        ValueError: `every_n_epochs` is below 1.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        """Check the argument."""
        super().__init__(every_n_epochs)

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: EvalSplit) -> None:
        """Draw the picture; called by every process.

        Args:
            trainer: The trainer.
            pl_module: The module to ask.
            split: What was evaluated.
        """
        raise NotImplementedError

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what validation has seen; the module resets its metrics after its callbacks.

        Args:
            trainer: The trainer.
            pl_module: The module to ask.
        """
        if self.is_due_after_validation(trainer):
            self.draw(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what the test has seen.

        Args:
            trainer: The trainer.
            pl_module: The module to ask.
        """
        self.draw(trainer, pl_module, "test")


def require_positive(**arguments: int) -> None:
    """Refuse numbers of epochs and images below 1.

    Args:
        arguments: The numbers by name.

    Raises:
        ValueError: One of them is below 1.
    """
    for name, value in arguments.items():
        if value < 1:
            msg = f"Expected `{name}` to be at least 1, got {value}; leave the callback out to have none."
            raise ValueError(msg)


def image_sink(trainer: pl.Trainer) -> Callable[..., object] | None:
    """`add_image` of the first logger that takes pictures, as TensorBoard's does; None where none does."""
    for logger in trainer.loggers:
        sink: Any = getattr(getattr(logger, "experiment", None), "add_image", None)
        if callable(sink):
            return cast("Callable[..., object]", sink)
    return None


@contextmanager
def evaluating(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Evaluation mode for a moment; afterwards every layer is as it was, frozen ones included."""
    modes = {module: module.training for module in pl_module.modules()}
    pl_module.eval()
    try:
        with torch.no_grad(), trainer.strategy.precision_plugin.forward_context():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def lacks_method(pl_module: pl.LightningModule, method: str, callback: type) -> str:
    """What to say of a module without the method that a callback needs."""
    return (
        f"Expected a `model` with a method {method}, got {type(pl_module).__name__}; add it, or take "
        f"{callback.__name__} out of `trainer.callbacks`."
    )


def class_name(trainer: pl.Trainer, number: int) -> str:
    """The name of a class as the datamodule's `class_names` has it; its number where there is none.

    Args:
        trainer: The trainer.
        number: Number of the class, from 0.
    """
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None) or ()
    return str(names[number]) if 0 <= number < len(names) else str(number)
