"""Adversarial training: classify the image that is hardest nearby as well."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.ssl.base import Batch, Host, Loss, Method, Views
from lightning_modules.ssl.parts import cross_entropy, frozen_statistics
from lightning_modules.ssl.thresholds import at_least_zero


def of_length(direction: Tensor, length: float) -> Tensor:
    """Scale each row of a tensor [B, ...] to a Euclidean length; rows of zeros stay."""
    rows = direction.flatten(1).float()
    # Tiny gradients would underflow when squared.
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    scaled: Tensor = length * rows
    return scaled.view_as(direction).to(direction.dtype)


class AdversarialTraining(Method):
    """Ls = alpha H(y, p(x)) + (1 - alpha) H(y, p(x + r)), r = epsilon sign(grad_x H) or epsilon grad_x H / |grad_x H|.

    Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples", arXiv 1412.6572, section 6; the
    Euclidean r as in Miyato et al., arXiv 1704.03976, section 3.1. r is a constant to the gradient. It needs labels, so
    only labelled images are used. Reference settings: "linf", alpha 0.5, epsilon 0.25 for MNIST in [0, 1]; that is
    far too much for natural images (8 / 255 = 0.03 is usual). x + r is not clipped to [0, 1], as there. Only the
    clean images move BatchNorm's running statistics.

    Args:
        epsilon: Length of r >= 0, in units of images in [0, 1], whatever the network's mean and std: the largest
            change of a pixel for "linf", the Euclidean length over all pixels and channels for "l2".
        norm: "linf" or "l2".
        share: alpha in [0, 1], the weight of the clean images.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=())
    batch_norm = "first"

    def __init__(self, epsilon: float = 0.25, norm: Literal["linf", "l2"] = "linf", share: float = 0.5) -> None:
        super().__init__()
        if norm not in ("linf", "l2"):
            msg = f"Expected `norm` to be linf or l2, got {norm!r}."
            raise ValueError(msg)
        if not 0 <= share <= 1:
            msg = f"Expected `share` in [0, 1], got {share}; 1 trains on clean images alone."
            raise ValueError(msg)
        self.epsilon = at_least_zero("epsilon", epsilon)
        self.norm = norm
        self.share = share

    def attack(self, network: nn.Module, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of images, and the perturbations that raise their losses most, to first order.

        Args:
            network: The network.
            image: [B, C, H, W].
            label: [B].

        Returns:
            Logits [B, K], with gradient, and r [B, C, H, W], without.
        """
        image = image.detach().requires_grad_()
        logits: Tensor = network(image)
        # The sum: a mean's gradients are smaller by the batch size, and what 16 bits cannot hold has no sign.
        losses = F.cross_entropy(logits.float(), label, reduction="sum")
        # Not backward(): the gradients of the weights are none of this step's business.
        (gradient,) = torch.autograd.grad(losses, image, retain_graph=True)
        if self.norm == "linf":
            return logits, self.epsilon * gradient.sign()
        return logits, of_length(gradient, self.epsilon)

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls of clean and attacked images."""
        label = labeled["label"]
        logits, r = self.attack(m.network, labeled["image"], label)
        with frozen_statistics(m.network):
            attacked = cross_entropy(m.network(labeled["image"] + r), label)
        clean = cross_entropy(logits, label)
        return Loss(
            sup=self.share * clean + (1 - self.share) * attacked, logs={"clean": clean, "adversarial": attacked}
        )
