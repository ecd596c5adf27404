"""Learning-rate schedules that the semi-supervised literature uses and torch lacks."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class CosineDecay(LambdaLR):
    """lr(k) = lr cos(cycles pi k / num_steps), after a linear warm-up; it does not restart.

    FixMatch (Sohn et al., arXiv 2001.07685, section 2.4) has cycles = 7/16, which ends at 0.195 of the rate; 1/2 ends
    at 0.

    Args:
        optimizer: The optimiser.
        num_steps: Batches of the training.
        cycles: Part of a half period that is run through, in (0, 1/2].
        warmup_steps: Batches over which the rate grows from 0, within `num_steps`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, optimizer: Optimizer, num_steps: int, cycles: float = 7 / 16, warmup_steps: int = 0) -> None:
        if not 0 <= warmup_steps < num_steps:
            msg = f"Expected `warmup_steps` from 0 to below `num_steps` ({num_steps}), got {warmup_steps}."
            raise ValueError(msg)
        if not 0 < cycles <= 0.5:
            msg = f"Expected `cycles` in (0, 0.5], got {cycles}; above it the learning rate would be negative."
            raise ValueError(msg)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            return math.cos(math.pi * cycles * min(1.0, (step - warmup_steps) / (num_steps - warmup_steps)))

        super().__init__(optimizer, factor)


class WarmUpCosine(LambdaLR):
    """A linear warm-up, then half a cosine that may go on beyond the end of the training.

    lr(k) = lr (end + (1 - end) (1 + cos(pi (k - w) / (stretch N - w))) / 2) after w of N batches. Self-supervised
    pretraining stops early on a longer cosine: Masked Siamese Networks (arXiv 2204.07141) have a stretch of 1.25.

    Args:
        optimizer: The optimiser.
        num_steps: Batches of the training, N.
        warmup_steps: Batches over which the rate grows, w, within `num_steps`.
        start: Share of the rate that the warm-up starts from, in [0, 1].
        end: Share of the rate at the end of the cosine, in [0, 1].
        stretch: Length of the schedule as a multiple of the training, at least 1.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_steps: int,
        warmup_steps: int = 0,
        start: float = 0.2,
        end: float = 0.001,
        stretch: float = 1.25,
    ) -> None:
        if not 0 <= warmup_steps < num_steps:
            msg = f"Expected `warmup_steps` from 0 to below `num_steps` ({num_steps}), got {warmup_steps}."
            raise ValueError(msg)
        for name, share in (("start", start), ("end", end)):
            if not 0 <= share <= 1:
                msg = f"Expected `{name}` in [0, 1], a share of the optimiser's rate, got {share}."
                raise ValueError(msg)
        if stretch < 1:
            msg = f"Expected `stretch` >= 1, got {stretch}; 1 ends with the training."
            raise ValueError(msg)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return start + (1 - start) * step / warmup_steps
            return end + (1 - end) * half_cosine((step - warmup_steps) / (stretch * num_steps - warmup_steps))

        super().__init__(optimizer, factor)


def half_cosine(share: float) -> float:
    """A cosine from 1 to 0: (1 + cos(pi share)) / 2; 0 beyond the end.

    Args:
        share: How much of it is past, from 0.
    """
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
