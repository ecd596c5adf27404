"""What drawn images of every kind have in common on disk; the same images always give the same bytes."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from datamodules.artifact_files import parquet_bytes
from datamodules.atomic import write_atomically

UInt8Array = npt.NDArray[np.uint8]
RowT = TypeVar("RowT")
_SHOWN = 5


class Pixels(NamedTuple):
    """Drawn images as they are written.

    Attributes:
        images: uint8 array [B, size, size, 3], or [B, size, size] where they are grey.
        masks: uint8 array [B, size, size] of class ids; None without masks.
        confidence: One number a pair; None without masks.
    """

    images: UInt8Array
    masks: UInt8Array | None = None
    confidence: list[float] | None = None


class Layout(Protocol):
    """How one kind of drawn images lies in a folder."""

    name: str
    schema: pa.Schema

    def extras(self) -> dict[str, Any]:
        """Return what the manifest says besides the origin."""
        ...

    def taken(self, folder: Path) -> list[str]:
        """List what is in the way in a folder that was not drawn into before."""
        ...

    def files(self, block: int) -> list[str]:
        """Name the files of a block, relative to the folder."""
        ...

    def check(self, drawn: object, seeds: Sequence[int], num_classes: int | None) -> Pixels:
        """Turn what a module drew for some seeds into what is written, or refuse it."""
        ...

    def write(self, folder: Path, block: int, pixels: Pixels) -> dict[str, Any]:
        """Write the files of a block; returns what its part has to say."""
        ...

    def rows(self, block: int, part: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Return the rows of the table for a block, given what its part says."""
        ...


def require_tensors(drawn: object, names: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
    """Take tensors out of what a module drew.

    Args:
        drawn: Should be a mapping of these names, and of `seed` [B], to tensors on any device.
        names: Which ones.
        seeds: The seeds that were asked for.

    Returns:
        The tensors, on the CPU.

    Raises:
        TypeError: Something is missing.
        ValueError: `seed` is not what was asked for.
    """
    wanted = (*names, "seed")
    if not isinstance(drawn, Mapping) or not all(isinstance(drawn.get(name), Tensor) for name in wanted):
        got = sorted(drawn) if isinstance(drawn, Mapping) else type(drawn).__name__
        msg = f"Expected `draw` to return a dict of the tensors {', '.join(wanted)}, but got {got}."
        raise TypeError(msg)
    *tensors, seed = (drawn[name].detach().cpu() for name in wanted)
    if seed.tolist() != list(seeds):
        msg = f"Expected `draw` to return the seeds that it was asked for, but got {seed.tolist()} for {list(seeds)}."
        raise ValueError(msg)
    return tensors


def require_finite(seeds: Sequence[int], *values: Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        seeds: Seeds of the images, for the message.
        values: Tensors [B, ...].

    Raises:
        ValueError: One of them holds such a number.
    """
    if not all(x.isfinite().all() for x in values):
        bad = [seed for seed, *own in zip(seeds, *values, strict=True) if not all(x.isfinite().all() for x in own)]
        msg = (
            f"Expected `draw` to return finite numbers, but got others for the seeds {bad[:_SHOWN]}: has training "
            "diverged?"
        )
        raise ValueError(msg)


def to_bytes(image: Tensor) -> UInt8Array:
    """Round images [B, C, H, W] in [0, 1] to uint8 [B, H, W, C]; values outside are clipped."""
    rounded = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).numpy())


def png_bytes(pixels: UInt8Array) -> bytes:
    """Encode [H, W] as a grey picture, [H, W, 3] as a coloured one."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path, names: Sequence[str], pixels: Pixels) -> None:
    """Write images as files of their own, each followed by its mask if there are any.

    Args:
        folder: Where they belong.
        names: Their files, relative to the folder.
        pixels: What they are.

    Raises:
        OSError: A file could not be written.
    """
    kinds = (pixels.images,) if pixels.masks is None else (pixels.images, pixels.masks)
    pictures = (picture for own in zip(*kinds, strict=True) for picture in own)
    for name, picture in zip(names, pictures, strict=True):
        write_atomically(folder / name, png_bytes(picture))


def table_bytes(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> bytes:
    """Encode rows as Parquet, see `parquet_bytes`."""
    columns = zip(*rows, strict=True)
    return parquet_bytes(pa.table(dict(zip(schema.names, map(list, columns), strict=True)), schema=schema))


def has_columns(path: Path, schema: pa.Schema) -> bool:
    """Whether a file is a table that has all columns of a schema."""
    try:
        return set(schema.names) <= set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        return False


def read_table(path: Path, schema: pa.Schema) -> list[tuple[Any, ...]]:
    """Read the rows of a table.

    Args:
        path: Parquet file.
        schema: Its columns.

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
        columns: dict[str, list[Any]] = pq.read_table(path, columns=schema.names).cast(schema).to_pydict()
        return list(zip(*(columns[name] for name in schema.names), strict=True))
    except (pa.ArrowException, KeyError) as error:
        msg = (
            f"Expected `synthetic_images` with a table of {', '.join(schema.names)}, but {path} is none "
            f"({type(error).__name__}); copy the folder again, or draw it anew."
        )
        raise ValueError(msg) from error
