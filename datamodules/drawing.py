"""A folder that images are drawn into, block by block, by any number of processes, until it is a SyntheticImages.

While it is being drawn it holds drawing.json, what is going to be the manifest, and parts/, a file for each block that
is done.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.artifact_files import MANIFEST, read_json
from datamodules.atomic import write_atomically, write_json_atomically
from datamodules.class_files import ClassFiles
from datamodules.class_shards import ClassShards
from datamodules.draw_request import DrawRequest
from datamodules.drawn_files import Layout, Pixels, table_bytes
from datamodules.pair_files import PairFiles

KIND = "synthetic_images"
DRAWING = "drawing.json"
TABLE = "metadata.parquet"
# More images of classes than this are written as shards: by now a file each is slow to make, to copy and to delete.
SHARDS_ABOVE = 50_000
_PARTS = "parts"
# What a kill inside `write_atomically` may leave.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True)
class Origin:
    """What drawn images are made from.

    Attributes:
        request: Which images, and how.
        weights: `weights_sha256` of the module that draws.
        num_classes: Its classes; None where nobody knows.
        class_names: Their names, likewise.
        fingerprint: Identifies the data that the module was trained on: for pairs with their split, for images of
            classes whatever labels they had (`images_fingerprint` of a datamodule).
        config_hash: Identifies the configuration that trained it.
        drawn_with: What else decides the images: precision, noise process, ..., as JSON has it.
    """

    request: DrawRequest
    weights: str
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    fingerprint: str | None = None
    config_hash: str | None = None
    drawn_with: Mapping[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Return what has to be the same for the same images, as JSON has it."""
        return {
            "class_names": None if self.class_names is None else list(self.class_names),
            "num_classes": self.num_classes,
            "fingerprint": self.fingerprint,
            "weights": self.weights,
            "drawn_with": None if self.drawn_with is None else dict(self.drawn_with),
            "request": self.request.description(),
        }


