"""Matrices of classes by classes, as labelled pictures: shares of a row in colours, numbers in the cells."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from callbacks.drawing import Color, Pixels

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


def draw_class_matrix(
    values: Tensor,
    names: Sequence[str],
    headline: str,
    *,
    rows: str,
    columns: str,
    legend: str,
    write: Callable[[float], str],
) -> Pixels:
    """Draw a matrix whose rows and columns are classes.

    Colours are shares of the rows, blue on the diagonal and red beside it; they grow with the square root of the share,
    so that small ones show. A row of zeros is grey. With at most 25 classes numbers and names are written.

    Args:
        values: [K, K], not negative.
        names: Names of the K classes.
        headline: The line above.
        rows: What the rows are.
        columns: What the columns are.
        legend: What the colours are shares of.
        write: The text of a value; "" for none.

    Returns:
        [height, width, 3], on white.

    Raises:
        ValueError: The shapes do not fit.
    """
    if values.ndim != 2 or len(set(values.shape) | {len(names)}) != 1:
        msg = (
            "Expected `values` [K, K] and `names` of length K, got shape "
            f"{tuple(values.shape)} and {len(names)} names; pass one name for each class."
        )
        raise ValueError(msg)
    classes = len(names)
    named = classes <= _MOST_NAMED
    cell = max(_SMALLEST_CELL if named else 1, min(_LARGEST_CELL, _SIDE // classes))
    side = cell * classes
    matrix = Image.fromarray(_colors(values)).resize((side, side), Image.Resampling.NEAREST)
    if named:
        _write_values(matrix, values, cell, write)
    shown = [shortened(name) for name in names] if named else ["0", str(classes - 1)]
    labels = max(_font(13).getlength(name) for name in shown)
    left, top = round(2 * _MARGIN + 18 + labels), 3 * _MARGIN + 6
    width = max(left + side, round(_font(15).getlength(headline)), left + 360) + _MARGIN
    picture = Image.new("RGB", (width, round(top + side + labels + 130)), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), headline, fill=_INK, font=_font(15))
    picture.paste(matrix, (left, top))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=_INK)
    middles = [(k + 0.5) * cell for k in range(classes)] if named else [4.0, side - 5.0]
    _write_names(picture, shown, middles, (left, top, side))
    write_upwards(picture, _MARGIN + 6, top + side / 2, rows, 14, centred=True)
    below = round(top + side + labels + 14)
    draw.text((left + side / 2, below), columns, fill=_INK, font=_font(14), anchor="ma")
    _draw_legend(draw, left, below + 34, legend)
    return np.asarray(picture)


def _colors(values: Tensor) -> Pixels:
    """[K, K, 3]: the share of each row, as colours."""
    rows = values.sum(1, keepdim=True)
    strength = (values / torch.where(rows > 0, rows, 1)).sqrt()[..., None]
    full = torch.tensor(_WRONG).expand(*values.shape, 3).clone()
    full[range(len(values)), range(len(values))] = torch.tensor(_RIGHT)
    colors = (1 - strength) * torch.tensor(_PAPER) + strength * full
    colors[rows[:, 0] == 0] = torch.tensor(_ABSENT, dtype=colors.dtype)
    return colors.round().byte().numpy()


def _write_values(matrix: Image.Image, values: Tensor, cell: int, write: Callable[[float], str]) -> None:
    """Lines between the cells, and in each cell its text, where there is room."""
    draw = ImageDraw.Draw(matrix)
    for k in range(1, len(values)):
        draw.line((k * cell, 0, k * cell, matrix.height), fill=_GRID)
        draw.line((0, k * cell, matrix.width, k * cell), fill=_GRID)
    rows = values.sum(1).tolist()
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            text = write(value)
            size = next((f for f in (14, 12, 10) if _font(f).getlength(text) <= cell - 4), None)
            if text and size is not None:
                ink = _PAPER if value > 0.3 * rows[i] else _INK
                middle = ((j + 0.5) * cell, (i + 0.5) * cell)
                draw.text(middle, text, fill=ink, font=_font(size), anchor="mm")


def _write_names(
    picture: Image.Image, names: Sequence[str], middles: Sequence[float], place: tuple[int, int, int]
) -> None:
    """The names left of the matrix and below it; place: its left, top and side."""
    left, top, side = place
    draw = ImageDraw.Draw(picture)
    for middle, name in zip(middles, names, strict=True):
        draw.text((left - 6, top + middle), name, fill=_INK, font=_font(13), anchor="rm")
        write_upwards(picture, left + middle, top + side + 6, name, 13)


def write_upwards(picture: Image.Image, x: float, y: float, text: str, size: int, centred: bool = False) -> None:
    """Write text turned by 90 degrees.

    Args:
        picture: Where to; it is changed.
        x: Its middle.
        y: Its upper end, or its middle if `centred`.
        text: One line.
        size: Of the letters.
        centred: What y is.
    """
    font = _font(size)
    x0, _, x1, _ = font.getbbox(text)
    ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (size, 0)
    word = Image.new("RGB", (round(x1 - x0) + 1, ascent + descent), _PAPER)
    ImageDraw.Draw(word).text((-x0, 0), text, fill=_INK, font=font)
    turned = word.rotate(90, expand=True)
    picture.paste(turned, (round(x - turned.width / 2), round(y - (turned.height / 2 if centred else 0))))


def _draw_legend(draw: ImageDraw.ImageDraw, left: int, top: int, legend: str) -> None:
    """Two bars of colours with the shares that they stand for."""
    for line, (name, full) in enumerate((("right", _RIGHT), ("wrong", _WRONG))):
        y = top + 16 * line
        draw.text((left + 200, y + 6), f"{name}, share of {legend}", fill=_INK, font=_font(12), anchor="lm")
        for x in range(190):
            strength = x / 189
            color = tuple(round((1 - strength) * p + strength * c) for p, c in zip(_PAPER, full, strict=True))
            draw.line((left + x, y, left + x, y + 12), fill=color)
        draw.rectangle((left, y, left + 190, y + 12), outline=_GRID)
    for tick in _TICKS:
        draw.text((left + 190 * tick**0.5, top + 34), f"{tick:.0%}", fill=_INK, font=_font(10), anchor="ma")


def shortened(name: str) -> str:
    """Shorten a name to 18 letters: the middle gives way, as names of one kind often differ at their ends.

    Args:
        name: The name.
    """
    keep = (_LONGEST_NAME - 1) // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:keep]}…{name[-keep:]}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
