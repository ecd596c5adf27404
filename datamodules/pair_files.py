"""How drawn pairs lie on disk: names, pictures and the table; the same pairs always give the same bytes."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

UInt8Array = npt.NDArray[np.uint8]

_SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("mask_file_name", pa.string()),
        ("seed", pa.int64()),
        ("confidence", pa.float32()),
    ]
)


class Row(NamedTuple):
    """One drawn pair.

    Attributes:
        file_name: Image, relative to the folder.
        mask_file_name: Mask, relative to the folder.
        seed: What it was drawn from.
        confidence: How sure the module is of the mask, in [0, 1].
    """

    file_name: str
    mask_file_name: str
    seed: int
    confidence: float


def image_name(seed: int) -> str:
    """Name the image of a seed, relative to the folder."""
    return f"images/{seed:09d}.png"


def mask_name(seed: int) -> str:
    """Name the mask of a seed, relative to the folder."""
    return f"masks/{seed:09d}.png"


class Pixels(NamedTuple):
    """Drawn pairs as they are written.

    Attributes:
        images: uint8 array [B, size, size, 3].
        masks: uint8 array [B, size, size] of class ids.
        confidence: One number a pair.
    """

    images: UInt8Array
    masks: UInt8Array
    confidence: list[float]


def to_pixels(drawn: object, seeds: Sequence[int], size: int, num_classes: int | None) -> Pixels:
    """Check what a module drew, and turn it into what is written.

    Args:
        drawn: A mapping of `image` [B, 3, size, size] (or one channel) in [0, 1], `mask` [B, size, size] of class
            ids, `confidence` [B] and `seed` [B], on any device.
        seeds: The seeds that were asked for.
        size: Side of the images that was asked for.
        num_classes: Number of classes; None for as many as 8 bits hold.

    Returns:
        The pixels, on the CPU.

    Raises:
        TypeError: Something is missing.
        ValueError: These are other pairs, or hold values that cannot be written.
    """
    names = ("image", "mask", "confidence", "seed")
    if not isinstance(drawn, Mapping) or not all(isinstance(drawn.get(name), Tensor) for name in names):
        got = sorted(drawn) if isinstance(drawn, Mapping) else type(drawn).__name__
        msg = f"Expected `draw` to return a dict of the tensors {', '.join(names)}, but got {got}."
        raise TypeError(msg)
    image, mask, confidence, seed = (drawn[name].detach().cpu() for name in names)
    count = len(seeds)
    if seed.tolist() != list(seeds):
        msg = f"Expected `draw` to return the seeds that it was asked for, but got {seed.tolist()} for {list(seeds)}."
        raise ValueError(msg)
    shapes = [tuple(x.shape) for x in (image, mask, confidence)]
    if shapes not in ([(count, channels, size, size), (count, size, size), (count,)] for channels in (1, 3)):
        msg = (
            f"Expected `draw` to return `image` [{count}, 3, {size}, {size}], `mask` [{count}, {size}, {size}] and "
            f"`confidence` [{count}], but got {', '.join(str(list(shape)) for shape in shapes)}."
        )
        raise ValueError(msg)
    if not (image.isfinite().all() and confidence.isfinite().all()):
        bad = [s for s, x, c in zip(seeds, image, confidence, strict=True) if not (x.isfinite().all() and c.isfinite())]
        msg = (
            f"Expected `draw` to return finite numbers, but got others for the seeds {bad[:5]}: has training diverged?"
        )
        raise ValueError(msg)
    last = 255 if num_classes is None else num_classes - 1
    low, high = int(mask.min()), int(mask.max())
    if low < 0 or high > min(last, 255):
        msg = f"Expected `draw` to return masks of ids from 0 to {min(last, 255)}, but got {low} to {high}."
        raise ValueError(msg)
    images = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    channels_last = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    # Via float32: what the table holds is then what the part of a block held, exactly.
    return Pixels(channels_last, mask.to(torch.uint8).numpy(), confidence.float().tolist())


def png_bytes(pixels: UInt8Array) -> bytes:
    """Encode [H, W] as a grey picture, [H, W, 3] as a coloured one."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table_bytes(rows: Sequence[Row]) -> bytes:
    """Encode rows as Parquet: all options are said, and no metadata tells when or where."""
    table = pa.table({name: [getattr(row, name) for row in rows] for name in _SCHEMA.names}, schema=_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="snappy", version="2.6", row_group_size=65536, store_schema=False)
    return buffer.getvalue()


def read_table(path: Path) -> list[Row]:
    """Read the rows of a table.

    Args:
        path: Parquet file.

    Returns:
        Its rows, in their order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no Parquet file, or lacks a column.
    """
    if not path.is_file():
        msg = f"Expected `synthetic_images` with its table, but there is no {path}; copy the folder again."
        raise FileNotFoundError(msg)
    try:
        columns: dict[str, list[Any]] = pq.read_table(path, columns=_SCHEMA.names).cast(_SCHEMA).to_pydict()
        return [Row(*values) for values in zip(*(columns[name] for name in _SCHEMA.names), strict=True)]
    except (pa.ArrowException, KeyError) as error:
        msg = (
            f"Expected `synthetic_images` with a table of {', '.join(_SCHEMA.names)}, but {path} is none "
            f"({type(error).__name__}); copy the folder again, or draw it anew."
        )
        raise ValueError(msg) from error
