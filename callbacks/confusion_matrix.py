"""Which classes a classifier takes for which, as a picture in TensorBoard."""

from collections.abc import Sequence
from functools import cache
from typing import Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from callbacks.drawing import Color, Pixels
from callbacks.picture import TITLES, EvalSplit, EvaluationPicture, class_name, lacks_method

_SIDE = 700  # of the matrix, about
_LARGEST_CELL, _SMALLEST_CELL = 88, 30
_MOST_NAMED = 25
_LONGEST_NAME = 18
_MARGIN = 14
_INK: Color = (40, 40, 40)
_PAPER: Color = (255, 255, 255)
_RIGHT: Color = (8, 64, 129)
_WRONG: Color = (178, 24, 43)
_ABSENT: Color = (236, 236, 236)
_GRID: Color = (215, 215, 215)
_TICKS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)


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
    if counts.ndim != 2 or len(set(counts.shape) | {len(names)}) != 1:
        msg = (
            "Expected `counts` [K, K] and `names` of length K, got shape "
            f"{tuple(counts.shape)} and {len(names)} names; pass one name for each class."
        )
        raise ValueError(msg)
    classes, total = len(names), int(counts.sum())
    named = classes <= _MOST_NAMED
    cell = max(1, min(_LARGEST_CELL, _SIDE // classes))
    if named:
        cell = max(cell, _SMALLEST_CELL)
    side = cell * classes
    matrix = Image.fromarray(_colors(counts)).resize((side, side), Image.Resampling.NEAREST)
    if named:
        _write_counts(matrix, counts, cell)
    shown = [_shortened(name) for name in names] if named else ["0", str(classes - 1)]
    labels = max(_font(13).getlength(name) for name in shown)
    left, top = round(2 * _MARGIN + 18 + labels), 3 * _MARGIN + 6
    headline = f"{title}: {total:,} images, accuracy {float(counts.trace()) / max(total, 1):.1%}"
    width = max(left + side, round(_font(15).getlength(headline)), left + 360) + _MARGIN
    picture = Image.new("RGB", (width, round(top + side + labels + 130)), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), headline, fill=_INK, font=_font(15))
    picture.paste(matrix, (left, top))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=_INK)
    middles = [(k + 0.5) * cell for k in range(classes)] if named else [4.0, side - 5.0]
    for middle, name in zip(middles, shown, strict=True):
        draw.text((left - 6, top + middle), name, fill=_INK, font=_font(13), anchor="rm")
        _write_upwards(picture, left + middle, top + side + 6, name, 13)
    _write_upwards(picture, _MARGIN + 6, top + side / 2, "true", 14, centred=True)
    below = round(top + side + labels + 14)
    draw.text((left + side / 2, below), "predicted", fill=_INK, font=_font(14), anchor="ma")
    _draw_legend(draw, left, below + 34)
    return np.asarray(picture)


def _colors(counts: Tensor) -> Pixels:
    """[K, K, 3]: the share of each row, as colours."""
    rows = counts.sum(1, keepdim=True)
    strength = (counts / rows.clamp(min=1)).sqrt()[..., None]
    full = torch.tensor(_WRONG).expand(*counts.shape, 3).clone()
    full[range(len(counts)), range(len(counts))] = torch.tensor(_RIGHT)
    colors = (1 - strength) * torch.tensor(_PAPER) + strength * full
    colors[rows[:, 0] == 0] = torch.tensor(_ABSENT, dtype=colors.dtype)
    return colors.round().byte().numpy()


def _write_counts(matrix: Image.Image, counts: Tensor, cell: int) -> None:
    """Lines between the cells, and in each cell its number, where it is not 0 and there is room."""
    draw = ImageDraw.Draw(matrix)
    for k in range(1, len(counts)):
        draw.line((k * cell, 0, k * cell, matrix.height), fill=_GRID)
        draw.line((0, k * cell, matrix.width, k * cell), fill=_GRID)
    rows = counts.sum(1).tolist()
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            fits = (f for f in (14, 12, 10) if _font(f).getlength(f"{count:,}") <= cell - 4)
            size = next(fits, None)
            if count and size is not None:
                ink = _PAPER if count > 0.3 * rows[i] else _INK
                middle = ((j + 0.5) * cell, (i + 0.5) * cell)
                draw.text(middle, f"{count:,}", fill=ink, font=_font(size), anchor="mm")


def _write_upwards(picture: Image.Image, x: float, y: float, text: str, size: int, centred: bool = False) -> None:
    """Text turned by 90 degrees around a middle at x: below y, or with its middle there."""
    font = _font(size)
    x0, _, x1, _ = font.getbbox(text)
    ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (size, 0)
    word = Image.new("RGB", (round(x1 - x0) + 1, ascent + descent), _PAPER)
    ImageDraw.Draw(word).text((-x0, 0), text, fill=_INK, font=font)
    turned = word.rotate(90, expand=True)
    picture.paste(turned, (round(x - turned.width / 2), round(y - (turned.height / 2 if centred else 0))))


def _draw_legend(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    """Two bars of colours with the shares that they stand for."""
    for line, (name, full) in enumerate((("right", _RIGHT), ("wrong", _WRONG))):
        y = top + 16 * line
        draw.text((left + 200, y + 6), f"{name}, share of the true class", fill=_INK, font=_font(12), anchor="lm")
        for x in range(190):
            strength = x / 189
            color = tuple(round((1 - strength) * p + strength * c) for p, c in zip(_PAPER, full, strict=True))
            draw.line((left + x, y, left + x, y + 12), fill=color)
        draw.rectangle((left, y, left + 190, y + 12), outline=_GRID)
    for tick in _TICKS:
        draw.text((left + 190 * tick**0.5, top + 34), f"{tick:.0%}", fill=_INK, font=_font(10), anchor="ma")


def _shortened(name: str) -> str:
    """The middle gives way: names of one kind often differ at their ends."""
    keep = (_LONGEST_NAME - 1) // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:keep]}…{name[-keep:]}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
