"""Distribution alignment: predictions of unlabelled images whose average is that of the labels."""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.ssl.base import Host
from lightning_modules.ssl.thresholds import decay_of


class Alignment(nn.Module):
    """q = normalise(p * target / mean of p), which moves the log-odds of two classes by a constant.

    ReMixMatch (Berthelot et al., arXiv 1911.09785, section 3.1). The mean is over the last batches of unlabelled
    images, the present one too, either a queue or a moving average. All processes' images count.

    Buffers: means [max(1, length), K], the queue, or the average; count [], batches so far; target [K].

    Args:
        target: "uniform", every class as often as another; "labeled", the moving average of the predictions of
            labelled images.
        length: Batches in the queue; 0 takes a moving average instead.
        decay: Decay of the moving averages, in [0, 1). They start at 1 / K; the queue starts empty.

    Raises:
        ValueError: An argument is out of range.
    """

    means: Tensor
    count: Tensor
    target: Tensor

    def __init__(
        self, target: Literal["uniform", "labeled"] = "uniform", length: int = 0, decay: float = 0.999
    ) -> None:
        super().__init__()
        if target not in ("uniform", "labeled"):
            msg = f"Expected `target` to be uniform or labeled, got {target!r}."
            raise ValueError(msg)
        if length < 0:
            msg = f"Expected `length` >= 0, got {length}; 0 takes a moving average."
            raise ValueError(msg)
        self.kind = target
        self.length = length
        self.decay = decay_of("decay", decay)

    def setup(self, m: Host) -> None:
        """Build the averages; called once."""
        uniform = torch.full((m.num_classes,), 1 / m.num_classes)
        self.register_buffer("means", uniform.new_zeros(self.length, m.num_classes) if self.length else uniform[None])
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("target", uniform.clone())

    @torch.no_grad()
    def forward(self, m: Host, probabilities: Tensor, labeled_probabilities: Tensor) -> Tensor:
        """Take a batch into the averages, and return its aligned predictions.

        Args:
            m: The module.
            probabilities: Of unlabelled images [B, K].
            labeled_probabilities: Of labelled images [A, K]; looked at if the target is "labeled".

        Returns:
            [B, K], each row summing to 1.
        """
        everyone, labeled = m.gather(probabilities, labeled_probabilities)
        if self.length:
            # An index of one axis stays on the device; without one, every batch would wait for its number.
            self.means[(self.count % self.length).view(1)] = everyone.mean(0)
        else:
            self.means[0].lerp_(everyone.mean(0), 1 - self.decay)
        if self.kind == "labeled":
            self.target.lerp_(labeled.mean(0), 1 - self.decay)
        self.count += 1
        return self.aligned(probabilities)

    def aligned(self, probabilities: Tensor) -> Tensor:
        """Return predictions [B, K] aligned by the averages so far."""
        # The queue's empty places are zeros, and the factor that they make is gone after normalising.
        mean = self.means.sum(0)
        mean = mean / mean.sum().clamp_min(torch.finfo(mean.dtype).tiny)
        ratio = probabilities * (self.target + 1e-6) / (mean + 1e-6)
        return ratio / ratio.sum(-1, keepdim=True)
