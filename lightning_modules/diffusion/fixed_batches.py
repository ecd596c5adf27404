"""Batches of one size for a denoiser, so that an image does not depend on what it is drawn with."""

import torch
from torch import Tensor

from lightning_modules.diffusion.sampler_steps import Denoiser


def in_fixed_batches(denoiser: Denoiser, size: int = 8) -> Denoiser:
    """Call a denoiser with a fixed number of images at a time, the last ones filled up.

    Convolutions and matrix products round differently in batches of another size, at the sixth digit, but alike at
    every place in a batch of one size: so an image is the same to the last bit whatever it is drawn with.

    Args:
        denoiser: Called with `size` images, their noise levels and, if there are any, their labels. What it returns for
            an image must not depend on the others (no batch normalisation in training mode).
        size: Images that go through the denoiser at once, at least 1.

    Returns:
        A denoiser for any number of images from 1.

    Raises:
        ValueError: If `size` is below 1.
    """
    if size < 1:
        msg = f"Expected `size` to be at least 1, got {size}."
        raise ValueError(msg)

    def denoise(x: Tensor, sigma: Tensor, label: Tensor | None = None, /) -> Tensor:
        filler = -len(x) % size
        given = (x, sigma) if label is None else (x, sigma, label)
        filled = [torch.cat([values, values[:1].expand(filler, *values.shape[1:])]) for values in given]
        parts = [torch.split(values, size) for values in filled]
        return torch.cat([denoiser(*part) for part in zip(*parts, strict=True)])[: len(x)]

    return denoise
