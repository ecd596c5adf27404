"""Normalisation as a part of the network, so that it travels with the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """(image - mean) / std.

    Args:
        mean: One number, or one a channel, for images in [0, 1].
        std: Likewise; positive.

    Raises:
        ValueError: A standard deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if min(std) <= 0:
            msg = f"Expected positive `std`, got {list(std)}; use 1 to leave the scale as it is."
            raise ValueError(msg)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

        self.mean: Tensor
        self.std: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """Normalise images [B, C, H, W]."""
        return (image - self.mean) / self.std
