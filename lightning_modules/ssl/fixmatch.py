"""FixMatch: confident predictions of weak views are the labels of strong views."""

from lightning_modules.ssl.base import Views
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import FixedThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong


class FixMatch(WeakToStrong):
    """Lu = mean 1[max p(w(u)) >= tau] H(argmax p(w(u)), p(s(u))).

    Sohn et al., "FixMatch", arXiv 2001.07685, equations 3 and 4. Reference settings, CIFAR-10: tau 0.95, weight 1
    without a ramp (the mask grows by itself), 7 unlabelled images for a labelled one, SGD with Nesterov momentum 0.9,
    learning rate 0.03. The pseudo-labels are those of the trained network, not of its average. That few or no images
    are confident at first is normal.

    Args:
        threshold: tau >= 0; 0 learns from every image, above 1 from none.

    Raises:
        ValueError: It is negative.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0)

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__(FixedThreshold(threshold))
