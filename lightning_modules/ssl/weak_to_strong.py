"""Learning from confident predictions of weak views: what FixMatch and its relatives have in common."""

from typing import Literal

import torch
from torch import Tensor

from lightning_modules.ssl.alignment import Alignment
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Views, view_keys
from lightning_modules.ssl.parts import cross_entropy, joint, sharpen, soft_cross_entropy
from lightning_modules.ssl.thresholds import Seen, Threshold, at_least_zero


class WeakToStrong(Method):
    """Lu = mean_b weight(q_b) * H(sharpen(q_b, T), p(s(u_b))), q = align(p(w(u))) without gradient.

    The pseudo-labels are those of the network that is trained. One forward of all views, so that BatchNorm sees all of
    them together; the mean is over the whole unlabelled batch, images of weight 0 included.

    Methods are this class with other parts, and a class of their own only for what has no part:

        WeakToStrong(FixedThreshold(0.95))                                  FixMatch
        WeakToStrong(FixedThreshold(0.8), temperature=0.4)                  UDA without TSA
        WeakToStrong(SoftThreshold(), alignment=Alignment(), align_target=False)   SoftMatch

    Args:
        threshold: What weight an unlabelled image has, by its prediction before sharpening.
        temperature: T >= 0 of the targets; 0 makes them hard, 1 leaves them as they are.
        alignment: Distribution alignment of the predictions; None is none.
        align_target: Whether targets are made of aligned predictions too; otherwise only the weights are.
        student: View that is learnt from; with "weak" it is the pseudo-label's own.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"))

    def __init__(
        self,
        threshold: Threshold,
        temperature: float = 0.0,
        alignment: Alignment | None = None,
        align_target: bool = True,
        student: Literal["strong", "weak"] = "strong",
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.temperature = at_least_zero("temperature", temperature)
        self.alignment = alignment
        self.align_target = align_target
        if student not in ("strong", "weak"):
            msg = f"Expected `student` to be strong or weak, got {student!r}."
            raise ValueError(msg)
        unlabeled = ("weak", "strong") if student == "strong" else ("weak",)
        self.views = Views(self.views.labeled, unlabeled, index=threshold.needs_index)

    def setup(self, m: Host) -> None:
        """Build what threshold and alignment remember."""
        self.threshold.setup(m)
        if self.alignment is not None:
            self.alignment.setup(m)

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu of a batch, in one forward."""
        views = [unlabeled[key] for key in view_keys(self.views.unlabeled)]
        logits, *of_views = joint(m.network, labeled["image"], *views)
        loss = self.unlabeled_loss(m, labeled, unlabeled, logits, of_views[0], of_views[-1])
        loss.sup = self.labeled_loss(m, logits, labeled["label"])
        return loss

    def labeled_loss(self, m: Host, logits: Tensor, label: Tensor) -> Tensor:
        """Ls = H(y, p(w(x))).

        Args:
            m: The module.
            logits: Of labelled images [A, K].
            label: Their labels [A].
        """
        return cross_entropy(logits, label)

    def unlabeled_loss(
        self, m: Host, labeled: Batch, unlabeled: Batch, labeled_logits: Tensor, weak: Tensor, student: Tensor
    ) -> Loss:
        """Lu, the threshold's penalty, and the pseudo-labels; called once a batch.

        Args:
            m: The module.
            labeled: The labelled part of the batch.
            unlabeled: The unlabelled part.
            labeled_logits: Of weak views of labelled images [A, K].
            weak: Of weak views of unlabelled images [B, K]; no gradient goes here.
            student: Of the views that are learnt from [B, K].
        """
        with torch.no_grad():
            labeled_p, raw = labeled_logits.detach().float().softmax(-1), weak.detach().float().softmax(-1)
            p = raw if self.alignment is None else self.alignment(m, raw, labeled_p)
            index = unlabeled["index"] if self.threshold.needs_index else None
            weight = self.threshold(m, Seen(p, labeled_p, labeled["label"], index))
            believed = p if self.align_target else raw
            target = sharpen(believed, self.temperature)
            confidence, label = believed.max(-1)
        return Loss(
            unsup=(weight * soft_cross_entropy(student.float(), target)).mean(),
            aux=self.threshold.penalty(student, weight),
            logs={"weight": weight.mean()},
            guess=Guess(label, confidence, weight),
        )

    def per_class(self) -> dict[str, Tensor]:
        """The thresholds, where each class has its own."""
        return self.threshold.per_class()
