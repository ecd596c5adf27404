"""SyntheticImages: drawn images and their masks, as one stage hands them to the next.

    <folder>/images/000000007.png    RGB
    <folder>/masks/000000007.png     8-bit grey, class ids
    <folder>/metadata.parquet        file_name, mask_file_name, seed, confidence
    <folder>/manifest.json           what made them; written last: no manifest = not finished

`load_dataset("imagefolder")` reads such a folder as it is, and so does FolderSegmentationDataModule. While it is
being drawn it holds drawing.json, what is going to be the manifest, and parts/, a file for each block that is done.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.atomic import write_atomically, write_json_atomically
from datamodules.draw_request import DrawRequest, SamplerName
from datamodules.pair_files import Pixels, Row, image_name, mask_name, png_bytes, read_table, table_bytes, to_pixels

__all__ = ["DrawRequest", "Drawing", "Origin", "SamplerName", "SyntheticImages", "read", "weights_sha256"]

KIND = "synthetic_images"
_MANIFEST = "manifest.json"
_DRAWING = "drawing.json"
_TABLE = "metadata.parquet"
_PARTS = "parts"
# What a kill inside `write_atomically` may leave.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_SHOWN = 5


@dataclass(frozen=True)
class Origin:
    """What drawn pairs are made from.

    Attributes:
        request: Which pairs, and how.
        weights: `weights_sha256` of the module that draws.
        num_classes: Classes of its masks; None where nobody knows.
        class_names: Their names, likewise.
        fingerprint: Identifies the data that the module was trained on, and their split.
        config_hash: Identifies the configuration that trained it.
        drawn_with: What else decides the pairs: precision, noise process, ..., as JSON has it.
    """

    request: DrawRequest
    weights: str
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    fingerprint: str | None = None
    config_hash: str | None = None
    drawn_with: Mapping[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Return what has to be the same for the same pairs, as JSON has it."""
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
    """A folder that pairs are drawn into, block by block.

    Any number of processes may write blocks at the same time; `begin` comes before the first and `finish`, in one of
    them, after the last. A block counts as done once its part is there, which is written after its images and masks.

    Args:
        folder: The folder; a relative one is below the current directory. Made if missing.
        request: Which pairs belong into it.
    """

    def __init__(self, folder: str | Path, request: DrawRequest) -> None:
        """Nothing is read or written yet."""
        self.folder = Path(folder).expanduser()
        self.request = request

    @property
    def is_finished(self) -> bool:
        """Whether the folder has its manifest."""
        return (self.folder / _MANIFEST).is_file()

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
        return [block for block in range(rank, self.request.num_blocks, world_size) if not self._is_done(block)]

    def require(self, known: Mapping[str, Any]) -> None:
        """Refuse a folder that holds other pairs.

        Args:
            known: What is known of the origin of those to come, a part of `Origin.identity`.

        Raises:
            ValueError: The folder was begun or finished with something else, or holds files of somebody else.
        """
        # Looked for before the header: others may be writing, and theirs is there before any image.
        taken = [name for name in ("images", "masks", _PARTS, _TABLE) if (self.folder / name).exists()]
        before = self.header()
        if before is None:
            if taken:
                msg = (
                    f"Expected `output_dir` to be a new folder or one that was drawn into before, but {self.folder} "
                    f"holds {', '.join(taken)} and neither {_DRAWING} nor {_MANIFEST}; choose another folder."
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
            msg = (
                f"Expected `output_dir` to hold pairs of the same origin or none, but in {self.folder} other ones were "
                f"{'drawn' if self.is_finished else 'begun'}: {'; '.join(found)}. Choose another folder, or remove "
                "this one to draw anew."
            )
            raise ValueError(msg)

    def begin(self, origin: Origin) -> None:
        """Get ready to draw, or to go on.

        Args:
            origin: What the pairs are made from.

        Raises:
            ValueError: The folder holds pairs of another origin.
            OSError: It cannot be written to.
        """
        self.require(origin.identity())
        if self.header() is None:
            head = {"kind": KIND, "fewlight": version("fewlight"), "config_hash": origin.config_hash}
            write_json_atomically(self.folder / _DRAWING, head | origin.identity())

    def write(self, block: int, drawn: object, num_classes: int | None = None) -> None:
        """Write the pairs of a block, then its part.

        Args:
            block: Number of the block.
            drawn: `image` [B, 3, H, W] (or one channel) in [0, 1], `mask` [B, H, W] of class ids, `confidence` [B]
                and `seed` [B].
            num_classes: Number of classes, to check the masks; None for as many as 8 bits hold.

        Raises:
            TypeError: Something is missing.
            ValueError: These are not the pairs of the block, or hold values that cannot be written.
            OSError: A file could not be written.
        """
        pixels = self.check(block, drawn, num_classes)
        seeds = self.request.seeds(block)
        for seed, image, mask in zip(seeds, pixels.images, pixels.masks, strict=True):
            write_atomically(self.folder / image_name(seed), png_bytes(image))
            write_atomically(self.folder / mask_name(seed), png_bytes(mask))
        write_json_atomically(self._part(block), {"confidence": pixels.confidence})

    def check(self, block: int, drawn: object, num_classes: int | None = None) -> Pixels:
        """Refuse what cannot be written, as `write` would; returns what it would write."""
        return to_pixels(drawn, self.request.seeds(block), self.request.image_size, num_classes)

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
            rows = list(self._rows())
            write_atomically(self.folder / _TABLE, table_bytes(rows))
            header["counts"] = {"images": len(rows)}
            write_json_atomically(self.folder / _MANIFEST, dict(sorted(header.items())))
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
        (self.folder / _DRAWING).unlink(missing_ok=True)
        for place in (self.folder, self.folder / "images", self.folder / "masks"):
            for path in place.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        return True

    def header(self) -> dict[str, Any] | None:
        """Return what is written down of the pairs' origin; None in a new folder."""
        for name in (_DRAWING, _MANIFEST):
            path = self.folder / name
            if path.is_file():
                return _read_json(path, "output_dir")
        return None

    def _part(self, block: int) -> Path:
        return self.folder / _PARTS / f"{block:06d}.json"

    def _is_done(self, block: int) -> bool:
        names = [name(seed) for seed in self.request.seeds(block) for name in (image_name, mask_name)]
        return self._part(block).is_file() and all((self.folder / name).is_file() for name in names)

    def _rows(self) -> Iterator[Row]:
        for block in range(self.request.num_blocks):
            part = _read_json(self._part(block), "output_dir")
            for seed, confidence in zip(self.request.seeds(block), part["confidence"], strict=True):
                yield Row(image_name(seed), mask_name(seed), seed, confidence)


@dataclass(frozen=True)
class SyntheticImages:
    """A finished artifact.

    Attributes:
        folder: Where it is.
        manifest: What made it.
        rows: Its pairs, by seed.
    """

    folder: Path
    manifest: Mapping[str, Any]
    rows: Sequence[Row]

    def require(
        self, class_names: Sequence[str], fingerprint: str | None = None, from_other_data: bool = False
    ) -> None:
        """Refuse pairs that do not belong to a data set.

        Args:
            class_names: The classes of the data set, background first.
            fingerprint: Identifies the data set and its split.
            from_other_data: Accept pairs that were drawn from other data or another split of them.

        Raises:
            ValueError: The classes or the data are others.
        """
        names, count = self.manifest.get("class_names"), self.manifest.get("num_classes")
        # A module that was loaded from a foreign checkpoint knows how many classes it has, but not their names.
        same = list(names) == list(class_names) if names is not None else count in (None, len(class_names))
        if not same:
            theirs = ", ".join(map(str, names)) if names is not None else f"{count} classes without names"
            msg = (
                f"Expected `synthetic_images` with the classes of the data ({', '.join(class_names)}), but those in "
                f"{self.folder} are {theirs}; draw from a module that was trained on these classes, or name the "
                "classes of the data alike (`class_names`) where they mean the same."
            )
            raise ValueError(msg)
        origin = self.manifest.get("fingerprint")
        if from_other_data or (origin is not None and origin == fingerprint):
            return
        which = f"other data, or another split of these (fingerprint {str(origin)[:12]}, here {str(fingerprint)[:12]})"
        msg = (
            f"Expected `synthetic_images` drawn by a module that was trained on these data and this split, but "
            f"{self.folder} comes from {which if origin is not None else 'data that it does not name'}: what was drawn "
            "may show images that are validated or tested on here, and measured results would be too good. Draw with "
            "a module of the same `data` arguments, or set `synthetic_from_other_data` if the training images of that "
            "module are none of your test images."
        )
        raise ValueError(msg)


def read(folder: str | Path) -> SyntheticImages:
    """Read the table and the manifest of a finished artifact.

    Args:
        folder: The folder; a relative one is below the current directory.

    Returns:
        What is in it; the pictures themselves are only looked for.

    Raises:
        FileNotFoundError: There is no such folder, it is not finished, or one of its files is missing.
        ValueError: It is something else, or damaged.
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder)
    rows = read_table(folder / _TABLE)
    names = [name for row in rows for name in (row.file_name, row.mask_file_name)]
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        msg = (
            f"Expected `synthetic_images` whose files are in its folder, but {folder / _TABLE} lists {_listed(outside)}"
            "; do not use an artifact whose origin you do not know."
        )
        raise ValueError(msg)
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        msg = (
            f"Expected `synthetic_images` with all files of its table, but {folder} lacks {_listed(lost)}; copy it "
            "again, or remove it and draw it anew."
        )
        raise FileNotFoundError(msg)
    count = manifest.get("counts", {}).get("images")
    if count != len(rows):
        msg = f"Expected `synthetic_images` with {count} pairs, but {folder / _TABLE} lists {len(rows)}; draw it anew."
        raise ValueError(msg)
    return SyntheticImages(folder, manifest, rows)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not folder.is_dir():
        msg = (
            f"Expected `synthetic_images` to be a folder of drawn pairs, but there is none at {folder.absolute()}; "
            "draw them first (SyntheticImageWriter). A relative folder is looked for under the current directory."
        )
        raise FileNotFoundError(msg)
    if not path.is_file():
        begun = (folder / _DRAWING).is_file()
        state = "is not finished" if begun else f"has no {_MANIFEST}"
        remedy = "run the command that draws it again, it goes on where it stopped" if begun else "draw the pairs first"
        msg = f"Expected `synthetic_images` to be a finished folder of drawn pairs, but {folder} {state}; {remedy}."
        raise FileNotFoundError(msg)
    manifest = _read_json(path, "synthetic_images")
    if manifest.get("kind") != KIND:
        msg = (
            f"Expected `synthetic_images` to be a folder of kind {KIND!r}, but {path} says {manifest.get('kind')!r}; "
            "give the `output_dir` of a SyntheticImageWriter."
        )
        raise ValueError(msg)
    return manifest


def _read_json(path: Path, argument: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        msg = f"Expected `{argument}` with a JSON object in {path}, but it is damaged; remove the folder, draw it anew."
        raise ValueError(msg)  # noqa: TRY004 - the content of a file, not the type of an argument
    return content


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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
