"""Wide residual networks for small images, as the semi-supervised literature uses them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.normalise import Normalise


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, slope: float, momentum: float, first: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs, momentum=momentum)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, momentum=momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.slope = slope
        # The very first block activates before it branches, the others only inside the branch.
        self.activates_input = first

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(self.norm1(x), self.slope)
        if self.activates_input:
            x = active
        out = self.conv2(F.leaky_relu(self.norm2(self.conv1(active)), self.slope))
        short = x if self.shortcut is None else self.shortcut(active if self.activates_input else x)
        return out + short  # type: ignore[no-any-return]  # modules return Any


class WideResNet(nn.Module):
    """WRN-depth-widen (Zagoruyko & Komodakis, arXiv 1605.07146), with the changes of Oliver et al. (arXiv 1804.09170).

    Leaky ReLU of slope 0.1, no dropout, three groups of (depth - 4) / 6 blocks of width * widen * (1, 2, 4) channels;
    the second and third halve the side. WRN-28-2 is `WideResNet()`, 1.47 million parameters for ten classes.

    Args:
        depth: 6 n + 4.
        widen: Multiple of the width.
        num_classes: Outputs; None until `reset_classifier` (SSLClassifier calls it).
        in_channels: Channels of the images.
        width: Channels of the first convolution.
        stem_stride: Stride of the first convolution; 2 makes a step four times as cheap.
        mean: Mean of the images in [0, 1], one number or one a channel; subtracted first.
        std: Their standard deviation, likewise.
        negative_slope: Of the leaky ReLU.
        bn_momentum: In torch's sense, the weight of the newest batch; the literature's 0.999 is 0.001.

    Attributes:
        num_features: Channels of the pooled features.

    Raises:
        ValueError: `depth` does not fit.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 2,
        num_classes: int | None = None,
        in_channels: int = 3,
        width: int = 16,
        stem_stride: int = 1,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        negative_slope: float = 0.1,
        bn_momentum: float = 0.001,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            msg = f"Expected `depth` to be 6 n + 4 with n >= 1, got {depth}; 10, 16, 22 and 28 are."
            raise ValueError(msg)
        self.num_classes = num_classes
        self.normalise = Normalise(mean, std)
        self.stem = nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False)
        channels, blocks = width, []
        for group, outputs in enumerate(width * widen * factor for factor in (1, 2, 4)):
            for number in range((depth - 4) // 6):
                stride = 2 if group > 0 and number == 0 else 1
                first = group == 0 and number == 0
                blocks.append(_Block(channels, outputs, stride, negative_slope, bn_momentum, first))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels, momentum=bn_momentum)
        self.negative_slope = negative_slope
        self.num_features = channels
        self.head = nn.Linear(channels, num_classes or 1)
        self.reset_parameters()
        # Channels last: a step is a quarter to a third faster, on CPUs too. For other widths the backward pass of
        # torch's CPU convolutions corrupts memory in that format (torch 2.15, widths 2, 4 and 6: a crash).
        self.memory_format = torch.channels_last if width % 8 == 0 else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    def reset_parameters(self) -> None:
        """Draw all weights anew: convolutions as He et al. (fan out), the last layer as Glorot & Bengio."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=self.negative_slope, mode="fan_out", nonlinearity="leaky_relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                module.reset_running_stats()
        self._reset_head()

    def _reset_head(self) -> None:
        nn.init.xavier_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one.

        Args:
            num_classes: Its outputs.
        """
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)
        self._reset_head()

    def embed(self, image: Tensor) -> Tensor:
        """Pooled features [B, num_features] of images [B, C, H, W] in [0, 1]."""
        image = self.normalise(image).contiguous(memory_format=self.memory_format)
        x = self.blocks(self.stem(image))
        return F.leaky_relu(self.norm(x), self.negative_slope).mean((2, 3))

    def classify(self, embedding: Tensor) -> Tensor:
        """Logits [B, K] of pooled features."""
        logits: Tensor = self.head(embedding)
        return logits

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [0, 1]."""
        return self.classify(self.embed(image))
