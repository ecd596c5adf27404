"""ReMixMatch: MixMatch with aligned guesses, strong views anchored to weak ones, and rotations."""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.ssl.alignment import Alignment
from lightning_modules.ssl.base import Batch, Host, Loss, Method, Views, view_keys
from lightning_modules.ssl.ctaugment import CTAugmentRates
from lightning_modules.ssl.mixing import guess_of, mixup, one_hot
from lightning_modules.ssl.parts import cross_entropy, embedding_network, frozen_statistics, sharpen, soft_cross_entropy
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import at_least_zero


def rotated(image: Tensor) -> tuple[Tensor, Tensor]:
    """Turn image i by i mod 4 quarters, counter-clockwise.

    Args:
        image: Square images [B, C, H, H].

    Returns:
        The images, and how many quarters each was turned by [B].

    Raises:
        ValueError: They are not square.
    """
    if image.shape[-1] != image.shape[-2]:
        msg = (
            f"Expected square images to rotate, got {image.shape[-2]} x {image.shape[-1]}; crop or resize them, or set "
            "`rotation_weight` to 0."
        )
        raise ValueError(msg)
    turns = torch.arange(len(image), device=image.device) % 4
    turned = image.clone()
    for quarter in (1, 2, 3):
        turned[quarter::4] = image[quarter::4].rot90(quarter, (2, 3))
    return turned, turns


class ReMixMatch(Method):
    """Ls = mean H(y', p(x')), Lu = w_match mean H(q', p(u')) + w_kl mean H(q, p(s1(u))), and w_rot mean H(turn, p_rot).

    Berthelot et al., "ReMixMatch", arXiv 1911.09785, algorithm 1 and section 3. The guess q is the prediction
    of the weak view, aligned to the class frequencies of the labelled images and sharpened; it is the label of the
    weak view and of the K strong ones (augmentation anchoring). All of them and the labelled images, which are seen
    strongly as well, are mixed as in MixMatch; cross-entropy replaces the squared error. The first strong view is
    also learnt unmixed, and turned by 0 to 3 quarters for a head of its own to tell by how many. Reference
    settings: weights 1.5, 0.5, 0.5, temperature 0.5, alpha 0.75, a queue of 128 batches, K up to 8
    (2 is cheaper and the default here); the weights of the unlabelled terms but the rotation grow over the
    first 1/64 of the training.

    Guesses are made without gradient and move no running statistics, nor do the unmixed and turned images; the mixed
    ones go through the network in one forward, which does.

    Args:
        num_strong: K >= 1 strong views of an unlabelled image.
        temperature: T >= 0 of the sharpening.
        alpha: lambda ~ Beta(alpha, alpha); 0 mixes nothing.
        match_weight: w_match.
        kl_weight: w_kl.
        rotation_weight: w_rot; 0 needs no square images and no network that embeds.
        target: What the guesses are aligned to: "labeled", the class frequencies of the labelled images; "uniform".
        ctaugment: Learn how strong augmentations may be (CTAugment); the data's strong views must be CTAugment's.

    Raises:
        ValueError: An argument is out of range.
    """

    batch_norm = "joint"
    ramp = Ramp(weight=1.0, until=1 / 64)

    def __init__(
        self,
        num_strong: int = 2,
        temperature: float = 0.5,
        alpha: float = 0.75,
        match_weight: float = 1.5,
        kl_weight: float = 0.5,
        rotation_weight: float = 0.5,
        target: Literal["labeled", "uniform"] = "labeled",
        ctaugment: bool = False,
    ) -> None:
        super().__init__()
        if num_strong < 1:
            msg = f"Expected `num_strong` >= 1, got {num_strong}; the paper takes up to 8."
            raise ValueError(msg)
        if target not in ("labeled", "uniform"):
            msg = f"Expected `target` to be labeled or uniform, got {target!r}."
            raise ValueError(msg)
        self.views = Views(
            labeled=("strong", "probe") if ctaugment else ("strong",), unlabeled=("weak", *["strong"] * num_strong)
        )
        self.temperature = at_least_zero("temperature", temperature)
        self.alpha = at_least_zero("alpha", alpha)
        self.match_weight = at_least_zero("match_weight", match_weight)
        self.kl_weight = at_least_zero("kl_weight", kl_weight)
        self.rotation_weight = at_least_zero("rotation_weight", rotation_weight)
        self.target = target
        # The frequencies of the labels are known, so the alignment has nothing to learn about its target.
        self.alignment = Alignment(target="uniform", length=128)
        self.augmentation = CTAugmentRates() if ctaugment else None
        if self.augmentation is not None:
            self.rates = self.augmentation.rates

    def setup(self, m: Host) -> None:
        """Build the queue of the alignment and the head for rotations."""
        self.alignment.setup(m)
        if self.rotation_weight > 0:
            self.rotation_head = nn.Linear(embedding_network(m.network, "ReMixMatch").num_features, 4)

    def fit_start(self, m: Host) -> None:
        """Count the labels."""
        if self.target == "labeled":
            label = m.labels_of("labeled")
            counts = torch.bincount(label[label >= 0], minlength=m.num_classes)
            self.alignment.target.copy_(counts / counts.sum())

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu of a mixed batch, and the rotations."""
        weak, *strong = (unlabeled[key] for key in view_keys(self.views.unlabeled))
        given = one_hot(labeled["label"], m.num_classes)
        with torch.no_grad(), frozen_statistics(m.network):
            p = m.network(weak).float().softmax(-1)
            aligned = self.alignment(m, p, given)
            guess = sharpen(aligned, self.temperature)
        image, target = mixup(
            torch.cat([labeled["image"], weak, *strong]), torch.cat([given, *[guess] * (1 + len(strong))]), self.alpha
        )
        losses = soft_cross_entropy(m.network(image).float(), target)
        with frozen_statistics(m.network):
            unmixed = soft_cross_entropy(m.network(strong[0]).float(), guess).mean()
            rotation = self.rotation_loss(m, strong[0]) if self.rotation_weight > 0 else 0.0
        if self.augmentation is not None:
            self.augmentation.learn(m, labeled)
        match = losses[len(given) :].mean()
        return Loss(
            sup=losses[: len(given)].mean(),
            unsup=self.match_weight * match + self.kl_weight * unmixed,
            aux=self.rotation_weight * rotation,
            logs={"match": match, "unmixed": unmixed, "rotation": rotation},
            guess=guess_of(aligned),
        )

    def rotation_loss(self, m: Host, image: Tensor) -> Tensor:
        """How badly the head tells by how much images [B, C, H, H] were turned."""
        turned, turns = rotated(image)
        return cross_entropy(self.rotation_head(embedding_network(m.network, "ReMixMatch").embed(turned)), turns)
