"""Noise of an evaluation: the same for an image in every epoch, run and process, so that losses compare."""

import torch
from torch import Tensor

from lightning_modules.diffusion.noise import NoiseProcess

_GOLDEN = 0.6180339887498949
"""Its multiples fill [0, 1) evenly."""


def evaluation_noise(process: NoiseProcess, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Draw noise levels and noise that depend on each image's index only.

    Args:
        process: Its levels are spread evenly over the images.
        index: Numbers of the images, [B], from 0.
        like: Images [B, ...]: shape, type and device of the noise.

    Returns:
        Noise levels [B] and standard normal noise like the images.
    """
    return process.sigma_at(_places(index).float()).to(like), image_noise(index, like)


def training_levels(process: NoiseProcess, number: int = 4096) -> Tensor:
    """Quantiles of the noise levels that training draws, the same whenever they are asked for.

    Args:
        process: The process.
        number: How many.

    Returns:
        Increasing levels [number].
    """
    return process.sample_sigma(number, torch.Generator().manual_seed(0)).sort().values


def levels_of_bin(levels: Tensor, index: Tensor, number: int, num_bins: int) -> Tensor:
    """Choose a noise level in one bin of equally many training levels; it depends on each image's index only.

    Args:
        levels: See `training_levels`.
        index: Numbers of the images, [B], from 0.
        number: Number of the bin, from 0 (little noise) to num_bins - 1.
        num_bins: Number of bins.

    Returns:
        Noise levels [B], spread evenly over the levels of the bin.
    """
    places = (number + _places(index)) / num_bins
    return levels[(places * len(levels)).long().to(levels.device)]


def training_bin(levels: Tensor, sigma: Tensor, num_bins: int) -> Tensor:
    """Number of the bin of equally many training levels that each level falls into.

    Args:
        levels: See `training_levels`.
        sigma: Noise levels [B].
        num_bins: Number of bins.

    Returns:
        int64 [B], from 0 (little noise) to num_bins - 1.
    """
    places = torch.searchsorted(levels, sigma.contiguous(), right=True)
    return (places * num_bins // len(levels)).clamp(max=num_bins - 1)


def _places(index: Tensor) -> Tensor:
    return torch.frac(_GOLDEN * (index.cpu().double() + 1))


def image_noise(index: Tensor, like: Tensor) -> Tensor:
    """Draw standard normal noise that depends on each image's index only.

    Args:
        index: Numbers of the images, [B], from 0.
        like: Images [B, ...]: shape, type and device of the noise.

    Returns:
        Noise like the images.
    """
    shape = like.shape[1:]
    # Read in one go, not image by image from a GPU; float32, since a trainer of 16 bits makes its type the default.
    seeds = index.tolist()
    eps = [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) for seed in seeds]
    return torch.stack(eps).to(like)


def level_bin(process: NoiseProcess, sigma: Tensor, num_bins: int) -> Tensor:
    """Number of the bin that each noise level falls into: 0 for clean images, then equal bins of `process.level`.

    Args:
        process: The process.
        sigma: Noise levels.
        num_bins: Bins above the one for clean images.

    Returns:
        int64, from 0 to `num_bins`.
    """
    number = (process.level(sigma) * num_bins).ceil().long()
    return torch.where(sigma == 0, 0, number.clamp(1, num_bins))


def bin_names(num_bins: int) -> list[str]:
    """Name the bins of `level_bin`, for logs."""
    return ["clean", *(f"level_{k / num_bins:.2f}_to_{(k + 1) / num_bins:.2f}" for k in range(num_bins))]
