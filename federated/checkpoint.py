"""A finished network as the checkpoint that `lightning test`, `predict` and `export` read."""

import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule

from datamodules.atomic import write_atomically

CHECKPOINT = "checkpoints/last.ckpt"


def write_checkpoint(module: LightningModule, path: Path) -> None:
    """Write a module's weights as Lightning does at the end of a fit, without optimiser and progress.

    Args:
        module: The module.
        path: The file, which is replaced; its folder is made.
    """
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": version("pytorch-lightning"),
        "epoch": 0,
        "global_step": 0,
        "state_dict": module.state_dict(),
        module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams),
    }
    module.on_save_checkpoint(checkpoint)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
