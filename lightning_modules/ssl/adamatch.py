"""AdaMatch: interpolated logits, distribution alignment, and a threshold relative to labelled images."""

import torch

from lightning_modules.ssl.alignment import Alignment
from lightning_modules.ssl.base import Batch, Host, Loss, Views
from lightning_modules.ssl.parts import cross_entropy, frozen_statistics, joint
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import RelativeThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong


class AdaMatch(WeakToStrong):
    """Lu = mean 1[max q >= tau c] H(argmax q, p(s(u))), q = p(w(u)) aligned to labelled predictions.

    Berthelot et al., "AdaMatch", arXiv 2106.04732, section 3. Labelled images, a weak and a strong view of each, go
    through the network twice: together with the unlabelled ones, z', and alone, z'', which leaves the running
    statistics of BatchNorm as they are. Their logits are z' + r (z'' - z'), r uniform in [0, 1] for each number, with
    gradient through both. c is the mean confidence of the weak labelled views by these logits. The weight rises
    as (1 - cos(2 pi t)) / 2 until t = 0.5.

    Reference settings (the authors' code): tau 0.9, 3 unlabelled images for a labelled one, weight decay 0.001,
    learning rate 0.03; hard pseudo-labels, where the paper writes soft ones; the target of the
    alignment is a moving average with decay 0.999, its source the mean of the last 128 batches.

    Deviation: the queue of 128 batches starts empty, in the reference it starts full of uniform distributions.

    Args:
        threshold: tau >= 0.
        temperature: T >= 0 of the targets; 0 makes them hard.
        queue: Batches that the source of the alignment averages over, >= 0; 0 takes a moving average.
        decay: Decay of the moving averages, in [0, 1).
        interpolate: Whether logits are interpolated; without it labelled images go through the network once.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak", "strong"), unlabeled=("weak", "strong"))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0, until=0.5, shape="cosine")

    def __init__(
        self,
        threshold: float = 0.9,
        temperature: float = 0.0,
        queue: int = 128,
        decay: float = 0.999,
        interpolate: bool = True,
    ) -> None:
        super().__init__(RelativeThreshold(threshold), temperature, Alignment("labeled", queue, decay))
        self.interpolate = interpolate

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu of a batch."""
        images = torch.cat([labeled["image"], labeled["strong"]])
        logits, weak, strong = joint(m.network, images, unlabeled["weak"], unlabeled["strong"])
        if self.interpolate:
            with frozen_statistics(m.network):
                alone = m.network(images)
            logits = logits + torch.rand_like(logits) * (alone - logits)
        size = len(labeled["label"])
        loss = self.unlabeled_loss(m, labeled, unlabeled, logits[:size], weak, strong)
        loss.sup = cross_entropy(logits, labeled["label"].repeat(2))
        return loss
