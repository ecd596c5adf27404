"""A transition matrix that is trained with the classifier (VolMinNet)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

from lightning_modules.diffusion.noise import wide
from lightning_modules.diffusion.transition import TransitionMatrix


class LearnedTransition(TransitionMatrix, nn.Module):
    """A matrix that is trained with the classifier, under a penalty on its volume (VolMinNet, Li et al. 2102.02400).

    T = row-normalise(I + (1 - I) * sigmoid(A)), A free: the diagonal is the largest entry of each row. Of all matrices
    that explain the given labels, the loss term `volume_weight` * log|det T| prefers the one of least volume; it is the
    true one if every class has images that are surely of it.

    Against the released code of TDSM: log|det T| is taken as the VolMinNet paper has it, where log(det T) is NaN as
    soon as the determinant is negative; and its start, A = -2 for any K, makes T[i, i] = 0.078 at K = 100, so here A
    starts where T[i, i] is as at K = 10 unless `init` says otherwise (-4.5 at K = 100, as in the VolMinNet paper).

    Args:
        init: Start of A; None for T[i, i] = 0.482, or 0.5 and 0.667 for 3 and 2 classes.
        volume_weight: Weight of log|det T|; not negative.
        freeze_after: Epochs after which T is trained no more, so that the classifier can settle; None for never.
        lr_scale: Learning rate of A relative to the network's; positive. Adam moves an entry by about one learning rate
            a step and A has to move by several units, so short fits need more than 1.

    Raises:
        ValueError: An argument is out of range.
    """

    raw: nn.Parameter

    def __init__(
        self,
        init: float | None = None,
        volume_weight: float = 1e-4,
        freeze_after: int | None = None,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= volume_weight < math.inf:
            msg = f"Expected `volume_weight` to be at least 0, got {volume_weight}; the papers use 1e-4."
            raise ValueError(msg)
        if freeze_after is not None and freeze_after < 0:
            msg = f"Expected `freeze_after` to be at least 0 epochs, got {freeze_after}; use None to never freeze."
            raise ValueError(msg)
        if not 0 < lr_scale < math.inf:
            msg = f"Expected a positive `lr_scale`, got {lr_scale}; to keep T as it is use FileTransition."
            raise ValueError(msg)
        self.init = init
        self.volume_weight = volume_weight
        self.freeze_after = freeze_after
        self.lr_scale = lr_scale

    def reset_classes(self, num_classes: int) -> None:
        """Make the parameter for K classes, at its start.

        Args:
            num_classes: Classes K, at least 2.
        """
        start = self.init
        if start is None:
            # The odds of one other class, (1 / T_ii - 1) / (K - 1), as for 10 classes; a sigmoid has to reach it.
            start = _logit(min(0.5, 9 * _sigmoid(-2.0) / (num_classes - 1)))
        self.raw = nn.Parameter(torch.full((num_classes, num_classes), float(start)))

    def log_matrix(self) -> Tensor:
        """Log T, float64 [K, K] (float32 on devices without), differentiable; finite however far A goes."""
        raw = wide(self.raw)
        own = torch.eye(len(raw), dtype=torch.bool, device=raw.device)
        # Each row is proportional to 1 on the diagonal and sigmoid(A) beside it.
        return F.logsigmoid(raw).masked_fill(own, 0.0).log_softmax(1)

    def matrix(self, num_classes: int) -> Tensor:
        """T as it is now, differentiable.

        Args:
            num_classes: Classes K.

        Raises:
            ValueError: The parameter was made for another K.
        """
        if not hasattr(self, "raw"):
            self.reset_classes(num_classes)
        if len(self.raw) != num_classes:
            msg = (
                f"Expected a LearnedTransition for `num_classes` = {num_classes}, got one for {len(self.raw)}; call "
                "reset_classes."
            )
            raise ValueError(msg)
        return self.log_matrix().exp()

    def penalty(self) -> Tensor:
        """The loss term `volume_weight` * log|det T|, a scalar."""
        return self.volume_weight * log_volume(self.log_matrix().exp())


def log_volume(matrix: Tensor) -> Tensor:
    """log|det T|, whatever the sign of the determinant; 0 for the identity, -inf for a singular matrix.

    Args:
        matrix: [K, K], float64.
    """
    volume: Tensor = torch.linalg.slogdet(matrix).logabsdet
    return volume


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
