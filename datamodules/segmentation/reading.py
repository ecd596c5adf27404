"""How the files of a pair are read and checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datamodules.segmentation.decoding import (
    DECODE_ERRORS,
    Head,
    UInt8Array,
    fit_mask,
    read_head,
    read_image,
    reason_for,
    turns_with_image,
)
from datamodules.segmentation.pairs import Pair
from datamodules.segmentation.store import Decoded


@dataclass(frozen=True)
class PairReader:
    """What it takes to read pairs; it goes to loader workers, so it holds nothing else.

    Attributes:
        image_size: Side of the decoded squares in pixels.
        mask_size_may_differ: Accept masks that were stored at another resolution than their images.
        read_mask: Reads the class ids of a pair at their own resolution.
    """

    image_size: int
    mask_size_may_differ: bool
    read_mask: Callable[[Pair], UInt8Array]

    def decode(self, pair: Pair) -> Decoded:
        """Read image and mask.

        Args:
            pair: A pair with masks.

        Returns:
            Both as squares of `image_size`.

        Raises:
            OSError: If the image cannot be decoded.
            ValueError: If the mask cannot be used.
        """
        image = read_image(pair.image, self.image_size)
        try:
            # Only where the image is turned does it matter whether the masks say how they are.
            is_upright = image.orientation != 1 and _say_orientation([read_head(path) for path in pair.masks])
            mask = self.read_mask(pair)
            mask = fit_mask(mask, image, self.image_size, self.mask_size_may_differ, is_upright)
        except DECODE_ERRORS as error:
            name = f" {pair.masks[0].name}" if len(pair.masks) == 1 else ""
            msg = f"mask{name}: {reason_for(error)}"
            raise ValueError(msg) from error
        return Decoded(image.pixels, mask, image.original_size)

    def decode_image(self, pair: Pair) -> Decoded:
        """Read the image alone.

        Args:
            pair: A pair, with or without masks.

        Returns:
            The image as a square of `image_size`, no mask.

        Raises:
            OSError: If the image cannot be decoded.
            ValueError: If it holds values that are not finite.
        """
        image = read_image(pair.image, self.image_size)
        return Decoded(image.pixels, None, image.original_size)

    def probe(self, pair: Pair) -> tuple[int, int]:
        """Look at the heads of the files only.

        Args:
            pair: A pair, with or without masks.

        Returns:
            (height, width) of the upright image.

        Raises:
            OSError: If a file is no picture.
            ValueError: If image and masks do not fit together.
        """
        image = read_head(pair.image)
        heads = [read_head(path) for path in pair.masks]
        orientation = 1 if image.orientation is None or _say_orientation(heads) else image.orientation
        for head in heads:
            turns_with_image(head.size, image.size, orientation, self.mask_size_may_differ)
        return image.size


def _say_orientation(heads: Sequence[Head]) -> bool:
    said = {head.orientation is not None for head in heads}
    if len(said) > 1:
        msg = "some masks of a turned image have an EXIF orientation and others none; save all of them upright"
        raise ValueError(msg)
    return True in said
