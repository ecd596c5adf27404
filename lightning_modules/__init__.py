"""What is trained: Lightning modules for many images and few, or unreliable, labels.

Names are resolved on first use, so importing the package (and `lightning --help`) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_modules.diffusion.noise import EDMProcess as EDMProcess
    from lightning_modules.diffusion.noise import VPProcess as VPProcess
    from lightning_modules.export import export_checkpoint as export_checkpoint
    from lightning_modules.hybrid_segmentation import HybridSegmentation as HybridSegmentation
    from lightning_modules.ledm_segmentation import LEDMSegmentation as LEDMSegmentation
    from lightning_modules.networks.adm_unet import ADMUNet as ADMUNet

_HOMES = {
    "ADMUNet": "lightning_modules.networks.adm_unet",
    "EDMProcess": "lightning_modules.diffusion.noise",
    "HybridSegmentation": "lightning_modules.hybrid_segmentation",
    "LEDMSegmentation": "lightning_modules.ledm_segmentation",
    "VPProcess": "lightning_modules.diffusion.noise",
    "export_checkpoint": "lightning_modules.export",
}

__all__ = ["ADMUNet", "EDMProcess", "HybridSegmentation", "LEDMSegmentation", "VPProcess", "export_checkpoint"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)
