"""MixUp of whole batches, and the guesses that are mixed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.ssl.base import Guess
from lightning_modules.ssl.parts import beta_samples, mix


def mixup(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mix each image, and its target alike, with another one of the batch.

    Zhang et al., arXiv 1710.09412, equation 1, with max(lambda, 1 - lambda) for each image as in MixMatch
    (arXiv 1905.02249, equations 8 to 11), so that row i stays closer to image i than to its partner.

    Args:
        images: [B, C, H, W].
        targets: Probabilities [B, K].
        alpha: lambda ~ Beta(alpha, alpha); 0 mixes nothing.

    Returns:
        Mixed images and mixed targets.
    """
    partner = torch.randperm(len(images), device=images.device)
    lam = beta_samples(alpha, len(images), like=images)
    return mix(images, images[partner], lam), mix(targets, targets[partner], lam.to(targets))


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """Class ids [B] as probabilities [B, K]."""
    return F.one_hot(label, num_classes).float()


def guess_of(probabilities: Tensor) -> Guess:
    """The report on targets [B, K] that are all learnt from, with weight 1."""
    confidence, label = probabilities.detach().max(-1)
    return Guess(label, confidence, torch.ones_like(confidence))
