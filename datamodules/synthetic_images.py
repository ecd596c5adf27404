"""SyntheticImages: drawn images as one stage hands them to the next, with masks or in classes.

    <folder>/images/, masks/    of pairs: an image and its mask, see `pair_files`
    <folder>/<class name>/      of classes: a folder each, see `class_files`
    <folder>/metadata.parquet   a row for each image
    <folder>/manifest.json      what made them; written last: no manifest = not finished

`load_dataset("imagefolder")` reads such a folder as it is. So does FolderSegmentationDataModule if it holds pairs, and
torchvision's ImageFolder if it holds classes, whose numbers there are those of the sorted names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Literal, TypeVar, overload

from datamodules.artifact_files import MANIFEST, listed, read_manifest
from datamodules.class_files import ClassFiles, ClassRow
from datamodules.draw_request import DrawRequest, SamplerName
from datamodules.drawing import DRAWING, KIND, TABLE, Drawing, Origin, weights_sha256
from datamodules.drawn_files import read_table
from datamodules.pair_files import PairFiles, PairRow

__all__ = [
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

    def bytes_of(self, row: RowT) -> bytes:
        """Read the encoded image of a row.

        Args:
            row: One of `rows`.

        Returns:
            A whole PNG file.

        Raises:
            OSError: It cannot be read any more.
        """
        return (self.folder / row.file_name).read_bytes()

    def require(
        self, class_names: Sequence[str], fingerprint: str | None = None, from_other_data: bool = False
    ) -> None:
        """Refuse images that do not belong to a data set.

        Args:
            class_names: The classes of the data set, in the order of their ids.
            fingerprint: Identifies the data set and its split.
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
        which = f"other data, or another split of these (fingerprint {str(origin)[:12]}, here {str(fingerprint)[:12]})"
        msg = (
            f"Expected `synthetic_images` drawn by a module that was trained on these data and this split, but "
            f"{self.folder} comes from {which if origin is not None else 'data that it does not name'}: what was drawn "
            "may show images that are validated or tested on here, and measured results would be too good. Draw with "
            "a module of the same `data` arguments, or set `synthetic_from_other_data` if the training images of that "
            "module are none of your test images."
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
    rows = (
        [PairRow(*values) for values in read_table(table, PairFiles.schema)]
        if layout == "pairs"
        else [ClassRow(*values) for values in read_table(table, ClassFiles.schema)]
    )
    names = [name for row in rows for name in row.files]
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        msg = (
            f"Expected `synthetic_images` whose files are in its folder, but {table} lists {listed(outside)}"
            "; do not use an artifact whose origin you do not know."
        )
        raise ValueError(msg)
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        msg = (
            f"Expected `synthetic_images` with all files of its table, but {folder} lacks {listed(lost)}; copy it "
            "again, or remove it and draw it anew."
        )
        raise FileNotFoundError(msg)
    count = manifest.get("counts", {}).get("images")
    if count != len(rows):
        msg = f"Expected `synthetic_images` with {count} {_NOUNS[layout]}, but {table} lists {len(rows)}; draw it anew."
        raise ValueError(msg)
    return SyntheticImages(folder, manifest, rows)


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
