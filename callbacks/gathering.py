"""Rows that processes have found each on its own, put together."""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor


def gathered_rows(trainer: pl.Trainer, found: Sequence[Tensor], device: torch.device) -> Tensor:
    """Put together the rows of all processes; every process has to ask.

    Args:
        trainer: The trainer.
        found: This process's rows, parts [N, C] whose first column numbers them from 0; none if it has none.
        device: Where processes exchange tensors.

    Returns:
        The rows of all, float64 on the CPU, by number. Doubles hold every number up to 2^53 and every probability.
    """
    own = torch.cat([rows.detach().cpu().double() for rows in found]) if found else torch.zeros(0, 1).double()
    # Processes may have different numbers of rows, or none, and all have to send equally much.
    rows, columns = (
        int(trainer.strategy.reduce(torch.tensor(size, device=device), reduce_op="max")) for size in own.shape
    )
    padded = torch.full((rows, columns), -1.0, dtype=torch.double)
    padded[: len(own), : own.shape[1]] = own
    if trainer.world_size > 1:
        padded = trainer.strategy.all_gather(padded.to(device)).cpu().flatten(0, -2)
    real = padded[padded[:, 0] >= 0]
    return real[real[:, 0].argsort(stable=True)]
