"""Soft pseudo-labels with MixUp (Arazo et al., arXiv 1908.02983)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Views
from lightning_modules.ssl.companions import agreed
from lightning_modules.ssl.parts import beta_samples, class_divergence, entropy, mix, soft_cross_entropy
from lightning_modules.ssl.ramps import Ramp


class SoftPseudoLabels(Method):
    """Each unlabelled image has a soft label, the network's own prediction, renewed before each epoch.

    Labelled and unlabelled images of a batch are mixed with each other, one lambda ~ Beta(alpha, alpha) a batch, and
    so are their labels: L = lambda H(y, p) + (1 - lambda) H(y', p) + class_weight R_A + entropy_weight R_H. R_A keeps
    the mean prediction near uniform, R_H, the mean entropy, makes predictions sharp. MixUp and labelled images in every
    batch are what keeps the network from confirming its own mistakes; their number is the labelled batch size of the
    data (the paper takes at least 16 of 100). Without a moving average for training, labels come from the network
    itself. An image that is also a labelled one keeps its given label.

    Reference settings (CIFAR-10): alpha 1, weights 0.8 and 0.4, 10 epochs of warm-up on the labelled images, 400 in
    all, SGD 0.1 divided by 10 after 250 and 350, weight decay 1e-4, dropout 0.1.

    What deviates: labels are predicted by one sweep in evaluation mode on plain images; the paper collects them in
    training mode with dropout off. The means over labelled and unlabelled images make up sup and unsup by the number of
    images, so that with mu = 1 their sum is the mean over the batch.

    Args:
        warmup_epochs: Epochs on the labelled images alone, mixed, without R_A and R_H; 0 if the network comes trained.
        alpha: Of the Beta distribution, >= 0; 0 does not mix.
        class_weight: Weight of R_A, >= 0.
        entropy_weight: Weight of R_H, >= 0.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak",), index=True)
    batch_norm = "joint"
    ramp = Ramp(1.0)

    soft_label: Tensor

    def __init__(
        self, warmup_epochs: int = 10, alpha: float = 1.0, class_weight: float = 0.8, entropy_weight: float = 0.4
    ) -> None:
        super().__init__()
        if min(warmup_epochs, alpha, class_weight, entropy_weight) < 0:
            msg = (
                "Expected `warmup_epochs`, `alpha`, `class_weight` and `entropy_weight` >= 0, got "
                f"{warmup_epochs}, {alpha}, {class_weight} and {entropy_weight}."
            )
            raise ValueError(msg)
        self.warmup_epochs = warmup_epochs
        self.alpha = alpha
        self.class_weight = class_weight
        self.entropy_weight = entropy_weight

    def setup(self, m: Host) -> None:
        """Make room for a soft label of each unlabelled image."""
        self.register_buffer("soft_label", torch.full((m.num_unlabeled, m.num_classes), 1.0 / m.num_classes))

    def epoch_start(self, m: Host) -> None:
        """Renew the labels."""
        if m.current_epoch < self.warmup_epochs:
            return
        with evaluating(m.network):
            p = m.sweep(lambda image: m.network(image).float().softmax(-1), "unlabeled")
        given = m.labels_of("unlabeled")
        known = F.one_hot(given.clamp_min(0), m.num_classes).to(p)
        self.soft_label.copy_(agreed(m, torch.where((given >= 0)[:, None], known, p)))

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Return the cross-entropy of mixed images and the two regularisers."""
        image, target = labeled["image"], F.one_hot(labeled["label"], m.num_classes).to(self.soft_label)
        if m.current_epoch < self.warmup_epochs:
            return Loss(sup=self._mixed(m, image, target)[1].mean())
        soft = self.soft_label[unlabeled["index"]]
        logits, each = self._mixed(m, torch.cat([image, unlabeled["weak"]]), torch.cat([target, soft]))
        ra, rh = class_divergence(logits), entropy(logits).mean()
        confidence, label = soft.max(-1)
        return Loss(
            sup=each[: len(image)].sum() / len(each),
            unsup=each[len(image) :].sum() / len(each),
            aux=self.class_weight * ra + self.entropy_weight * rh,
            logs={"class_divergence": ra.detach(), "entropy": rh.detach()},
            guess=Guess(label, confidence, torch.ones_like(confidence)),
        )

    def _mixed(self, m: Host, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of images mixed with each other [B, K], and the loss of each [B]."""
        lam = beta_samples(self.alpha, 1, target, folded=False)
        order = torch.randperm(len(image), device=image.device)
        logits = m.network(mix(image, image[order], lam.to(image))).float()
        return logits, soft_cross_entropy(logits, mix(target, target[order], lam))
