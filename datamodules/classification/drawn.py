"""Drawn images of classes beside those of a source."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from datamodules.classification.contents import Int64Array
from datamodules.classification.prepare import Reading
from datamodules.classification.store import Encoded, JoinedPixels, PixelStore, decode_files
from datamodules.segmentation.pairs import describe_problems
from datamodules.synthetic_images import ClassRow, SyntheticImages, read

# What decides the pixels of drawn images beside seed and class.
_ORIGIN = ("weights", "drawn_with", "request")


@dataclass(frozen=True)
class DrawnImages:
    """Some images of an artifact, by row.

    Attributes:
        artifact: What holds them.
        rows: Which of its images.
    """

    artifact: SyntheticImages[ClassRow]
    rows: Sequence[ClassRow]

    @property
    def labels(self) -> Int64Array:
        """Class ids [N]."""
        return np.array([row.label for row in self.rows], dtype=np.int64)

    def identity(self) -> str:
        """Return what has to be the same for the same images."""
        origin = {name: self.artifact.manifest.get(name) for name in _ORIGIN}
        return json.dumps([origin, [[row.seed, row.label] for row in self.rows]], sort_keys=True)

    def behind(self, store: PixelStore, reading: Reading) -> JoinedPixels:
        """Decode them, and put them behind the images of a source.

        Args:
            store: The images of the source, whose size and colours they get.
            reading: How those were read; drawn images that do not fit into what these leave of its memory are
                decoded on every access.

        Raises:
            ValueError: Files cannot be decoded, listing them.
        """
        files = _Files(self.artifact, self.rows)
        memory = max(0, reading.cache_megabytes - store.megabytes)
        own, _, problems = decode_files(files, store.size, store.channels, memory, "drawn images")
        if problems:
            report = describe_problems(problems, len(files), self.artifact.folder, "as SyntheticImageWriter wrote it")
            msg = f"{report}\nDraw them again, or take `synthetic_images` out."
            raise ValueError(msg)
        return JoinedPixels([store, own])


@dataclass(frozen=True)
class _File:
    """One drawn image, a file or a part of one."""

    artifact: SyntheticImages[ClassRow]
    row: ClassRow

    def __str__(self) -> str:
        return "/".join(map(str, filter(None, (self.artifact.folder, self.row.shard, self.row.file_name))))

    def read(self) -> bytes:
        return self.artifact.bytes_of(self.row)


@dataclass(frozen=True)
class _Files(Sequence[Encoded]):
    artifact: SyntheticImages[ClassRow]
    rows: Sequence[ClassRow]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> _File: ...

    @overload
    def __getitem__(self, place: slice) -> "_Files": ...

    def __getitem__(self, place: int | slice) -> "_File | _Files":
        if isinstance(place, slice):
            return _Files(self.artifact, self.rows[place])
        return _File(self.artifact, self.rows[place])


def drawn_images(
    folder: str, class_names: Sequence[str], images_fingerprint: str, per_class: int | None, from_other_data: bool
) -> DrawnImages:
    """Find the drawn images of a folder; no picture is decoded.

    Args:
        folder: Folder of a SyntheticImages artifact of classes; a relative one is below the current directory.
        class_names: The classes of the source.
        images_fingerprint: Identifies its images.
        per_class: Take the first so many of each class, by seed; None takes them all.
        from_other_data: Accept images that were drawn from other data.

    Raises:
        FileNotFoundError: The folder is missing or not finished.
        ValueError: It is damaged, of other data or classes, or has fewer images of a class.
    """
    artifact = read(folder, "classes")
    artifact.require(class_names, images_fingerprint, from_other_data)
    highest = max(row.label for row in artifact.rows)
    if highest >= len(class_names):
        # Neither it nor the module that drew it knew how many classes there are.
        msg = (
            f"Expected `synthetic_images` of the {len(class_names)} classes of the data, but {artifact.folder} has "
            f"images of class {highest}; draw from a module that was trained on these classes."
        )
        raise ValueError(msg)
    rows = sorted(artifact.rows, key=lambda row: row.seed)
    if per_class is None:
        return DrawnImages(artifact, rows)
    seen, taken = [0] * len(class_names), []
    for row in rows:
        seen[row.label] += 1
        if seen[row.label] <= per_class:
            taken.append(row)
    for name, count in zip(class_names, seen, strict=True):
        if count < per_class:
            msg = (
                f"Expected argument `synthetic_per_class` to be at most the number of drawn images of a class, but got "
                f"{per_class}, and {artifact.folder} has {count} of class {name!r}. Draw more (`images_per_class`), or "
                "lower it."
            )
            raise ValueError(msg)
    return DrawnImages(artifact, taken)
