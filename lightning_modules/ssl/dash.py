"""Dash: FixMatch with a threshold on the loss that shrinks as training goes on."""

from lightning_modules.ssl.base import Views
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import LossThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong


class Dash(WeakToStrong):
    """Lu = mean 1[-log max p(w(u)) <= rho_t] H(argmax p(w(u)), p(s(u))), rho_t = max(C gamma^-k rho_0, rho_min).

    Xu et al., "Dash", arXiv 2109.00650, algorithm 1; see LossThreshold. Reference settings: gamma 1.27,
    C 1.0001, rho_min 0.05, 2048 of 2^20 batches of warm-up on labelled images, k counts 10 of 1024 epochs, weight 1.
    Both lengths are shares of the training here, so that a shorter one goes through the same thresholds.

    Deviations: hard labels throughout, where the reference code sharpens with T = 0.5 until rho_min is reached. rho_0
    is an average over the last batches of the warm-up instead of a pass over the labelled images.

    Args:
        warmup: Share of the training without unlabelled images, in [0, 1].
        period: Share of the training after which the threshold shrinks, positive.
        shrink: gamma >= 1.
        scale: C >= 1.
        lowest: rho_min >= 0.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0)

    def __init__(
        self,
        warmup: float = 0.002,
        period: float = 0.01,
        shrink: float = 1.27,
        scale: float = 1.0001,
        lowest: float = 0.05,
    ) -> None:
        super().__init__(LossThreshold(warmup, period, shrink, scale, lowest))
