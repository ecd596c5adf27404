"""How drawn (image, mask) pairs lie on disk.

images/000000007.png    RGB
masks/000000007.png     8-bit grey, class ids
metadata.parquet        file_name, mask_file_name, seed, confidence
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from datamodules.draw_request import DrawRequest
from datamodules.drawn_files import Pixels, require_finite, require_tensors, to_bytes, write_pictures


class PairRow(NamedTuple):
    """One drawn pair.

    Attributes:
        file_name: Image, relative to the folder.
        mask_file_name: Mask, relative to the folder.
        seed: What it was drawn from.
        confidence: How sure the module is of the mask, in [0, 1].
    """

    file_name: str
    mask_file_name: str
    seed: int
    confidence: float

    @property
    def files(self) -> tuple[str, ...]:
        """Both files."""
        return (self.file_name, self.mask_file_name)


class PairFiles:
    """Layout of pairs, see `Layout`.

    Args:
        request: What is drawn.
    """

    name = "pairs"
    schema = pa.schema(
        [
            ("file_name", pa.string()),
            ("mask_file_name", pa.string()),
            ("seed", pa.int64()),
            ("confidence", pa.float32()),
        ]
    )

    def __init__(self, request: DrawRequest) -> None:
        """Remember the request."""
        self.request = request

    def extras(self) -> dict[str, Any]:
        """Return the number of pairs."""
        return {"counts": {"images": self.request.total}}

    def taken(self, folder: Path) -> list[str]:
        """List which of the folders of pairs are there already."""
        return [name for name in ("images", "masks") if (folder / name).exists()]

    def files(self, block: int) -> list[str]:
        """Name the images of a block, each followed by its mask."""
        return [name for seed in self.request.seeds(block) for name in _names(seed)]

    def check(self, drawn: object, seeds: Sequence[int], num_classes: int | None) -> Pixels:
        """Check what a module drew, and turn it into what is written.

        Args:
            drawn: A mapping of `image` [B, 3, size, size] (or one channel) in [0, 1], `mask` [B, size, size] of class
                ids, `confidence` [B] and `seed` [B], on any device.
            seeds: The seeds that were asked for.
            num_classes: Number of classes; None for as many as 8 bits hold.

        Returns:
            The pixels, on the CPU.

        Raises:
            TypeError: Something is missing.
            ValueError: These are other pairs, or hold values that cannot be written.
        """
        image, mask, confidence = require_tensors(drawn, ("image", "mask", "confidence"), seeds)
        count, size = len(seeds), self.request.image_size
        shapes = [tuple(x.shape) for x in (image, mask, confidence)]
        if shapes not in ([(count, channels, size, size), (count, size, size), (count,)] for channels in (1, 3)):
            msg = (
                f"Expected `draw` to return `image` [{count}, 3, {size}, {size}], `mask` [{count}, {size}, {size}] and "
                f"`confidence` [{count}], but got {', '.join(str(list(shape)) for shape in shapes)}."
            )
            raise ValueError(msg)
        require_finite(seeds, image, confidence)
        last = 255 if num_classes is None else num_classes - 1
        low, high = int(mask.min()), int(mask.max())
        if low < 0 or high > min(last, 255):
            msg = f"Expected `draw` to return masks of ids from 0 to {min(last, 255)}, but got {low} to {high}."
            raise ValueError(msg)
        # Confidence via float32: what the table holds is then what the part of a block held, exactly.
        images = to_bytes(image.expand(-1, 3, -1, -1))
        return Pixels(images, mask.to(torch.uint8).numpy(), confidence.float().tolist())

    def write(self, folder: Path, block: int, pixels: Pixels) -> dict[str, Any]:
        """Write images and masks of a block.

        Args:
            folder: Where they belong.
            block: Number of the block.
            pixels: What they are.

        Returns:
            The confidence of each pair.

        Raises:
            OSError: A file could not be written.
        """
        write_pictures(folder, self.files(block), pixels)
        return {"confidence": pixels.confidence}

    def rows(self, block: int, part: Mapping[str, Any]) -> Iterator[PairRow]:
        """Return the rows of a block.

        Args:
            block: Its number.
            part: The confidence of each.

        Yields:
            A row each.
        """
        for seed, confidence in zip(self.request.seeds(block), part["confidence"], strict=True):
            yield PairRow(*_names(seed), seed, confidence)


def _names(seed: int) -> tuple[str, str]:
    return f"images/{seed:09d}.png", f"masks/{seed:09d}.png"
