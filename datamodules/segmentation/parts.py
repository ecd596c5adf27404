"""Masks that are stored as one black and white picture for each structure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamodules.segmentation.decoding import (
    DECODE_ERRORS,
    UInt8Array,
    open_upright,
    read_raw_mask,
    reason_for,
    to_class_ids,
)


def read_binary_mask(path: Path) -> npt.NDArray[np.bool_]:
    """Decode a mask of one structure.

    Args:
        path: Mask file with the values {0, 1} or {0, 255}; of a palette file (GIF) the colours count, not
            the indices, because writers number black and white as they like.

    Returns:
        Array [height, width], true inside the structure; upright if the file has an EXIF orientation.

    Raises:
        ValueError: If the file cannot be decoded or holds other values, naming it.
    """
    try:
        with open_upright(path) as image:
            values = np.asarray(image.convert("L"), dtype=np.int64) if image.mode in {"P", "PA"} else None
        mask = to_class_ids(read_raw_mask(path) if values is None else values, num_classes=2)
    except DECODE_ERRORS as error:
        msg = f"{path.parent.name}/{path.name}: {reason_for(error)}"
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
        ValueError: If a file cannot be decoded or is no black and white mask, or the files differ in
            size, naming the file.
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
