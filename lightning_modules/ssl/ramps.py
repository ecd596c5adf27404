"""How the weight mu(t) of the unlabelled loss grows; t is the share of the training that is done."""

import math
from typing import Literal


class Ramp:
    """mu(t) = weight * shape(t / until), which stays at `weight` from t = until on.

    Args:
        weight: The weight at the end of the ramp.
        until: Share of the training that the ramp takes, in [0, 1]; 0 is no ramp.
        shape: "linear"; "gaussian", exp(-5 (1 - s)^2) (Laine & Aila, arXiv 1610.02242, section 2); "cosine",
            (1 - cos(pi s)) / 2 (AdaMatch, arXiv 2106.04732, equation 8).

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, weight: float = 1.0, until: float = 0.0, shape: Literal["linear", "gaussian", "cosine"] = "linear"
    ) -> None:
        if weight < 0:
            msg = f"Expected `weight` >= 0, got {weight}; 0 trains without the unlabelled loss."
            raise ValueError(msg)
        if not 0 <= until <= 1:
            msg = f"Expected `until` in [0, 1], a share of the training, got {until}; 0.4 ramps for 40 % of it."
            raise ValueError(msg)
        if shape not in ("linear", "gaussian", "cosine"):
            msg = f"Expected `shape` to be linear, gaussian or cosine, got {shape!r}."
            raise ValueError(msg)
        self.weight = weight
        self.until = until
        self.shape = shape

    def __call__(self, t: float) -> float:
        """Return mu(t) for t in [0, 1]."""
        if t >= self.until:
            return self.weight
        s = t / self.until
        if self.shape == "gaussian":
            return self.weight * math.exp(-5 * (1 - s) ** 2)
        if self.shape == "cosine":
            return self.weight * (1 - math.cos(math.pi * s)) / 2
        return self.weight * s
