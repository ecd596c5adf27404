"""Samplers: from noise to images with any `denoiser(x, sigma, label=None) -> x0`.

All of them walk down a list of noise levels in variance-exploding coordinates, x_sigma = x + sigma * eps (see
`noise.py`), so they know nothing of the process, the network or the meaning of the channels:

    generators = seeded_generators([0, 1, 2])
    sigmas = process.sigmas(50)
    x = sigmas[0] * seeded_noise(generators, (3, 32, 32))
    images = sample("heun", denoiser, x, sigmas, generators)

All randomness is drawn from one CPU generator per image, so an image is a function of its seed, whatever else
is in its batch, and whatever device the denoiser runs on. (Its network may still round differently in another
batch.) The last level is 0, and what is returned is the last estimate of the denoiser, as it is.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_modules.diffusion.multistep import sample_dpmpp_2m
from lightning_modules.diffusion.sampler_steps import (
    Denoiser,
    OnStep,
    estimate,
    falling_levels,
    initial_state,
    report,
)

SamplerName = Literal["euler", "heun", "ancestral", "dpmpp_2m"]


class Sampler(Protocol):
    """What the entries of `SAMPLERS` have in common."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        generators: Sequence[torch.Generator],
        label: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Turn noise into images; see `sample`."""
        ...


def seeded_generators(seeds: Sequence[int] | Tensor) -> list[torch.Generator]:
    """Make one CPU generator per image.

    Args:
        seeds: Seed of each image, [B], from 0 to 2^32 - 1.

    Returns:
        The generators, in the order of the seeds.

    Raises:
        ValueError: If a seed is out of range, or if `seeds` is not a list.
    """
    seeds = torch.as_tensor(seeds)
    # PyTorch reads 32 bits of a CPU generator's seed: two seeds with the same ones would give the same image.
    if seeds.ndim != 1 or seeds.is_floating_point() or bool(((seeds < 0) | (seeds >= 2**32)).any()):
        msg = (
            f"Expected `seeds` to be a list of integers from 0 to 2^32 - 1, got {seeds}. "
            f"Count the images of a data set from any `first_seed` in this range."
        )
        raise ValueError(msg)
    return [torch.Generator(device="cpu").manual_seed(seed) for seed in seeds.tolist()]


def seeded_noise(
    seeds: Sequence[int] | Sequence[torch.Generator] | Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the noise of each image from its own generator.

    Args:
        seeds: One seed per image, or its generator, which is then left ahead by this draw. Give generators
            if the sampler draws as well: with the same seeds anew it would repeat this noise.
        shape: Shape of one image, [C, H, W].
        dtype: Type of the result. The draws are float32 in any case, so types do not change the noise.
        device: Where to put the result. The draws are made on the CPU in any case.

    Returns:
        Standard normal noise, [B, C, H, W].

    Raises:
        ValueError: If there is no seed, or as in `seeded_generators`.
    """
    if len(seeds) == 0:
        msg = "Expected `seeds` to hold at least one seed or generator, got none; leave out empty batches."
        raise ValueError(msg)
    generators = [seed for seed in seeds if isinstance(seed, torch.Generator)]
    if len(generators) < len(seeds):
        numbers = seeds if isinstance(seeds, Tensor) else [seed for seed in seeds if isinstance(seed, int)]
        generators = seeded_generators(numbers)
    draws = [
        torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu") for generator in generators
    ]
    return torch.stack(draws).to(device=device, dtype=dtype)


@torch.no_grad()
def sample_euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    *,
    label: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow the reverse ODE with Euler's method; this is DDIM with eta = 0 in VE coordinates.

    Sources: Karras et al. (arXiv 2206.00364), equation 4; Song et al., "Denoising Diffusion Implicit Models"
    (arXiv 2010.02502), equation 13.

    Args:
        denoiser: Estimates clean images. It is called once per step, in the type of `x`.
        x: Initial state, sigmas[0] * eps, [B, C, H, W].
        sigmas: Decreasing noise levels, the last one 0, such as those of `NoiseProcess.sigmas`.
        label: Passed on to the denoiser.
        generators: Not used: all samplers are called alike.
        on_step: Called after each step.

    Returns:
        The last estimate of the denoiser, in the type of `x`, without gradients.

    Raises:
        ValueError: If a shape does not fit, or if the levels do not decrease to 0.
    """
    levels, state = falling_levels(sigmas), initial_state(x)
    for step, (sigma, next_sigma) in enumerate(pairwise(levels), 1):
        denoised = estimate(denoiser, state, sigma, label, x.dtype)
        # As a weighted mean of the two, the last step gives `denoised` to the last bit.
        state = denoised + next_sigma / sigma * (state - denoised)
        report(on_step, step, denoised, x.dtype)
    return state.to(x.dtype)


@torch.no_grad()
def sample_heun(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    *,
    label: Tensor | None = None,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Follow the reverse ODE with Heun's method, optionally with fresh noise before each step.

    Source: Karras et al. (arXiv 2206.00364), algorithms 1 and 2.

    Args:
        denoiser: Estimates clean images. It is called twice per step, once in the last one, in the type of `x`.
        x: Initial state, sigmas[0] * eps, [B, C, H, W].
        sigmas: Decreasing noise levels, the last one 0, such as those of `NoiseProcess.sigmas`.
        label: Passed on to the denoiser.
        generators: One per image, for the fresh noise. Needed only with `s_churn`.
        on_step: Called after each step.
        s_churn: Fresh noise, at least 0, over all steps together; 0 for none. A step at sigma starts from
            (1 + min(s_churn / steps, sqrt(2) - 1)) * sigma.
        s_tmin: Smallest noise level at which there is fresh noise.
        s_tmax: Largest noise level at which there is fresh noise.
        s_noise: Standard deviation of the fresh noise, where 1 would be exact for an exact denoiser.

    Returns:
        The last estimate of the denoiser, in the type of `x`, without gradients.

    Raises:
        ValueError: If a shape, a level, an option or the number of generators does not fit.
    """
    levels, state = falling_levels(sigmas), initial_state(x)
    _check_options(s_churn=s_churn, s_tmin=s_tmin, s_noise=s_noise)
    if s_churn > 0:
        generators = _check_generators(generators, x)
    gamma = min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)
    for step, (level, next_sigma) in enumerate(pairwise(levels), 1):
        sigma = level
        if generators is not None and gamma > 0 and s_tmin <= level <= s_tmax:
            sigma = (1 + gamma) * level
            state = state + math.sqrt(sigma**2 - level**2) * s_noise * _noise_like(state, generators)
        denoised = estimate(denoiser, state, sigma, label, x.dtype)
        euler = denoised + next_sigma / sigma * (state - denoised)
        if next_sigma > 0:
            slope = (state - denoised) / sigma
            denoised = estimate(denoiser, euler, next_sigma, label, x.dtype)
            state = state + (next_sigma - sigma) * (slope + (euler - denoised) / next_sigma) / 2
        else:
            state = euler
        report(on_step, step, denoised, x.dtype)
    return state.to(x.dtype)


