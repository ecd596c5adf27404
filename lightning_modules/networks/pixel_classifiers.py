"""An ensemble of small classifiers of pixels, fed with feature maps that stay at their low resolution."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

PIXELS_AT_ONCE = 4096
"""Pixels that `PixelClassifiers.predict` works on at a time: a few MB for each of its steps."""


class EnsemblePrediction(NamedTuple):
    """What an ensemble says about images.

    Attributes:
        probabilities: [B, K, H, W], mean over the members.
        entropy: [B, H, W] in nats, mean over the members of each one's own entropy.
        votes: [B, K, H, W], share of the members that prefer the class.
    """

    probabilities: Tensor
    entropy: Tensor
    votes: Tensor


class PixelClassifiers(nn.Module):
    """An ensemble of perceptrons D - h1 - h2 - K on feature vectors of pixels, all in one batched computation.

    Each member is Linear, ReLU, BatchNorm, Linear, ReLU, BatchNorm, Linear, the normalisation after the ReLU (Baranchuk
    et al. 2022, arXiv 2112.03126, section 4; order and initialisation as in its code). Members share nothing, also not
    the batch statistics: `loss` gives one number a member, and their sum trains each as if it were alone.

    The feature vector of a pixel is made of feature maps f_b, upsampled to the image and concatenated. `predict` never
    forms it: bilinear interpolation is linear, its weights sum to 1, and it treats all channels alike, so

        W1 concat_b(up(f_b)) + b1 = sum_b up(W1_b f_b) + b1,

    the first layer is applied at low resolution and only its few outputs are upsampled.

    Args:
        in_features: Length D of the feature vectors.
        num_classes: K, the background included.
        num_members: Size of the ensemble.
        hidden: Widths h1 and h2; None is (128, 32) below 30 classes, else (256, 128).

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(
        self, in_features: int, num_classes: int, num_members: int = 10, hidden: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if num_members < 1:
            msg = f"Expected `num_members` >= 1, got {num_members}; 10 is usual, 1 is a single classifier."
            raise ValueError(msg)
        widths = ((128, 32) if num_classes < 30 else (256, 128)) if hidden is None else tuple(hidden)
        if len(widths) != 2 or min(widths) < 1:
            msg = f"Expected `hidden` to be two positive widths, got {hidden}; leave it out for the paper's."
            raise ValueError(msg)
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_members = num_members
        sizes = (in_features, *widths, num_classes)
        shapes = [(num_members, before, after) for before, after in pairwise(sizes)]
        self.weights = nn.ParameterList([nn.Parameter(nn.init.normal_(torch.empty(s), std=0.02)) for s in shapes])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(num_members, s[2])) for s in shapes])
        # One normalisation over members * width channels is one for each member.
        self.norm1, self.norm2 = (nn.BatchNorm1d(num_members * width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """Classify pixels, in float32 whatever the surroundings.

        Args:
            x: [num_members, n, in_features], each member's own pixels.

        Returns:
            Logits [num_members, n, num_classes].
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            for weight, bias, norm in zip(self.weights, self.biases, (self.norm1, self.norm2, None), strict=True):
                x = torch.baddbmm(bias[:, None], x, weight)
                if norm is not None:
                    x = norm(x.relu().transpose(0, 1).flatten(1))
                    x = x.view(len(x), self.num_members, -1).transpose(0, 1)
        return x

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of each member, mean over its pixels.

        Args:
            x: [num_members, n, in_features].
            target: [num_members, n] class ids.

        Returns:
            [num_members].
        """
        logits = self(x)
        return F.cross_entropy(logits.movedim(-1, 1), target, reduction="none").mean(1)

    @torch.no_grad()
    def predict(self, maps: Sequence[Tensor], size: tuple[int, int]) -> EnsemblePrediction:
        """Classify every pixel of images, with the running statistics of the normalisation.

        Works on strips of rows and on one member at a time, so beyond maps and result it needs a few MB.

        Args:
            maps: Feature maps [B, C_b, h_b, w_b], their channels adding up to `in_features`.
            size: Height and width of the images.
        """
        height, width = size
        images = max(1, PIXELS_AT_ONCE // (height * width))
        rows = min(height, max(1, PIXELS_AT_ONCE // width))
        shape = (len(maps[0]), self.num_classes, height, width)
        zeros = maps[0].new_zeros
        result = EnsemblePrediction(*(zeros(s, dtype=torch.float32) for s in (shape, (shape[0], height, width), shape)))
        with torch.autocast(maps[0].device.type, enabled=False):
            members = [self._member(number) for number in range(self.num_members)]
            grids = [_Grid.between(features, size) for features in maps]
            for first in range(0, shape[0], images):
                part = [features[first : first + images].float() for features in maps]
                for top in range(0, height, rows):
                    strip = _Strip(part, grids, top, min(top + rows, height))
                    here = slice(first, first + images), ..., slice(top, top + rows), slice(None)
                    for member in members:
                        _add(EnsemblePrediction(*(tensor[here] for tensor in result)), member.logits(strip))
        for tensor in result:
            tensor /= self.num_members
        return result

    def _member(self, number: int) -> "_Member":
        """One member with its normalisation folded into the next layer."""
        weights = [weight[number].float().t() for weight in self.weights]
        biases = [bias[number].float() for bias in self.biases]
        for layer, norm in enumerate((self.norm1, self.norm2)):
            gain, shift, mean, variance = (
                norm.state_dict()[name].view(self.num_members, -1)[number].float()
                for name in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gain / (variance + norm.eps).sqrt()
            biases[layer + 1] = biases[layer + 1] + weights[layer + 1] @ (shift - mean * scale)
            weights[layer + 1] = weights[layer + 1] * scale
        return _Member(weights, biases)


class _Grid(NamedTuple):
    """Bilinear interpolation of maps of one resolution to the image: down [H, h], across [w, W]."""

    down: Tensor
    across: Tensor

    @classmethod
    def between(cls, features: Tensor, size: tuple[int, int]) -> "_Grid":
        down, across = (
            interpolation_matrix(n, m).to(features.device) for n, m in zip(features.shape[2:], size, strict=True)
        )
        return cls(down, across.t())


class _Strip:
    """The rows [top, bottom) of images, and the parts of the feature maps that they are interpolated from."""

    def __init__(self, maps: Sequence[Tensor], grids: Sequence[_Grid], top: int, bottom: int) -> None:
        self.shape = len(maps[0]), bottom - top, grids[0].across.shape[1]
        # Maps of one resolution are upsampled together, as the sum of what the first layer makes of them.
        self.levels: dict[tuple[int, int], list[tuple[slice, Tensor]]] = {}
        self.grids: dict[tuple[int, int], _Grid] = {}
        channel = 0
        for features, grid in zip(maps, grids, strict=True):
            h, w = features.shape[2:]
            low, high, _ = bilinear(torch.tensor([top, bottom - 1]), h, len(grid.down))
            near = slice(int(low[0]), int(high[1]) + 1)
            channels = slice(channel, channel + features.shape[1])
            self.levels.setdefault((h, w), []).append((channels, features[:, :, near].flatten(2)))
            self.grids[h, w] = _Grid(grid.down[top:bottom, near], grid.across)
            channel = channels.stop

    def first_layer(self, weight: Tensor, bias: Tensor) -> Tensor:
        """sum_b up(W1_b f_b) + b1 on the strip: [B, h1, rows, W]."""
        count, rows, width = self.shape
        z = bias.view(1, -1, 1, 1).repeat(count, 1, rows, width)
        for resolution, maps in self.levels.items():
            low = weight.new_zeros(())
            for channels, features in maps:
                low = torch.baddbmm(low, weight[:, channels].expand(count, -1, -1), features)
            down, across = self.grids[resolution]
            tall = down @ low.view(*low.shape[:2], -1, resolution[1])
            z.view(-1, width).addmm_(tall.flatten(0, 2), across)
        return z


class _Member(NamedTuple):
    """Weights [out, in] and biases [out] of three layers."""

    weights: list[Tensor]
    biases: list[Tensor]

    def logits(self, strip: _Strip) -> Tensor:
        """[B, K, rows * W]."""
        x = strip.first_layer(self.weights[0], self.biases[0]).flatten(2)
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            x = torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), x.relu_())
        return x


def _add(total: EnsemblePrediction, logits: Tensor) -> None:
    """Add what one member says about a strip."""
    logits = logits.view(total.probabilities.shape)
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    total.probabilities.add_(p)
    # exp underflows to 0 long before log_softmax reaches -inf, so the product is never NaN.
    total.entropy.sub_((p * log_p).sum(1))
    total.votes.scatter_add_(1, logits.argmax(1, keepdim=True), torch.ones_like(logits[:, :1]))


def bilinear(position: Tensor, length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where bilinear interpolation (align_corners=False) of a line to another length reads.

    Args:
        position: Integer positions on the interpolated line.
        length: Length of the line itself.
        size: Length of the interpolated line.

    Returns:
        The two neighbours of each position on the line, and the weight of the second; beyond the ends of the line its
        last values go on.
    """
    at = ((position.float() + 0.5) * (length / size) - 0.5).clamp(min=0.0)
    low = at.long().clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), at - low


def interpolation_matrix(length: int, size: int) -> Tensor:
    """Bilinear interpolation of a line (see `bilinear`) as a matrix [size, length]."""
    low, high, weight = bilinear(torch.arange(size), length, size)
    matrix = torch.zeros(size, length, dtype=torch.float32)
    row = torch.arange(size)
    matrix[row, low] += 1.0 - weight
    matrix[row, high] += weight
    return matrix


def features_at(maps: Sequence[Tensor], row: Tensor, y: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Feature vectors of single pixels, as upsampling all maps to the image and concatenating them would give.

    Args:
        maps: Feature maps [N, C_b, h_b, w_b].
        row: [n], which row of the maps each pixel belongs to.
        y: [n], its row in the image.
        x: [n], its column in the image.
        size: Height and width of the images.

    Returns:
        [n, sum of the C_b].
    """
    parts = []
    for features in maps:
        top, bottom, down = bilinear(y, features.shape[-2], size[0])
        left, right, across = bilinear(x, features.shape[-1], size[1])
        down, across = down[:, None], across[:, None]
        above = torch.lerp(features[row, :, top, left], features[row, :, top, right], across)
        below = torch.lerp(features[row, :, bottom, left], features[row, :, bottom, right], across)
        parts.append(torch.lerp(above, below, down))
    return torch.cat(parts, 1)
