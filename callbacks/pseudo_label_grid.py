"""The pseudo-labels that a method was surest of and that are wrong, in TensorBoard."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.drawing import PAPER, Pixels, sheet, with_lines_below
from callbacks.picture import Picture, class_name, require_positive
from callbacks.view_grid import to_cell, views

_CELL = 192
_COLUMNS = 4


class Guessed(Protocol):
    """What a method took the labels of a batch of unlabelled images to be."""

    label: Tensor
    confidence: Tensor
    weight: Tensor


class PseudoLabelGrid(Picture):
    """Draws the wrong pseudo-labels of an epoch that the method was surest of (`train/wrong_pseudo_labels`).

    Shown is the first view of each image, the class guessed, the true one and the confidence, the surest first; only
    pseudo-labels that were learnt from count (weight above 0), and of an image the surest one. This needs true labels
    that are hidden from training, as benchmarks have them, and a `training_step` that returns `guess` (label,
    confidence, weight [B]) and `true_label` [B], -1 where it is not known. Of several processes the first one's images
    are drawn.

    Args:
        every_n_epochs: Epochs between pictures; the last epoch always has one.
        num_images: Images in a picture.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(self, every_n_epochs: int = 1, num_images: int = 16) -> None:
        """Check the arguments."""
        super().__init__(every_n_epochs)
        require_positive(num_images=num_images)
        self.num_images = num_images
        self._surest: dict[str, Tensor] = {}
        self._any_known: Tensor | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the epoch before.

        Args:
            trainer: Not looked at.
            pl_module: Not looked at.
        """
        self._surest, self._any_known = {}, None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Take in what was wrong in this batch.

        Args:
            trainer: The trainer.
            pl_module: Not looked at.
            outputs: What `training_step` returned.
            batch: {"unlabeled": {views, index}}.
            batch_idx: Not looked at.
        """
        if not trainer.is_global_zero or not self.is_due(trainer):
            return
        told = cast("Mapping[str, Any]", outputs) if isinstance(outputs, Mapping) else {}
        guess, true_label = told.get("guess"), told.get("true_label")
        part = batch.get("unlabeled") if isinstance(batch, Mapping) else None
        images = next(iter(views(part).values()), None)
        if guess is None or images is None:
            self.say("the method has no pseudo-labels, nothing is drawn.")
        elif true_label is None:
            self._say_unknown()
        else:
            index = cast("Mapping[str, Tensor]", part).get("index", torch.full_like(true_label, -1))
            self._take_in(guess, true_label, images, index)

    @torch.no_grad()
    def _take_in(self, guess: Guessed, true_label: Tensor, images: Tensor, index: Tensor) -> None:
        """Merge a batch into the surest so far, in sizes that are always the same: the device is never waited for."""
        known = true_label >= 0
        any_known = known.any()
        self._any_known = any_known if self._any_known is None else self._any_known | any_known
        wrong = known & (guess.label != true_label) & (guess.weight > 0)
        score = torch.where(wrong, guess.confidence.float(), -1.0)
        score, rows = score.topk(min(self.num_images, len(score)))
        new = {"image": images[rows], "label": guess.label[rows], "true_label": true_label[rows], "index": index[rows]}
        new["score"] = score
        both = {k: torch.cat([self._surest[k], x]) for k, x in new.items()} if self._surest else new
        both["score"] = torch.where(_beaten(both["score"], both["index"]), -1.0, both["score"])
        _, rows = both["score"].topk(min(self.num_images, len(both["score"])))
        self._surest = {k: x[rows] for k, x in both.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what was wrong in this epoch.

        Args:
            trainer: The trainer.
            pl_module: Not looked at.
        """
        surest, known, self._surest = self._surest, self._any_known, {}
        if not surest:
            return
        if not bool(known):
            self._say_unknown()
            return
        count = int((surest["score"] >= 0).sum())
        add_image = self.sink(trainer)
        if count and add_image is not None:
            names = {k: class_name(trainer, k) for key in ("label", "true_label") for k in surest[key].tolist()}
            drawn = draw_wrong({k: x[:count] for k, x in surest.items()}, names)
            add_image("train/wrong_pseudo_labels", drawn, trainer.global_step, dataformats="HWC")

    def _say_unknown(self) -> None:
        self.say("the data do not know the true labels of unlabelled images, nothing is drawn.")


def draw_wrong(wrong: Mapping[str, Tensor], names: Mapping[int, str]) -> Pixels:
    """Draw images with the class guessed, the true one and the confidence.

    Args:
        wrong: `image` [N, C, H, W] in [0, 1], `label` [N] (guessed), `true_label` [N] and `score` [N] (confidence).
        names: Names of the classes by number.

    Returns:
        [height, width, 3].
    """
    cells = []
    numbers = (wrong[key].tolist() for key in ("label", "true_label", "score"))
    for image, label, true_label, score in zip(wrong["image"], *numbers, strict=True):
        lines = [f"guessed {names[label]} ({score:.4f})", f"is {names[true_label]}"]
        cells.append(with_lines_below(to_cell(image, _CELL), lines))
    cells += [np.full_like(cells[0], PAPER)] * (-len(cells) % _COLUMNS)
    rows = [cells[i : i + _COLUMNS] for i in range(0, len(cells), _COLUMNS)]
    return sheet(["wrong pseudo-labels, the surest first (confidence)", *[""] * (_COLUMNS - 1)], rows)


def _beaten(score: Tensor, index: Tensor) -> Tensor:
    """Which entries [N] are of an image that another, surer entry is of; images of index -1 are all different."""
    same = (index[:, None] == index) & (index >= 0)
    place = torch.arange(len(score), device=score.device)
    surer = (score > score[:, None]) | ((score == score[:, None]) & (place < place[:, None]))
    return (same & surer).any(1)
