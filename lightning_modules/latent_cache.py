"""The latents of all training images, worked out once and kept on disk."""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from numpy.lib.format import open_memmap
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_modules.latent_space import LatentSpace
from lightning_modules.run_files import written_whole

Precision = Literal["float32", "float16"]

MANIFEST = "manifest.json"
_ARRAYS = ("moments.npy", "mirrored.npy")
_VERSION = 1
_SECONDS_BETWEEN_LINES = 10.0


class LatentCache:
    """Moments of images by their index, in arrays that are mapped into memory and not read as a whole.

    A folder holds `moments.npy`, [N, 2 z, h, w], with flips `mirrored.npy`, the moments of the mirrored images, and
    `manifest.json`, which says what they are of. The manifest is written last, so a folder without one is half-written
    and is filled again. With several processes each writes the rows of its share of the images; they have to see one
    file system. A second run that wants the same folder waits until the first has filled it.

    Args:
        folder: Where the arrays are kept; made if missing.
        precision: Numbers in the arrays. float16 takes half the space and keeps three digits.

    Raises:
        ValueError: `precision` is something else.
    """

    def __init__(self, folder: str | Path, precision: Precision = "float32") -> None:
        """Look at nothing yet."""
        if precision not in get_args(Precision):
            msg = f"Expected `precision` to be one of {', '.join(get_args(Precision))}, got {precision!r}."
            raise ValueError(msg)
        self.folder = Path(folder).expanduser()
        self.precision: Precision = precision
        self._arrays: list[npt.NDArray[Any]] = []

    def ensure(
        self,
        latent_space: LatentSpace,
        loader: Iterable[Mapping[str, Tensor]],
        num_images: int,
        image_size: int,
        fingerprint: str,
        flips: bool = False,
    ) -> None:
        """Open the cache, and fill it before if that has not been done. Every process calls it.

        Args:
            latent_space: Encodes the images, on the device that it is on.
            loader: Gives "image" and "index" of all training images, unaugmented, each on one process; index -1 is a
                filler. It is not asked for anything if the cache is there.
            num_images: N; the indices are 0 to N - 1.
            image_size: Side of the images in pixels.
            fingerprint: Identifies the images and their order.
            flips: Whether the mirrored images are needed as well.

        Raises:
            ValueError: The folder holds latents of something else, or the loader does not give each image once.
            OSError: The disk is too small or cannot be written.
        """
        side = image_size // latent_space.factor
        wanted = {
            "version": _VERSION,
            "data": fingerprint,
            "autoencoder": latent_space.fingerprint(),
            "image_size": image_size,
            "shape": [num_images, 2 * latent_space.channels, side, side],
            "precision": self.precision,
            "flips": flips,
        }
        with self._alone():
            # Rank 0 decides for all: the others could see a folder that it is writing already.
            if not _agreed(_rank() == 0 and self._is_there(wanted), latent_space.shift.device):
                self._fill(latent_space, loader, wanted)
        self._arrays = [np.load(self.folder / name, mmap_mode="r") for name in _ARRAYS[: 1 + flips]]

    def moments(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """Look moments up.

        Args:
            index: Numbers of images, int64 [B].
            flip: Which of them are mirrored, bool [B]; None is none of them.

        Returns:
            [B, 2 z, h, w] float32, on the device of `index`.

        Raises:
            RuntimeError: The cache has not been opened.
            ValueError: There is no such image, or the mirrored ones were not kept.
        """
        if not self._arrays:
            msg = "Call `ensure` before asking for moments: the cache has not been opened."
            raise RuntimeError(msg)
        rows, size = index.cpu().numpy(), len(self._arrays[0])
        if len(rows) and not 0 <= rows.min() <= rows.max() < size:
            msg = (
                f"Expected `index` from 0 to {size - 1}, got {rows.min()} to {rows.max()}; -1 marks fillers, drop them."
            )
            raise ValueError(msg)
        found = self._arrays[0][rows]
        if flip is not None and bool(flip.any()):
            if len(self._arrays) == 1:
                msg = "Expected no mirrored images, as the cache was opened without; call `ensure` with flips=True."
                raise ValueError(msg)
            mirrored = flip.cpu().numpy()
            found[mirrored] = self._arrays[1][rows[mirrored]]
        return torch.from_numpy(found).to(index.device, torch.float32)

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
                f"Expected `latent_cache` to be a folder that can be written to, got {self.folder} ({error.strerror}); "
                "choose another one."
            )
            raise OSError(error.errno, msg) from error
        with file as lock:
            with contextlib.suppress(OSError):  # a file system that cannot lock
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _is_there(self, wanted: Mapping[str, Any]) -> bool:
        """Whether the folder holds these latents, whole."""
        file = self.folder / MANIFEST
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return False
        if not isinstance(found, dict):
            return False
        self._require_same(found, wanted)
        if wanted["flips"] and not found.get("flips"):
            return False
        try:
            arrays = [np.load(self.folder / name, mmap_mode="r") for name in _ARRAYS[: 1 + wanted["flips"]]]
        except (OSError, ValueError):  # no file, a short one, another format
            return False
        return all(list(a.shape) == wanted["shape"] and a.dtype == self.precision for a in arrays)

    def _require_same(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        names = {"data": "the training images", "autoencoder": "the autoencoder", "image_size": "image_size"}
        names |= {"shape": "the shape", "precision": "precision", "version": "the version of the format"}
        wrong = [name for name in names if found.get(name) != wanted[name]]
        if wrong:
            what = wrong[0]
            msg = (
                f"Expected `latent_cache` {self.folder} to be new or to hold the latents of this run, but "
                f"{names[what]} differs ({found.get(what)} there, {wanted[what]} here); choose another folder, or "
                "remove this one if no other run needs it."
            )
            raise ValueError(msg)

    # ---------------------------------------------------------------- filling it

    def _fill(
        self, latent_space: LatentSpace, loader: Iterable[Mapping[str, Tensor]], wanted: Mapping[str, Any]
    ) -> None:
        device = latent_space.shift.device
        if _rank() == 0:
            self._make_room(wanted)
        _wait()
        paths = [self.folder / name for name in _ARRAYS[: 1 + wanted["flips"]]]
        arrays: list[npt.NDArray[Any]] = [open_memmap(path, mode="r+") for path in paths]
        times = np.zeros(wanted["shape"][0], np.int64)
        for batch in _shown(loader, len(times), self.folder):
            index, image = batch["index"], batch["image"]
            real = index >= 0
            rows = index[real].cpu().numpy()
            if not len(rows):
                continue
            image = image[real].to(device)
            _require_size(image, wanted["image_size"])
            if rows.max() >= len(times):
                raise ValueError(_not_once(len(times), f"one has index {rows.max()}"))
            for array, view in zip(arrays, (image, image.flip(-1)), strict=False):
                array[rows] = latent_space.moments(view).cpu().numpy()
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

    def _make_room(self, wanted: Mapping[str, Any]) -> None:
        """Create the arrays; what is there is unlinked and not cut short, as another run may still map it."""
        for name in (MANIFEST, *_ARRAYS):
            (self.folder / name).unlink(missing_ok=True)
        shape, names = tuple(wanted["shape"]), _ARRAYS[: 1 + wanted["flips"]]
        need = len(names) * int(np.prod(shape)) * np.dtype(self.precision).itemsize
        free = shutil.disk_usage(self.folder).free
        # The pages of a mapped file that do not fit would end the process without a word.
        if need > free:
            msg = (
                f"Expected `latent_cache` {self.folder} on a disk with {need / 1e9:.1f} GB free, got {free / 1e9:.1f}; "
                "choose another folder or precision float16."
            )
            raise OSError(msg)
        for name in names:
            open_memmap(self.folder / name, mode="w+", dtype=self.precision, shape=shape)


def _require_size(image: Tensor, image_size: int) -> None:
    if tuple(image.shape[2:]) != (image_size, image_size):
        msg = (
            f"Expected images of `image_size` {image_size}, got {tuple(image.shape[2:])} from the loader; bring the "
            "data to that size."
        )
        raise ValueError(msg)


def _not_once(size: int, what: str) -> str:
    return (
        f"Expected `loader` to give each of {size} training images once over all processes, but {what}; give the "
        "datamodule's sweep_dataloader()."
    )


def _shown(batches: Iterable[Mapping[str, Tensor]], size: int, folder: Path) -> Iterator[Mapping[str, Tensor]]:
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
            rank_zero_info(f"latents: {min(done, size):,} of {size:,} images, {max(left, 0):.0f} s left")
    rank_zero_info(f"latents: {size:,} images in {time.monotonic() - started:.0f} s, kept in {folder}")


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
