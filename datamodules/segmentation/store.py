"""Decoded images in memory, or a promise to decode them, behind one interface."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress

from datamodules.loading import world
from datamodules.segmentation.decoding import DECODE_ERRORS, UInt8Array, reason_for
from datamodules.segmentation.pairs import LabelledArrays, Pair, Problem

log = logging.getLogger(__name__)

_MEGABYTE = 2**20
_BYTES_PER_PIXEL = 4  # three of the image, one of the mask
_BAR_AFTER_SECONDS = 2.0
# Pillow releases the interpreter while it decodes, so threads help; more than this only fight for the disk.
_MAX_THREADS = 16


class Decoded(NamedTuple):
    """One decoded pair.

    Attributes:
        image: uint8 array [size, size, 3].
        mask: uint8 array [size, size] of class ids; None for images that have no mask.
        original_size: (height, width) of the image file.
    """

    image: UInt8Array
    mask: UInt8Array | None
    original_size: tuple[int, int]


Decode = Callable[[Pair], Decoded]
Probe = Callable[[Pair], tuple[int, int]]


@dataclass
class ImageStore:
    """All images of one source.

    Attributes:
        pairs: What the rows are.
        sizes: (height, width) of every image file.
        images: uint8 array [N, size, size, 3]; None if images are decoded on access.
        masks: uint8 array [N, size, size]; None if there are none or they are decoded on access.
        decode: Reads one pair; not needed when everything is in memory.
    """

    pairs: Sequence[Pair]
    sizes: Sequence[tuple[int, int]]
    images: UInt8Array | None = None
    masks: UInt8Array | None = None
    decode: Decode | None = None

    def take(self, rows: Sequence[int]) -> "ImageStore":
        """Copy some rows into a store of their own.

        Args:
            rows: Which images, in their new order.

        Returns:
            A store of only these.
        """
        return ImageStore(
            [self.pairs[row] for row in rows],
            [self.sizes[row] for row in rows],
            None if self.images is None else self.images[list(rows)],
            None if self.masks is None else self.masks[list(rows)],
            self.decode,
        )

    def get(self, row: int) -> tuple[UInt8Array, UInt8Array | None]:
        """Return image and mask of a row; they must not be written to.

        Args:
            row: Which image.

        Returns:
            uint8 arrays [size, size, 3] and [size, size] (None without masks).

        Raises:
            ValueError: If the file turns out to be unreadable, naming it.
        """
        if self.images is not None:
            return self.images[row], None if self.masks is None else self.masks[row]
        if self.decode is None:
            msg = "an ImageStore needs either `images` or `decode`"
            raise ValueError(msg)
        pair = self.pairs[row]
        try:
            decoded = self.decode(pair)
        except DECODE_ERRORS as error:
            msg = (
                f"{pair.image}: {reason_for(error)}. It was decoded on access because the images do not fit "
                "`cache_megabytes`; raise it to have every file checked at the start, or remove the file."
            )
            raise ValueError(msg) from error
        return decoded.image, decoded.mask


def store_arrays(arrays: LabelledArrays, image_size: int) -> ImageStore:
    """Take images from memory as they are.

    Args:
        arrays: The images.
        image_size: Side that they must have.

    Returns:
        A store over the same memory.

    Raises:
        ValueError: If a shape does not fit.
    """
    count = len(arrays.keys)
    expected = (count, image_size, image_size)
    if arrays.images.shape != (*expected, 3) or arrays.masks.shape != expected:
        msg = (
            f"Expected argument `arrays` to hold images {[*expected, 3]} and masks {list(expected)}, "
            f"but got {list(arrays.images.shape)} and {list(arrays.masks.shape)}."
        )
        raise ValueError(msg)
    strata = arrays.strata if arrays.strata is not None else [""] * count
    splits = arrays.splits if arrays.splits is not None else [None] * count
    pairs = [
        Pair(key, Path(key), stratum=stratum, split=split)
        for key, stratum, split in zip(arrays.keys, strata, splits, strict=True)
    ]
    images = np.ascontiguousarray(arrays.images, dtype=np.uint8)
    masks = np.ascontiguousarray(arrays.masks, dtype=np.uint8)
    return ImageStore(pairs, [(image_size, image_size)] * count, images, masks)


def fingerprint(store: ImageStore, rows: dict[str, list[int]]) -> str:
    """Identify a data set and its split.

    Args:
        store: The images.
        rows: Rows of each split.

    Returns:
        SHA-256 in hexadecimal over sorted lines of key, original size and split.
    """
    lines = sorted(
        f"{store.pairs[row].key}\t{store.sizes[row][0]}x{store.sizes[row][1]}\t{split}"
        for split, members in rows.items()
        for row in members
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def build_store(
    pairs: Sequence[Pair], decode: Decode, probe: Probe, image_size: int, cache_megabytes: int, what: str
) -> tuple[ImageStore, list[Problem]]:
    """Decode all pairs into memory if they fit, else look only at the heads of their files.

    Args:
        pairs: Pairs without a known problem.
        decode: Reads one pair.
        probe: Reads the heads of its files, checks them and returns (height, width) of the image.
        image_size: Side of the decoded squares in pixels.
        cache_megabytes: Memory budget.
        what: Names the images in the log.

    Returns:
        The store without the pairs that failed, and why each of those failed.
    """
    needed = len(pairs) * image_size**2 * _BYTES_PER_PIXEL / _MEGABYTE
    cached = needed <= cache_megabytes
    size = f"{len(pairs)} {what} at {image_size}x{image_size}: {needed:.1f} MB"
    if cached:
        _say(f"{size}, kept in memory (cache_megabytes={cache_megabytes})")
        return _decode_all(pairs, decode, image_size, what)
    _say(f"{size}, more than cache_megabytes={cache_megabytes}: decoded on access, file heads checked now")
    return _probe_all(pairs, decode, probe, what)


@rank_zero_only
def _say(message: str) -> None:
    log.info(message)


def _decode_all(pairs: Sequence[Pair], decode: Decode, size: int, what: str) -> tuple[ImageStore, list[Problem]]:
    count = len(pairs)
    images: UInt8Array = np.empty((count, size, size, 3), dtype=np.uint8)
    masks: UInt8Array | None = np.empty((count, size, size), dtype=np.uint8)
    if not any(pair.masks for pair in pairs):
        masks = None

    def fill(row: int) -> tuple[int, int] | Problem:
        try:
            decoded = decode(pairs[row])
        except DECODE_ERRORS as error:
            return Problem(pairs[row].image, reason_for(error))
        images[row] = decoded.image
        if masks is not None and decoded.mask is not None:
            masks[row] = decoded.mask
        return decoded.original_size

    sizes, problems, good = collect(fill, count, f"decoding {what}")
    if problems:
        images = images[good]
        masks = None if masks is None else masks[good]
    return ImageStore([pairs[row] for row in good], sizes, images, masks), problems


def _probe_all(pairs: Sequence[Pair], decode: Decode, probe: Probe, what: str) -> tuple[ImageStore, list[Problem]]:
    def look(row: int) -> tuple[int, int] | Problem:
        try:
            return probe(pairs[row])
        except DECODE_ERRORS as error:
            return Problem(pairs[row].image, reason_for(error))

    sizes, problems, good = collect(look, len(pairs), f"checking {what}")
    return ImageStore([pairs[row] for row in good], sizes, decode=decode), problems


def collect(
    work: Callable[[int], tuple[int, int] | Problem], count: int, title: str
) -> tuple[list[tuple[int, int]], list[Problem], list[int]]:
    """Do the same work on many files in threads, with a progress bar.

    Args:
        work: Handles the file of a number and returns the picture's (height, width), or what is wrong with it.
        count: Number of files.
        title: Names the work in the progress bar.

    Returns:
        Sizes of the files that are fine, what is wrong with the others, and the numbers of those that are fine.
    """
    sizes: list[tuple[int, int]] = []
    problems: list[Problem] = []
    good: list[int] = []
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for row, result in enumerate(_with_bar(pool.map(work, range(count)), count, title)):
            if isinstance(result, Problem):
                problems.append(result)
            else:
                good.append(row)
                sizes.append(result)
    return sizes, problems, good


def _with_bar(
    results: Iterable[tuple[int, int] | Problem], count: int, title: str
) -> Iterator[tuple[int, int] | Problem]:
    """Pass results on, with a progress bar once it has taken longer than a person likes to wait."""
    console = Console(stderr=True)
    silent = not console.is_terminal or world()[1] != 0
    bar = Progress(console=console, transient=True, disable=silent)
    task = bar.add_task(title, total=count)
    begun = time.monotonic()
    try:
        for result in results:
            if not bar.live.is_started and time.monotonic() - begun > _BAR_AFTER_SECONDS:
                bar.start()
            bar.advance(task)
            yield result
    finally:
        bar.stop()
