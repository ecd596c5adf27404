"""SyntheticImages: drawn images as one stage hands them to the next, with masks or in classes.

    <folder>/images/, masks/    of pairs: an image and its mask, see `pair_files`
    <folder>/<class name>/      of classes: a folder each, see `class_files`
    <folder>/shards/            of classes, where they are many: tar files of WebDataset, see `class_shards`
    <folder>/metadata.parquet   a row for each image
    <folder>/manifest.json      what made them; written last: no manifest = not finished

`load_dataset("imagefolder")` reads a folder without shards as it is. So does FolderSegmentationDataModule if it holds
pairs, and torchvision's ImageFolder if it holds classes, whose numbers there are those of the sorted names. None of
them reads shards: those are for WebDataset, or for `SyntheticImages.bytes_of`, which reads both.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Literal, TypeVar, overload

from datamodules.artifact_files import MANIFEST, listed, read_manifest
from datamodules.class_files import ClassFiles, ClassRow
from datamodules.class_shards import ClassShards, ShardReader, require_shards
from datamodules.draw_request import DrawRequest, SamplerName
from datamodules.drawing import DRAWING, KIND, SHARDS_ABOVE, TABLE, Drawing, Origin, weights_sha256
from datamodules.drawn_files import has_columns, read_table
from datamodules.pair_files import PairFiles, PairRow

__all__ = [
    "SHARDS_ABOVE",
    "ClassRow",
    "DrawRequest",
    "Drawing",
    "Origin",
    "PairRow",
    "SamplerName",
    "SyntheticImages",
    "read",
    "weights_sha256",
]

LayoutName = Literal["pairs", "classes"]
RowT = TypeVar("RowT", PairRow, ClassRow)
_NOUNS: dict[LayoutName, str] = {"pairs": "pairs", "classes": "images"}
_KINDS: dict[LayoutName, str] = {"pairs": "(image, mask) pairs", "classes": "images of classes, without masks"}


@dataclass(frozen=True)
class SyntheticImages(Generic[RowT]):
    """A finished artifact.

    Attributes:
        folder: Where it is.
        manifest: What made it.
        rows: Its pairs (PairRow) or images of classes (ClassRow), by seed.
    """

    folder: Path
    manifest: Mapping[str, Any]
    rows: Sequence[RowT]
    _shards: ShardReader = field(default_factory=ShardReader, repr=False, compare=False)

    def bytes_of(self, row: RowT) -> bytes:
        """Read the encoded image of a row, out of its shard or its own file.

        Processes that are forked or spawned may go on reading, such as workers of a DataLoader.

        Args:
            row: One of `rows`.

        Returns:
            A whole PNG file.

        Raises:
            OSError: It cannot be read any more.
            ValueError: There is something else in its place in the shard.
        """
        if isinstance(row, ClassRow) and row.shard is not None:
            return self._shards.read(self.folder, row)
        return (self.folder / row.file_name).read_bytes()

    def require(
        self, class_names: Sequence[str], fingerprint: str | None = None, from_other_data: bool = False
    ) -> None:
        """Refuse images that do not belong to a data set.

        Args:
            class_names: The classes of the data set, in the order of their ids.
            fingerprint: Identifies the data set; with its split for pairs, whatever its labels for images of classes
                (`images_fingerprint` of a datamodule).
            from_other_data: Accept images that were drawn from other data or another split of them.

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
        classes = self.manifest.get("layout") == "classes"
        split, same_data = (
            (", or from a source that splits them otherwise", "`source`")
            if classes
            else (", or another split of these", "`data` arguments")
        )
        which = f"other data{split} (fingerprint {str(origin)[:12]}, here {str(fingerprint)[:12]})"
        msg = (
            f"Expected `synthetic_images` drawn by a module that was trained on these {'images' if classes else 'data'}"
            f"{'' if classes else ' and this split'}, but {self.folder} comes from "
            f"{which if origin is not None else 'data that it does not name'}: what was drawn may show images that are "
            "validated or tested on here, and measured results would be too good. Draw with a module of the same "
            f"{same_data}, or set `synthetic_from_other_data` if the training images of that module are none of your "
            "test images."
        )
        raise ValueError(msg)


@overload
def read(folder: str | Path, layout: Literal["pairs"] = "pairs") -> SyntheticImages[PairRow]: ...


@overload
def read(folder: str | Path, layout: Literal["classes"]) -> SyntheticImages[ClassRow]: ...


