"""Plain PyTorch networks: nothing here knows about training loops."""

from lightning_modules.networks.adm_unet import ADMUNet

__all__ = ["ADMUNet"]
