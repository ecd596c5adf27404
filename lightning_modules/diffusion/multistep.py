"""Samplers that look back: a step uses the estimate of the one before, so one call of the denoiser has second order."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_modules.diffusion.sampler_steps import (
    Denoiser,
    OnStep,
    estimate,
    falling_levels,
    initial_state,
    report,
)


@torch.no_grad()
def sample_dpmpp_2m(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    *,
    label: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow the reverse ODE with DPM-Solver++(2M).

    In VE coordinates and lambda = -ln(sigma), a step of length h = lambda' - lambda from sigma to sigma' is that of
    Euler's method, x' = d + (sigma' / sigma) * (x - d), with d extrapolated to the middle of the step from the two
    newest estimates of the denoiser,

        d = D + h / (2 h_before) * (D - D_before).

    The first step has nothing to look back on; the last one, to sigma' = 0, is infinitely long: both take d = D.

    Source: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (arXiv
    2211.01095), algorithm 2.

    Args:
        denoiser: Estimates clean images. It is called once per step, in the type of `x`.
        x: Initial state, sigmas[0] * eps, [B, C, H, W].
        sigmas: Decreasing noise levels, the last one 0, such as those of `NoiseProcess.sigmas`.
        generators: Not used: all samplers are called alike.
        label: Passed on to the denoiser.
        on_step: Called after each step.

    Returns:
        The last estimate of the denoiser, in the type of `x`, without gradients.

    Raises:
        ValueError: If a shape does not fit, or if the levels do not decrease to 0.
    """
    levels, state = falling_levels(sigmas), initial_state(x)
    lambdas = [-math.log(level) for level in levels[:-1]]
    before: Tensor | None = None
    for step, (sigma, next_sigma) in enumerate(pairwise(levels), 1):
        denoised = estimate(denoiser, state, sigma, label, x.dtype)
        ahead = denoised
        if before is not None and next_sigma > 0:
            h_before, h = lambdas[step - 1] - lambdas[step - 2], lambdas[step] - lambdas[step - 1]
            ahead = denoised + h / (2 * h_before) * (denoised - before)
        state = ahead + next_sigma / sigma * (state - ahead)
        before = denoised
        report(on_step, step, denoised, x.dtype)
    return state.to(x.dtype)