def read(folder: str | Path, layout: LayoutName = "pairs") -> SyntheticImages[Any]:
    """Read the table and the manifest of a finished artifact.

    Args:
        folder: The folder; a relative one is below the current directory.
        layout: What it has to hold: (image, mask) pairs, or images of classes.

    Returns:
        What is in it; the pictures themselves are only looked for.

    Raises:
        FileNotFoundError: There is no such folder, it is not finished, or one of its files is missing.
        ValueError: It is something else, holds the other kind of images, or is damaged.
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder, layout)
    table = folder / TABLE
    if layout == "pairs":
        pairs = [PairRow(*values) for values in read_table(table, PairFiles.schema)]
        _require_files(folder, [name for row in pairs for name in row.files])
        _require_count(manifest, pairs, table, layout)
        return SyntheticImages(folder, manifest, pairs)
    # Either side may have been changed by hand: that of the table says how to read it, the manifest has to agree.
    sharded = has_columns(table, ClassShards.schema)
    schema = ClassShards.schema if sharded else ClassFiles.schema
    rows = [ClassRow(*values) for values in read_table(table, schema)]
    num_shards = require_shards(folder, rows) if sharded else None
    if not sharded:
        _require_files(folder, [row.file_name for row in rows])
    _require_count(manifest, rows, table, layout)
    _require_agreement(manifest, rows, num_shards, folder)
    return SyntheticImages(folder, manifest, rows)


def _require_files(folder: Path, names: Sequence[str]) -> None:
    places = [PurePosixPath(name) for name in names]
    outside = [name for name, place in zip(names, places, strict=True) if place.is_absolute() or ".." in place.parts]
    if outside:
        msg = (
            f"Expected `synthetic_images` whose files are in its folder, but {folder / TABLE} lists {listed(outside)}"
            "; do not use an artifact whose origin you do not know."
        )
        raise ValueError(msg)
    # Folders are listed: asking for each file would take a moment each where the disk is far away.
    parents = {place.parent for place in places}
    found = {parent / entry.name for parent in parents for entry in _entries(folder / parent) if entry.is_file()}
    lost = [name for name, place in zip(names, places, strict=True) if place not in found]
    if lost:
        msg = (
            f"Expected `synthetic_images` with all files of its table, but {folder} lacks {listed(lost)}; copy it "
            "again, or remove it and draw it anew."
        )
        raise FileNotFoundError(msg)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(folder)) if folder.is_dir() else []


def _require_count(manifest: Mapping[str, Any], rows: Sequence[object], table: Path, layout: LayoutName) -> None:
    counts = manifest.get("counts")
    count = counts.get("images") if isinstance(counts, Mapping) else None
    if count != len(rows):
        msg = f"Expected `synthetic_images` with {count} {_NOUNS[layout]}, but {table} lists {len(rows)}; draw it anew."
        raise ValueError(msg)


def _require_agreement(
    manifest: Mapping[str, Any], rows: Sequence[ClassRow], num_shards: int | None, folder: Path
) -> None:
    """What the manifest of images of classes says has to be what its table says."""
    said, names = manifest["counts"].get("classes"), manifest.get("class_names")
    classes: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
    # Classes without names have numbers, with leading zeros.
    names = sorted(classes) if names is None else list(names)
    found = Counter((row.label, row.class_name) for row in rows)
    counted = Counter(row.class_name for row in rows)
    checks = {
        "counts": counted == Counter(classes),
        "class_names": set(names) == set(classes) and all(names[c : c + 1] == [name] for c, name in found),
        "num_classes": manifest.get("num_classes") in (None, len(names)),
        "shards": manifest.get("shards") == num_shards,
    }
    disagreeing = [what for what, agrees in checks.items() if not agrees]
    if disagreeing:
        msg = (
            f"Expected `synthetic_images` whose {MANIFEST} says what {TABLE} says, but in {folder} they disagree about "
            f"{', '.join(disagreeing)}: was one of them changed by hand? Copy the folder again, or draw it anew."
        )
        raise ValueError(msg)


def _read_manifest(folder: Path, layout: LayoutName) -> dict[str, Any]:
    path, noun = folder / MANIFEST, _NOUNS[layout]
    if not folder.is_dir():
        msg = (
            f"Expected `synthetic_images` to be a folder of drawn {noun}, but there is none at {folder.absolute()}; "
            "draw them first (SyntheticImageWriter). A relative folder is looked for under the current directory."
        )
        raise FileNotFoundError(msg)
    if not path.is_file():
        begun = (folder / DRAWING).is_file()
        state = "is not finished" if begun else f"has no {MANIFEST}"
        again = "run the command that draws it again, it goes on where it stopped"
        remedy = again if begun else f"draw the {noun} first"
        msg = f"Expected `synthetic_images` to be a finished folder of drawn {noun}, but {folder} {state}; {remedy}."
        raise FileNotFoundError(msg)
    manifest = read_manifest(folder, KIND, "synthetic_images", "give the `output_dir` of a SyntheticImageWriter")
    found: LayoutName = "classes" if manifest.get("layout") == "classes" else "pairs"
    if found != layout:
        needs = "segmentation needs a mask for each image" if layout == "pairs" else "masks tell no class of an image"
        msg = (
            f"Expected `synthetic_images` to be {_KINDS[layout]}, but {folder} holds {_KINDS[found]}: {needs}; draw "
            f"{noun} with a module that makes them."
        )
        raise ValueError(msg)
    return manifest
