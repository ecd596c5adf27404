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
    level = torch.frac(_GOLDEN * (index.cpu().double() + 1)).float()
    shape = like.shape[1:]
    eps = [torch.randn(shape, generator=torch.Generator().manual_seed(int(i))) for i in index]
    return process.sigma_at(level).to(like), torch.stack(eps).to(like)


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
