"""The dataset behind every segmentation datamodule."""

import hashlib
import random
from collections.abc import Sequence

import albumentations as A
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import SampleKey
from datamodules.segmentation.decoding import IGNORE, UInt8Array
from datamodules.segmentation.store import ImageStore


class SegmentationDataset(Dataset[dict[str, Tensor]]):
    """Some rows of an image store as training, evaluation or prediction samples.

    `dataset[i]` is sample i as it is; `dataset[SampleKey(i, draw)]` is sample i augmented, and the
    augmentation is a function of (seed, draw) alone, so it does not depend on workers, batches, ranks or what
    was drawn before. `dataset[SampleKey(-1, 0)]` is a filler: image 0, a mask of 255 and index -1, which
    losses and metrics ignore.

    Args:
        store: Where the images are.
        rows: Rows of the store that belong to this dataset, in its order.
        transform: Augmentation, or None for none.
        seed: Seed of the augmentations.
        with_masks: False leaves the masks out, for prediction.

    Attributes:
        keys: Image path of each sample, relative to the folder it came from.
    """

    def __init__(
        self,
        store: ImageStore,
        rows: Sequence[int],
        transform: A.Compose | None = None,
        seed: int = 0,
        with_masks: bool = True,
    ) -> None:
        """Remember which rows are whose."""
        self.store = store
        self.rows = list(rows)
        self.transform = transform
        self.seed = seed
        self.with_masks = with_masks
        self.keys = [store.pairs[row].key for row in self.rows]

    def __getstate__(self) -> dict[str, object]:
        """Pickle only the images of this dataset: workers that are spawned get one copy each."""
        return {**self.__dict__, "store": self.store.take(self.rows), "rows": list(range(len(self.rows)))}

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def original_size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of the file that sample `index` was read from."""
        return self.store.sizes[self.rows[index]]

    def __getitem__(self, key: int | SampleKey) -> dict[str, Tensor]:
        """Return one sample.

        Args:
            key: Index, or what a sampler asks for.

        Returns:
            image float32 [3, H, W] in [0, 1], mask int64 [H, W] (if there are masks), index int64 scalar.
        """
        index, draw = (key.index, key.draw) if isinstance(key, SampleKey) else (key, None)
        filler = index < 0 and draw is not None
        image, mask = self.store.get(self.rows[0 if filler else index])
        if not self.with_masks:
            mask = None
        if filler:
            mask = None if mask is None else np.full_like(mask, IGNORE)
        elif draw is not None and self.transform is not None:
            seed_transform(self.transform, self.seed, draw)
            image, mask = _augment(self.transform, image, mask)
        sample = {"image": _to_float(image), "index": torch.tensor(index)}
        if mask is not None:
            sample["mask"] = torch.from_numpy(mask.astype(np.int64))
        return sample


def seed_transform(transform: A.Compose, seed: int, draw: int) -> None:
    """Make the next call of a pipeline a function of (seed, draw).

    `Compose.set_random_seed` is not used: it gives every step a generator with the same seed, so that a
    horizontal and a vertical flip of probability 1/2 happen always together (measured: 400 of 400). One
    generator that all steps share makes them independent, and is five times cheaper.

    Args:
        transform: Pipeline whose generators are replaced.
        seed: Seed of the run.
        draw: Position in the training stream.
    """
    digest = hashlib.blake2b(f"{seed}:{draw}".encode(), digest_size=8).digest()
    state = int.from_bytes(digest, "little")
    transform.set_random_state(np.random.default_rng(state), random.Random(state))


def _augment(transform: A.Compose, image: UInt8Array, mask: UInt8Array | None) -> tuple[UInt8Array, UInt8Array | None]:
    result = transform(image=image) if mask is None else transform(image=image, mask=mask)
    new_image, new_mask = result["image"], result.get("mask")
    _check_shape("image", new_image, image.shape)
    if mask is not None:
        _check_shape("mask", new_mask, mask.shape)
    return new_image, new_mask


def _check_shape(name: str, value: object, shape: tuple[int, ...]) -> None:
    if not isinstance(value, np.ndarray) or value.shape != shape:
        got = list(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
        msg = (
            f"Expected argument `train_transform` to return a NumPy {name} of shape {list(shape)}, but "
            f"got {got}. Steps that crop, resize or convert to tensors "
            "do not belong in it (`image_size` sets the size)."
        )
        raise ValueError(msg)


def _to_float(image: UInt8Array) -> Tensor:
    if image.dtype != np.uint8:
        msg = (
            f"Expected argument `train_transform` to keep images uint8, but got {image.dtype}. "
            "Leave Normalize and ToFloat out: models normalise themselves."
        )
        raise ValueError(msg)
    # One pass that scales, moves the channels and detaches from the store, faster than one by one.
    scaled = np.empty((image.shape[2], *image.shape[:2]), dtype=np.float32)
    np.multiply(image.transpose(2, 0, 1), np.float32(1 / 255), out=scaled)
    return torch.from_numpy(scaled)
