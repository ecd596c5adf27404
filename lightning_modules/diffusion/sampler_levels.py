"""Which noise levels a sampler walks through in a process."""

from torch import Tensor

from lightning_modules.diffusion.noise import NoiseProcess, karras_sigmas
from lightning_modules.diffusion.samplers import SamplerName
from lightning_modules.diffusion.vp_noise import VariancePreserving

_VISIBLE = 80.0
"""Noise level beyond which nothing of an image in [-1, 1] can be seen."""


def sampler_sigmas(process: NoiseProcess, sampler: SamplerName, num_steps: int) -> Tensor:
    """Return the noise levels of a sampler: the process's own, but for Heun's method in a variance-preserving one.

    Its trapezoids in sigma go wrong in steps as long as such a process makes them at its noisy end (a cosine schedule
    starts above 10^4); beyond 80 there is nothing to be seen of an image in [-1, 1].

    Args:
        process: The process that the network was trained with.
        sampler: Name of the sampler.
        num_steps: Its steps, at least 1.

    Returns:
        num_steps + 1 decreasing float32 levels, the last one 0.

    Raises:
        ValueError: If `num_steps` is below 1.
    """
    if sampler != "heun" or not isinstance(process, VariancePreserving):
        return process.sigmas(num_steps)
    return karras_sigmas(num_steps, process.sigma_min, min(process.sigma_max, _VISIBLE))
