"""Digits that are hard to read, so that methods differ on them; made on the spot, nothing to download."""

from functools import lru_cache

import numpy as np

from datamodules.classification.arrays import DigitsSource
from datamodules.classification.contents import Contents, ImageSource, Int64Array, Role, UInt8Array
from datamodules.classification.prepare import check_least


class HardDigitsSource(ImageSource):
    """Scikit-learn's digits (8 x 8 grey pixels), shifted, some with their contrast inverted, under Gaussian noise.

    Images to train on are made from the 1297 training digits of DigitsSource, images to test on from its 500 test
    digits: no digit is in both. Each digit is used as often as any other, give or take one. A mirrored digit is no
    digit: use weak views without flips.

    Args:
        num_train: Images to train on.
        num_test: Images to test on.
        noise: Standard deviation of the noise, of grey levels in [0, 1]; what leaves this range is cut off.
        shift: Largest shift in pixels, rows and columns each by chance; what is shifted in is background.
        flip_contrast: Invert every second image, by chance.
        seed: Seed of all of it; images to test on do not depend on the number of others.

    Raises:
        ValueError: If an argument is out of range.
    """

    image_channels = 1
    native_size = 8

    def __init__(
        self,
        num_train: int = 4000,
        num_test: int = 1000,
        noise: float = 0.35,
        shift: int = 1,
        flip_contrast: bool = True,
        seed: int = 0,
    ) -> None:
        """Check the arguments; no image is made before `read`."""
        for name, value, least in (("num_train", num_train, 1), ("num_test", num_test, 1), ("seed", seed, 0)):
            check_least(name, value, least)
        if not 0 <= shift < self.native_size:
            msg = f"Expected argument `shift` to be from 0 to {self.native_size - 1} pixels, but got {shift}."
            raise ValueError(msg)
        if not 0 <= noise < float("inf"):
            msg = f"Expected argument `noise` to be finite and at least 0, but got {noise}; 0.35 is hard."
            raise ValueError(msg)
        self._key = (num_train, num_test, float(noise), shift, flip_contrast, seed)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return DigitsSource().class_names

    def read(self) -> Contents:
        """Return all images, those to test on last."""
        return _hard_digits(*self._key)


# Clients of one process share one copy.
@lru_cache(maxsize=4)
def _hard_digits(num_train: int, num_test: int, noise: float, shift: int, flip_contrast: bool, seed: int) -> Contents:
    digits = DigitsSource().read()
    images = np.empty((0, 8, 8, 1), dtype=np.uint8) if digits.images is None else digits.images
    keys: list[str] = []
    roles: list[Role] = []
    labels, made = [], []
    uses: tuple[tuple[Role, int], ...] = (("train", num_train), ("test", num_test))
    for place, (role, count) in enumerate(uses):
        generator = np.random.default_rng((seed, place))
        rows = np.flatnonzero(np.asarray(digits.roles) == role)
        turns = [generator.permutation(rows) for _ in range(-(-count // len(rows)))]
        chosen: Int64Array = np.concatenate(turns)[:count]
        labels.append(digits.labels[chosen])
        made.append(_worsened(images[chosen], noise, shift, flip_contrast, generator))
        keys += [f"{role}/{number:06d}" for number in range(count)]
        roles += [role] * count
    return Contents(keys, np.concatenate(labels), roles, None, np.concatenate(made))


def _worsened(
    images: UInt8Array, noise: float, shift: int, flip_contrast: bool, generator: np.random.Generator
) -> UInt8Array:
    count, side = images.shape[:2]
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    top, left = (start[:, None] + np.arange(side) for start in generator.integers(0, 2 * shift + 1, (2, count)))
    moved = padded[np.arange(count)[:, None, None], top[:, :, None], left[:, None, :]] / 255
    inverted = generator.random((count, 1, 1, 1)) < (0.5 if flip_contrast else 0.0)
    blurred = np.where(inverted, 1 - moved, moved) + noise * generator.standard_normal(moved.shape)
    worse: UInt8Array = np.rint(blurred.clip(0, 1) * 255).astype(np.uint8)
    return worse
