"""A small ResNet that also sees how noisy its image is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

from lightning_modules.networks.conditioning import check_noisy_images, check_positive, require_classes, sinusoid

_SINUSOID = 128


class NoisyResNet(nn.Module):
    """Classifier p(y | x_t) of noisy images: a ResNet for small images (He et al., arXiv 1512.03385) with a time input.

    A 3 x 3 convolution, then stages of residual blocks with batch norm, average pool, Linear: the defaults are
    ResNet-18 as used for CIFAR. The noise level is embedded as sinusoid -> Linear, SiLU, Linear, SiLU, and each stage's
    output gets Linear(SiLU(embedding)) added, one number a channel (Na et al., arXiv 2402.17517, use such a classifier
    to weigh the classes of a noisy label).

    Args:
        in_channels: Channels of the images.
        widths: Channels of each stage; the first is also the first convolution's.
        blocks: Residual blocks of each stage.
        strides: Stride of each stage's first block; None halves the side in every stage but the first. Any side works:
            a stride of 2 turns 7 pixels into 4 and leaves 1 pixel as it is.
        embed_dim: Width of the embedding of the noise level.
        num_classes: Outputs K; None until `reset_classes` (the module that trains the network calls it).
        time_scale: Multiplies t before the embedding, which is made for t up to about 1000. 1 for times 0..1000; 1000
            for EDM's t = ln(sigma) / 4, which else would move only the first few channels.

    Attributes:
        num_classes: K, or None.
        in_channels: Channels of the images.

    Raises:
        ValueError: There is no stage, their lists differ in length, or a number is not positive.
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        strides: tuple[int, ...] | None = None,
        embed_dim: int = 512,
        num_classes: int | None = None,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if strides is None:
            strides = (1,) + (2,) * (len(widths) - 1)
        _check_stages(widths, blocks, strides)
        check_positive({"in_channels": in_channels, "embed_dim": embed_dim})
        self.in_channels = in_channels
        self.time_scale = time_scale
        self.num_classes: int | None = None
        self.embedding = nn.Sequential(
            nn.Linear(_SINUSOID, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim), nn.SiLU()
        )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        inputs = (widths[0], *widths[:-1])
        self.stages = nn.ModuleList(map(_stage, inputs, widths, blocks, strides))
        self.biases = nn.ModuleList(nn.Linear(embed_dim, width) for width in widths)
        self.head = nn.Linear(widths[-1], 1)
        # Channels last is faster, but with other widths torch's CPU convolutions corrupt memory in it, see WideResNet.
        fits = all(width % 8 == 0 for width in widths)
        self.memory_format = torch.channels_last if fits else torch.contiguous_format
        self.to(memory_format=self.memory_format)
        if num_classes is not None:
            self.reset_classes(num_classes)

    def reset_parameters(self) -> None:
        """Draw all weights anew, as PyTorch does, and forget the running statistics."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()

    def reset_classes(self, num_classes: int) -> None:
        """Start with new classes: a new last layer, everything else stays as it is.

        Args:
            num_classes: K.

        Raises:
            ValueError: It is not positive.
        """
        check_positive({"num_classes": num_classes})
        weight = self.head.weight
        self.head = nn.Linear(self.head.in_features, num_classes, device=weight.device, dtype=weight.dtype)
        self.num_classes = num_classes

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Classify noisy images.

        Args:
            x: Noisy images, [B, in_channels, H, W].
            t: The number that tells each image's noise level, [B], or one for all, 0-dimensional.

        Returns:
            Logits, [B, K].

        Raises:
            ValueError: A shape does not fit, or there are no classes.
        """
        check_noisy_images(x, t, self.in_channels)
        require_classes(self.num_classes)
        time = sinusoid(t.to(x.device).expand(len(x)), _SINUSOID, self.time_scale)
        embedding = F.silu(self.embedding(time.to(self.head.weight.dtype)))
        x = self.stem(x.contiguous(memory_format=self.memory_format))
        for stage, bias in zip(self.stages, self.biases, strict=True):
            x = stage(x) + bias(embedding)[:, :, None, None]
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    # timm takes seconds to import; who only reads a signature (`--help`) should not wait for it.
    from timm.models.resnet import BasicBlock

    shortcut = None
    if stride != 1 or inputs != width:
        shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    first = BasicBlock(inputs, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


def _check_stages(widths: tuple[int, ...], blocks: tuple[int, ...], strides: tuple[int, ...]) -> None:
    if not widths or not len(widths) == len(blocks) == len(strides):
        msg = (
            f"Expected `widths`, `blocks` and `strides` with one number a stage, got {widths}, {blocks} and {strides}; "
            f"make them equally long."
        )
        raise ValueError(msg)
    for name, numbers in (("widths", widths), ("blocks", blocks), ("strides", strides)):
        if min(numbers) < 1:
            msg = f"Expected `{name}` to be positive, got {numbers}."
            raise ValueError(msg)
