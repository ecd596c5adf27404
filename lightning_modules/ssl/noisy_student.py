"""Noisy Student: learn a trained teacher's labels under noise (Xie et al., arXiv 1911.04252)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl.balancing import balanced_copies
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Split, Views
from lightning_modules.ssl.companions import agreed, require_teacher, with_classes
from lightning_modules.ssl.parts import joint, sharpen, soft_cross_entropy
from lightning_modules.ssl.ramps import Ramp


class NoisyStudent(Method):
    """A student learns labelled images and the labels that a trained teacher gave to the others, both under noise.

    Before the fit, the teacher labels all unlabelled images, without noise. Images that it is not sure of are left out,
    and classes are balanced: the most confident images of large classes, several copies of those of small ones. Then
    L = (B H(y, p(s(x))) + U mu H(q, p(s(u)))) / (B + U) over B labelled and U unlabelled images of a batch, with the
    teacher's q. Noise is the strong view and what the student's network brings along (dropout, stochastic depth), so
    give it some. The next generation is the next fit, whose `teacher_from` is this one's checkpoint; the student may be
    larger than its teacher. An image that is among the labelled ones too keeps its given label.

    Self-training from a pre-trained backbone (Zoph et al., arXiv 2006.06882) is this method on a network that starts
    from pre-trained weights, with hard labels or soft ones and `loss_normalization`: the unlabelled loss is scaled by
    the ratio of the running means of both losses.

    Reference settings (ImageNet): confidence 0.3, 130000 images a class, soft labels, RandAugment with two operations,
    dropout 0.5, stochastic depth 0.8, label smoothing 0.1, one to five unlabelled images a labelled one, average
    0.9999, three generations. The classes are balanced exactly here; the published code draws the remainder of each
    class image by image.

    Args:
        teacher_from: Checkpoint of the fit that trained the teacher; needed when a fit begins, not when it goes on.
        teacher: The teacher's network, if it is not like the student's. Without `teacher_from` it is taken as it is.
        hard_labels: Learn the teacher's most likely class instead of its probabilities.
        temperature: T of the teacher's soft labels, > 0.
        threshold: Confidence below which an image is left out, in [0, 1].
        balance: Draw all classes alike.
        images_per_class: How many of each class, > 0; None is the mean over the classes.
        label_smoothing: Of the labelled loss, in [0, 1).
        loss_normalization: Scale the unlabelled loss to the size of the labelled one.
        loss_decay: Decay per batch of the running means behind that, in [0, 1).

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("strong",), unlabeled=("strong",), index=True)
    batch_norm = "joint"
    ramp = Ramp(1.0)

    soft_label: Tensor
    copies: Tensor
    loss_means: Tensor

    def __init__(
        self,
        teacher_from: str | None = None,
        teacher: nn.Module | None = None,
        hard_labels: bool = False,
        temperature: float = 1.0,
        threshold: float = 0.3,
        balance: bool = True,
        images_per_class: int | None = None,
        label_smoothing: float = 0.1,
        loss_normalization: bool = False,
        loss_decay: float = 0.99,
    ) -> None:
        super().__init__()
        require_teacher(teacher_from, teacher, type(self).__name__)
        if temperature <= 0 or not 0 <= threshold <= 1 or (images_per_class is not None and images_per_class < 1):
            msg = (
                "Expected `temperature` > 0, `threshold` in [0, 1] and `images_per_class` >= 1 or None, got "
                f"{temperature}, {threshold} and {images_per_class}; `hard_labels` takes the place of temperature 0."
            )
            raise ValueError(msg)
        for name, value in {"label_smoothing": label_smoothing, "loss_decay": loss_decay}.items():
            if not 0 <= value < 1:
                msg = f"Expected `{name}` in [0, 1), got {value}."
                raise ValueError(msg)
        self.teacher_from = teacher_from
        # Asked once and only when a fit begins: as a part of the module it would be in every checkpoint.
        self._teacher = (teacher,)
        self.hard_labels = hard_labels
        self.temperature = temperature
        self.threshold = threshold
        self.balance = balance
        self.images_per_class = images_per_class
        self.label_smoothing = label_smoothing
        self.loss_normalization = loss_normalization
        self.loss_decay = loss_decay

    def setup(self, m: Host) -> None:
        """Make room for the teacher's labels."""
        self.register_buffer("soft_label", torch.zeros(m.num_unlabeled, m.num_classes))
        self.register_buffer("copies", torch.zeros(m.num_unlabeled, dtype=torch.long))
        self.register_buffer("loss_means", torch.zeros(2))

    def fit_start(self, m: Host) -> None:
        """Let the teacher label the images.

        Raises:
            ValueError: It is sure of none.
        """
        (given_teacher,) = self._teacher
        teacher = m.new_network() if given_teacher is None else with_classes(given_teacher, m.num_classes)
        if self.teacher_from is not None:
            m.load_trained(teacher, self.teacher_from, "teacher_from")
        teacher.to(self.soft_label.device)
        with evaluating(teacher):
            p = m.sweep(lambda image: teacher(image).float().div(self.temperature).softmax(-1), "unlabeled")
        given = m.labels_of("unlabeled")
        confidence, label = p.max(-1)
        known = F.one_hot(given.clamp_min(0), m.num_classes).to(p)
        p = torch.where((given >= 0)[:, None], known, sharpen(p, 0.0) if self.hard_labels else p)
        confidence = torch.where(given >= 0, 1.0, confidence)
        label = torch.where(given >= 0, given, label)
        if self.balance:
            copies = balanced_copies(label, confidence, m.num_classes, self.threshold, self.images_per_class)
        else:
            copies = (confidence >= self.threshold).long()
        if not bool(copies.any()):
            msg = (
                f"Expected a teacher that is sure of some images by `threshold` {self.threshold}, but its largest "
                f"confidence is {float(confidence.max()):.3g}; lower it, or train the teacher longer."
            )
            raise ValueError(msg)
        self.soft_label.copy_(agreed(m, p))
        self.copies.copy_(agreed(m, copies))

    def select(self) -> dict[Split, Tensor] | None:
        """The images that are learnt, each as often as its class needs."""
        if not bool(self.copies.any()):
            return None
        return {"unlabeled": torch.arange(len(self.copies), device=self.copies.device).repeat_interleave(self.copies)}

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Return both cross-entropies, weighted by how many images there are of each."""
        x, u = joint(m.network, labeled["image"], unlabeled["strong"])
        target = self.soft_label[unlabeled["index"]]
        # Images that were left out come along only where the data cannot select.
        kept = (self.copies[unlabeled["index"]] > 0).float()
        sup = F.cross_entropy(x.float(), labeled["label"], label_smoothing=self.label_smoothing)
        unsup = (kept * soft_cross_entropy(u.float(), target)).mean()
        confidence, label = target.max(-1)
        share = len(x) / (len(x) + len(u))
        scale = self._scale(m, sup, unsup) if self.loss_normalization else 1.0
        return Loss(sup=share * sup, unsup=(1 - share) * scale * unsup, guess=Guess(label, confidence, kept))

    @torch.no_grad()
    def _scale(self, m: Host, sup: Tensor, unsup: Tensor) -> Tensor:
        """Ratio of the running means of labelled and unlabelled loss, with this batch."""
        now = m.gather(torch.stack([sup, unsup])[None].float())[0].mean(0)
        decay = self.loss_decay if bool(self.loss_means.any()) else 0.0
        self.loss_means.lerp_(now, 1 - decay)
        return self.loss_means[0] / self.loss_means[1].clamp_min(1e-8)
