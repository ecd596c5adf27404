"""SimMatch: strong views agree with weak views about the classes, and about which labelled images they are like."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.ssl.alignment import Alignment
from lightning_modules.ssl.banks import newest
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Views
from lightning_modules.ssl.parts import cross_entropy, embedding_network, soft_cross_entropy
from lightning_modules.ssl.projector import Projector
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import at_least_zero, decay_of, require_above_zero

_NOT_ALIKE = -1e4


class SimMatch(Method):
    """Lu = mean 1[max p^ >= tau] H(p^, p(s(u))) + lambda_in mean H(q^, q(s(u))).

    Zheng et al., "SimMatch", arXiv 2203.06915, section 3. A bank holds an embedding and the label of each labelled
    image. q = softmax(z bank / T) is how alike an image is to each of them, p the class probabilities, aligned to
    uniform. The weak view's are calibrated by each other: q^ ~ q times p of the entry's label, rows summing to 1;
    p^ = alpha p + (1 - alpha) (sum of q over the entries of a class).

    Reference settings, CIFAR-10: tau 0.95, T 0.1, alpha 0.9, embeddings of 128 numbers, lambda_in 1, alignment by the
    last 32 batches, weak views by the trained network itself, bank momentum 0.7, 7 unlabelled images for a labelled
    one. ImageNet: `ema_teacher`, bank momentum 0, tau 0.7, lambda_u 10, lambda_in 5 (`instance=0.5`), 5 unlabelled
    images for a labelled one.

    Deviations: instances count from a share of the training on, not from the second epoch. Labelled images that have
    not been seen are not in the bank; in the reference they are random vectors of class 0.

    Buffers: bank [num_labeled, size], bank_label [num_labeled], -1 = not seen yet.

    Args:
        threshold: tau >= 0.
        alpha: Share of an image's own prediction in its pseudo-label, in [0, 1]; 1 does not aggregate.
        temperature: T > 0.
        instance: lambda_in >= 0.
        size: Numbers of an embedding.
        bank_momentum: Share of the old embedding in a new one, in [0, 1).
        start: Share of the training after which the bank is used; an epoch of 1024 in the reference.
        align_queue: Batches that the alignment averages over, >= 0; 0 takes a moving average.
        ema_teacher: Weak views and bank by the moving average of network and projector (EMAN, the BatchNorm
            statistics are averaged as well), not by the network itself.
        teacher_decay: Decay of the projector's moving average, in [0, 1); only with `ema_teacher`.

    Raises:
        ValueError: An argument is out of range, or the data do not number labelled images.
        TypeError: The network does not embed.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0)
    bank: Tensor
    bank_label: Tensor

    def __init__(
        self,
        threshold: float = 0.95,
        alpha: float = 0.9,
        temperature: float = 0.1,
        instance: float = 1.0,
        size: int = 128,
        bank_momentum: float = 0.7,
        start: float = 0.001,
        align_queue: int = 32,
        ema_teacher: bool = False,
        teacher_decay: float = 0.999,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            msg = f"Expected `alpha` in [0, 1], got {alpha}; 1 does not aggregate."
            raise ValueError(msg)
        require_above_zero(temperature=temperature, size=size)
        self.threshold = at_least_zero("threshold", threshold)
        self.instance = at_least_zero("instance", instance)
        self.bank_momentum = decay_of("bank_momentum", bank_momentum)
        self.teacher_decay = decay_of("teacher_decay", teacher_decay)
        self.alpha = alpha
        self.temperature = temperature
        self.size = size
        self.start = at_least_zero("start", start)
        self.ema_teacher = ema_teacher
        if ema_teacher:
            self.teacher_buffers = "average"
        self.alignment = Alignment("uniform", align_queue)

    def setup(self, m: Host) -> None:
        """Build projector and bank."""
        self.projector = Projector(embedding_network(m.network, "SimMatch").num_features, self.size)
        if self.ema_teacher:
            self.teacher_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("bank", torch.zeros(m.num_labeled, self.size))
        self.register_buffer("bank_label", torch.full((m.num_labeled,), -1))
        self.alignment.setup(m)

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu (Lu + lambda_in Lin) of a batch."""
        if "index" not in labeled or len(self.bank) == 0:
            msg = (
                "Expected labelled images with an `index` and their number for SimMatch, which remembers each of them; "
                "use SemiSupervisedDataModule, or give your data num_labeled and `index`."
            )
            raise ValueError(msg)
        network = embedding_network(m.network, "SimMatch")
        weak_views = [] if self.ema_teacher else [unlabeled["weak"]]
        views = [labeled["image"], unlabeled["strong"], *weak_views]
        features = network.embed(torch.cat(views))
        sizes = [len(view) for view in views]
        x, strong, *of_weak = torch.split(network.classify(features).float(), sizes)
        zx, zs, *z_weak = torch.split(self.projector(features), sizes)
        with torch.no_grad():
            if self.ema_teacher:
                weak, zw, zx = self._taught(m, unlabeled["weak"], labeled["image"])
            else:
                weak, zw = of_weak[0], z_weak[0]
            p = self.alignment(m, weak.softmax(-1), x.softmax(-1))
            alike = self.similarity(zw)
            # A number on the device, so that nothing waits for it.
            used = (self.bank_label >= 0).any().float() * float(m.progress >= self.start)
            target = torch.where(used > 0, self.aggregated(p, alike), p)
            unfolded = self.unfolded(p, alike)
            confidence, label = target.max(-1)
            weight = (confidence >= self.threshold).float()
        instance = used * -(unfolded * self.similarity(zs).clamp_min(1e-12).log()).sum(-1).mean()
        fit = (weight * soft_cross_entropy(strong, target)).mean()
        with torch.no_grad():
            self.remember(*m.gather(zx, labeled["label"], labeled["index"]))
        return Loss(
            sup=cross_entropy(x, labeled["label"]),
            unsup=fit + self.instance * instance,
            logs={"instance": instance},
            guess=Guess(label, confidence, weight),
        )

    def _taught(self, m: Host, weak: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if m.ema_network is m.network:
            msg = "Expected `ema_decay` > 0 for SimMatch with `ema_teacher`, which learns from the average, got 0."
            raise ValueError(msg)
        for own, theirs in zip(self.teacher_projector.parameters(), self.projector.parameters(), strict=True):
            own.lerp_(theirs, 1 - self.teacher_decay)
        teacher = embedding_network(m.ema_network, "SimMatch")
        features = teacher.embed(torch.cat([weak, image]))
        logits = teacher.classify(features[: len(weak)]).float()
        zw, zx = torch.split(self.teacher_projector(features), [len(weak), len(image)])
        return logits, zw, zx

    def similarity(self, embedding: Tensor) -> Tensor:
        """Return q [B, num_labeled], each row summing to 1, of unit vectors [B, size]."""
        # A copy, as the bank is written to before the gradient is taken.
        products = embedding @ self.bank.clone().T / self.temperature
        return products.masked_fill(self.bank_label < 0, _NOT_ALIKE).softmax(-1)

    def unfolded(self, p: Tensor, q: Tensor) -> Tensor:
        """Return q^ ~ q times p of each entry's label: [B, num_labeled], each row summing to 1.

        Args:
            p: Class probabilities [B, K].
            q: Similarities [B, num_labeled].
        """
        product = q * p[:, self.bank_label.clamp_min(0)]
        return product / product.sum(-1, keepdim=True).clamp_min(torch.finfo(product.dtype).tiny)

    def aggregated(self, p: Tensor, q: Tensor) -> Tensor:
        """Return p^ = alpha p + (1 - alpha) (q summed over the entries of a class): [B, K], each row summing to 1.

        Args:
            p: Class probabilities [B, K].
            q: Similarities [B, num_labeled].
        """
        classes = F.one_hot(self.bank_label.clamp_min(0), p.shape[-1]).to(q)
        return self.alpha * p + (1 - self.alpha) * (q @ classes)

    def remember(self, embedding: Tensor, label: Tensor, index: Tensor) -> None:
        """Write labelled images into the bank.

        Args:
            embedding: Unit vectors [n, size].
            label: [n].
            index: Their numbers [n], in [0, num_labeled).
        """
        place = newest(index, len(self.bank))
        found, at = place >= 0, place.clamp_min(0)
        share = torch.where(self.bank_label >= 0, self.bank_momentum, 0.0).unsqueeze(-1)
        new = F.normalize(share * self.bank + (1 - share) * embedding[at], dim=-1)
        self.bank.copy_(torch.where(found.unsqueeze(-1), new, self.bank))
        self.bank_label.copy_(torch.where(found, label[at], self.bank_label))
