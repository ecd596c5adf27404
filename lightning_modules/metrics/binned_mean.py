"""Means per bin, for losses that are followed per noise level."""

import torch
from torch import Tensor
from torchmetrics import Metric


class BinnedMean(Metric):
    """Mean of the values that fell into each bin since the last reset.

    A denoising loss differs by orders of magnitude between noise levels, so its plain mean says little; one
    mean per noise-level bin does. A bin that received nothing is NaN, not 0.

    Args:
        num_bins: How many bins there are, at least 1.

    Raises:
        ValueError: `num_bins` is below 1.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, num_bins: int) -> None:
        """Check the argument and start at zero."""
        super().__init__()
        if num_bins < 1:
            msg = f"Expected argument `num_bins` to be at least 1 but got {num_bins}. Give the number of bins."
            raise ValueError(msg)
        self.num_bins = num_bins
        self.add_state("total", torch.zeros(num_bins), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_bins, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, values: Tensor, bins: Tensor) -> None:
        """Add values to their bins.

        Args:
            values: [N], any floating type; summed in float32.
            bins: [N] integers in 0..num_bins-1, the bin of each value.

        Raises:
            ValueError: The shapes differ, `bins` does not hold integers, or one of them names no bin.
        """
        if values.ndim != 1 or values.shape != bins.shape:
            msg = (
                "Expected arguments `values` and `bins` to be vectors of one length but got shapes "
                f"{tuple(values.shape)} and {tuple(bins.shape)}. Pass one value and one bin per sample."
            )
            raise ValueError(msg)
        if bins.is_floating_point() or bins.dtype == torch.bool:
            msg = f"Expected argument `bins` to hold integers but got {bins.dtype}. Convert it with `.long()`."
            raise ValueError(msg)
        if bins.numel() and not bool(((bins >= 0) & (bins < self.num_bins)).all()):
            msg = (
                f"Expected argument `bins` to lie in 0..{self.num_bins - 1} but got values from "
                f"{int(bins.min())} to {int(bins.max())}. Clamp them or raise `num_bins`."
            )
            raise ValueError(msg)
        # A mask and `where` instead of index_add: deterministic on GPUs, and a NaN stays within its own bin.
        member = bins[:, None] == torch.arange(self.num_bins, device=bins.device)
        spread = torch.where(member, values.detach().float()[:, None], 0.0)
        self.total += spread.sum(0)
        self.count += member.sum(0)

    def compute(self) -> Tensor:
        """Mean of each bin.

        Returns:
            [num_bins] float32, NaN where nothing fell.
        """
        return self.total / self.count

    def pop(self) -> Tensor:
        """What `compute` returns, and start again; no warning where nothing fell. Every process has to ask.

        Returns:
            [num_bins] float32, NaN where nothing fell on any process.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            means = self.total / self.count
        self.reset()
        return means
