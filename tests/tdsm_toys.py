"""A conditional diffusion model of a few hundred numbers, and points of three classes as 1x1 images."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_modules.diffusion.transition import SymmetricTransition
from lightning_modules.tdsm_diffusion import TDSMDiffusion

MEANS = torch.tensor([-0.8, 0.0, 0.8])
SPREAD = 0.1


class ClassPoint(nn.Module):
    """A conditional network of images [B, C, H, W], each pixel on its own."""

    num_classes: int | None
    null_label: int | None

    def __init__(self, channels: int = 1, side: int = 1, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_channels, self.image_size = channels, side
        self.num_classes = self.null_label = None
        self.width = width
        self.first = nn.Linear(channels + 1, width)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, channels)
        )

    def reset_classes(self, num_classes: int) -> None:
        self.num_classes = self.null_label = num_classes
        self.classes = nn.Embedding(num_classes + 1, self.width)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        level = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        features = self.first(torch.cat([x, level], 1).movedim(1, -1))
        out: Tensor = self.body(features + self.classes(label)[:, None, None]).movedim(-1, 1)
        return out


class PointPosterior(nn.Module):
    """Exact logits of the classes of noisy points, from what EDM's coefficients give a network."""

    num_classes = 3

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = (4 * t).exp()
        noisy = x.flatten() * (sigma**2 + 0.25).sqrt()
        variance = SPREAD**2 + sigma[:, None] ** 2
        logits: Tensor = -((noisy[:, None] - MEANS.to(x)) ** 2) / (2 * variance)
        return logits


class Points(Dataset[dict[str, Tensor]]):
    """Points of three classes in [0, 1], labels wrong at a rate."""

    def __init__(self, size: int = 8, rate: float = 0.4, side: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        truth = torch.arange(size) % 3
        x = MEANS[truth] + SPREAD * torch.randn(size, generator=generator)
        wrong = torch.rand(size, generator=generator) < rate
        other = (truth + torch.randint(1, 3, (size,), generator=generator)) % 3
        self.image = ((x + 1) / 2).view(-1, 1, 1, 1).expand(-1, 1, side, side)
        self.label = torch.where(wrong, other, truth)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.image[i], "label": self.label[i], "index": torch.tensor(i)}


def points_loader(size: int = 8, batch_size: int = 4, **options: Any) -> DataLoader[dict[str, Tensor]]:
    """Whole batches: taking one point at a time would take most of a test's time."""
    batches = list(DataLoader(Points(size, **options), batch_size=batch_size))
    return DataLoader(cast("Dataset[dict[str, Tensor]]", batches), batch_size=None)


def tiny_tdsm(side: int = 1, dropout: float = 0.0, lr: float = 1e-3, **options: Any) -> TDSMDiffusion:
    """TDSM of points with symmetric noise of 40 %, unless told otherwise."""
    chosen: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=lr),
        "classifier": PointPosterior(),
        "transition": SymmetricTransition(0.4),
        "ema_half_life": 100.0,
    }
    torch.manual_seed(0)
    return TDSMDiffusion(ClassPoint(side=side, dropout=dropout), 3, **chosen | options)


def plain(**options: Any) -> TDSMDiffusion:
    """Diffusion on the labels as they are."""
    return tiny_tdsm(weighting="none", classifier=None, transition=None, **options)
