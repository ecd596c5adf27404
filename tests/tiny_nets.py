"""Networks and data of a few hundred numbers, for tests that train."""

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_modules.networks.adm_unet import ADMUNet

adamw = partial(torch.optim.AdamW, lr=1e-3)


def tiny_unet(out_channels: int = 5, dropout: float = 0.1) -> ADMUNet:
    """An ADM UNet for 8-px images; dropout is on so that randomness matters."""
    return ADMUNet(
        out_channels=out_channels,
        image_size=8,
        base_channels=8,
        channel_mult=(1, 2),
        layers_per_block=1,
        attention_resolutions=(4,),
        head_channels=8,
        dropout=dropout,
        norm_groups=4,
        zero_init=False,
    )


class PointNet(nn.Module):
    """An MLP over the channels of each pixel and the noise level: enough for toys on 1x1 images."""

    def __init__(self, in_channels: int, out_channels: int, width: int = 64) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.body = nn.Sequential(nn.Linear(in_channels + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.head = nn.Linear(width, out_channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = (t / 1000).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        features = torch.cat([x, level, level.sqrt()], 1).movedim(1, -1)
        out: Tensor = self.head(self.body(features)).movedim(-1, 1)
        return out


class Segmenter(nn.Module):
    """A network without a time input, shaped like the models of segmentation_models_pytorch."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.segmentation_head = nn.Sequential(nn.Conv2d(8, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.segmentation_head(self.encoder(x))
        return out


class Squares(Dataset[dict[str, Tensor]]):
    """Bright squares on dark ground, 8 px; image i is a function of i."""

    def __init__(self, size: int = 8) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(i))
        image = 0.3 * torch.rand(3, 8, 8, generator=generator)
        mask = torch.zeros(8, 8, dtype=torch.int64)
        top, left = torch.randint(0, 4, (2,), generator=generator).tolist()
        mask[top : top + 4, left : left + 4] = 1
        return {"image": image + 0.6 * mask, "mask": mask, "index": torch.tensor(i)}


def squares_loader(size: int = 8, batch_size: int = 4) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Squares(size), batch_size=batch_size)


def tiny_trainer(path: Path, **kwargs: Any) -> pl.Trainer:
    """One silent epoch on the CPU that writes nothing, unless told otherwise."""
    options: dict[str, Any] = {
        "default_root_dir": path,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**options | kwargs)
