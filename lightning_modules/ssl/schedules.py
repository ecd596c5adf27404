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
