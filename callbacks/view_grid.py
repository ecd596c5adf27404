"""What the augmentations make of training images, in TensorBoard."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pytorch_lightning as pl
from torch import Tensor

from callbacks.drawing import PAPER, Pixels, captioned, sheet, to_pixels
from callbacks.picture import Picture, class_name, require_positive

_CELL = 144


class ViewGrid(Picture):
    """Draws the first training batch of a fit as the network sees it (`train/views`).

    Each row has the views of one labelled image, with its label, and then those of one unlabelled image.

    Args:
        num_images: Rows, if the batch has as many images.

    Raises:
        ValueError: `num_images` is below 1.
    """

    def __init__(self, num_images: int = 8) -> None:
        """Check the argument."""
        super().__init__(every_n_epochs=1)
        require_positive(num_images=num_images)
        self.num_images = num_images
        self._drawn = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw again in this fit.

        Args:
            trainer: Not looked at.
            pl_module: Not looked at.
        """
        self._drawn = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Draw the views of the first batch.

        Args:
            trainer: The trainer.
            pl_module: Not looked at.
            batch: {"labeled": {views, label}, "unlabeled": {views}}, or one of the two.
            batch_idx: Not looked at.
        """
        if self._drawn:
            return
        self._drawn = True
        if not trainer.is_global_zero or (add_image := self.sink(trainer)) is None:
            return
        drawn = self.picture(batch, partial(class_name, trainer))
        if drawn is None:
            self.say("batches have no images under `labeled` or `unlabeled`, nothing is drawn.")
        else:
            add_image("train/views", drawn, trainer.global_step, dataformats="HWC")

    def picture(self, batch: object, name: Callable[[int], str] = str) -> Pixels | None:
        """Draw the picture.

        Args:
            batch: {"labeled": {views, label}, "unlabeled": {views}}, or one of the two.
            name: Gives the name of a class by its number.

        Returns:
            [height, width, 3], or nothing where there are no images.
        """
        columns: dict[str, list[Pixels]] = {}
        for part, word in (("labeled", "labelled"), ("unlabeled", "unlabelled")):
            found = batch.get(part) if isinstance(batch, Mapping) else None
            for key, images in views(found).items():
                columns[f"{word}: {key}"] = [to_cell(image) for image in images[: self.num_images]]
            label = found.get("label") if isinstance(found, Mapping) and part == "labeled" else None
            if label is not None and columns:
                first = next(iter(columns.values()))
                first[:] = [captioned(cell, name(int(k))) for cell, k in zip(first, label, strict=False)]
        cells = [cell for column in columns.values() for cell in column]
        if not cells:
            return None
        # Views may differ in size, and the parts in how many images they have.
        blank = np.full((max(len(c) for c in cells), max(c.shape[1] for c in cells), 3), PAPER, np.uint8)
        count = max(len(column) for column in columns.values())
        rows = [[_on(blank, column[i : i + 1]) for column in columns.values()] for i in range(count)]
        return sheet(list(columns), rows)


def views(part: object) -> dict[str, Tensor]:
    """The images [B, C, H, W] in a part of a batch, by name and in order.

    Args:
        part: {name: tensor}; what is no image is left out.
    """
    items = part.items() if isinstance(part, Mapping) else ()
    return {k: x for k, x in items if isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()}


def to_cell(image: Tensor, least: int = _CELL) -> Pixels:
    """Bytes of an image with any number of channels, of which three, or the first, are shown.

    Args:
        image: [C, H, W] in [0, 1].
        least: What the longer side has to reach, in pixels.

    Returns:
        [height, width, 3].
    """
    return to_pixels(image[:3] if len(image) >= 3 else image[:1], least)[0]


def _on(blank: Pixels, cells: Sequence[Pixels]) -> Pixels:
    """The first cell, if there is one, in the upper left corner of an empty one."""
    paper = blank.copy()
    for cell in cells[:1]:
        paper[: len(cell), : cell.shape[1]] = cell
    return paper
