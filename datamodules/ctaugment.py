"""CTAugment's operations, and how a table of what the network copes with chooses their strengths.

D. Berthelot et al., "ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring",
arXiv:1911.09785, section 3.3. The table is kept by the method that learns it; here it is only read.
"""

import torch
from torch import Tensor

# (name, bins of the first parameter, bins of the second one); 0 = the operation has no such parameter.
OPS: tuple[tuple[str, int, int], ...] = (
    ("autocontrast", 17, 0),
    ("blur", 17, 0),
    ("brightness", 17, 0),
    ("color", 17, 0),
    ("contrast", 17, 0),
    ("cutout", 17, 0),
    ("equalize", 17, 0),
    ("invert", 17, 0),
    ("identity", 0, 0),
    ("posterize", 8, 0),
    ("rescale", 17, 6),
    ("rotate", 17, 0),
    ("sharpness", 17, 0),
    ("shear_x", 17, 0),
    ("shear_y", 17, 0),
    ("smooth", 17, 0),
    ("solarize", 17, 0),
    ("translate_x", 17, 0),
    ("translate_y", 17, 0),
)
BINS = torch.tensor([op[1:] for op in OPS])
MAX_BINS = 17
RATES_SHAPE = (len(OPS), 2, MAX_BINS)
DEPTH = 2
DECAY = 0.99
THRESHOLD = 0.8


def bin_probabilities(rates: Tensor) -> Tensor:
    """Turn the table into the probabilities that bins are drawn with.

    p = r + (1 - 0.99), so that a bin that the network never copes with can come back; then p / max p over the bins
    of a parameter, and 0 where that is below 0.8: only strengths that the network copes with are used.

    Args:
        rates: Table [ops, 2, bins]; entries of bins that an operation lacks are ignored.

    Returns:
        Probabilities of the table's shape, summing to 1 over the bins; all on bin 0 for a missing parameter.
    """
    exists = torch.arange(MAX_BINS) < BINS[..., None]
    odds = (rates.detach().to("cpu", torch.float32) + (1 - DECAY)).masked_fill(~exists, 0.0)
    odds = odds / odds.amax(2, keepdim=True).clamp_min(1e-12)
    odds = odds.masked_fill(odds < THRESHOLD, 0.0)
    odds[..., 0] += (BINS == 0).float()
    return odds / odds.sum(2, keepdim=True)


def choose_bins(ops: Tensor, uniform: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """Draw a bin for each parameter of chosen operations.

    Args:
        ops: Numbers of operations in `OPS`, any shape.
        uniform: Uniform random numbers in [0, 1), one per parameter: shape of `ops` and 2.
        probabilities: What `bin_probabilities` gives; None takes every bin equally often.

    Returns:
        Numbers of bins, shaped as `uniform`; -1 for a parameter that the operation lacks.
    """
    count = BINS[ops]
    if probabilities is None:
        bins = (uniform * count).long()
    else:
        bins = (uniform[..., None] >= probabilities[ops].cumsum(-1)).sum(-1)
    return torch.minimum(bins, count - 1)
