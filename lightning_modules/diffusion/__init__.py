"""Noise processes and denoisers in plain PyTorch."""

from lightning_modules.diffusion.denoisers import JointDenoiser, takes_time
from lightning_modules.diffusion.noise import EDMProcess, NoiseProcess, VPProcess

__all__ = ["EDMProcess", "JointDenoiser", "NoiseProcess", "VPProcess", "takes_time"]
