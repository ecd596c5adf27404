"""A frozen encoder and a linear classifier of its features."""

from typing import Any

import torch
from torch import Tensor, nn


def preprocess_rows(features: Tensor, centre: bool = True, normalize: bool = True) -> Tensor:
    """Bring each feature vector to mean 0 and length 1 by itself, without statistics of others.

    Args:
        features: [N, D].
        centre: Subtract from each row its own mean.
        normalize: Divide each row by its Euclidean norm then; a constant one becomes 0.

    Returns:
        float64 [N, D].
    """
    rows = features.double()
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if centre:
        rows = rows - rows.mean(1, keepdim=True)
    if not normalize:
        return rows
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # What is left of a constant row is rounding, and no direction.
    return torch.where(norm > 1e-12 * length, rows / norm, 0.0)


class ProbeNetwork(nn.Module):
    """Logits W x of the preprocessed features x of images; only W can be trained.

    Args:
        num_classes: Classes K.
        encoder: Image [B, C, H, W] in [0, 1] -> features [B, D], by its `embed` where it has one; it is frozen. None
            takes the pixels.
        centre_rows: Subtract from each feature vector its own mean.
        normalize_rows: Divide each feature vector by its norm.

    Attributes:
        weight: W, float64 [K, D]; D is 0 until `resize`.
        num_features: D.
    """

    def __init__(
        self, num_classes: int, encoder: nn.Module | None = None, centre_rows: bool = True, normalize_rows: bool = True
    ) -> None:
        super().__init__()
        self.encoder = None if encoder is None else encoder.requires_grad_(False)
        self.num_classes = num_classes
        self.centre_rows = centre_rows
        self.normalize_rows = normalize_rows
        self.weight = nn.Parameter(torch.zeros(num_classes, 0, dtype=torch.float64))
        self.train(self.training)

    @property
    def num_features(self) -> int:
        """Features D of an image; 0 until it is known."""
        return self.weight.shape[1]

    def resize(self, num_features: int) -> None:
        """Start again with W = 0 for so many features.

        Args:
            num_features: D.
        """
        self.weight = nn.Parameter(self.weight.new_zeros(self.num_classes, num_features))

    def train(self, mode: bool = True) -> "ProbeNetwork":
        """Leave the encoder in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    @torch.no_grad()
    def embed(self, image: Tensor) -> Tensor:
        """Features [B, D] float32 of images [B, C, H, W] in [0, 1], the same whatever the precision of the fit.

        Raises:
            ValueError: The encoder gives something else.
        """
        if self.encoder is None:
            return image.float().flatten(1)
        look: Any = getattr(self.encoder, "embed", self.encoder)
        with torch.autocast(image.device.type, enabled=False):
            features = look(image.float())
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(image):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            msg = (
                f"Expected an `encoder` that gives features [B, D] of images [B, C, H, W], got {got} from "
                f"{type(self.encoder).__name__}; use ViTEncoder, or TimmClassifier with num_classes 0."
            )
            raise ValueError(msg)
        return features.float()

    def rows(self, features: Tensor) -> Tensor:
        """What W is multiplied with, float64 [B, D], of features [B, D]."""
        return preprocess_rows(features, self.centre_rows, self.normalize_rows)

    def classify(self, embedding: Tensor) -> Tensor:
        """Logits [B, K] float64 of features [B, D].

        Raises:
            ValueError: They are of another width, or there is no W yet.
        """
        if embedding.shape[1] != self.num_features:
            msg = (
                f"Expected images with {self.num_features} features, which the probe was fitted on, got "
                f"{embedding.shape[1]}; fit it first, or give images of the size that it was fitted on."
            )
            raise ValueError(msg)
        with torch.autocast(embedding.device.type, enabled=False):
            return self.rows(embedding) @ self.weight.T

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] float64 of images [B, C, H, W] in [0, 1]."""
        return self.classify(self.embed(image))
