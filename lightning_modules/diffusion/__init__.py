"""Noise processes, denoisers and samplers in plain PyTorch."""

from lightning_modules.diffusion.denoisers import JointDenoiser, PairDenoiser, takes_time
from lightning_modules.diffusion.fixed_batches import in_fixed_batches
from lightning_modules.diffusion.guidance import AffineDenoiser, GuidedDenoiser
from lightning_modules.diffusion.multistep import sample_dpmpp_2m
from lightning_modules.diffusion.noise import EDMProcess, NoiseProcess
from lightning_modules.diffusion.sampler_levels import sampler_sigmas
from lightning_modules.diffusion.sampler_steps import Denoiser
from lightning_modules.diffusion.samplers import (
    SAMPLERS,
    Sampler,
    SamplerName,
    sample,
    sample_ancestral,
    sample_euler,
    sample_heun,
    seeded_generators,
    seeded_noise,
)
from lightning_modules.diffusion.vp_noise import VPProcess, VPSDEProcess

__all__ = [
    "SAMPLERS",
    "AffineDenoiser",
    "Denoiser",
    "EDMProcess",
    "GuidedDenoiser",
    "JointDenoiser",
    "NoiseProcess",
    "PairDenoiser",
    "Sampler",
    "SamplerName",
    "VPProcess",
    "VPSDEProcess",
    "in_fixed_batches",
    "sample",
    "sample_ancestral",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_heun",
    "sampler_sigmas",
    "seeded_generators",
    "seeded_noise",
    "takes_time",
]
