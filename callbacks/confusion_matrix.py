"""Which classes a classifier takes for which, as a picture in TensorBoard."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
from torch import Tensor

from callbacks.class_matrix import draw_class_matrix
from callbacks.drawing import Pixels
from callbacks.picture import TITLES, EvalSplit, EvaluationPicture, class_name, lacks_method


@runtime_checkable
class TellsConfusion(Protocol):
    """A module that knows which classes it took for which."""

    def confusion(self, split: EvalSplit) -> Tensor:
        """Counts [K, K] over all processes: row = true class, column = predicted class."""
        ...


class ConfusionMatrix(EvaluationPicture):
    """Draws the confusion matrix at the end of validation and test (`<split>/confusion_matrix`).

    A row is a true class, and the colours are shares of its images: blue on the diagonal, where they are right, red
    beside it. They grow with the square root of the share, so that rare confusions show. With at most 25 classes the
    numbers of images and the names of the datamodule's `class_names` are written. The row of a class without images is
    grey.

    Args:
        every_n_epochs: Epochs between pictures; the last epoch always has one.

    Raises:
        ValueError: `every_n_epochs` is below 1.
    """

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: EvalSplit) -> None:
        """Draw the picture; called by every process.

        Args:
            trainer: The trainer.
            pl_module: The module to ask.
            split: What was evaluated.

        Raises:
            TypeError: The module has no `confusion`.
        """
        if not isinstance(pl_module, TellsConfusion):
            raise TypeError(lacks_method(pl_module, "confusion(split)", type(self)))
        # Every process has to ask, as the answer adds up all of them; one draws.
        counts = pl_module.confusion(split).cpu()
        if not trainer.is_global_zero:
            return
        if not counts.any():
            self.say(f"the {split} data has no labelled images, nothing is drawn.")
        elif (add_image := self.sink(trainer)) is not None:
            names = [class_name(trainer, k) for k in range(len(counts))]
            drawn = draw_confusion(counts, names, TITLES[split])
            add_image(f"{split}/confusion_matrix", drawn, trainer.global_step, dataformats="HWC")


def draw_confusion(counts: Tensor, names: Sequence[str], title: str) -> Pixels:
    """Draw a confusion matrix.

    Args:
        counts: [K, K] images; row = true class, column = predicted class.
        names: Names of the K classes.
        title: First words of the line above.

    Returns:
        [height, width, 3], on white.

    Raises:
        ValueError: The shapes do not fit.
    """
    total = int(counts.sum())
    return draw_class_matrix(
        counts,
        names,
        f"{title}: {total:,} images, accuracy {float(counts.trace()) / max(total, 1):.1%}",
        rows="true",
        columns="predicted",
        legend="the true class",
        write=lambda count: f"{count:,}" if count else "",
    )
