"""Images as uint8 tensors, or a promise to decode them."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from datamodules.classification.contents import Contents, UInt8Array
from datamodules.segmentation.decoding import DECODE_ERRORS, open_upright, read_head, reason_for, to_rgb
from datamodules.segmentation.pairs import Problem
from datamodules.segmentation.store import collect

_MEGABYTE = 2**20
_CHUNK = 1024

Rows = Sequence[int] | npt.NDArray[np.int64]


class Encoded(Protocol):
    """An image that is no file of its own; `str` says where it is."""

    def read(self) -> bytes:
        """Return what a file of the image would hold."""
        ...


class Pixels(Protocol):
    """Images by row: a PixelStore, or several as one."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def fetch(self, rows: Rows) -> Tensor:
        """Copy images, uint8 [B, C, size, size]."""
        ...


@dataclass
class PixelStore:
    """The images of one source, square and 8-bit.

    Attributes:
        size: Side in pixels.
        channels: 1 or 3.
        images: uint8 tensor [N, C, size, size]; None if images are decoded on access.
        paths: Files, or what takes their place; None if the images are in memory.
    """

    size: int
    channels: int
    images: Tensor | None = None
    paths: Sequence[Path | Encoded] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths or ()) if self.images is None else len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the paths of decoded images out: workers need them no more."""
        return {**self.__dict__, "paths": self.paths if self.images is None else None}

    @property
    def megabytes(self) -> int:
        """Memory that the images take, rounded up."""
        return 0 if self.images is None else -(-self.images.nbytes // _MEGABYTE)

    def fetch(self, rows: Rows) -> Tensor:
        """Copy images.

        Args:
            rows: Which.

        Returns:
            uint8 tensor [B, C, size, size].

        Raises:
            ValueError: If a file turns out to be unreadable, naming it.
        """
        if self.images is not None:
            return self.images[torch.from_numpy(np.asarray(rows, dtype=np.int64))]
        out = torch.empty((len(rows), self.channels, self.size, self.size), dtype=torch.uint8)
        for place, row in enumerate(rows):
            out[place] = self._decode(int(row))
        return out

    def take(self, rows: Rows) -> "PixelStore":
        """Keep some of the images, in a new order.

        Args:
            rows: Which.
        """
        paths = None if self.paths is None else [self.paths[row] for row in rows]
        images = None if self.images is None else self.fetch(rows)
        return PixelStore(self.size, self.channels, images, paths)

    def _decode(self, row: int) -> Tensor:
        path = (self.paths or ())[row]
        try:
            return torch.from_numpy(read_square(path, self.size, self.channels)[0])
        except DECODE_ERRORS as error:
            msg = (
                f"{path}: {reason_for(error)}. It was decoded on access because the images do not fit "
                "`cache_megabytes`; raise it to have every file checked at the start, or remove the file."
            )
            raise ValueError(msg) from error


@dataclass
class JoinedPixels:
    """Several stores, one after the other, as one; nothing is copied.

    Attributes:
        stores: The stores.
    """

    stores: Sequence[PixelStore]

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(map(len, self.stores))

    def fetch(self, rows: Rows) -> Tensor:
        """Copy images, see `PixelStore.fetch`.

        Args:
            rows: Which, counted through all stores.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        first = self.stores[0]
        out = torch.empty((len(wanted), first.channels, first.size, first.size), dtype=torch.uint8)
        start = 0
        for store in self.stores:
            own = np.flatnonzero((wanted >= start) & (wanted < start + len(store)))
            if len(own):
                out[torch.from_numpy(own)] = store.fetch(wanted[own] - start)
            start += len(store)
        return out


