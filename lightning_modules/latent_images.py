"""The space that a diffusion model works in: pixels, or the latents of an autoencoder."""

from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.diffusion.fixed_batches import in_batches_of
from lightning_modules.latent_cache import LatentCache
from lightning_modules.latent_space import LatentSpace


class _Sized(Protocol):
    in_channels: int
    image_size: int


class LatentImages(nn.Module):
    """Turns images in [0, 1] into what is diffused, and back.

    Args:
        latent: The autoencoder; None works on pixels, 2 x - 1.
        cache: Folder for the latents of the training images; None encodes every batch.

    Attributes:
        is_cached: Whether there is a cache, so that training batches need no images.

    Raises:
        TypeError: `latent` is none.
        ValueError: There is a cache and nothing to keep in it.
    """

    def __init__(self, latent: nn.Module | None, cache: str | None) -> None:
        super().__init__()
        if latent is not None and not isinstance(latent, LatentSpace):
            msg = (
                f"Expected `latent` to be a LatentSpace, got {type(latent).__name__}; give it the autoencoder as its "
                "`network` or `folder`."
            )
            raise TypeError(msg)
        if cache is not None and latent is None:
            msg = f"Expected `latent` with `latent_cache`, got None and {cache!r}; pixels need no cache."
            raise ValueError(msg)
        self.latent = latent
        self.is_cached = cache is not None
        self._cache = None if cache is None else LatentCache(cache)

    def image_shape(self, network: _Sized) -> tuple[int, int]:
        """Side and channels of images that a network's input stands for."""
        if self.latent is None:
            return network.image_size, network.in_channels
        return network.image_size * self.latent.factor, self.latent.image_channels

    def space(self) -> str:
        """Name the space: a network of one space knows nothing of the images of another."""
        if self.latent is None:
            return "pixels"
        return f"latents of deviation {self.latent.sigma_data:g} of the autoencoder {self.latent.fingerprint()[:16]}"

    def meaning(self) -> dict[str, float]:
        """What of the space is in no state dict: the autoencoder itself is part of a checkpoint."""
        return {} if self.latent is None else {"latent_deviation": self.latent.sigma_data}

    def prepare(self, trainer: pl.Trainer, image_size: int | None) -> None:
        """Before a fit: read the autoencoder's weights and, if there is a cache, encode all training images once.

        A dry run leaves the cache alone: its few batches are encoded as they come.

        Args:
            trainer: With a cache its datamodule has `sweep_dataloader`, `leave_out_images`, `num_images` and
                `fingerprint`.
            image_size: Side of the images in pixels; None if not known.

        Raises:
            FileNotFoundError: There is no such autoencoder.
            TypeError: The datamodule cannot sweep.
            ValueError: The autoencoder or the cache is another one.
        """
        if self.latent is None:
            return
        # On all processes at once: DDP would tell the others that they have weights as soon as one has.
        self.latent.load()
        if self._cache is None or getattr(trainer, "fast_dev_run", False):
            return
        data: Any = getattr(trainer, "datamodule", None)
        if image_size is None or not hasattr(data, "sweep_dataloader") or not hasattr(data, "leave_out_images"):
            msg = (
                f"Expected data with `sweep_dataloader` and `leave_out_images` for `latent_cache`, got "
                f"{type(data).__name__}; use GenerationDataModule, or leave the cache out."
            )
            raise TypeError(msg)
        self._cache.ensure(
            self.latent,
            data.sweep_dataloader(),
            num_images=data.num_images,
            image_size=image_size,
            fingerprint=data.fingerprint,
            flips=bool(getattr(data, "flip", False)),
        )
        data.leave_out_images()

    def of_training(self, batch: dict[str, Tensor]) -> Tensor:
        """What is diffused of a training batch; latents are drawn anew from their distribution.

        Args:
            batch: image [B, C, H, W] in [0, 1]; with a cache, index [B] and, where some are mirrored, flip [B] will do.

        Raises:
            ValueError: There are neither images nor a cache.
        """
        if self.latent is not None and self._cache is not None and "image" not in batch:
            return self.latent.sample(self._cache.moments(batch["index"], batch.get("flip")))
        if "image" not in batch:
            msg = (
                f"Expected training batches with `image`, got {sorted(batch)}; only a fit with `latent_cache` does "
                "without, so give it, or a new datamodule."
            )
            raise ValueError(msg)
        if self.latent is None:
            return 2.0 * batch["image"] - 1.0
        return self.latent.sample(self.latent.moments(batch["image"]))

    def of(self, image: Tensor) -> Tensor:
        """What is diffused of images; latents at their means."""
        if self.latent is None:
            return 2.0 * image - 1.0
        moments = self.latent.moments(image)
        return self.latent.sample(moments, noise=torch.zeros_like(moments.chunk(2, 1)[0]))

    def to_images(self, x: Tensor, at_once: int) -> Tensor:
        """Images in [0, 1].

        Args:
            x: What was diffused, [B, C, H, W].
            at_once: Latents that go through the decoder together, so that an image is the same whatever comes with it.
        """
        if self.latent is None:
            return ((x + 1) / 2).clamp(0, 1)
        return in_batches_of(at_once, self.latent.decode, x)
