"""Which noise levels a sampler walks through in a process."""

from torch import Tensor

from lightning_modules.diffusion.noise import NoiseProcess, karras_sigmas
from lightning_modules.diffusion.samplers import SamplerName
from lightning_modules.diffusion.vp_noise import VariancePreserving

_VISIBLE = 80.0
"""Noise level beyond which nothing of an image in [-1, 1] can be seen."""


def sampler_sigmas(process: NoiseProcess, sampler: SamplerName, num_steps: int) -> Tensor:
    """Return the noise levels of a sampler: the process's own, but for those of second order in a VP process.

    The trapezoids of Heun's method in sigma go wrong in steps as long as a variance-preserving process makes them at
    its noisy end (a cosine schedule starts above 10^4). DPM-Solver++ does not go wrong there, but times equally spaced
    waste its order at the clean end: in 20 steps of the linear schedule, pixels of N(0, 0.25^2) lose 19 % of their
    spread, where they gain 4 % with the levels of `karras_sigmas`. So both take these, cut at 80, beyond which there is
    nothing to be seen of an image in [-1, 1].

    Args:
        process: The process that the network was trained with.
        sampler: Name of the sampler.
        num_steps: Its steps, at least 1.

    Returns:
        num_steps + 1 decreasing float32 levels, the last one 0.

    Raises:
        ValueError: If `num_steps` is below 1.
    """
    if sampler not in ("heun", "dpmpp_2m") or not isinstance(process, VariancePreserving):
        return process.sigmas(num_steps)
    return karras_sigmas(num_steps, process.sigma_min, min(process.sigma_max, _VISIBLE))
