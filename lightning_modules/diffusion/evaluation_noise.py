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
    return process.sigma_at(_places(index).float()).to(like), _noise(index, like)


def training_levels(process: NoiseProcess, number: int = 4096) -> Tensor:
    """Quantiles of the noise levels that training draws, the same whenever they are asked for.

    Args:
        process: The process.
        number: How many.

    Returns:
        Increasing levels [number].
    """
    return process.sample_sigma(number, torch.Generator().manual_seed(0)).sort().values


def training_noise(levels: Tensor, index: Tensor, like: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw noise that depends on each image's index only, its levels distributed as in training.

    Args:
        levels: See `training_levels`.
        index: Numbers of the images, [B], from 0.
        like: Images [B, ...]: shape, type and device of the noise.
        num_bins: Bins of equally many levels.

    Returns:
        Noise levels [B], their bins from 0 (little noise) to num_bins - 1, and standard normal noise like the images.
    """
    places = _places(index).to(levels.device)
    return levels[(places * len(levels)).long()].to(like), (places * num_bins).long(), _noise(index, like)


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


def _noise(index: Tensor, like: Tensor) -> Tensor:
    shape = like.shape[1:]
    eps = [torch.randn(shape, generator=torch.Generator().manual_seed(int(i))) for i in index]
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