@torch.no_grad()
def sample_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    *,
    label: Tensor | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
) -> Tensor:
    """Follow the reverse SDE: each step goes below the next noise level and adds noise up to it.

    With eta = 1 this is the ancestral sampler of DDPM, with eta = 0 it is `sample_euler`, and in between DDIM
    with that eta. In VE coordinates the noise of DDIM on a step from sigma to s is

        sigma_up = eta * s * sqrt(1 - s^2 / sigma^2),    sigma_down^2 = s^2 - sigma_up^2.

    Source: Song et al. (arXiv 2010.02502), equations 12 and 16, divided by sqrt(abar_s) with
    abar = 1 / (1 + sigma^2).

    Args:
        denoiser: Estimates clean images. It is called once per step, in the type of `x`.
        x: Initial state, sigmas[0] * eps, [B, C, H, W].
        sigmas: Decreasing noise levels, the last one 0, such as those of `NoiseProcess.sigmas`.
        generators: One per image, for the noise; the ones that drew `x`. Needed only with `eta` above 0.
        label: Passed on to the denoiser.
        on_step: Called after each step.
        eta: Share of the noise, in [0, 1].

    Returns:
        The last estimate of the denoiser, in the type of `x`, without gradients.

    Raises:
        ValueError: If a shape or the number of generators does not fit, if the levels do not decrease to 0,
            or if `eta` is out of range.
    """
    levels, state = falling_levels(sigmas), initial_state(x)
    if not 0 <= eta <= 1:
        msg = f"Expected `eta` in [0, 1], got {eta}; 0 follows the ODE, 1 is the ancestral sampler of DDPM."
        raise ValueError(msg)
    if eta > 0:
        generators = _check_generators(generators, x)
    for step, (sigma, next_sigma) in enumerate(pairwise(levels), 1):
        denoised = estimate(denoiser, state, sigma, label, x.dtype)
        up = eta * next_sigma * math.sqrt(1 - (next_sigma / sigma) ** 2)
        down = math.sqrt(next_sigma**2 - up**2)
        state = denoised + down / sigma * (state - denoised)
        if generators is not None and up > 0:
            state = state + up * _noise_like(state, generators)
        report(on_step, step, denoised, x.dtype)
    return state.to(x.dtype)


SAMPLERS: dict[SamplerName, Sampler] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "ancestral": sample_ancestral,
    "dpmpp_2m": sample_dpmpp_2m,
}
"""The samplers by name, with their default options."""


def sample(
    name: SamplerName,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator],
    label: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Turn noise into images with a sampler of `SAMPLERS`.

    Args:
        name: Which one: `euler`, `heun` and `dpmpp_2m` follow the ODE, `ancestral` the SDE.
        denoiser: Estimates clean images.
        x: Initial state, sigmas[0] * eps, [B, C, H, W].
        sigmas: Decreasing noise levels, the last one 0, such as those of `NoiseProcess.sigmas`.
        generators: One per image: the ones that drew `x`.
        label: Passed on to the denoiser.
        on_step: Called after each step with the number of steps done and the newest estimate.

    Returns:
        Images, [B, C, H, W], in the type of `x`, without gradients.

    Raises:
        ValueError: If there is no such sampler, or if it refuses its arguments.
    """
    if name not in SAMPLERS:
        msg = f"Expected `name` of a sampler among {sorted(SAMPLERS)}, got {name!r}."
        raise ValueError(msg)
    return SAMPLERS[name](denoiser, x, sigmas, generators=generators, label=label, on_step=on_step)


def _check_options(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < math.inf:
            msg = f"Expected `{name}` to be 0 or more and finite, got {value}."
            raise ValueError(msg)


def _check_generators(generators: Sequence[torch.Generator] | None, x: Tensor) -> Sequence[torch.Generator]:
    found = [] if generators is None else [generator.device.type for generator in generators]
    if generators is None or found != ["cpu"] * x.shape[0]:
        msg = (
            f"Expected `generators` with {x.shape[0]} generators on the CPU, one per image of `x`, got "
            f"{len(found)} on {sorted(set(found))}. Make them with `seeded_generators`."
        )
        raise ValueError(msg)
    return generators


def _noise_like(state: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    return seeded_noise(generators, state.shape[1:], dtype=state.dtype, device=state.device)
