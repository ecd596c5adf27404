"""CTAugment's memory: how well the network copes with each strength of each augmentation."""

import torch
from torch import Tensor, nn

from lightning_modules.ssl.base import Batch, Host

NUM_OPS, NUM_PARAMETERS, NUM_BINS = 19, 2, 17


def _show(module: nn.Module, _: object = None) -> None:
    if isinstance(module, CTAugmentRates):
        module.rates.copy_(module.table)


class CTAugmentRates(nn.Module):
    """A rate for each bin of each parameter of each augmentation: rate <- 0.99 rate + 0.01 omega.

    Berthelot et al., "ReMixMatch", arXiv 1911.09785, section 3.2. omega = 1 - |p - y|_1 / 2, which is the probability
    of the true class, of a labelled image that was augmented with bins drawn at random (the view "probe"); p is the
    moving average's. Bins with low rates are no longer drawn by the data, which read `rates`.

    A method holds one, shows its `rates` as an attribute of its own, declares the labelled view "probe" and calls
    `learn` in each batch:

        self.augmentation = CTAugmentRates()
        self.rates = self.augmentation.rates

    Buffers: table [operations, parameters, bins], which is saved, moved and broadcast like all others.

    Args:
        decay: Of the rates per probe, in [0, 1).

    Attributes:
        rates: The same numbers in shared memory of the CPU, always the same tensor, for the loader's workers.

    Raises:
        ValueError: `decay` is out of range.
    """

    table: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            msg = f"Expected `decay` in [0, 1), got {decay}; 0.99 is the reference."
            raise ValueError(msg)
        self.decay = decay
        self.register_buffer("table", torch.ones(NUM_OPS, NUM_PARAMETERS, NUM_BINS))
        # Not the buffer itself: that leaves shared memory when the module is moved to a GPU.
        self.rates = torch.ones(NUM_OPS, NUM_PARAMETERS, NUM_BINS)
        self.rates.share_memory_()  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_post_hook(_show)  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def learn(self, m: Host, labeled: Batch) -> None:
        """Update the rates from the probes of all processes.

        Args:
            m: The module.
            labeled: The labelled part of a batch: "probe" [B, C, H, W], "label" [B], "probe_ops" [B, depth],
                "probe_bins" [B, depth, parameters].

        Raises:
            ValueError: The batch does not say how the probes were made.
        """
        missing = [key for key in ("probe", "probe_ops", "probe_bins") if key not in labeled]
        if missing:
            msg = (
                f"Expected labelled batches with {', '.join(missing)} for CTAugment, got "
                f"{', '.join(sorted(labeled))}; use SemiSupervisedDataModule, or let your data give them."
            )
            raise ValueError(msg)
        p = m.teacher(labeled["probe"]).float().softmax(-1).gather(1, labeled["label"][:, None])[:, 0]
        self.update(*m.gather(labeled["probe_ops"], labeled["probe_bins"], p))

    @torch.no_grad()
    def update(self, ops: Tensor, bins: Tensor, p_true: Tensor) -> None:
        """Take probes into the rates, one after the other.

        Args:
            ops: Numbers of the operations [B, depth].
            bins: Bins of their parameters [B, depth, parameters], -1 where an operation has no such parameter.
            p_true: Probability of the true class [B].
        """
        cell = (ops[..., None] * NUM_PARAMETERS + torch.arange(NUM_PARAMETERS, device=ops.device)) * NUM_BINS + bins
        omega = p_true.to(self.table)[:, None, None].expand(bins.shape)
        present = bins >= 0
        # In closed form: of n updates of a cell, number k (from 0) ends with the weight decay^(n - 1 - k).
        cell, order = cell[present].sort(stable=True)
        omega = omega[present][order]
        count = torch.bincount(cell, minlength=self.table.numel())
        last = count.cumsum(0)[cell] - 1
        later = last - torch.arange(len(cell), device=cell.device)
        gained = torch.zeros_like(self.table).flatten()
        gained.index_add_(0, cell, (1 - self.decay) * self.decay ** later.to(gained) * omega)
        self.table.mul_((self.decay ** count.to(gained)).view_as(self.table)).add_(gained.view_as(self.table))
        _show(self)
