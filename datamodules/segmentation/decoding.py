"""From image and mask files to uint8 arrays."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

UInt8Array = npt.NDArray[np.uint8]

IGNORE = 255

# What a broken or hostile file makes Pillow raise.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)

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


class Head(NamedTuple):
    """What is known of a picture before its pixels are read.

    Attributes:
        size: (height, width) of the upright picture.
        orientation: EXIF orientation, 1 for upright; None where the file says nothing about it.
    """

    size: tuple[int, int]
    orientation: int | None


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


def reason_for(error: Exception) -> str:
    """Say in a few words what an exception of a decoder means."""
    if isinstance(error, ValueError):
        return str(error)
    return f"cannot be decoded ({type(error).__name__}: {error})"


def _head(image: Image.Image) -> tuple[Head, Image.Transpose | None]:
    """Read the head of a file just opened, and what its pixels still need to become upright."""
    width, height = image.size
    # Pillow turns a TIFF while it loads the pixels.
    turns_itself = isinstance(image, TiffImageFile)
    if isinstance(image, TiffImageFile):
        # Which of the two sizes it gives before that depends on its version.
        width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        # Without a name it is not mapped into memory: Pillow (13.0) garbles grey and palette TIFFs that are
        # both mapped and turned by a quarter.
        image.filename = ""
    orientation = image.getexif().get(_ORIENTATION_TAG)
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        return Head((height, width), None), None
    head = Head((width, height) if orientation in _SWAPS_SIDES else (height, width), orientation)
    return head, None if turns_itself or orientation == 1 else _TRANSPOSE[orientation]


def read_head(path: Path | BinaryIO) -> Head:
    """Read size and orientation of a picture from the head of its file.

    Args:
        path: Image or mask file, or its bytes.

    Returns:
        Upright size and EXIF orientation.

    Raises:
        OSError: If the file is no picture.
    """
    with Image.open(path) as image:
        return _head(image)[0]


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture of any mode into 8-bit RGB; above 8 bits it is stretched from its own minimum to its maximum.

    Args:
        image: The picture.

    Raises:
        ValueError: It holds values that are not finite.
    """
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
        head, turn = _head(image)
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the work; twice the target keeps the
        # antialiasing of the last step.
        image.draft(None, (2 * size, 2 * size))
        rgb = to_rgb(image)
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
        if turn is not None:
            rgb = rgb.transpose(turn)
        return DecodedImage(np.array(rgb, dtype=np.uint8), head.size, head.orientation or 1)


@contextmanager
def open_upright(path: Path | BinaryIO) -> Iterator[Image.Image]:
    """Open a picture and turn it as its EXIF orientation says, if it has one.

    Args:
        path: Image or mask file, or its bytes.

    Yields:
        The picture.

    Raises:
        OSError: If the file cannot be decoded.
    """
    with Image.open(path) as image:
        turn = _head(image)[1]
        yield image if turn is None else image.transpose(turn)


def read_raw_mask(path: Path) -> npt.NDArray[np.int64]:
    """Decode a mask file to the numbers stored in it, upright if it has an EXIF orientation.

    Args:
        path: Mask file: one bit, grey of any depth, palette (the indices count) or RGB with three equal
            channels.

    Returns:
        Array [height, width].

    Raises:
        OSError: If the file cannot be decoded.
        ValueError: If it is a colour picture.
    """
    with open_upright(path) as image:
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


def turns_with_image(
    mask_size: tuple[int, int], image_size: tuple[int, int], orientation: int, size_may_differ: bool
) -> bool:
    """Decide whether a mask without EXIF lies on the stored pixels of its image or on the upright picture.

    Only the shape can tell, so quarter turns of images that are not square are decided and all others are
    refused: a mask turned the wrong way would be trained on without a sign of it.

    Args:
        mask_size: (height, width) of the mask.
        image_size: (height, width) of the upright image.
        orientation: EXIF orientation of the image, 1 for none.
        size_may_differ: Accept masks that were stored at another resolution than their images.

    Returns:
        True if the mask has to be turned like the image, false if it is upright already.

    Raises:
        ValueError: If the sizes differ and may not, or both readings are possible.
    """
    height, width = image_size
    upright = mask_size == image_size
    stored = mask_size == ((width, height) if orientation in _SWAPS_SIDES else image_size)
    if not (upright or stored or size_may_differ):
        msg = f"size mismatch: image {width}x{height}, mask {mask_size[1]}x{mask_size[0]} (width x height)"
        raise ValueError(msg)
    if orientation == 1:
        return False
    if upright == stored:
        msg = f"ambiguous: image has EXIF orientation {orientation} and the mask none; save the image upright"
        raise ValueError(msg)
    return stored


def fit_mask(
    mask: UInt8Array, image: DecodedImage, size: int, size_may_differ: bool, is_upright: bool = False
) -> UInt8Array:
    """Bring a mask to the size and orientation of its decoded image.

    Args:
        mask: Class ids, [height, width].
        image: The decoded image.
        size: Side of the result in pixels.
        size_may_differ: Accept masks that were stored at another resolution than their images.
        is_upright: The mask file said how it is turned, and `mask` is upright; else an orientation of the
            image leaves open which of the two the mask belongs to, see `turns_with_image`.

    Returns:
        uint8 array [size, size], resized by nearest neighbour.

    Raises:
        ValueError: If the sizes differ and may not, or it is ambiguous how the mask is turned.
    """
    orientation = 1 if is_upright else image.orientation
    height, width = mask.shape
    if turns_with_image((height, width), image.original_size, orientation, size_may_differ):
        mask = np.asarray(Image.fromarray(mask).transpose(_TRANSPOSE[orientation]))
    if mask.shape == (size, size):
        return mask
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
