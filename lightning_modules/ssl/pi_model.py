"""The Pi-model: agree with oneself on two views."""

import torch
from torch import Tensor

from lightning_modules.ssl.base import Batch, Host, Loss, Method, Views
from lightning_modules.ssl.parts import cross_entropy, frozen_statistics, squared_error
from lightning_modules.ssl.ramps import Ramp


class PiModel(Method):
    """Lu = mean_{b,c} (p(w1(u)) - p(w2(u)))^2.

    Sajjadi, Javanmardi & Tasdizen, arXiv 1606.04586; Laine & Aila, "Temporal Ensembling", arXiv 1610.02242,
    algorithm 1. Laine & Aila let the gradient through both views and count labelled images too; Oliver et al.'s
    comparison (arXiv 1804.09170), whose weight of 10 with a linear ramp over 40 % of the training is the default,
    counts unlabelled images and takes one view as the target. The unlabelled images contain the labelled ones. (The
    original weight, 100 times the share of labelled images with a Gaussian ramp over 80 of 300 epochs, goes with a
    labelled loss that is divided by the whole batch: 100 here.) Only the labelled images move BatchNorm's running
    statistics.

    Args:
        stop_gradient: Take the first view as a constant target; False lets the gradient through both, at the cost of
            a further backward.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "weak"))
    batch_norm = "first"
    ramp = Ramp(weight=10.0, until=0.4)

    def __init__(self, stop_gradient: bool = True) -> None:
        super().__init__()
        self.stop_gradient = stop_gradient

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu."""
        sup = cross_entropy(m.network(labeled["image"]), labeled["label"])

        def predicted(key: str) -> Tensor:
            logits: Tensor = m.network(unlabeled[key])
            return logits.float().softmax(-1)

        with frozen_statistics(m.network):
            with torch.set_grad_enabled(not self.stop_gradient):
                first = predicted("weak")
            second = predicted("weak_2")
        return Loss(sup=sup, unsup=squared_error(second, first).mean())
