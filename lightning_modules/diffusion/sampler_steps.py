"""What every sampler does: check its start, ask the denoiser, report a step."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from lightning_modules.diffusion.noise import wide

OnStep = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done and the newest estimate of the clean image."""


class Denoiser(Protocol):
    """Estimates clean images, E[x | x_sigma]."""

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, /) -> Tensor:
        """Denoise `x` [B, C, H, W], whose images have the noise levels `sigma` [B]."""
        ...


def initial_state(x: Tensor) -> Tensor:
    """Return the state of a sampler: its start in float64, which it keeps to the end.

    Args:
        x: Initial state, sigmas[0] * eps, [B, C, H, W].

    Returns:
        The same in float64, or in float32 on Apple's GPUs, which have no float64.

    Raises:
        ValueError: If it is not a batch of images, or not of a floating type.
    """
    if x.ndim != 4 or not x.is_floating_point():
        msg = (
            f"Expected `x` of shape [B, C, H, W] and a floating type, got {list(x.shape)} of {x.dtype}. "
            f"Draw it with `seeded_noise` and scale it by sigmas[0]."
        )
        raise ValueError(msg)
    # Steps add up differences that a float32 loses.
    return wide(x)


def falling_levels(sigmas: Tensor) -> list[float]:
    """Return noise levels as numbers, if a sampler can walk down them.

    Args:
        sigmas: The levels, [N + 1].

    Returns:
        The levels, of which there are at least 2.

    Raises:
        ValueError: If they do not decrease to 0.
    """
    levels: list[float] = sigmas.flatten().tolist()
    falling = all(after < before < math.inf for before, after in pairwise(levels))
    if sigmas.ndim != 1 or len(levels) < 2 or not falling or levels[-1] != 0:
        msg = (
            f"Expected `sigmas` to be 2 or more decreasing noise levels that end in 0, got "
            f"{sigmas if len(levels) <= 8 else f'{len(levels)} from {levels[0]:g} to {levels[-1]:g}'}. "
            f"`NoiseProcess.sigmas` makes them."
        )
        raise ValueError(msg)
    return levels


def estimate(denoiser: Denoiser, state: Tensor, sigma: float, label: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Ask the denoiser for the clean images.

    Args:
        denoiser: Estimates clean images.
        state: State of the sampler, [B, C, H, W].
        sigma: Noise level of the state.
        label: Passed on to the denoiser.
        dtype: Type that the denoiser takes and returns.

    Returns:
        Its estimate, in the type of the state.

    Raises:
        ValueError: If it does not return images of the shape of the state.
    """
    # 16 bits are too few for a noise level.
    sigmas = state.new_full((state.shape[0],), sigma, dtype=torch.promote_types(dtype, torch.float32))
    denoised = denoiser(state.to(dtype), sigmas, label)
    if denoised.shape != state.shape:
        msg = (
            f"Expected `denoiser` to return the shape of `x`, {list(state.shape)}, got {list(denoised.shape)}. "
            f"Give `x` all channels that are drawn, those of a mask too."
        )
        raise ValueError(msg)
    return denoised.to(state.dtype)


def report(on_step: OnStep | None, step: int, denoised: Tensor, dtype: torch.dtype) -> None:
    """Tell the caller of a sampler, if it wants to know, that a step is done.

    Args:
        on_step: Called with the number of steps done and the newest estimate.
        step: Number of steps done.
        denoised: Newest estimate of the clean images.
        dtype: Type that the estimate is given in.
    """
    if on_step is not None:
        on_step(step, denoised.to(dtype))
