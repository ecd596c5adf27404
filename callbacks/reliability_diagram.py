"""Whether a module is as often right as it says, as a picture in TensorBoard."""

import math
from functools import cache
from typing import Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from callbacks.drawing import Color, Pixels
from callbacks.picture import TITLES, EvalSplit, EvaluationPicture, lacks_method

_SIZE = (480, 560)
_FINE = 3  # drawn this much larger, then reduced: PIL draws no smooth lines
_LEFT, _RIGHT = 64, 464
_DIAGRAM, _HISTOGRAM = (40, 388), (408, 500)  # top and bottom
_LEAST_SHARE = 1e-4
_INK: Color = (40, 40, 40)
_GRID: Color = (225, 225, 225)
_DIAGONAL: Color = (120, 120, 120)
_ACCURACY: Color = (70, 130, 180)
_GAP = (214, 39, 40, 110)
_GAP_LINE: Color = (190, 30, 45)
_HISTOGRAM_BAR: Color = (150, 165, 180)


@runtime_checkable
class TellsReliability(Protocol):
    """A module that knows how often it was right at which confidence."""

    def reliability(self, split: EvalSplit) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mean confidence, accuracy (NaN where empty) and count of each bin, over all processes; or nothing."""
        ...


class ReliabilityDiagram(EvaluationPicture):
    """Draws accuracy against confidence at the end of validation and test (`<split>/reliability`).

    The confidences of all labelled pixels (of a classifier: images) are divided into bins of equal width. A blue bar is
    the share of a bin's pixels that were right, red the gap between it and the mean confidence of the bin: the mean of
    the gaps, weighted by the pixels, is the expected calibration error (Guo et al., 2017, arXiv 1706.04599). Below is
    the share of the pixels in each bin, on a logarithmic scale, as most pixels of a segmentation are certain. A module
    that counts something else has an attribute `counted`, what it counts in the plural.

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
            TypeError: The module has no `reliability`.
        """
        if not isinstance(pl_module, TellsReliability):
            raise TypeError(lacks_method(pl_module, "reliability(split)", type(self)))
        # Every process has to ask, as the answer adds up all of them; one draws.
        bins = pl_module.reliability(split)
        if not trainer.is_global_zero:
            return
        counted = getattr(pl_module, "counted", "pixels")
        if bins is None:
            self.say("the module trains no masks, nothing is drawn.")
        elif not bins[2].any():
            self.say(f"the {split} data has no labelled {counted}, nothing is drawn.")
        elif (add_image := self.sink(trainer)) is not None:
            title = f"{TITLES[split]}: reliability of {int(bins[2].sum()):,} {counted}"
            add_image(
                f"{split}/reliability", draw_reliability(*bins, title, counted), trainer.global_step, dataformats="HWC"
            )


def draw_reliability(
    confidence: Tensor, accuracy: Tensor, count: Tensor, title: str, counted: str = "pixels"
) -> Pixels:
    """Draw a reliability diagram over a histogram of the confidences.

    Args:
        confidence: [M] mean confidence of each bin in [0, 1], bins of equal width; NaN where it is empty.
        accuracy: [M] share of what is in it that was right, in [0, 1]; NaN where it is empty.
        count: [M] how many fell into each bin, at least one of them not 0.
        title: One line above.
        counted: What was counted, in the plural.

    Returns:
        [560, 480, 3], on white.

    Raises:
        ValueError: The three are not vectors of one length, or all bins are empty.
    """
    if not (confidence.ndim == 1 and confidence.shape == accuracy.shape == count.shape) or not bool(count.any()):
        msg = (
            "Expected `confidence`, `accuracy` and `count` to be vectors of one length with a bin that is not empty, "
            f"got shapes {tuple(confidence.shape)}, {tuple(accuracy.shape)} and {tuple(count.shape)} and "
            f"{int(count.sum())} {counted}; pass what CalibrationError.bins() returns."
        )
        raise ValueError(msg)
    share = (count.cpu().double() / count.cpu().sum()).tolist()
    bins = [
        (conf, acc, part)
        for conf, acc, part in zip(confidence.cpu().tolist(), accuracy.cpu().tolist(), share, strict=True)
    ]
    chart = _Chart()
    chart.text((_LEFT + _RIGHT) / 2, 20, title, "mm", 15)
    chart.grid(_DIAGRAM, [(k / 5, f"{k / 5:.1f}") for k in range(6)])
    low = math.log10(_LEAST_SHARE)
    decades = [(1 - k / low, f"{100 * 10.0**k:g} %") for k in range(int(low), 1)]
    chart.grid(_HISTOGRAM, decades[::2])
    for m, (conf, acc, part) in enumerate(bins):
        if part:
            left, right = m / len(bins), (m + 1) / len(bins)
            chart.bar(_DIAGRAM, (left, right), (0, acc), _ACCURACY)
            chart.bar(_DIAGRAM, (left, right), (min(acc, conf), max(acc, conf)), _GAP, _GAP_LINE)
            # Whatever is there shows, as a sliver at least.
            chart.bar(_HISTOGRAM, (left, right), (0, max(0.03, 1 - math.log10(part) / low)), _HISTOGRAM_BAR)
    chart.diagonal()
    for box, label in ((_DIAGRAM, "accuracy"), (_HISTOGRAM, counted)):
        chart.frame(box, label)
    for k in range(6):
        chart.text(_LEFT + k / 5 * (_RIGHT - _LEFT), _HISTOGRAM[1] + 6, f"{k / 5:.1f}", "ma")
    chart.text((_LEFT + _RIGHT) / 2, _HISTOGRAM[1] + 30, "confidence", "ma", 14)
    chart.legend(
        f"ECE {sum(part * abs(conf - acc) for conf, acc, part in bins if part):.4f}",
        f"mean confidence {sum(part * conf for conf, _, part in bins if part):.3f}",
        f"mean accuracy {sum(part * acc for _, acc, part in bins if part):.3f}",
    )
    return chart.pixels()


class _Chart:
    """A white sheet with two boxes over one horizontal axis, in units of the final picture."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (_SIZE[0] * _FINE, _SIZE[1] * _FINE), (255, 255, 255))
        self.draw = ImageDraw.Draw(self.image, "RGBA")  # colours with a fourth number let through what is below

    def grid(self, box: tuple[int, int], ticks: list[tuple[float, str]]) -> None:
        """Horizontal lines and their labels, at heights in [0, 1]; vertical lines at each fifth."""
        for height, label in ticks:
            y = box[1] - height * (box[1] - box[0])
            self.line((_LEFT, y, _RIGHT, y), _GRID)
            self.text(_LEFT - 6, y, label, "rm")
        for k in range(6):
            x = _LEFT + k / 5 * (_RIGHT - _LEFT)
            self.line((x, box[0], x, box[1]), _GRID)

    def bar(
        self,
        box: tuple[int, int],
        across: tuple[float, float],
        up: tuple[float, float],
        color: tuple[int, ...],
        outline: Color | None = None,
    ) -> None:
        """A rectangle in coordinates of a box, both in [0, 1]."""
        left, right = (_LEFT + x * (_RIGHT - _LEFT) for x in across)
        top, bottom = (box[1] - y * (box[1] - box[0]) for y in reversed(up))
        space = min(1.0, (right - left) / 4)
        corners = [n * _FINE for n in (left + space, top, right - space, bottom)]
        self.draw.rectangle(corners, fill=color, outline=outline, width=_FINE)

    def diagonal(self) -> None:
        """Dashes where confidence is accuracy."""
        dashes = 50
        width, height = _RIGHT - _LEFT, _DIAGRAM[1] - _DIAGRAM[0]
        for k in range(dashes):
            a, b = k / dashes, (k + 0.6) / dashes
            ends = _LEFT + a * width, _DIAGRAM[1] - a * height, _LEFT + b * width, _DIAGRAM[1] - b * height
            self.line(ends, _DIAGONAL, 1.6)

    def frame(self, box: tuple[int, int], label: str) -> None:
        """The edges of a box and what its height means, written upwards."""
        self.draw.rectangle([n * _FINE for n in (_LEFT, box[0], _RIGHT, box[1])], outline=_INK, width=_FINE)
        font = _font(14)
        x0, y0, x1, y1 = (round(n) for n in font.getbbox(label))
        word = Image.new("RGB", (x1 - x0, y1 - y0), (255, 255, 255))
        ImageDraw.Draw(word).text((-x0, -y0), label, fill=_INK, font=font)
        turned = word.rotate(90, expand=True)
        self.image.paste(turned, (6 * _FINE, round((box[0] + box[1]) / 2 * _FINE - turned.height / 2)))

    def legend(self, *facts: str) -> None:
        """What the colours mean, and numbers, in the upper left corner, where a segmenter has no bars."""
        left, top, step = _LEFT + 10, _DIAGRAM[0] + 10, 19
        self.draw.rectangle(
            [n * _FINE for n in (left, top, left + 160, top + step * (len(facts) + 3) + 10)],
            fill=(255, 255, 255, 235),
            outline=_GRID,
            width=_FINE,
        )
        rows = [*facts, "accuracy of the bin", "gap to its confidence", "as right as confident"]
        for i, row in enumerate(rows):
            y = top + 14 + i * step
            key = i - len(facts)
            box = [n * _FINE for n in (left + 8, y - 5, left + 26, y + 5)]
            if key == 0:
                self.draw.rectangle(box, fill=_ACCURACY)
            elif key == 1:
                self.draw.rectangle(box, fill=_GAP, outline=_GAP_LINE, width=_FINE)
            elif key == 2:
                for k in range(3):
                    self.line((left + 8 + 7 * k, y, left + 12 + 7 * k, y), _DIAGONAL, 1.6)
            self.text(left + (8 if key < 0 else 32), y, row, "lm", 14 if i == 0 else 12)

    def line(self, ends: tuple[float, float, float, float], color: Color, width: float = 1.0) -> None:
        """A line from (x, y) to (x, y)."""
        self.draw.line([n * _FINE for n in ends], fill=color, width=round(width * _FINE))

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 12) -> None:
        """One line of text; `anchor` is PIL's."""
        self.draw.text((x * _FINE, y * _FINE), text, fill=_INK, font=_font(size), anchor=anchor)

    def pixels(self) -> Pixels:
        """The picture at its final size."""
        return np.asarray(self.image.resize(_SIZE, Image.Resampling.LANCZOS))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _FINE)
