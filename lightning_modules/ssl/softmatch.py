"""SoftMatch: FixMatch with a smooth weight instead of a threshold."""

from lightning_modules.ssl.alignment import Alignment
from lightning_modules.ssl.base import Views
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import SoftThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong


class SoftMatch(WeakToStrong):
    """Lu = mean lambda(max q) H(argmax p(w(u)), p(s(u))), q = p(w(u)) aligned to uniform.

    Chen et al., "SoftMatch", arXiv 2301.10921, section 3; see SoftThreshold. The alignment is for the weights only,
    pseudo-labels are those of the raw prediction. Reference settings: decay 0.999, two standard deviations, weight
    1, 7 unlabelled images for a labelled one.

    Deviation: the average for the alignment starts uniform instead of at the first batch's, so that a new network's
    preferences are not taken for the data's.

    Args:
        decay: Decay of the moving averages, in [0, 1).
        sharpness: The weight falls to exp(-sharpness^2 / 2) one standard deviation below the mean; positive.
        align: Whether to align.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0)

    def __init__(self, decay: float = 0.999, sharpness: float = 2.0, align: bool = True) -> None:
        alignment = Alignment("uniform", decay=decay) if align else None
        super().__init__(SoftThreshold(decay, sharpness), alignment=alignment, align_target=False)
