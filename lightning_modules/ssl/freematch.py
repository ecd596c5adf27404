"""FreeMatch: FixMatch with thresholds that follow the network's confidence, and a fairness term."""

from lightning_modules.ssl.base import Views
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import FreeThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong


class FreeMatch(WeakToStrong):
    """Lu = mean 1[max p(w(u)) >= tau_c] H(c, p(s(u))), c = argmax p(w(u)); aux = w_f L_f.

    Wang et al., "FreeMatch", arXiv 2205.07246, section 3; see FreeThreshold. Reference settings: w_f 0.001 and
    weight 1 on CIFAR and SVHN, decay 0.999, `highest` 0.95 on SVHN only, 7 unlabelled images for a labelled one.

    The fairness term does not ramp: it is part of `aux`. The reference has no ramp at all.

    Args:
        decay: Decay of the moving averages, in [0, 1).
        fairness: w_f >= 0.
        highest: The global threshold is never above.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0)

    def __init__(self, decay: float = 0.999, fairness: float = 0.001, highest: float = 1.0) -> None:
        super().__init__(FreeThreshold(decay, fairness, highest))
