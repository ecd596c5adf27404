"""Masks that are stored as one black and white picture for each structure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from datamodules.segmentation.decoding import UInt8Array, read_raw_mask, to_class_ids


def read_binary_mask(path: Path) -> npt.NDArray[np.bool_]:
    """Decode a mask of one structure.

    Args:
        path: Mask file with the values {0, 1} or {0, 255}; of a palette file (GIF) the colours count, not
            the indices, because writers number black and white as they like.

    Returns:
        Array [height, width], true inside the structure.

    Raises:
        OSError: If the file cannot be decoded.
        ValueError: If it holds other values, naming the file.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image.convert("L"), dtype=np.int64) if image.mode in {"P", "PA"} else None
        mask = to_class_ids(read_raw_mask(path) if values is None else values, num_classes=2)
    except OSError as error:
        msg = f"{path.parent.name}/{path.name}: {error}"
        raise OSError(msg) from error
    except ValueError as error:
        msg = f"{path.parent.name}/{path.name}: {error}"
        raise ValueError(msg) from error
    return mask > 0


def read_parts(parts: Sequence[tuple[int, Path]]) -> UInt8Array:
    """Put the masks of several structures on top of each other.

    Args:
        parts: Class id and mask file of each structure; where two overlap the later one stays. At least
            one.

    Returns:
        uint8 array [height, width] of class ids, 0 where there is no structure.

    Raises:
        OSError: If a file cannot be decoded.
        ValueError: If a file is no black and white mask, or the files differ in size, naming the file.
    """
    whole: UInt8Array | None = None
    for class_id, path in parts:
        inside = read_binary_mask(path)
        if whole is None:
            whole = np.zeros(inside.shape, dtype=np.uint8)
        if inside.shape != whole.shape:
            (height, width), (other_height, other_width) = inside.shape, whole.shape
            msg = (
                f"{path.parent.name}/{path.name}: is {width}x{height}, but {parts[0][1].name} of the same image is "
                f"{other_width}x{other_height} (width x height)"
            )
            raise ValueError(msg)
        whole[inside] = class_id
    if whole is None:
        msg = "Expected argument `parts` to hold at least one mask file, but it is empty."
        raise ValueError(msg)
    return whole
