"""Which client has how many images of which class, as two labelled pictures side by side."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from callbacks.class_matrix import shortened, write_upwards
from callbacks.drawing import Color, Pixels

_MARGIN, _TOP, _GAP, _TOTAL = 14, 44, 34, 44
_PANEL = 420  # side of a panel, about
_LARGEST_CELL, _SMALLEST_CELL = 44, 26
_MOST_CLASSES, _MOST_CLIENTS = 25, 40
_BAR = 150  # of colours
_INK: Color = (40, 40, 40)
_PAPER: Color = (255, 255, 255)
_FULL: Color = (8, 64, 129)
_GRID: Color = (215, 215, 215)

Counts = npt.NDArray[np.int64]


def draw_client_classes(labeled: Counts, unlabeled: Counts, class_names: Sequence[str]) -> Pixels:
    """Draw the labelled images of clients, and beside them the unlabelled ones: rows are clients, columns classes.

    Colours grow with the square root of the count, up to the largest of each of the two, so that few images show; a
    cell without images is empty. Behind each row stands its sum. With at most 25 classes and 40 clients counts and
    names are written.

    Args:
        labeled: Labelled images [C, K] of C clients and K classes.
        unlabeled: Unlabelled ones [C, K].
        class_names: Names of the K classes.

    Returns:
        [height, width, 3], on white.

    Raises:
        ValueError: The shapes do not fit, or there is nothing to draw.
    """
    clients, classes = len(labeled), len(class_names)
    if labeled.shape != unlabeled.shape or labeled.shape != (clients, classes) or not labeled.size:
        msg = (
            "Expected `labeled` and `unlabeled` [C, K] with at least one client, and `class_names` of length K, got "
            f"shapes {labeled.shape} and {unlabeled.shape} and {classes} names; count every class of every client."
        )
        raise ValueError(msg)
    named = classes <= _MOST_CLASSES and clients <= _MOST_CLIENTS
    # One size for both sides of a cell where numbers are in it.
    sides = [max(classes, clients)] * 2 if named else [classes, clients]
    least = _SMALLEST_CELL if named else 1
    width, height = (max(least, min(_LARGEST_CELL, _PANEL // side)) for side in sides)
    shown = [shortened(name) for name in class_names] if named else ["0", str(classes - 1)]
    foot = round(max(_font(12).getlength(name) for name in shown))
    left = 2 * _MARGIN + 16 + round(_font(12).getlength(str(clients - 1)))
    step = max(classes * width + _TOTAL, _BAR + _TOTAL, 200) + _GAP
    below = _TOP + clients * height
    picture = Image.new("RGB", (left + 2 * step - _GAP + _MARGIN, below + foot + 74), _PAPER)
    write_upwards(picture, _MARGIN + 6, (_TOP + below) / 2, "client", 13, centred=True)
    for place, (what, counts) in enumerate((("labelled", labeled), ("unlabelled", unlabeled))):
        start = left + place * step
        headline = f"{what} images: {int(counts.sum()):,}"
        panel = _panel(counts, width, height, named=named)
        _draw_panel(picture, panel, (start, _TOP), headline)
        _write_sums(picture, counts, (start + panel.width, _TOP), height)
        _write_classes(picture, shown, [(k + 0.5) * width for k in _marks(classes, named)], (start, below))
        if counts.any():
            _draw_legend(picture, int(counts.max()), (start, below + foot + 34))
    pen = ImageDraw.Draw(picture)
    for client in _marks(clients, named):
        middle = max(_TOP + (client + 0.5) * height, _TOP + 6 if client == 0 else 0)
        pen.text((left - 6, middle), str(client), fill=_INK, font=_font(12), anchor="rm")
    return np.asarray(picture)


def _marks(count: int, named: bool) -> Sequence[int]:
    """Which rows or columns have a name: all, or the first and the last."""
    return range(count) if named else (0, count - 1)


def _strength(counts: Counts) -> npt.NDArray[np.float64]:
    strength: npt.NDArray[np.float64] = np.sqrt(counts / max(int(counts.max()), 1))
    return strength


def _panel(counts: Counts, width: int, height: int, *, named: bool) -> Image.Image:
    """The cells, [C height, K width]."""
    strength = _strength(counts)[..., None]
    colors = np.rint((1 - strength) * np.array(_PAPER) + strength * np.array(_FULL)).astype(np.uint8)
    clients, classes = counts.shape
    panel = Image.fromarray(colors).resize((classes * width, clients * height), Image.Resampling.NEAREST)
    if not named:
        return panel
    pen = ImageDraw.Draw(panel)
    for k in range(1, classes):
        pen.line((k * width, 0, k * width, panel.height), fill=_GRID)
    for c in range(1, clients):
        pen.line((0, c * height, panel.width, c * height), fill=_GRID)
    for (c, k), count in np.ndenumerate(counts):
        size = next((f for f in (13, 11, 9) if _font(f).getlength(str(count)) <= width - 3), None)
        if count and size is not None:
            ink = _PAPER if strength[c, k, 0] > 0.55 else _INK
            middle = ((k + 0.5) * width, (c + 0.5) * height)
            pen.text(middle, str(count), fill=ink, font=_font(size), anchor="mm")
    return panel


def _draw_panel(picture: Image.Image, panel: Image.Image, place: tuple[int, int], headline: str) -> None:
    left, top = place
    picture.paste(panel, place)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((left - 1, top - 1, left + panel.width, top + panel.height), outline=_INK)
    pen.text((left, _MARGIN), headline, fill=_INK, font=_font(15))


def _write_sums(picture: Image.Image, counts: Counts, place: tuple[int, int], height: int) -> None:
    """Behind each row its sum, where there is room."""
    left, top = place
    pen = ImageDraw.Draw(picture)
    if height < 12:
        return
    for client, count in enumerate(counts.sum(1).tolist()):
        middle = (left + 6, top + (client + 0.5) * height)
        pen.text(middle, f"{count:,}", fill=_INK, font=_font(12), anchor="lm")


def _write_classes(
    picture: Image.Image, names: Sequence[str], middles: Sequence[float], place: tuple[int, int]
) -> None:
    left, below = place
    for middle, name in zip(middles, names, strict=True):
        write_upwards(picture, left + middle, below + 5, name, 12)


def _draw_legend(picture: Image.Image, most: int, place: tuple[int, int]) -> None:
    """A bar of colours from no image to the most of a cell."""
    left, top = place
    pen = ImageDraw.Draw(picture)
    for x in range(_BAR):
        strength = x / (_BAR - 1)
        color = tuple(round((1 - strength) * p + strength * f) for p, f in zip(_PAPER, _FULL, strict=True))
        pen.line((left + x, top, left + x, top + 10), fill=color)
    pen.rectangle((left, top, left + _BAR, top + 10), outline=_GRID)
    for tick in sorted({0, round(most / 4), most}):
        x = left + _BAR * (tick / most) ** 0.5
        pen.text((x, top + 14), f"{tick:,}", fill=_INK, font=_font(10), anchor="ma")
    pen.text((left + _BAR + 12, top + 5), "images", fill=_INK, font=_font(11), anchor="lm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
