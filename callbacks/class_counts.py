"""How many images each class has, as bars."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from callbacks.class_matrix import shortened, write_upwards
from callbacks.drawing import Color, Pixels

_MARGIN, _LEFT, _TOP, _HEIGHT = 14, 64, 62, 260
_NARROWEST, _WIDEST = 560, 1000
_MOST_NAMED = 40
_PAPER: Color = (255, 255, 255)
_INK: Color = (40, 40, 40)
_GRID: Color = (225, 225, 225)
_COLORS: tuple[Color, Color] = ((27, 120, 55), (33, 102, 172))


def draw_class_counts(
    below: npt.NDArray[np.int64],
    above: npt.NDArray[np.int64],
    names: Sequence[str],
    headline: str,
    legend: Sequence[str],
) -> Pixels:
    """Draw a bar for each class, in two parts; more than 40 classes are sorted by their height and not named.

    Args:
        below: Images of the lower part of each bar [K].
        above: Images of the upper part [K].
        names: Names of the K classes.
        headline: The line above.
        legend: What the two parts are.

    Returns:
        [height, width, 3], on white.
    """
    classes, named = len(names), len(names) <= _MOST_NAMED
    total = below + above
    order = np.arange(classes) if named else np.argsort(-total, kind="stable")
    shown = [shortened(name) for name in names] if named else []
    width = max(_NARROWEST, min(_WIDEST, 26 * classes))
    foot = round(max((_font(12).getlength(name) for name in shown), default=18)) + 14
    picture = Image.new("RGB", (_LEFT + width + _MARGIN, _TOP + _HEIGHT + foot + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, _MARGIN), headline, fill=_INK, font=_font(15))
    _write_legend(pen, legend)
    most = 4 * max(-(-int(total.max(initial=0)) // 4), 1)  # quarters are whole numbers
    for k in range(5):
        y = _TOP + _HEIGHT * (1 - k / 4)
        pen.line((_LEFT, y, _LEFT + width, y), fill=_GRID)
        pen.text((_LEFT - 6, y), f"{most * k // 4:,}", fill=_INK, font=_font(12), anchor="rm")
    step = width / classes
    for place, row in enumerate(order.tolist()):
        gap = 0.12 * step if named else 0.0
        left, right = _LEFT + place * step + gap, max(_LEFT + (place + 1) * step - gap, _LEFT + place * step)
        start = 0
        for part, color in zip((int(below[row]), int(above[row])), _COLORS, strict=True):
            top, bottom = (_TOP + _HEIGHT * (1 - count / most) for count in (start + part, start))
            if part:
                pen.rectangle((left, top, right, bottom), fill=color)
            start += part
        if named:
            write_upwards(picture, (left + right) / 2, _TOP + _HEIGHT + 6, shown[row], 12)
    if not named:
        text = f"{classes} classes, the largest first"
        pen.text((_LEFT + width / 2, _TOP + _HEIGHT + 6), text, fill=_INK, font=_font(12), anchor="ma")
    return np.asarray(picture)


def _write_legend(pen: ImageDraw.ImageDraw, legend: Sequence[str]) -> None:
    x = float(_LEFT)
    for text, color in zip(legend, _COLORS, strict=True):
        pen.rectangle((x, _TOP - 22, x + 12, _TOP - 10), fill=color)
        pen.text((x + 18, _TOP - 16), text, fill=_INK, font=_font(12), anchor="lm")
        x += 18 + _font(12).getlength(text) + 24


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
