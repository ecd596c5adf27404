"""How drawn images of classes lie on disk.

<class name>/000000007.png    RGB, or 8-bit grey where the module draws one channel
metadata.parquet              file_name, label, class_name, seed, guidance

Of very many images see `class_shards`.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from datamodules.artifact_files import listed
from datamodules.draw_request import DrawRequest
from datamodules.drawn_files import Pixels, require_finite, require_tensors, to_bytes, write_pictures

# Names that an artifact needs itself, or would have with masks.
_RESERVED = frozenset({"images", "masks", "parts", "shards", "metadata.parquet", "manifest.json", "drawing.json"})
_LONGEST = 255


class ClassRow(NamedTuple):
    """One drawn image of a class.

    Attributes:
        file_name: Image, relative to the folder; of an image in a shard, its name there.
        label: Number of its class, from 0, as the module has it; sorted folders may count otherwise.
        class_name: Name of its class.
        seed: What it was drawn from.
        guidance: Weight of the guidance it was drawn with.
        shard: File that it is in, relative to the folder; None for a file of its own.
        offset: Where its bytes begin in the shard.
        size: How many they are.
    """

    file_name: str
    label: int
    class_name: str
    seed: int
    guidance: float
    shard: str | None = None
    offset: int = 0
    size: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        """Its only file."""
        return (self.shard or self.file_name,)


class ClassFiles:
    """Layout of images of classes, see `Layout`; torchvision's ImageFolder reads it.

    Args:
        request: What is drawn.
        class_names: Names of the classes, which name the folders; None takes their numbers.

    Raises:
        ValueError: There are more or fewer of them than classes, or they cannot be the names of folders.
    """

    name = "classes"
    schema = pa.schema(
        [
            ("file_name", pa.string()),
            ("label", pa.int64()),
            ("class_name", pa.string()),
            ("seed", pa.int64()),
            ("guidance", pa.float64()),
        ]
    )

    def __init__(self, request: DrawRequest, class_names: Sequence[str] | None = None) -> None:
        """Check the names."""
        self.request = request
        count = len(request.counts)
        # With leading zeros the numbers are sorted as names, too.
        numbers = [f"{c:0{len(str(count - 1))}d}" for c in range(count)]
        self.class_names = numbers if class_names is None else list(class_names)
        if len(self.class_names) != count:
            msg = (
                f"Expected `class_names` to name the {count} classes of the request, but got {len(self.class_names)} "
                f"({listed(self.class_names)}); ask for the classes of the module (`num_classes`)."
            )
            raise ValueError(msg)
        _require_folder_names(self.class_names)

    def extras(self) -> dict[str, Any]:
        """Return the layout and the number of images of each class."""
        classes = dict(zip(self.class_names, self.request.counts, strict=True))
        return {"layout": self.name, "counts": {"images": self.request.total, "classes": classes}}

    def taken(self, folder: Path) -> list[str]:
        """List the folders that are there already: any of them would pass for a class."""
        return sorted(path.name for path in folder.glob("*") if path.is_dir())

    def files(self, block: int) -> list[str]:
        """Name the images of a block."""
        return [self.row(seed).file_name for seed in self.request.seeds(block)]

    def check(self, drawn: object, seeds: Sequence[int], num_classes: int | None) -> Pixels:
        """Check what a module drew, and turn it into what is written.

        Args:
            drawn: A mapping of `image` [B, 3, size, size] (or one channel) in [0, 1], `label` [B] and `seed` [B], on
                any device.
            seeds: The seeds that were asked for.
            num_classes: Not used: the request says which labels are right.

        Returns:
            The pixels, on the CPU; one channel makes grey pictures.

        Raises:
            TypeError: Something is missing.
            ValueError: These are other images, or hold values that cannot be written.
        """
        image, label = require_tensors(drawn, ("image", "label"), seeds)
        asked = [self.request.label(seed) for seed in seeds]
        if label.tolist() != asked:
            msg = f"Expected `draw` to return the labels that it was asked for, but got {label.tolist()} for {asked}."
            raise ValueError(msg)
        count, size = len(seeds), self.request.image_size
        if list(image.shape) not in ([count, channels, size, size] for channels in (1, 3)):
            msg = (
                f"Expected `draw` to return `image` [{count}, 1 or 3, {size}, {size}], but got {list(image.shape)}; "
                "ask for the `image_size` that the module was trained with."
            )
            raise ValueError(msg)
        require_finite(seeds, image)
        pixels = to_bytes(image)
        return Pixels(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def write(self, folder: Path, block: int, pixels: Pixels) -> dict[str, Any]:
        """Write the images of a block.

        Args:
            folder: Where they belong.
            block: Number of the block.
            pixels: What they are.

        Returns:
            Nothing: the request says it all.

        Raises:
            OSError: A file could not be written.
        """
        write_pictures(folder, self.files(block), pixels)
        return {}

    def rows(self, block: int, part: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Return the rows of a block.

        Args:
            block: Its number.
            part: Not used.

        Yields:
            The columns of the table for each image.
        """
        for seed in self.request.seeds(block):
            yield self.row(seed)[: len(self.schema)]

    def row(self, seed: int) -> ClassRow:
        """Return the row of a seed."""
        label = self.request.label(seed)
        name = self.class_names[label]
        return ClassRow(f"{name}/{seed:09d}.png", label, name, seed, self.request.guidance)


def _require_folder_names(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        # Some file systems know neither case nor the spelling of accents.
        folded = unicodedata.normalize("NFC", name).casefold()
        problem = _problem(name, folded)
        if problem is None and folded in seen:
            problem = f"is the same folder as {seen[folded]!r} on some file systems"
        if problem is not None:
            msg = (
                f"Expected `class_names` that can be names of folders, but {name!r} {problem}; name the classes "
                "otherwise (`class_names` of SamplingDataModule, or of the data of a fit)."
            )
            raise ValueError(msg)
        seen[folded] = name


def _problem(name: str, folded: str) -> str | None:
    if not name or name != name.strip():
        return "is empty, or begins or ends with a space"
    if any(c in '/\\:*?"<>|' or unicodedata.category(c) == "Cc" for c in name):
        return "holds a character that no file name may have"
    if name.startswith(".") or name.endswith("."):
        return "begins or ends with a dot"
    if folded in _RESERVED:
        return "is kept for something else in such a folder"
    if len(name.encode()) > _LONGEST:
        return f"is longer than {_LONGEST} bytes"
    return None
