"""From image and mask files to uint8 arrays."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]

IGNORE = 255

_ORIENTATION_TAG = 0x0112
# EXIF 2.32, tag 0x0112: what turns the stored pixels into the picture that was seen.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})


class DecodedImage(NamedTuple):
    """One image file in memory.

    Attributes:
        pixels: uint8 array [size, size, 3].
        original_size: (height, width) of the upright picture in the file.
        orientation: EXIF orientation that was applied, 1 for none.
    """

    pixels: UInt8Array
    original_size: tuple[int, int]
    orientation: int


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if value in _TRANSPOSE else 1


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if orientation in _SWAPS_SIDES else (height, width)


def probe_size(path: Path) -> tuple[int, int]:
    """Read the size of a picture from the head of its file.

    Args:
        path: Image or mask file.

    Returns:
        (height, width) after EXIF orientation.
    """
    with Image.open(path) as image:
        return _upright_size(image, _orientation(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Above 8 bits there is no fixed white: X-ray files use 10, 12 or 16 bits, signed or not.
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(high - low):
            msg = "holds values that are not finite"
            raise ValueError(msg)
        scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
        image = Image.fromarray(np.rint(scaled).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path: Path, size: int) -> DecodedImage:
    """Decode an image file into a square of `size` pixels.

    Grey, palette and transparent images become RGB, images above 8 bits are stretched from their own minimum
    to their own maximum, EXIF orientation is applied. Resizing is bilinear with antialiasing (Pillow's), and
    changes the aspect ratio of images that are not square.

    Args:
        path: Image file.
        size: Side of the result in pixels.

    Returns:
        Pixels, original size and applied orientation.

    Raises:
        OSError: If the file cannot be decoded.
        ValueError: If it holds values that are not finite.
    """
    with Image.open(path) as image:
        orientation = _orientation(image)
        original_size = _upright_size(image, orientation)
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the work; twice the target keeps the
        # antialiasing of the last step.
        image.draft(None, (2 * size, 2 * size))
        rgb = _to_rgb(image)
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
        if orientation in _TRANSPOSE:
            rgb = rgb.transpose(_TRANSPOSE[orientation])
        return DecodedImage(np.array(rgb, dtype=np.uint8), original_size, orientation)


def read_raw_mask(path: Path) -> npt.NDArray[np.int64]:
    """Decode a mask file to the numbers stored in it.

    Args:
        path: Mask file: one bit, grey of any depth, palette (the indices count) or RGB with three equal
            channels.

    Returns:
        Array [height, width].

    Raises:
        OSError: If the file cannot be decoded.
        ValueError: If it is a colour picture.
    """
    with Image.open(path) as image:
        values = np.asarray(image.getchannel(0) if image.mode in {"LA", "PA"} else image)
    if values.ndim == 3:
        values = values[..., :3]
        if (values != values[..., :1]).any():
            msg = "is a colour picture, but a mask holds one number a pixel (grey or palette)"
            raise ValueError(msg)
        values = values[..., 0]
    return values.astype(np.int64)


def to_class_ids(values: npt.NDArray[np.int64], num_classes: int) -> UInt8Array:
    """Turn stored numbers into class ids.

    For two classes {0, 255} means background and foreground, as {0, 1} does; for more classes 255 marks
    pixels that nothing is learned from or measured on.

    Args:
        values: Numbers of a mask file, [height, width].
        num_classes: Number of classes, background included.

    Returns:
        uint8 array of the same shape.

    Raises:
        ValueError: If a number is neither, naming those numbers.
    """
    if values.size == 0:
        msg = "is empty"
        raise ValueError(msg)
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < num_classes:
        return values.astype(np.uint8)
    # np.unique sorts; counting is ten times faster on the twelve megapixels of a full-size ISIC mask.
    if low >= 0 and high <= IGNORE:
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=IGNORE + 1)).tolist()
    else:
        present = np.unique(values).tolist()
    if num_classes == 2 and set(present) <= {0, IGNORE}:
        return (values > 0).astype(np.uint8)
    wrong = [value for value in present if not 0 <= value < num_classes and (value != IGNORE or num_classes == 2)]
    if wrong:
        names = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        rule = "{0, 1} or {0, 255}" if num_classes == 2 else f"0 to {num_classes - 1}, or {IGNORE} for ignore"
        msg = f"ids out of range: {names} (expected {rule})"
        raise ValueError(msg)
    return values.astype(np.uint8)


def fit_mask(mask: UInt8Array, image: DecodedImage, size: int, size_may_differ: bool) -> UInt8Array:
    """Bring a mask to the size and orientation of its decoded image.

    Args:
        mask: Class ids as stored, [height, width].
        image: The decoded image.
        size: Side of the result in pixels.
        size_may_differ: Accept masks that were stored at another resolution than their images.

    Returns:
        uint8 array [size, size], resized by nearest neighbour.

    Raises:
        ValueError: If the sizes differ and may not.
    """
    height, width = image.original_size
    turned = image.orientation in _SWAPS_SIDES and height != width
    if turned and mask.shape == (width, height):
        # The mask was drawn on the stored pixels and has no EXIF of its own: it turns with its image.
        mask = np.asarray(Image.fromarray(mask).transpose(_TRANSPOSE[image.orientation]))
    if mask.shape != (height, width) and not size_may_differ:
        msg = f"size mismatch: image {width}x{height}, mask {mask.shape[1]}x{mask.shape[0]} (width x height)"
        raise ValueError(msg)
    if mask.shape == (size, size):
        return mask
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