def read_square(path: Path | Encoded, size: int, channels: int) -> tuple[UInt8Array, tuple[int, int]]:
    """Decode the centre of an image file into a square.

    The short side is resized (bilinear with antialiasing), the long side cropped to the middle. Palette and
    transparent images become RGB, images above 8 bits are stretched from their minimum to their maximum, EXIF
    orientation is applied.

    Args:
        path: Image file, or what takes its place.
        size: Side of the result in pixels.
        channels: 3 for colour, 1 for grey.

    Returns:
        uint8 array [channels, size, size], and (height, width) of the upright picture.

    Raises:
        OSError: If the file cannot be decoded.
        ValueError: If it holds values that are not finite.
    """
    file = _opened(path)
    head = read_head(file)
    with open_upright(file) as image:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the work; twice the target keeps the
        # antialiasing of the last step.
        image.draft(None, (2 * size, 2 * size))
        picture = to_rgb(image)
        if channels == 1:
            picture = picture.convert("L")
        width, height = picture.size
        side = min(width, height)
        if (width, height) != (size, size):
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = np.array(picture, dtype=np.uint8).reshape(size, size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), head.size


def build_pixels(
    contents: Contents, size: int, channels: int, cache_megabytes: int, what: str
) -> tuple[PixelStore, list[int], list[Problem]]:
    """Decode all images into memory if they fit, else look only at the heads of their files.

    Args:
        contents: The images.
        size: Side of the squares in pixels.
        channels: 1 or 3.
        cache_megabytes: Memory budget for files; images that are in memory anyway stay there.
        what: Names the images in the progress bar.

    Returns:
        A store of the usable images, their rows in `contents`, and what is wrong with the others.
    """
    if contents.images is not None:
        return PixelStore(size, channels, resize(contents.images, size)), list(range(len(contents.keys))), []
    return decode_files(list(contents.paths or ()), size, channels, cache_megabytes, what)


def decode_files(
    paths: Sequence[Path | Encoded], size: int, channels: int, cache_megabytes: int, what: str
) -> tuple[PixelStore, list[int], list[Problem]]:
    """Decode image files into memory if they fit, else look only at their heads; each is opened once.

    Args:
        paths: The files, or what takes their place.
        size: Side of the squares in pixels.
        channels: 1 or 3.
        cache_megabytes: Memory budget.
        what: Names the images in the progress bar.

    Returns:
        A store of the usable images, their places in `paths`, and what is wrong with the others.
    """
    count = len(paths)
    cached = count * channels * size**2 <= cache_megabytes * _MEGABYTE
    images = torch.empty((count if cached else 0, channels, size, size), dtype=torch.uint8)

    def handle(row: int) -> tuple[int, int] | Problem:
        try:
            if not cached:
                return read_head(_opened(paths[row])).size
            pixels, original = read_square(paths[row], size, channels)
        except DECODE_ERRORS as error:
            return Problem(Path(str(paths[row])), reason_for(error))
        images[row] = torch.from_numpy(pixels)
        return original

    _, problems, good = collect(handle, count, f"decoding {what}" if cached else f"checking {what}")
    store = PixelStore(size, channels, images if cached else None, paths)
    return store.take(good) if problems else store, good, problems


def _opened(path: Path | Encoded) -> Path | BytesIO:
    return path if isinstance(path, Path) else BytesIO(path.read())


def resize(images: UInt8Array, size: int) -> Tensor:
    """Bring images from memory to one size.

    Args:
        images: uint8 array [N, H, W, C].
        size: Side of the result in pixels.

    Returns:
        uint8 tensor [N, C, size, size]: the square in the middle, resized (bilinear with antialiasing).
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    height, width = tensor.shape[2:]
    if height == width == size:
        return tensor
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    tensor = tensor[:, :, top : top + side, left : left + side]
    out = torch.empty((*tensor.shape[:2], size, size), dtype=torch.uint8)
    for start in range(0, len(tensor), _CHUNK):
        chunk = tensor[start : start + _CHUNK].float()
        resized = interpolate(chunk, (size, size), mode="bilinear", antialias=True)
        out[start : start + _CHUNK] = resized.round_().clamp_(0, 255).to(torch.uint8)
    return out
