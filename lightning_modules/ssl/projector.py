"""A small head that maps features to unit vectors, whose products say how alike images are."""

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """Two linear layers with a leaky ReLU, then division by the length.

    Args:
        num_features: Numbers of a feature vector.
        size: Numbers of a projected one, positive.
    """

    def __init__(self, num_features: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, num_features), nn.LeakyReLU(0.1), nn.Linear(num_features, size)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return unit vectors [B, size] of features [B, num_features]."""
        return F.normalize(self.layers(features).float(), dim=-1)
