"""Pseudo-Label: the network's own confident predictions are labels."""

from lightning_modules.ssl.base import Views
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import FixedThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong


class PseudoLabel(WeakToStrong):
    """Lu = mean 1[max p(w(u)) >= tau] H(argmax p(w(u)), p(w(u))), with gradient through the one forward of w(u).

    Lee, "Pseudo-Label" (ICML workshop 2013), equations 15 and 16; it minimises the entropy of the predictions. The
    paper has no threshold (`threshold=0`) and a weight that rises to 3 between epochs 100 and 600 of MNIST. Threshold
    0.95 and a linear ramp to 1 over 40 % of the training are those of later comparisons on CIFAR-10 (Sohn et al.,
    arXiv 2001.07685), with as many unlabelled as labelled images.

    Deviation: labelled and unlabelled images share a forward, and so the statistics of BatchNorm.

    Args:
        threshold: tau >= 0.

    Raises:
        ValueError: It is negative.
    """

    views = Views(labeled=("weak",), unlabeled=("weak",))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0, until=0.4, shape="linear")

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__(FixedThreshold(threshold), student="weak")
