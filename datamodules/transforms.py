"""Joint augmentation of image and mask."""

from collections.abc import Sequence

import albumentations as A
import cv2
import numpy as np

from datamodules.segmentation.decoding import UInt8Array


class SwapHorizontalFlip(A.HorizontalFlip):
    """Mirror image and mask, and exchange the class ids that change sides.

    The left eye of a mirrored face is a right eye; without the exchange a network is taught both for either.

    Args:
        swaps: Pairs of class ids to exchange in the mask.
        p: Probability of the flip.

    Raises:
        ValueError: If a class id appears twice or is no uint8.
    """

    def __init__(self, swaps: Sequence[tuple[int, int]], p: float = 0.5) -> None:
        """Check the ids and build their look-up table."""
        super().__init__(p=p)
        ids = [class_id for pair in swaps for class_id in pair]
        if len(set(ids)) != len(ids) or any(len(pair) != 2 for pair in swaps):
            msg = f"Expected argument `swaps` to hold pairs of class ids, each id once, but got {list(swaps)}."
            raise ValueError(msg)
        if any(not 0 <= class_id <= 255 for class_id in ids):
            msg = f"Expected argument `swaps` to hold class ids from 0 to 255, but got {list(swaps)}."
            raise ValueError(msg)
        self.swaps = swaps
        self._table: UInt8Array = np.arange(256, dtype=np.uint8)
        for left, right in swaps:
            self._table[left], self._table[right] = right, left

    def apply_to_mask(self, mask: UInt8Array, **params: object) -> UInt8Array:
        """Mirror a mask and exchange ids.

        Args:
            mask: uint8 array [H, W].
            params: Passed on by albumentations.

        Returns:
            uint8 array [H, W].
        """
        mirrored: UInt8Array = super().apply_to_mask(mask, **params)
        return self._table[mirrored]


def default_train_transform(flip_pairs: Sequence[tuple[int, int]] = (), vertical_flip: bool = True) -> A.Compose:
    """Build the augmentation that training uses unless another one is given.

    Flips, a mild affine map and mild brightness and contrast. The affine map mirrors image and mask at the
    border: black corners would look like the vignette of a dermatoscope, and lesions that touch the border (a
    quarter of the resized ISIC masks) would get an artificial edge; mirrored, image and mask stay a consistent
    pair everywhere, so no pixel has to be ignored.

    Args:
        flip_pairs: Class ids that change sides when the image is mirrored.
        vertical_flip: Also turn images upside down; wrong for faces and radiographs.

    Returns:
        A pipeline for `image` (uint8) and `mask`.
    """
    mirror: A.BasicTransform = SwapHorizontalFlip(flip_pairs) if flip_pairs else A.HorizontalFlip()
    steps: list[A.BasicTransform | A.BaseCompose] = [mirror]
    if vertical_flip:
        steps.append(A.VerticalFlip())
    steps += [
        A.Affine(
            scale=(0.9, 1.1),
            translate_percent=(-0.05, 0.05),
            rotate=(-15, 15),
            border_mode=cv2.BORDER_REFLECT_101,
            # Half the time: it costs more than all other steps together.
            p=0.5,
        ),
        A.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1, p=0.5),
    ]
    return A.Compose(steps)
