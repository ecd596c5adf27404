"""FlexMatch: FixMatch with lower thresholds for classes that are hard to learn."""

from lightning_modules.ssl.base import Views
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import FlexThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong


class FlexMatch(WeakToStrong):
    """Lu = mean 1[max p(w(u)) >= tau_c] H(c, p(s(u))), c = argmax p(w(u)), tau_c = tau beta_c / (2 - beta_c).

    Zhang et al., "FlexMatch", arXiv 2110.08263, algorithm 1; see FlexThreshold. Reference settings,
    CIFAR-10: tau 0.95, weight 1, 7 unlabelled images for a labelled one. At first every threshold is 0 and every image
    counts; that is the method. Thresholds are those before the batch, as in the reference code. Banks are filled from
    all processes' batches.

    Args:
        threshold: tau >= 0.

    Raises:
        ValueError: It is negative.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"), index=True)
    batch_norm = "joint"
    ramp = Ramp(weight=1.0)

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__(FlexThreshold(threshold))
