"""Bars that compare runs, and classes before and after, as one picture."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from callbacks.class_matrix import shortened, write_upwards
from callbacks.drawing import Color, Pixels

Float64Array = npt.NDArray[np.float64]

_MARGIN, _LEFT, _HEAD = 14, 56, 34
_NARROWEST, _WIDEST = 640, 1000  # of a panel
_BAR, _PANEL = 26, 170  # heights
_MOST_NAMED = 25
_LEAST_PIXELS = 6  # of a class, for two bars side by side
_PAPER: Color = (255, 255, 255)
_INK: Color = (40, 40, 40)
_GRID: Color = (225, 225, 225)
_BEFORE: Color = (172, 184, 196)
_AFTER: Color = (33, 102, 172)


def draw_summary(
    runs: Mapping[str, float | None],
    own: str,
    panels: Mapping[str, tuple[Float64Array | None, Float64Array | None]],
    class_names: Sequence[str],
    headline: str,
) -> Pixels:
    """Draw a bar for each run, and below a panel for each measure of the K classes, before and after.

    Where there are too many classes for two bars each, they are sorted by their values before; those are an area then,
    and the values after are dots on it.

    Args:
        runs: Title -> share in [0, 1], None where it is not known. With none known the bars are left out.
        own: Title of the run that stands out.
        panels: Measure -> its values [K] in [0, 1] before and after; NaN draws nothing, and so does None.
        class_names: Names of the K classes.
        headline: The line above.

    Returns:
        [height, width, 3], on white.
    """
    width = max(_NARROWEST, min(_WIDEST, 10 * len(class_names)))
    shown = runs if any(share is not None for share in runs.values()) else {}
    drawn = {name: pair for name, pair in panels.items() if any(values is not None for values in pair)}
    names = [shortened(name) for name in class_names] if len(class_names) <= _MOST_NAMED else []
    below = round(max((_font(12).getlength(name) for name in names), default=12)) + 12
    tops = [_HEAD + (_HEAD + _BAR * len(shown) if shown else 0)]
    tops += [tops[0] + k * (_PANEL + below + _HEAD) for k in range(1, len(drawn) + 1)]
    picture = Image.new("RGB", (_LEFT + width + _MARGIN, tops[-1] + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, _MARGIN), headline, fill=_INK, font=_font(15))
    if shown:
        _draw_runs(pen, shown, own, _HEAD + _MARGIN, width)
    for top, (measure, (before, after)) in zip(tops, drawn.items(), strict=False):
        pen.text((_MARGIN, top + 10), measure, fill=_INK, font=_font(14))
        _legend(pen, _LEFT + width, top + 12)
        box = (_LEFT, top + _HEAD, width)
        _frame(pen, box)
        blank = np.full(len(class_names), np.nan)
        pair = blank if before is None else before, blank if after is None else after
        if width / len(class_names) < _LEAST_PIXELS:
            _draw_sorted(pen, box, *pair)
        else:
            _draw_pairs(pen, box, *pair)
            _write_classes(picture, names, box, len(class_names))
    return np.asarray(picture)


def _draw_runs(pen: ImageDraw.ImageDraw, runs: Mapping[str, float | None], own: str, top: int, width: int) -> None:
    """Bars from left to right, the title of each before it and its value behind."""
    titles = round(max(_font(13).getlength(title) for title in runs)) + 8
    left, right = _MARGIN + titles, _LEFT + width - 60
    for row, (title, share) in enumerate(runs.items()):
        y = top + row * _BAR
        pen.text((left - 8, y + _BAR / 2), title, fill=_INK, font=_font(13), anchor="rm")
        end = left + (right - left) * (share or 0.0)
        if share is not None:
            pen.rectangle((left, y + 4, end, y + _BAR - 4), fill=_AFTER if title == own else _BEFORE)
        value = "-" if share is None else f"{share:.2%}"
        pen.text((end + 6, y + _BAR / 2), value, fill=_INK, font=_font(13), anchor="lm")
    pen.line((left, top, left, top + len(runs) * _BAR), fill=_INK)


def _legend(pen: ImageDraw.ImageDraw, right: int, top: int) -> None:
    for place, (name, color) in enumerate((("before", _BEFORE), ("after", _AFTER))):
        left = right - 140 + 74 * place
        pen.rectangle((left, top, left + 12, top + 12), fill=color)
        pen.text((left + 17, top + 6), name, fill=_INK, font=_font(12), anchor="lm")


def _frame(pen: ImageDraw.ImageDraw, box: tuple[int, int, int]) -> None:
    """Lines and numbers at fifths of the height; box: left, top and width of the panel."""
    left, top, width = box
    for k in range(6):
        y = _height(box, k / 5)
        pen.line((left, y, left + width, y), fill=_GRID if k else _INK)
        pen.text((left - 6, y), f"{k / 5:.1f}", fill=_INK, font=_font(12), anchor="rm")
    pen.line((left, top, left, top + _PANEL), fill=_INK)


def _height(box: tuple[int, int, int], value: float) -> float:
    return box[1] + (1 - value) * _PANEL


def _draw_pairs(pen: ImageDraw.ImageDraw, box: tuple[int, int, int], before: Float64Array, after: Float64Array) -> None:
    """Two bars for each class, side by side."""
    step = box[2] / len(before)
    bar = max(step * 0.38, 2.0)
    for k, values in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        for place, (value, color) in enumerate(zip(values, (_BEFORE, _AFTER), strict=True)):
            if not math.isnan(value):
                left = box[0] + (k + 0.5) * step + (place - 1) * bar
                # Down to the axis: a bar of no height leaves its foot there.
                pen.rectangle((left, _height(box, value), left + bar - 1, _height(box, 0.0)), fill=color)


def _draw_sorted(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int], before: Float64Array, after: Float64Array
) -> None:
    """An area of the values before, sorted, and dots of those after; NaN goes last."""
    order = np.argsort(before if not np.isnan(before).all() else after, kind="stable")
    step = box[2] / len(before)
    for place, (old, new) in enumerate(zip(before[order].tolist(), after[order].tolist(), strict=True)):
        left = box[0] + place * step
        if not math.isnan(old):
            pen.rectangle((left, _height(box, old), left + step, _height(box, 0.0)), fill=_BEFORE)
        if not math.isnan(new):
            y = _height(box, new)
            pen.rectangle((left - 1, y - 1, left + 1, y + 1), fill=_AFTER)
    middle, below = box[0] + box[2] / 2, box[1] + _PANEL + 6
    pen.text((middle, below), "classes, sorted by their values before", fill=_INK, font=_font(12), anchor="ma")


def _write_classes(picture: Image.Image, names: Sequence[str], box: tuple[int, int, int], classes: int) -> None:
    """Names of few classes below their bars, numbers of every tenth of many."""
    step, below = box[2] / classes, box[1] + _PANEL + 6
    if names:
        for k, name in enumerate(names):
            write_upwards(picture, box[0] + (k + 0.5) * step, below, name, 12)
        return
    pen = ImageDraw.Draw(picture)
    for k in range(0, classes, 10):
        pen.text((box[0] + (k + 0.5) * step, below), str(k), fill=_INK, font=_font(12), anchor="ma")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