def weights_sha256(module: nn.Module) -> str:
    """Identify a module by its state: the checkpoint file around the same weights may differ.

    Args:
        module: Any module, on any device.

    Returns:
        SHA-256 in hexadecimal over the sorted names, types, shapes and bytes of its state dict.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}\t{value.dtype}\t{list(value.shape)}\n".encode())
            # By bytes: NumPy does not know bfloat16.
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name}\t{value!r}\n".encode())
    return digest.hexdigest()


class Drawing:
    """A folder that images are drawn into, block by block.

    Any number of processes may write blocks at the same time; `begin` comes before the first and `finish`, in one of
    them, after the last. A block counts as done once its part is there, which is written after its images.

    Args:
        folder: The folder; a relative one is below the current directory. Made if missing.
        request: Which images belong into it.
        shards_above: Number of images of classes above which they are written as tar shards, see `class_shards`; None
            writes a file each. A folder that was begun goes on as it was begun. Pairs are always files.
    """

    def __init__(self, folder: str | Path, request: DrawRequest, shards_above: int | None = SHARDS_ABOVE) -> None:
        """Nothing is read or written yet."""
        self.folder = Path(folder).expanduser()
        self.request = request
        self.shards_above = shards_above
        self._chosen: Layout | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the folder has its manifest."""
        return (self.folder / MANIFEST).is_file()

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """List the blocks that are still to be drawn.

        Args:
            rank: The process that asks: block b is drawn by rank b mod `world_size`.
            world_size: Number of processes.

        Returns:
            Their numbers, in order.
        """
        if self.is_finished:
            return []
        layout = self._layout()
        return [b for b in range(rank, self.request.num_blocks, world_size) if not self._is_done(b, layout)]

    def require(self, known: Mapping[str, Any]) -> None:
        """Refuse a folder that holds other images, and classes that cannot be drawn into one.

        Args:
            known: What is known of the origin of those to come, a part of `Origin.identity`.

        Raises:
            ValueError: The folder was begun or finished with something else, or holds files of somebody else; or the
                classes are not those of the request, or have names that cannot be folders.
        """
        self._require_classes(known.get("num_classes"))
        layout = layout_of(self.request, known.get("class_names"))
        # Looked for before the header: others may be writing, and theirs is there before any image.
        ours = [name for name in (_PARTS, TABLE) if (self.folder / name).exists()]
        taken = list(dict.fromkeys([*layout.taken(self.folder), *ours]))
        before = self.header()
        if before is None:
            if taken:
                msg = (
                    f"Expected `output_dir` to be a new folder or one that was drawn into before, but {self.folder} "
                    f"holds {', '.join(taken)} and neither {DRAWING} nor {MANIFEST}; choose another folder."
                )
                raise ValueError(msg)
            return
        if before.get("kind") != KIND:
            what = f"holds a {before.get('kind')!r}"
            msg = f"Expected `output_dir` to be a folder of its own, but {self.folder} {what}; choose another folder."
            raise ValueError(msg)
        wanted = json.loads(json.dumps(dict(known)))
        found = _differences({name: before.get(name) for name in wanted}, wanted)
        if found:
            state = "drawn" if self.is_finished else "begun"
            msg = (
                f"Expected `output_dir` to hold {self.request.noun} of the same origin or none, but in {self.folder} "
                f"other ones were {state}: {'; '.join(found)}. Choose another folder, or remove this one to draw anew."
            )
            raise ValueError(msg)

    def begin(self, origin: Origin) -> None:
        """Get ready to draw, or to go on.

        Args:
            origin: What the images are made from.

        Raises:
            ValueError: The folder holds images of another origin.
            OSError: It cannot be written to.
        """
        self.require(origin.identity())
        if self.header() is None:
            head: dict[str, Any] = {"kind": KIND, "fewlight": version("fewlight"), "config_hash": origin.config_hash}
            if self.request.has_classes and self.shards_above is not None and self.request.total > self.shards_above:
                head["shards"] = self.request.num_blocks
            write_json_atomically(self.folder / DRAWING, head | origin.identity())

    def write(self, block: int, drawn: object, num_classes: int | None = None) -> None:
        """Write the images of a block, then its part.

        Args:
            block: Number of the block.
            drawn: For pairs `image` [B, 3, H, W] (or one channel) in [0, 1], `mask` [B, H, W] of class ids,
                `confidence` [B] and `seed` [B]; for images of classes `image`, `label` [B] and `seed`.
            num_classes: Number of classes, to check the masks; None for as many as 8 bits hold.

        Raises:
            TypeError: Something is missing.
            ValueError: These are not the images of the block, or hold values that cannot be written.
            OSError: A file could not be written.
        """
        pixels = self.check(block, drawn, num_classes)
        write_json_atomically(self._part(block), self._layout().write(self.folder, block, pixels))

    def check(self, block: int, drawn: object, num_classes: int | None = None) -> Pixels:
        """Refuse what cannot be written, as `write` would; returns what it would write."""
        return self._layout().check(drawn, self.request.seeds(block), num_classes)

    def finish(self) -> bool:
        """Write table and manifest if all blocks are there, and remove what was only needed to draw.

        Called in one process, when no other one writes any more. A folder that is finished is only tidied up.

        Returns:
            Whether the folder is finished now.

        Raises:
            OSError: A file could not be written.
        """
        if not self.is_finished:
            header = self.header()
            if header is None or self.missing():
                return False
            layout = self._layout()
            write_atomically(self.folder / TABLE, table_bytes(list(self._rows(layout)), layout.schema))
            write_json_atomically(self.folder / MANIFEST, dict(sorted((header | layout.extras()).items())))
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
        (self.folder / DRAWING).unlink(missing_ok=True)
        for place in (self.folder, *(path for path in self.folder.iterdir() if path.is_dir())):
            for path in place.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        return True

    def header(self) -> dict[str, Any] | None:
        """Return what is written down of the images' origin; None in a new folder."""
        for name in (DRAWING, MANIFEST):
            path = self.folder / name
            if path.is_file():
                return read_json(path, "output_dir")
        return None

    def _part(self, block: int) -> Path:
        return self.folder / _PARTS / f"{block:06d}.json"

    def _layout(self) -> Layout:
        """Where files belong: in folders or shards as it was said when the drawing began."""
        if self._chosen is not None:
            return self._chosen
        header = self.header()
        if header is None:
            return layout_of(self.request)
        # Kept: to check the names of many classes for each block would take as long as to encode the images.
        self._chosen = layout_of(self.request, header.get("class_names"), "shards" in header)
        return self._chosen

    def _is_done(self, block: int, layout: Layout) -> bool:
        return self._part(block).is_file() and all((self.folder / name).is_file() for name in layout.files(block))

    def _rows(self, layout: Layout) -> Iterator[tuple[Any, ...]]:
        for block in range(self.request.num_blocks):
            yield from layout.rows(block, read_json(self._part(block), "output_dir"))

    def _require_classes(self, num_classes: int | None) -> None:
        if self.request.has_classes and num_classes not in (None, self.request.num_classes):
            msg = (
                f"Expected a request for images of the {num_classes} classes of the data, but got `num_classes` "
                f"{self.request.num_classes}; make them equal."
            )
            raise ValueError(msg)


def layout_of(request: DrawRequest, class_names: Sequence[str] | None = None, sharded: bool = False) -> Layout:
    """Choose how the images of a request lie on disk.

    Args:
        request: What is drawn.
        class_names: Names of the classes; None where nobody knows. Pairs do not look at them.
        sharded: Whether images of classes lie in shards.

    Returns:
        The layout.

    Raises:
        ValueError: The names cannot be folders, or are too many or too few.
    """
    if not request.has_classes:
        return PairFiles(request)
    return (ClassShards if sharded else ClassFiles)(request, class_names)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {_short(old)} -> {_short(new)}")
    return found


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)
