"""The features of all training images under a frozen encoder, worked out once and kept on disk."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_modules.array_cache import Array, ArrayCache, Column, require_size

_VERSION = 1


class FeatureCache(ArrayCache):
    """Features by the contents of an image: `features.npy`, float32 [N, D], and `digests.npy`, uint64 [N, 2].

    It is filled with all training images of a source, whatever their labels, and so serves every fit on any choice of
    labels. Who asks for features shows images: one that is known, by the digest of its pixels, needs no encoder,
    whichever loader it came from. Others, such as drawn ones, which every fit has its own of, are not kept.

    Args:
        folder: Where the arrays are kept; made if missing.
    """

    argument = "feature_cache"
    contents = "features"
    files = ("features.npy", "digests.npy")
    named = {  # noqa: RUF012 - never changed
        "images": "the training images",
        "encoder": "the encoder",
        "image_size": "image_size",
        "shape": "the shape",
        "version": "the version of the format",
    }

    def __init__(self, folder: str | Path) -> None:
        """Look at nothing yet."""
        super().__init__(folder)
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._digests: npt.NDArray[np.uint64] = np.empty((0, 2), np.uint64)

    def ensure(
        self,
        encode: Callable[[Tensor], Tensor],
        encoder: str,
        num_features: int,
        loader: Iterable[Mapping[str, Tensor]],
        num_images: int,
        image_size: int,
        fingerprint: str,
        device: torch.device,
    ) -> None:
        """Open the cache, and fill it before if that has not been done. Every process calls it.

        Args:
            encode: Images [B, C, H, W] in [0, 1] -> features [B, D].
            encoder: Identifies the encoder and its weights.
            num_features: D.
            loader: Gives "image" and "index" of all training images, unaugmented, each on one process; index -1 is a
                filler. It is not asked for anything if the cache is there.
            num_images: N; the indices are 0 to N - 1.
            image_size: Side of the images in pixels.
            fingerprint: Identifies the images and their order.
            device: Where images are encoded.

        Raises:
            ValueError: The folder holds features of something else, or the loader does not give each image once.
            OSError: The disk is too small or cannot be written.
        """
        wanted = {
            "version": _VERSION,
            "images": fingerprint,
            "encoder": encoder,
            "image_size": image_size,
            "shape": [num_images, num_features],
        }

        def encoded(image: Tensor) -> Iterator[Array]:
            require_size(image, image_size)
            yield encode(image).cpu().numpy()
            yield _digests(image)

        shapes = ((num_images, num_features), (num_images, 2))
        columns = [Column(*of) for of in zip(self.files, shapes, ("float32", "uint64"), strict=True)]
        self._ensure(wanted, columns, loader, encoded, device)
        self._order = np.argsort(self._arrays[1][:, 0], kind="stable")
        self._digests = self._arrays[1][self._order]

    def look_up(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Find the features of images.

        Args:
            image: [B, C, H, W] in [0, 1].

        Returns:
            Which images are known, bool [B]; and the features of those, float32 [known, D]; on the device of `image`.

        Raises:
            RuntimeError: The cache has not been opened.
        """
        if not self._arrays:
            msg = "Call `ensure` before asking for features: the cache has not been opened."
            raise RuntimeError(msg)
        own = _digests(image)
        place = np.searchsorted(self._digests[:, 0], own[:, 0]).clip(max=len(self._digests) - 1)
        known = (self._digests[place] == own).all(1)
        features = torch.from_numpy(self._arrays[0][self._order[place[known]]])
        return torch.from_numpy(known).to(image.device), features.to(image.device)


def _digests(image: Tensor) -> npt.NDArray[np.uint64]:
    """128 bits of each image [B, C, H, W], uint64 [B, 2]; loaders bring pixels of 8 bits to the same numbers always."""
    pixels = image.detach().float().cpu().contiguous().numpy()
    found = b"".join(hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in pixels)
    return np.frombuffer(found, np.uint64).reshape(-1, 2)
