"""How labels become wrong, as a picture in TensorBoard: a module's transition matrix, and the true one beside it."""

import math
from typing import Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.class_matrix import draw_class_matrix
from callbacks.drawing import Pixels
from callbacks.picture import EvalSplit, EvaluationPicture, class_name, lacks_method


@runtime_checkable
class TellsTransition(Protocol):
    """A module that knows, or estimates, how labels become wrong."""

    def current_transition(self) -> Tensor:
        """T [K, K] of now, the same on every process: row = clean class, column = given label."""
        ...


class TransitionGrid(EvaluationPicture):
    """Draws the transition matrix of a module at the end of validation and test (`<split>/transition_matrix`).

    A row is a clean class and shows the labels that its images are given: blue on the diagonal, where these are right,
    red beside it. Where the datamodule knows another matrix (`transition_matrix`), the true one, it is drawn beside it,
    with the largest difference. The line above has the condition number: how much an error in what is known about the
    given labels can grow on the way back to the clean classes; 1 is the best, infinity is no way back.

    Args:
        every_n_epochs: Epochs between pictures; the last epoch always has one.

    Raises:
        ValueError: `every_n_epochs` is below 1.
    """

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: EvalSplit) -> None:
        """Draw the picture.

        Args:
            trainer: The trainer.
            pl_module: The module to ask.
            split: What was evaluated.

        Raises:
            TypeError: The module has no `current_transition`.
        """
        if not isinstance(pl_module, TellsTransition):
            raise TypeError(lacks_method(pl_module, "current_transition()", type(self)))
        if not trainer.is_global_zero or (add_image := self.sink(trainer)) is None:
            return
        found = pl_module.current_transition().detach().cpu().double()
        if not bool(torch.isfinite(found).all()):
            self.say("the module does not know its transition matrix, nothing is drawn.")
            return
        names = [class_name(trainer, k) for k in range(len(found))]
        drawn = draw_transition(found, names, "Transition matrix of the module")
        true = getattr(getattr(trainer, "datamodule", None), "transition_matrix", None)
        if isinstance(true, Tensor) and true.shape == found.shape:
            true = true.detach().cpu().double()
            apart = float((found - true).abs().max())
            if apart > 1e-6:  # the module keeps float32
                beside = draw_transition(true, names, f"Transition matrix of the data, up to {apart:.3f} away")
                drawn = _side_by_side(drawn, beside)
        add_image(f"{split}/transition_matrix", drawn, trainer.global_step, dataformats="HWC")


def draw_transition(matrix: Tensor, names: list[str], title: str) -> Pixels:
    """Draw a transition matrix.

    Args:
        matrix: [K, K]; row = clean class, column = given label, rows sum to 1.
        names: Names of the K classes.
        title: First words of the line above.

    Returns:
        [height, width, 3], on white.

    Raises:
        ValueError: The shapes do not fit.
    """
    return draw_class_matrix(
        matrix,
        names,
        f"{title}: condition number {_condition(matrix):.3g}",
        rows="clean",
        columns="given",
        legend="the clean class",
        # Below half a percent there would be zeros only.
        write=lambda p: f"{p:.2f}" if p >= 0.005 else "",
    )


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf


def _side_by_side(left: Pixels, right: Pixels) -> Pixels:
    """Both pictures, on white where one is less high."""
    height = max(len(left), len(right))
    padded = [np.pad(p, ((0, height - len(p)), (0, 0), (0, 0)), constant_values=255) for p in (left, right)]
    return np.concatenate(padded, 1)
