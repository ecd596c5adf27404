"""Unsupervised data augmentation: strong views are to be predicted as weak views are, sharpened."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.ssl.base import Host, Views
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import FixedThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong

Schedule = Literal["none", "linear", "log", "exp"]


class UDA(WeakToStrong):
    """Lu = mean 1[max p(w(u)) >= tau] H(softmax(z(w(u)) / T), p(s(u))).

    Xie et al., "Unsupervised Data Augmentation for Consistency Training", arXiv 1904.12848, section 2. The confidence
    is that of the prediction before sharpening. Reference settings, CIFAR-10: tau 0.8, T 0.4, 7 unlabelled images for
    a labelled one, no training signal annealing (TSA).

    TSA leaves out labelled images that are learnt already: those with p(y | x) > eta_t of the true class, where eta_t
    rises from 1 / K to 1. Ls is the mean over those kept, 0 if there are none. "exp" is for few labels, which
    are soon overfitted, "log" for many.

    Deviation: cross-entropy instead of the divergence KL; they differ by the entropy of the targets, and have the same
    gradient.

    Args:
        threshold: tau >= 0.
        temperature: T >= 0; 1 does not sharpen, 0 makes hard labels.
        annealing: Schedule of eta_t; "none" learns from all labelled images.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0)

    def __init__(self, threshold: float = 0.8, temperature: float = 0.4, annealing: Schedule = "none") -> None:
        super().__init__(FixedThreshold(threshold), temperature=temperature)
        if annealing not in ("none", "linear", "log", "exp"):
            msg = f"Expected `annealing` to be none, linear, log or exp, got {annealing!r}."
            raise ValueError(msg)
        self.annealing = annealing

    def labeled_loss(self, m: Host, logits: Tensor, label: Tensor) -> Tensor:
        """Ls over the images that are not learnt yet."""
        losses = F.cross_entropy(logits.float(), label, reduction="none")
        if self.annealing == "none":
            return losses.mean()
        # -log p(y | x) is the loss: the probability of the true class, whatever the largest is.
        kept = (torch.exp(-losses.detach()) <= annealed(self.annealing, m.progress, m.num_classes)).float()
        return (kept * losses).sum() / kept.sum().clamp_min(1)


def annealed(schedule: Schedule, t: float, num_classes: int) -> float:
    """eta_t = a(t) (1 - 1 / K) + 1 / K with a = t, 1 - exp(-5 t) or exp(5 (t - 1)) (UDA, arXiv 1904.12848).

    Args:
        schedule: "linear", "log" or "exp"; "none" is 1.
        t: Share of the training that is done, in [0, 1].
        num_classes: K.

    Returns:
        In [1 / K, 1].
    """
    a = {"none": 1.0, "linear": t, "log": 1 - math.exp(-5 * t), "exp": math.exp(5 * (t - 1))}[schedule]
    return a * (1 - 1 / num_classes) + 1 / num_classes
