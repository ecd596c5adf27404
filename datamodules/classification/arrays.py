"""Images that are in memory already: arrays, and the digits that come with scikit-learn."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from datamodules.classification.contents import Contents, ImageSource, Int64Array, Role, UInt8Array, check_labels
from datamodules.partition import stratified_order

_DIGITS_TEST = 500


class ArraySource(ImageSource):
    """Images from memory.

    Args:
        images: Training images [N, H, W] or [N, H, W, C] with C 1 or 3: uint8, or floats in [0, 1], which are rounded
            to 8 bits.
        labels: Class ids [N]; -1 for images without a label.
        test_images: Images to test on, like `images`; None for none.
        test_labels: Their class ids.
        class_names: Names of the classes; None numbers them up to the highest label.
        hidden_labels: True class ids [N] of images whose entry in `labels` is -1, for reports on pseudo-labels only;
            -1 where they are not known, too.

    Raises:
        ValueError: If shapes, lengths or labels do not fit.
    """

    def __init__(
        self,
        images: npt.NDArray[np.generic],
        labels: Sequence[int] | npt.NDArray[np.generic],
        test_images: npt.NDArray[np.generic] | None = None,
        test_labels: Sequence[int] | npt.NDArray[np.generic] | None = None,
        class_names: Sequence[str] | None = None,
        hidden_labels: Sequence[int] | npt.NDArray[np.generic] | None = None,
    ) -> None:
        """Check shapes and labels."""
        self._images = as_uint8("images", images)
        self._labels = _as_labels("labels", labels, len(self._images))
        self._test_images = None if test_images is None else as_uint8("test_images", test_images)
        if (test_images is None) != (test_labels is None):
            msg = "Expected `test_images` and `test_labels` together, but got only one of them; give both or neither."
            raise ValueError(msg)
        if self._test_images is not None and self._test_images.shape[1:] != self._images.shape[1:]:
            msg = (
                f"Expected argument `test_images` to have the shape of `images`, {list(self._images.shape[1:])}, but "
                f"got {list(self._test_images.shape[1:])}."
            )
            raise ValueError(msg)
        tested = 0 if self._test_images is None else len(self._test_images)
        self._test_labels = _as_labels("test_labels", () if test_labels is None else test_labels, tested)
        every = np.concatenate([self._labels, self._test_labels])
        self._names = tuple(class_names or map(str, range(int(every.max(initial=-1)) + 1)))
        self._truth = self._labels
        if hidden_labels is not None:
            hidden = _as_labels("hidden_labels", hidden_labels, len(self._images))
            self._truth = np.where(self._labels >= 0, self._labels, hidden)
        check_labels(np.concatenate([self._truth, self._test_labels]), len(self._names), self._keys())
        # A label below -1 must not be taken for a hidden one.
        check_labels(self._labels, len(self._names), self._keys())
        height, width = self._images.shape[1:3]
        self.native_size = height if height == width else None
        self.image_channels = self._images.shape[3]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self._names

    def read(self) -> Contents:
        """Return all images, those to test on last."""
        images = self._images
        if self._test_images is not None:
            images = np.concatenate([images, self._test_images])
        roles: list[Role] = ["train"] * len(self._images)
        roles += ["test"] * len(self._test_labels)
        given = np.concatenate([self._labels >= 0, np.ones(len(self._test_labels), dtype=bool)])
        return Contents(self._keys(), np.concatenate([self._truth, self._test_labels]), roles, given, images)

    def _keys(self) -> list[str]:
        train = [f"train/{number:07d}" for number in range(len(self._labels))]
        return train + [f"test/{number:07d}" for number in range(len(self._test_labels))]


class DigitsSource(ImageSource):
    """The 1797 handwritten digits of scikit-learn (8 x 8 grey pixels): the embedded default, nothing to download.

    A fixed stratified choice of 500 is tested on, the other 1297 are trained on. Their 17 grey levels are spread
    over 8 bits. A mirrored digit is no digit: use weak views without flips.
    """

    image_channels = 1
    native_size = 8

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple("0123456789")

    def read(self) -> Contents:
        """Return all digits."""
        return _digits()


@cache
def _digits() -> Contents:
    # Imported here: scikit-learn takes a second, and other sources do without.
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    tested = set(stratified_order([str(label) for label in labels], seed=0)[:_DIGITS_TEST])
    roles: list[Role] = ["test" if row in tested else "train" for row in range(len(labels))]
    return Contents([f"digits/{row:04d}" for row in range(len(labels))], labels, roles, None, images)


def as_uint8(name: str, images: npt.NDArray[np.generic]) -> UInt8Array:
    """Bring images to 8 bits and four axes.

    Args:
        name: Name of the argument, for messages.
        images: uint8, or floats in [0, 1], [N, H, W] or [N, H, W, C].

    Returns:
        uint8 array [N, H, W, C].

    Raises:
        ValueError: If they are something else.
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        msg = (
            f"Expected argument `{name}` to be an array [N, H, W] or [N, H, W, C] with 1 or 3 channels, but got shape "
            f"{list(images.shape)}. Channels come last here."
        )
        raise ValueError(msg)
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images, dtype=np.uint8)
    floats = np.asarray(images, dtype=np.float32)
    if not np.issubdtype(images.dtype, np.floating) or not (floats >= 0).all() or not (floats <= 1).all():
        msg = (
            f"Expected argument `{name}` to be uint8, or floats in [0, 1], but got {images.dtype} from "
            f"{floats.min()} to {floats.max()}. Scale it."
        )
        raise ValueError(msg)
    return np.rint(floats * 255).astype(np.uint8)


def _as_labels(name: str, labels: Sequence[int] | npt.NDArray[np.generic], count: int) -> Int64Array:
    array = np.asarray(labels)
    if array.shape != (count,) or (count and not np.issubdtype(array.dtype, np.integer)):
        msg = (
            f"Expected argument `{name}` to be {count} whole numbers, one an image, but got {array.dtype} of shape "
            f"{list(array.shape)}."
        )
        raise ValueError(msg)
    return array.astype(np.int64)
