"""Autoencoders of a few thousand numbers, and images for them."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tiny_nets import adamw, squares_loader, tiny_trainer

from lightning_modules import KLAutoencoder, LatentSpace, VAETraining
from lightning_modules.networks.autoencoder import encode


def tiny_autoencoder(in_channels: int = 3) -> KLAutoencoder:
    """Images of 8 px to 2 channels of 4 px."""
    return KLAutoencoder(in_channels, latent_channels=2, block_out_channels=(4, 8), layers_per_block=1, norm_groups=4)


def tiny_training(**arguments: Any) -> VAETraining:
    """Training of a tiny autoencoder."""
    options: dict[str, Any] = {"optimizer": adamw, "ema_decay": 0.5}
    return VAETraining(tiny_autoencoder(), **options | arguments)


def fitted(folder: Path, **options: Any) -> tuple[VAETraining, pl.Trainer, Path]:
    """A module that was fitted on eight squares, its trainer and its checkpoint."""
    torch.manual_seed(0)
    model, trainer = tiny_training(), tiny_trainer(folder, **{"max_epochs": 2} | options)
    trainer.fit(model, squares_loader(), squares_loader())
    trainer.save_checkpoint(folder / "vae.ckpt")
    return model, trainer, folder / "vae.ckpt"


def tiny_latent_space(folder: Path, seed: int = 0, sigma_data: float = 1.0) -> LatentSpace:
    """A latent space of random weights whose latents have a mean and a deviation far from 0 and 1."""
    torch.manual_seed(seed)
    vae = tiny_autoencoder().vae
    with torch.no_grad():
        means = encode(vae, torch.rand(64, 3, 8, 8)).chunk(2, dim=1)[0]
    config = {"latents_mean": means.mean((0, 2, 3)).tolist(), "latents_std": means.std((0, 2, 3)).tolist()}
    vae.register_to_config(**config, scaling_factor=1.0)
    vae.save_pretrained(folder)
    return LatentSpace(folder=str(folder), sigma_data=sigma_data)
