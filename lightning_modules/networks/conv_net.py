"""A small convolutional network for small images, as federated averaging was first tried with."""

from collections.abc import Sequence
from math import gcd
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.normalise import Normalise

NormName = Literal["batch", "group"]
# Channels of a group, as Wu & He (arXiv 1803.08494) have it, where it divides the channels.
_GROUP = 16


class ConvNet(nn.Module):
    """Two or more convolutions with normalisation, and one linear layer on all their outputs.

    The first convolution keeps the side, each further one halves it. The linear layer sees where a feature is: with a
    few labels of some classes a client, federated averaging does better with it than with pooled features. The CNN
    of McMahan et al. 2017 (arXiv 1602.05629) is of this kind, with 5 x 5 kernels, pooling and a hidden layer.

    Args:
        image_size: Side of the images in pixels.
        widths: Channels of each convolution.
        num_classes: Outputs; None until `reset_classifier` (SSLClassifier calls it).
        in_channels: Channels of the images.
        norm: `batch` or `group`: statistics of the batch, which clients average like weights, or of each image.
        mean: Mean of the images in [0, 1], one number or one a channel; subtracted first.
        std: Their standard deviation, likewise.
        bn_momentum: In torch's sense, the weight of the newest batch.

    Attributes:
        num_features: Inputs of the linear layer.

    Raises:
        ValueError: There are no `widths`, or `norm` is unknown.
    """

    def __init__(
        self,
        image_size: int,
        widths: Sequence[int] = (32, 64),
        num_classes: int | None = None,
        in_channels: int = 3,
        norm: NormName = "batch",
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            msg = f"Expected `widths` of at least one convolution, got {list(widths)}; [32, 64] is the default."
            raise ValueError(msg)
        if norm not in ("batch", "group"):
            msg = f'Expected `norm` to be "batch" or "group", got {norm!r}.'
            raise ValueError(msg)
        self.num_classes = num_classes
        self.normalise = Normalise(mean, std)
        layers: list[nn.Module] = []
        channels, side = in_channels, image_size
        for number, width in enumerate(widths):
            stride = 1 if number == 0 else 2
            side = (side - 1) // stride + 1
            groups = gcd(width, max(width // _GROUP, 1))
            made = nn.BatchNorm2d(width, momentum=bn_momentum) if norm == "batch" else nn.GroupNorm(groups, width)
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), made, nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.num_features = channels * side * side
        self.head = nn.Linear(self.num_features, num_classes or 1)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one.

        Args:
            num_classes: Its outputs.
        """
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)

    def embed(self, image: Tensor) -> Tensor:
        """Features [B, num_features] of images [B, C, H, W] in [0, 1]."""
        return self.features(self.normalise(image)).flatten(1)  # type: ignore[no-any-return]  # modules return Any

    def classify(self, embedding: Tensor) -> Tensor:
        """Logits [B, K] of features."""
        return F.linear(embedding, self.head.weight, self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [0, 1]."""
        return self.classify(self.embed(image))
