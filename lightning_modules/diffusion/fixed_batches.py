"""Batches of one size for a network, so that an image does not depend on what it is drawn with."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.diffusion.sampler_steps import Denoiser


def in_batches_of(size: int, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """Call a function with a fixed number of images at a time, the last ones filled up.

    Convolutions and matrix products round differently in batches of another size, at the sixth digit, but alike at
    every place in a batch of one size: so an image is the same to the last bit whatever it is drawn with.

    Args:
        size: Images that go through the function at once, at least 1.
        function: Called with `size` of each of the tensors. What it returns for an image must not depend on the others
            (no batch normalisation in training mode).
        given: Tensors [B, ...] with B at least 1.

    Returns:
        What it returned for the B images.

    Raises:
        ValueError: If `size` is below 1.
    """
    _require(size)
    number = len(given[0])
    filler = -number % size
    filled = [torch.cat([values, values[:1].expand(filler, *values.shape[1:])]) for values in given]
    parts = [torch.split(values, size) for values in filled]
    return torch.cat([function(*part) for part in zip(*parts, strict=True)])[:number]


def in_fixed_batches(denoiser: Denoiser, size: int = 8) -> Denoiser:
    """Let a denoiser have a fixed number of images at a time, see `in_batches_of`.

    Args:
        denoiser: Called with `size` images, their noise levels and, if there are any, their labels.
        size: Images that go through the denoiser at once, at least 1.

    Returns:
        A denoiser for any number of images from 1.

    Raises:
        ValueError: If `size` is below 1.
    """
    _require(size)

    def denoise(x: Tensor, sigma: Tensor, label: Tensor | None = None, /) -> Tensor:
        return in_batches_of(size, denoiser, *((x, sigma) if label is None else (x, sigma, label)))

    return denoise


def _require(size: int) -> None:
    if size < 1:
        msg = f"Expected `size` to be at least 1, got {size}."
        raise ValueError(msg)
