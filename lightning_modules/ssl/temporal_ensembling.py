"""Temporal Ensembling: agree with the average of one's own predictions in past epochs."""

import torch
from torch import Tensor

from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Views
from lightning_modules.ssl.parts import cross_entropy, joint, squared_error
from lightning_modules.ssl.ramps import Ramp


class TemporalEnsembling(Method):
    """Lu = mean_{b,c} (p(w(u_i)) - Z_i / (1 - alpha^t_i))^2, Z_i <- alpha Z_i + (1 - alpha) z_i after each epoch.

    Laine & Aila, "Temporal Ensembling for Semi-Supervised Learning", arXiv 1610.02242, algorithm 2. z_i is what the
    very forward that is trained on predicted for image i; drawn several times in an epoch, the mean of those. An
    epoch need not see all images: Z_i changes in epochs that saw image i only, and t_i counts those, so the
    correction of the start from 0 is exact for each image. An image has no target before its first epoch has ended
    and is learnt from with weight 0 until then (all of them in the first epoch, as in the paper).

    The reference weight is 30 times the share of labelled images, with a labelled loss divided by the whole batch; with
    the mean over labelled images, as here, that is 30. Gaussian ramp over 80 of 300 epochs. Predictions of all images
    are kept twice, [N, K] in float32: 4 MB for CIFAR-10, 10 GB for ImageNet. All processes hold all of them.

    Args:
        alpha: Decay per epoch, in [0, 1); 0 keeps the last epoch's predictions only.

    Raises:
        ValueError: It is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak",), index=True)
    batch_norm = "joint"
    ramp = Ramp(weight=30.0, until=80 / 300, shape="gaussian")

    ensemble: Tensor
    epochs: Tensor
    seen: Tensor
    visits: Tensor

    def __init__(self, alpha: float = 0.6) -> None:
        super().__init__()
        if not 0 <= alpha < 1:
            msg = f"Expected `alpha` in [0, 1), got {alpha}; 0.6 is the reference."
            raise ValueError(msg)
        self.alpha = alpha

    def setup(self, m: Host) -> None:
        """Make room for the predictions: Z and t, and the sum and number of this epoch's."""
        self.register_buffer("ensemble", torch.zeros(m.num_unlabeled, m.num_classes))
        self.register_buffer("epochs", torch.zeros(m.num_unlabeled, dtype=torch.long))
        self.register_buffer("seen", torch.zeros(m.num_unlabeled, m.num_classes))
        self.register_buffer("visits", torch.zeros(m.num_unlabeled))

    def targets(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What has been predicted for images in past epochs.

        Args:
            index: Their numbers [B].

        Returns:
            Probabilities [B, K], zeros where there are none yet, and whether there are any [B].
        """
        epochs = self.epochs[index]
        startup = 1 - self.alpha ** epochs.clamp_min(1).float()
        return self.ensemble[index] / startup[:, None], epochs > 0

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu; the targets are of past epochs, this batch's predictions are remembered for the next one."""
        logits, of_unlabeled = joint(m.network, labeled["image"], unlabeled["weak"])
        p = of_unlabeled.float().softmax(-1)
        target, known = self.targets(unlabeled["index"])
        with torch.no_grad():
            index, predicted = m.gather(unlabeled["index"], p.detach())
            self.seen.index_add_(0, index, predicted)
            self.visits.index_add_(0, index, torch.ones_like(predicted[:, 0]))
        confidence, label = target.max(-1)
        return Loss(
            sup=cross_entropy(logits, labeled["label"]),
            unsup=(known * squared_error(p, target)).mean(),
            guess=Guess(label, confidence, known.float()),
        )

    @torch.no_grad()
    def epoch_end(self, m: Host) -> None:
        """Take the epoch's predictions into Z, for the images that it saw."""
        visited = self.visits > 0
        mean = self.seen / self.visits.clamp_min(1)[:, None]
        self.ensemble.copy_(torch.where(visited[:, None], self.ensemble.lerp(mean, 1 - self.alpha), self.ensemble))
        self.epochs += visited
        self.seen.zero_()
        self.visits.zero_()
