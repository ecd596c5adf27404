"""Augmentations of single 8-bit images by Pillow, for the workers of a DataLoader."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from PIL.Image import Resampling, Transform

from datamodules.segmentation.decoding import UInt8Array
from datamodules.views.crops import Crop
from datamodules.views.policies import KINDS, Plan, ViewSettings

_FILTERS = (
    Resampling.LANCZOS,
    Resampling.BICUBIC,
    Resampling.BILINEAR,
    Resampling.BOX,
    Resampling.HAMMING,
    Resampling.NEAREST,
)
_Operation = Callable[[Image.Image, list[float], int], Image.Image]


def apply_plan(pixels: UInt8Array, plan: Plan, settings: ViewSettings) -> UInt8Array:
    """Make one view of one image.

    Args:
        pixels: Image [S, S, C], C = 1 or 3.
        plan: What is done, of one image.
        settings: What views are made of.

    Returns:
        A new array, of the same shape but for a crop.
    """
    if plan.crop is not None:
        pixels = _cropped(pixels, plan.crop)
    if plan.shift is not None:
        flip, top, left = (int(number) for number in (plan.shift.flip, plan.shift.top, plan.shift.left))
        pixels = _shifted(pixels, bool(flip), top, left, settings.pad)
    if plan.kinds is None or plan.values is None:
        return np.array(pixels)
    fill = round(255 * settings.fill)
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    for kind, values in zip(plan.kinds[0].tolist(), plan.values[0].tolist(), strict=True):
        image = OPERATIONS[KINDS[kind]](image, values, fill)
    if plan.hole is not None:
        image = _cut(image, plan.hole[0].tolist(), fill)
    return np.array(image).reshape(pixels.shape)


def _cropped(pixels: UInt8Array, crop: Crop) -> UInt8Array:
    top, left, height, width = (int(part) for part in (crop.top, crop.left, crop.height, crop.width))
    cut = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    image = Image.fromarray(cut[..., 0] if cut.shape[2] == 1 else cut)
    made = np.array(image.resize((crop.size, crop.size), Resampling.BILINEAR)).reshape(crop.size, crop.size, -1)
    return np.ascontiguousarray(made[:, ::-1]) if bool(crop.flip) else made


@cache
def _reflected(side: int, pad: int) -> npt.NDArray[np.int64]:
    """Where the rows of a padded image come from; padding the image itself takes much longer."""
    return np.pad(np.arange(side), pad, mode="reflect")


def _shifted(pixels: UInt8Array, flip: bool, top: int, left: int, pad: int) -> UInt8Array:
    side = pixels.shape[0]
    source = _reflected(side, pad)
    columns = source[left : left + side]
    return pixels[source[top : top + side]][:, columns[::-1] if flip else columns]


def _level(image: Image.Image, fill: int) -> int | tuple[int, ...]:
    return fill if image.mode == "L" else (fill,) * 3


def _cut(image: Image.Image, values: list[float], fill: int) -> Image.Image:
    """Fill a square: its side and centre (row, column) as shares of the side."""
    side = image.width
    box = []
    for centre in values[1:3]:
        # Pixels whose centres are inside.
        first = math.floor((centre - values[0] / 2) * side - 0.5) + 1
        last = math.ceil((centre + values[0] / 2) * side - 0.5)
        box.append((max(first, 0), min(last, side)))
    (top, bottom), (left, right) = box
    if top < bottom and left < right:
        image = image.copy()
        image.paste(_level(image, fill), (left, top, right, bottom))
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: int) -> Image.Image:
    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.BILINEAR, fillcolor=_level(image, fill))


def _rescaled(image: Image.Image, values: list[float], fill: int) -> Image.Image:
    side = image.width
    first, last = values[0] * side, (1 - values[0]) * side
    return image.crop((first, first, last, last)).resize(image.size, _FILTERS[int(values[1] * len(_FILTERS))])


def _turned(image: Image.Image, values: list[float], fill: int) -> Image.Image:
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + round(255 * values[0])) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


# Of an image, its three values (see `policies.Plan`) and the grey level that fills what comes from outside.
OPERATIONS: dict[str, _Operation] = {
    "identity": lambda image, values, fill: image,
    "brightness": lambda image, values, fill: ImageEnhance.Brightness(image).enhance(values[0]),
    "color": lambda image, values, fill: ImageEnhance.Color(image).enhance(values[0]),
    "contrast": lambda image, values, fill: ImageEnhance.Contrast(image).enhance(values[0]),
    "sharpness": lambda image, values, fill: ImageEnhance.Sharpness(image).enhance(values[0]),
    "smooth": lambda image, values, fill: Image.blend(image.filter(ImageFilter.SMOOTH), image, values[0]),
    "blur": lambda image, values, fill: Image.blend(image.filter(ImageFilter.BLUR), image, values[0]),
    "invert": lambda image, values, fill: Image.blend(ImageOps.invert(image), image, values[0]),
    "autocontrast": lambda image, values, fill: Image.blend(ImageOps.autocontrast(image), image, values[0]),
    "equalize": lambda image, values, fill: Image.blend(ImageOps.equalize(image), image, values[0]),
    "posterize": lambda image, values, fill: ImageOps.posterize(image, int(values[0])),
    "solarize": lambda image, values, fill: ImageOps.solarize(image, math.ceil(255 * values[0])),
    "rotate": lambda image, values, fill: image.rotate(values[0], Resampling.BILINEAR, fillcolor=_level(image, fill)),
    "shear_x": lambda image, values, fill: _affine(image, (1, values[0], 0, 0, 1, 0), fill),
    "shear_y": lambda image, values, fill: _affine(image, (1, 0, 0, values[0], 1, 0), fill),
    "translate_x": lambda image, values, fill: _affine(image, (1, 0, round(values[0] * image.width), 0, 1, 0), fill),
    "translate_y": lambda image, values, fill: _affine(image, (1, 0, 0, 0, 1, round(values[0] * image.width)), fill),
    "cutout": lambda image, values, fill: _cut(image, values, fill),
    "rescale": _rescaled,
    "hue": _turned,
    "gaussian": lambda image, values, fill: image.filter(ImageFilter.GaussianBlur(values[0])),
}
