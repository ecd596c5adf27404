"""Joint augmentation: image and mask stay a pair, steps are independent, sides are swapped."""

from collections import Counter

import albumentations as A
import numpy as np
import pytest

from datamodules import SwapHorizontalFlip, default_train_transform
from datamodules.segmentation.dataset import seed_transform


def test_flip_swaps_the_sides() -> None:
    mask = np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)
    image = np.arange(15, dtype=np.uint8).reshape(1, 5, 3)
    result = A.Compose([SwapHorizontalFlip([(1, 2)], p=1.0)])(image=image, mask=mask)
    np.testing.assert_array_equal(result["mask"], [[255, 3, 1, 2, 0]])
    np.testing.assert_array_equal(result["image"], image[:, ::-1])


def test_flip_left_out_swaps_nothing() -> None:
    mask = np.array([[0, 1, 2]], dtype=np.uint8)
    result = A.Compose([SwapHorizontalFlip([(1, 2)], p=0.0)])(image=np.zeros((1, 3, 3), np.uint8), mask=mask)
    np.testing.assert_array_equal(result["mask"], mask)


@pytest.mark.parametrize("swaps", [[(1, 2), (2, 3)], [(1, 1)], [(1, 256)], [(-1, 2)]])
def test_bad_swaps(swaps: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="`swaps` to hold"):
        SwapHorizontalFlip(swaps)


def test_default_keeps_image_and_mask_together() -> None:
    # The mask is where the image is bright: after any joint map a threshold must give the mask back, up to
    # the interpolated pixels of its outline.
    y, x = np.mgrid[:64, :64]
    mask = ((x - 24) ** 2 + (y - 40) ** 2 < 200).astype(np.uint8)
    image = np.repeat((40 + 170 * mask)[..., None], 3, axis=-1).astype(np.uint8)
    pipeline = default_train_transform()
    moved = 0
    for draw in range(20):
        seed_transform(pipeline, 0, draw)
        result = pipeline(image=image, mask=mask)
        assert set(np.unique(result["mask"])) <= {0, 1}
        assert ((result["image"][..., 0] > 125) != result["mask"]).mean() < 0.02
        moved += bool((result["mask"] != mask).any())
    assert moved >= 12


def test_faces_are_mirrored_with_swapped_sides_and_never_turned_over() -> None:
    steps = default_train_transform(flip_pairs=((1, 2),), vertical_flip=False).transforms
    assert isinstance(steps[0], SwapHorizontalFlip)
    assert not any(isinstance(step, A.VerticalFlip) for step in steps)


def test_seeded_flips_are_independent_and_reproducible() -> None:
    pipeline = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0] = 255

    def corner(seed: int, draw: int) -> tuple[int, int]:
        seed_transform(pipeline, seed, draw)
        row, column = np.argwhere(pipeline(image=image)["image"][..., 0])[0]
        return int(row), int(column)

    counts = Counter(corner(0, draw) for draw in range(400))
    # Four outcomes of probability 1/4: 100 +- 8.7 each.
    assert len(counts) == 4
    assert min(counts.values()) > 60
    assert [corner(0, draw) for draw in range(400)] == [corner(0, draw) for draw in range(400)]
    assert [corner(0, draw) for draw in range(50)] != [corner(1, draw) for draw in range(50)]
