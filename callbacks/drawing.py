"""Outlines, colours and contact sheets: arrays in, arrays out."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

Color = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]

TRUTH: Color = (0, 220, 90)
PREDICTION: Color = (255, 40, 60)
IGNORED = 255
# From black over red to white: the lightness rises evenly, so that grey prints and the colour-blind see the order.
_HEAT: tuple[Color, ...] = (
    (3, 2, 12),
    (56, 0, 77),
    (134, 0, 93),
    (205, 0, 66),
    (241, 105, 25),
    (242, 187, 106),
    (248, 247, 224),
)
_GAP = 4
_HEADER = 24
PAPER = 24
_FONT_SIZE = 13


def contours(labels: Tensor, thickness: int = 1) -> Tensor:
    """Inner outline of every class but the background.

    Args:
        labels: [H, W] class ids; 255 is outlined like a class.
        thickness: Width of the line, in pixels.

    Returns:
        [H, W] bool. A region that reaches the border of the image is outlined there as well.
    """
    framed = pad(labels.float()[None, None], [thickness] * 4)
    window = 2 * thickness + 1
    differs = max_pool2d(framed, window, 1) != -max_pool2d(-framed, window, 1)
    return differs[0, 0] & (labels > 0)


def draw_contours(image: Pixels, labels: Tensor, color: Color, thickness: int = 2) -> Pixels:
    """Draw the outlines of a mask over an image.

    Args:
        image: [H, W, 3].
        labels: [H, W] class ids; what is 255 (no label) is darkened instead.
        color: Red, green, blue of the lines.
        thickness: Width of the lines, in pixels.

    Returns:
        A new [H, W, 3].
    """
    drawn = image.copy()
    ignored = (labels == IGNORED).cpu().numpy()
    drawn[ignored] //= 3
    known = torch.where(labels == IGNORED, 0, labels)
    drawn[contours(known, thickness).cpu().numpy()] = color
    return drawn


def enlarge(x: Tensor, scale: int) -> Tensor:
    """Enlarge by repeating pixels.

    Args:
        x: [..., H, W].
        scale: How often each pixel is repeated, in both directions.

    Returns:
        [..., scale * H, scale * W].
    """
    return x.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def to_pixels(x: Tensor, least: int = 1) -> tuple[Pixels, int]:
    """Turn an image into bytes, its pixels repeated until it is large enough to look at.

    Args:
        x: [3, H, W] or [1, H, W], in [0, 1], on any device; values outside are clipped, NaN is black.
        least: What the longer side has to reach, in pixels.

    Returns:
        [height, width, 3], and how often pixels were repeated.
    """
    x = (x.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte()
    scale = max(1, -(-least // max(x.shape[-2:])))
    pixels: Pixels = enlarge(x.expand(3, -1, -1), scale).permute(1, 2, 0).contiguous().numpy()
    return pixels, scale


def class_colors(classes: int) -> Tensor:
    """Choose a colour for each class.

    Args:
        classes: How many there are, background included.

    Returns:
        [K, 3] in [0, 1]: black, then white for a single foreground class, or hues far from each other.
    """
    if classes == 2:
        return torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float32)
    # Steps of the golden ratio keep every prefix of the hues spread out.
    hues = [hsv_to_rgb(0.618034 * k % 1, 0.75, 1.0 - 0.3 * (k % 2)) for k in range(1, classes)]
    # The type is said: under precision "bf16-true" the default one is bfloat16, which numpy does not know.
    return torch.tensor([(0.0, 0.0, 0.0), *hues], dtype=torch.float32)


def shade(probabilities: Tensor) -> Tensor:
    """Picture of class probabilities, in which each class gives its colour in proportion.

    Args:
        probabilities: [K, H, W].

    Returns:
        [3, H, W] in [0, 1], on the CPU.
    """
    p = probabilities.detach().float().cpu().clamp(0, 1)
    return torch.einsum("khw,kc->chw", p, class_colors(len(p)))


def tint(image: Pixels, labels: Tensor, classes: int) -> Pixels:
    """Colour the classes of an image; a single foreground class shows by its outline alone.

    Args:
        image: [H, W, 3].
        labels: [H, W] class ids, or 255.
        classes: How many classes there are, background included.

    Returns:
        [H, W, 3]; the image itself with two classes.
    """
    if classes == 2:
        return image
    known = torch.where(labels == IGNORED, 0, labels).cpu()
    colors = (class_colors(classes)[known] * 255).numpy()
    tinted = np.where((known > 0).numpy()[..., None], 0.55 * image + 0.45 * colors, image)
    return tinted.astype(np.uint8)


def heat(x: Tensor, top: float) -> Pixels:
    """Colour values from black (0) over red to white.

    Args:
        x: [H, W]; values outside [0, top] get the colour of the nearer end, NaN that of 0.
        top: The value of the lightest colour; if it is 0, everything is black.

    Returns:
        [H, W, 3].
    """
    values = x.detach().double().cpu().nan_to_num().clamp(0, top).numpy() / (top or 1.0)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, stops, channel).round() for channel in zip(*_HEAT, strict=True)]
    return np.stack(channels, -1).astype(np.uint8)


def color_bar(width: int, top: float, text: str) -> Pixels:
    """Draw the colours of `heat` from left to right, with their values.

    Args:
        width: Width of the result; that of a `sheet` to put it below.
        top: The value of the lightest colour.
        text: What the values mean, one line.

    Returns:
        [height, width, 3].
    """
    inner = width - 2 * _GAP
    paper = np.full((3 * _HEADER, width, 3), PAPER, np.uint8)
    paper[_HEADER : 2 * _HEADER, _GAP : _GAP + inner] = heat(torch.linspace(0, 1, inner).expand(_HEADER, -1), 1.0)
    picture = Image.fromarray(paper)
    draw = ImageDraw.Draw(picture)
    _write(draw, _GAP, 4, text)
    for k in range(5):
        value = f"{top * k / 4:.3g}"
        # The first value begins where the bar does, the last one ends with it.
        _write(draw, round(_GAP + k / 4 * (inner - draw.textlength(value, _font()))), 2 * _HEADER + 2, value)
    return np.asarray(picture)


def captioned(image: Pixels, text: str) -> Pixels:
    """Write into the lower left corner, on black.

    Args:
        image: [H, W, 3].
        text: What to write, one line; its end is cut off where the image ends.

    Returns:
        A new [H, W, 3].
    """
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    width, top = draw.textlength(text, _font()), picture.height - _FONT_SIZE
    draw.rectangle((0, top - 4, width + 6, picture.height), fill=(0, 0, 0))
    _write(draw, 3, top - 3, text)
    return np.asarray(picture)


def with_lines_below(image: Pixels, lines: Sequence[str]) -> Pixels:
    """Write below an image, which stays whole.

    Args:
        image: [H, W, 3].
        lines: What to write; a line that is longer than the image loses its end.

    Returns:
        A new [H + 16 a line, W, 3].
    """
    step = _FONT_SIZE + 3
    strip = np.full((step * len(lines), image.shape[1], 3), PAPER, np.uint8)
    picture = Image.fromarray(np.concatenate([image, strip]))
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        _write(draw, 2, len(image) + i * step, line)
    return np.asarray(picture)


def sheet(headers: Sequence[str], rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """Put cells of one size side by side and below each other, under a line of headers.

    Args:
        headers: One for each column.
        rows: Cells [H, W, 3] of each row, at least one row.

    Returns:
        [height, width, 3].
    """
    height, width = (n + _GAP for n in rows[0][0].shape[:2])
    paper = np.full((_HEADER + len(rows) * height, len(headers) * width + _GAP, 3), PAPER, np.uint8)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            top, left = _HEADER + i * height, _GAP + j * width
            paper[top : top + height - _GAP, left : left + width - _GAP] = cell
    picture = Image.fromarray(paper)
    draw = ImageDraw.Draw(picture)
    for j, header in enumerate(headers):
        _write(draw, _GAP + j * width, 4, header)
    return np.asarray(picture)


def _write(draw: ImageDraw.ImageDraw, left: int, top: int, text: str) -> None:
    draw.text((left, top), text, fill=(255, 255, 255), font=_font())


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)
