"""Noise processes, denoisers, samplers and transition matrices of noisy labels in plain PyTorch."""

from lightning_modules.diffusion.denoisers import ClassDenoiser, JointDenoiser, PairDenoiser, takes_time
from lightning_modules.diffusion.fixed_batches import in_fixed_batches
from lightning_modules.diffusion.guidance import AffineDenoiser, GuidedDenoiser
from lightning_modules.diffusion.learned_transition import LearnedTransition
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
from lightning_modules.diffusion.transition import (
    AsymmetricTransition,
    ConfusionTransition,
    FileTransition,
    IdentityTransition,
    SymmetricTransition,
    TransitionMatrix,
    require_transition,
    reverse_transition,
)
from lightning_modules.diffusion.transition_weights import (
    log_transition,
    mixed_estimate,
    reverse_weights,
    transition_weights,
)
from lightning_modules.diffusion.vp_noise import VPProcess, VPSDEProcess

__all__ = [
    "SAMPLERS",
    "AffineDenoiser",
    "AsymmetricTransition",
    "ClassDenoiser",
    "ConfusionTransition",
    "Denoiser",
    "EDMProcess",
    "FileTransition",
    "GuidedDenoiser",
    "IdentityTransition",
    "JointDenoiser",
    "LearnedTransition",
    "NoiseProcess",
    "PairDenoiser",
    "Sampler",
    "SamplerName",
    "SymmetricTransition",
    "TransitionMatrix",
    "VPProcess",
    "VPSDEProcess",
    "in_fixed_batches",
    "log_transition",
    "mixed_estimate",
    "require_transition",
    "reverse_transition",
    "reverse_weights",
    "sample",
    "sample_ancestral",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_heun",
    "sampler_sigmas",
    "seeded_generators",
    "seeded_noise",
    "takes_time",
    "transition_weights",
]
