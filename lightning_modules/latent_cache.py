"""The latents of all training images, worked out once and kept on disk."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_modules.array_cache import Array, ArrayCache, Column, require_size
from lightning_modules.latent_space import LatentSpace

Precision = Literal["float32", "float16"]

_VERSION = 1


class LatentCache(ArrayCache):
    """Moments of images by their index: `moments.npy`, [N, 2 z, h, w], and with flips `mirrored.npy`.

    Args:
        folder: Where the arrays are kept; made if missing.
        precision: Numbers in the arrays. float16 takes half the space and keeps three digits.

    Raises:
        ValueError: `precision` is something else.
    """

    argument = "latent_cache"
    contents = "latents"
    files = ("moments.npy", "mirrored.npy")
    named = {  # noqa: RUF012 - never changed
        "data": "the training images",
        "autoencoder": "the autoencoder",
        "image_size": "image_size",
        "shape": "the shape",
        "precision": "precision",
        "version": "the version of the format",
    }
    smaller = " or precision float16"

    def __init__(self, folder: str | Path, precision: Precision = "float32") -> None:
        """Look at nothing yet."""
        if precision not in get_args(Precision):
            msg = f"Expected `precision` to be one of {', '.join(get_args(Precision))}, got {precision!r}."
            raise ValueError(msg)
        super().__init__(folder)
        self.precision: Precision = precision

    def ensure(
        self,
        latent_space: LatentSpace,
        loader: Iterable[Mapping[str, Tensor]],
        num_images: int,
        image_size: int,
        fingerprint: str,
        flips: bool = False,
    ) -> None:
        """Open the cache, and fill it before if that has not been done. Every process calls it.

        Args:
            latent_space: Encodes the images, on the device that it is on.
            loader: Gives "image" and "index" of all training images, unaugmented, each on one process; index -1 is a
                filler. It is not asked for anything if the cache is there.
            num_images: N; the indices are 0 to N - 1.
            image_size: Side of the images in pixels.
            fingerprint: Identifies the images and their order.
            flips: Whether the mirrored images are needed as well.

        Raises:
            ValueError: The folder holds latents of something else, or the loader does not give each image once.
            OSError: The disk is too small or cannot be written.
        """
        side = image_size // latent_space.factor
        shape = (num_images, 2 * latent_space.channels, side, side)
        wanted = {
            "version": _VERSION,
            "data": fingerprint,
            "autoencoder": latent_space.fingerprint(),
            "image_size": image_size,
            "shape": list(shape),
            "precision": self.precision,
            "flips": flips,
        }

        def encoded(image: Tensor) -> Iterator[Array]:
            require_size(image, image_size)
            for view in (image, image.flip(-1))[: 1 + flips]:
                yield latent_space.moments(view).cpu().numpy()

        columns = [Column(file, shape, self.precision) for file in self.files[: 1 + flips]]
        self._ensure(wanted, columns, loader, encoded, latent_space.shift.device)

    def moments(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """Look moments up.

        Args:
            index: Numbers of images, int64 [B].
            flip: Which of them are mirrored, bool [B]; None is none of them.

        Returns:
            [B, 2 z, h, w] float32, on the device of `index`.

        Raises:
            RuntimeError: The cache has not been opened.
            ValueError: There is no such image, or the mirrored ones were not kept.
        """
        if not self._arrays:
            msg = "Call `ensure` before asking for moments: the cache has not been opened."
            raise RuntimeError(msg)
        rows, size = index.cpu().numpy(), len(self._arrays[0])
        if len(rows) and not 0 <= rows.min() <= rows.max() < size:
            msg = (
                f"Expected `index` from 0 to {size - 1}, got {rows.min()} to {rows.max()}; -1 marks fillers, drop them."
            )
            raise ValueError(msg)
        found = self._arrays[0][rows]
        if flip is not None and bool(flip.any()):
            if len(self._arrays) == 1:
                msg = "Expected no mirrored images, as the cache was opened without; call `ensure` with flips=True."
                raise ValueError(msg)
            mirrored = flip.cpu().numpy()
            found[mirrored] = self._arrays[1][rows[mirrored]]
        return torch.from_numpy(found).to(index.device, torch.float32)
