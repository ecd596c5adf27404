"""Arrays of what was worked out of all training images, once, by their index; kept on disk."""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from numpy.lib.format import open_memmap
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_modules.run_files import written_whole

MANIFEST = "manifest.json"
_SECONDS_BETWEEN_LINES = 10.0

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Column:
    """An array of the cache: one entry for each image.

    Args:
        file: Its name in the folder.
        shape: Of all entries, [N, ...].
        dtype: Of its numbers, by NumPy's name.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class ArrayCache:
    """Arrays by the index of an image, mapped into memory and not read as a whole.

    A folder holds the arrays and `manifest.json`, which says what they are of. The manifest is written last, so a
    folder without one is half-written and is filled again. With several processes each writes the rows of its share of
    the images; they have to see one file system. A second run that wants the same folder waits until the first has
    filled it.

    Args:
        folder: Where the arrays are kept; made if missing.
    """

    argument: str  # what the user calls the folder
    contents: str  # what is kept of the images
    files: tuple[str, ...]  # all arrays that there may be
    named: Mapping[str, str]  # entries of the manifest that have to be the same, in words
    smaller = ""  # what else to do about a small disk

    def __init__(self, folder: str | Path) -> None:
        """Look at nothing yet."""
        self.folder = Path(folder).expanduser()
        self._arrays: list[Array] = []

    def _ensure(
        self,
        wanted: Mapping[str, Any],
        columns: Sequence[Column],
        loader: Iterable[Mapping[str, Tensor]],
        work_out: Callable[[Tensor], Iterable[Array]],
        device: torch.device,
    ) -> None:
        """Open the arrays, and fill them before if that has not been done. Every process calls it.

        Args:
            wanted: The manifest.
            columns: The arrays.
            loader: Gives "image" and "index" of all images, each on one process; index -1 is a filler. It is not asked
                for anything if the cache is there.
            work_out: Given images, returns their rows of each array.
            device: Where the images are worked on.

        Raises:
            ValueError: The folder holds something else, or the loader does not give each image once.
            OSError: The disk is too small or cannot be written.
        """
        with self._alone():
            # Rank 0 decides for all: the others could see a folder that it is writing already.
            if not _agreed(_rank() == 0 and self._is_there(wanted, columns), device):
                self._fill(wanted, columns, loader, work_out, device)
        self._arrays = [np.load(self.folder / column.file, mmap_mode="r") for column in columns]

    # ---------------------------------------------------------------- what is there

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder against other runs; within this one, rank 0 does it for all."""
        if _rank() != 0:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("a+")
        except OSError as error:
            msg = (
                f"Expected `{self.argument}` to be a folder that can be written to, got {self.folder} "
                f"({error.strerror}); choose another one."
            )
            raise OSError(error.errno, msg) from error
        with file as lock:
            with contextlib.suppress(OSError):  # a file system that cannot lock
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _is_there(self, wanted: Mapping[str, Any], columns: Sequence[Column]) -> bool:
        """Whether the folder holds these arrays, whole."""
        file = self.folder / MANIFEST
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return False
        if not isinstance(found, dict):
            return False
        self._require_same(found, wanted)
        try:
            arrays = [np.load(self.folder / column.file, mmap_mode="r") for column in columns]
        except (OSError, ValueError):  # no file, a short one, another format
            return False
        return all(a.shape == c.shape and a.dtype == c.dtype for a, c in zip(arrays, columns, strict=True))

    def _require_same(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        wrong = [name for name in self.named if found.get(name) != wanted[name]]
        if wrong:
            what = wrong[0]
            msg = (
                f"Expected `{self.argument}` {self.folder} to be new or to hold the {self.contents} of this run, but "
                f"{self.named[what]} differs ({found.get(what)} there, {wanted[what]} here); choose another folder, or "
                "remove this one if no other run needs it."
            )
            raise ValueError(msg)

    # ---------------------------------------------------------------- filling it

    def _fill(
        self,
        wanted: Mapping[str, Any],
        columns: Sequence[Column],
        loader: Iterable[Mapping[str, Tensor]],
        work_out: Callable[[Tensor], Iterable[Array]],
        device: torch.device,
    ) -> None:
        if _rank() == 0:
            self._make_room(columns)
        _wait()
        arrays: list[Array] = [open_memmap(self.folder / column.file, mode="r+") for column in columns]
        times = np.zeros(columns[0].shape[0], np.int64)
        for batch in self._shown(loader, len(times)):
            index, image = batch["index"], batch["image"]
            real = index >= 0
            rows = index[real].cpu().numpy()
            if not len(rows):
                continue
            found = work_out(image[real].to(device))
            if rows.max() >= len(times):
                raise ValueError(_not_once(len(times), f"one has index {rows.max()}"))
            for array, values in zip(arrays, found, strict=True):
                array[rows] = values
            np.add.at(times, rows, 1)
        for array in arrays:
            array.flush()  # type: ignore[attr-defined]  # a memmap, which open_memmap does not say
        total = _sum(torch.from_numpy(times), device)
        if not bool((total == 1).all()):
            raise ValueError(_not_once(len(times), f"{int((total != 1).sum())} came never or more than once"))
        if _rank() == 0:
            with written_whole(self.folder / MANIFEST) as temporary:
                temporary.write_text(f"{json.dumps(dict(wanted), indent=2)}\n", encoding="utf-8")
        _wait()

    def _make_room(self, columns: Sequence[Column]) -> None:
        """Create the arrays; what is there is unlinked and not cut short, as another run may still map it."""
        for name in (MANIFEST, *self.files):
            (self.folder / name).unlink(missing_ok=True)
        need, free = sum(column.size for column in columns), shutil.disk_usage(self.folder).free
        # The pages of a mapped file that do not fit would end the process without a word.
        if need > free:
            msg = (
                f"Expected `{self.argument}` {self.folder} on a disk with {need / 1e9:.1f} GB free, got "
                f"{free / 1e9:.1f}; choose another folder{self.smaller}."
            )
            raise OSError(msg)
        for column in columns:
            open_memmap(self.folder / column.file, mode="w+", dtype=column.dtype, shape=column.shape)

    def _shown(self, batches: Iterable[Mapping[str, Tensor]], size: int) -> Iterator[Mapping[str, Tensor]]:
        """The batches, with a line from time to time on how far they are."""
        started = said = time.monotonic()
        done = 0
        for batch in batches:
            yield batch
            done += int((batch["index"] >= 0).sum()) * _world()
            now = time.monotonic()
            if now - said > _SECONDS_BETWEEN_LINES:
                said = now
                left = (now - started) / max(done, 1) * (size - done)
                rank_zero_info(f"{self.contents}: {min(done, size):,} of {size:,} images, {max(left, 0):.0f} s left")
        took = time.monotonic() - started
        rank_zero_info(f"{self.contents}: {size:,} images in {took:.0f} s, kept in {self.folder}")


def require_size(image: Tensor, image_size: int) -> None:
    """Refuse images of another size.

    Args:
        image: [B, C, H, W].
        image_size: H and W.

    Raises:
        ValueError: They are of another.
    """
    if tuple(image.shape[2:]) != (image_size, image_size):
        msg = (
            f"Expected images of `image_size` {image_size}, got {tuple(image.shape[2:])} from the loader; bring the "
            "data to that size."
        )
        raise ValueError(msg)


def _not_once(size: int, what: str) -> str:
    return (
        f"Expected `loader` to give each of {size} training images once over all processes, but {what}; give the "
        "datamodule's own loader of them."
    )


# -------------------------------------------------------------------- processes


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _world() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def _wait() -> None:
    if _is_distributed():
        dist.barrier()


def _sum(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes."""
    if not _is_distributed():
        return values
    total = values.to(device)
    dist.all_reduce(total)
    return total.cpu()


def _agreed(answer: bool, device: torch.device) -> bool:
    """Whether any process says yes."""
    return bool(_sum(torch.tensor([int(answer)]), device).item())
