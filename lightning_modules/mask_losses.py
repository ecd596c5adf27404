"""Losses on the mask channels, one value an image, and what the channels say about class probabilities."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # the name everybody reads

MaskLoss = Literal["mse", "ce", "dice_ce"]
IGNORE = 255


def mask_loss_per_image(channels: Tensor, mask: Tensor, kind: MaskLoss) -> Tensor:
    """The loss of each image over its labelled pixels; an image without any has loss 0.

    Args:
        channels: [B, K, H, W], the network's mask channels in float32.
        mask: [B, H, W] class ids, 255 = unlabelled.
        kind: `mse`: squared distance to the one-hot mask, mean over classes and pixels. `ce`: softmax cross-entropy,
            mean over pixels. `dice_ce`: cross-entropy plus 1 - soft Dice, the Dice (Milletari et al. 2016, eq. 5 with
            plain sums in the denominator) as a mean over the classes.

    Returns:
        [B], differentiable.
    """
    valid = (mask != IGNORE).to(channels)
    pixels = valid.sum((1, 2)).clamp(min=1.0)
    target = mask.where(mask != IGNORE, 0)
    if kind == "mse":
        one_hot = F.one_hot(target, channels.shape[1]).movedim(-1, 1).to(channels)
        return ((channels - one_hot).square().mean(1) * valid).sum((1, 2)) / pixels
    ce = (F.cross_entropy(channels, target, reduction="none") * valid).sum((1, 2)) / pixels
    return ce if kind == "ce" else ce + _soft_dice_loss(channels, target, valid)


def _soft_dice_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    one_hot = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits) * valid[:, None]
    p = logits.softmax(1) * valid[:, None]
    total = p.sum((2, 3)) + one_hot.sum((2, 3))
    dice = (2.0 * (p * one_hot).sum((2, 3)) + 1e-6) / (total + 1e-6)
    return 1.0 - dice.mean(1)


def mask_probabilities(channels: Tensor, kind: MaskLoss) -> Tensor:
    """Class probabilities [B, K, H, W] from mask channels trained with a loss.

    Cross-entropy channels are logits. Squared-error channels estimate probabilities but are free to leave the
    simplex; the nearest point of it is taken (Duchi et al. 2008, Figure 1), which keeps the order of the classes.
    """
    if kind != "mse":
        return channels.softmax(1)
    ordered = channels.sort(dim=1, descending=True).values
    rank = torch.arange(1, channels.shape[1] + 1, device=channels.device).view(1, -1, 1, 1)
    excess = (ordered.cumsum(1) - 1.0) / rank
    # At least one class is in the support; with NaN none compares as larger, and NaN is then what comes out.
    support = (ordered > excess).sum(1, keepdim=True).clamp(min=1)
    return (channels - excess.gather(1, support - 1)).clamp(min=0.0)
