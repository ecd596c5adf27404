"""Meta Pseudo Labels: a teacher that learns from how well its student does (Pham et al., arXiv 2003.10580)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Views
from lightning_modules.ssl.companions import batch_statistics, with_classes
from lightning_modules.ssl.parts import cross_entropy, joint, sharpen, soft_cross_entropy
from lightning_modules.ssl.ramps import Ramp


class MetaPseudoLabels(Method):
    """The teacher labels, the student learns, the teacher is told how much that helped on labelled images.

    The student (the module's network) minimises H(y', S(s(u))) with y' drawn from the teacher's T(s(u)). Then the
    teacher minimises its UDA loss and h H(y', T(s(u))), where h = H(y, S_old(x)) - H(y, S_new(x)) is what the student's
    step gained on the labelled images: to first order lr <grad of the labelled loss, grad of the student's loss>
    (section 2 and appendix A). Labels that helped become likelier.

    Two things differ from the code published with the paper. It multiplies by new minus old, the opposite sign. And it
    takes T(s(u)) itself as the target of the last term, whose gradient is then p - p = 0: no feedback arrives. Labels
    are drawn here, as in the paper's derivation. Over the draws that gradient has mean 0, so a moving average of h is
    subtracted, which lowers its variance only.

    Both labelled losses behind h are taken in 32 bits, without dropout, normalised by the batch: they differ by the
    student's step alone.

    The student sees no label. In the paper it is therefore fine-tuned on the labelled images at the end, here a second
    fit (`Supervised`, small learning rate) that starts from this one's checkpoint. In short fits two things help: the
    teacher must be ahead of its student, so let it not wait (a `ramp` that ends within the first tenth of the fit), and
    `student_labeled_weight` 1 gives the student the labels from the beginning instead of at the end. Evaluated is the
    student's moving average.

    Reference settings (CIFAR-10, 4000 labels): 300000 batches, lr 0.05 for both, average 0.995, ramp of 5000 batches to
    8, label smoothing 0.15, T = 0.7, threshold 0.6, dropout 0.2.

    Args:
        temperature: T of the teacher's sharpened UDA targets, >= 0.
        threshold: Confidence from which UDA keeps an image, in [0, 1].
        label_smoothing: Of the teacher's labelled loss, in [0, 1).
        feedback_weight: Weight of the feedback term, >= 0; 0 leaves the teacher with UDA.
        baseline_decay: Decay per batch of the average of h, in [0, 1).
        student_labeled_weight: Weight of a labelled loss of the student, >= 0; the paper has none.
        teacher: The teacher's network; None makes one like the student's, with weights of its own.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong"))
    batch_norm = "joint"
    ramp = Ramp(8.0, until=5000 / 300000)

    baseline: Tensor

    def __init__(
        self,
        temperature: float = 0.7,
        threshold: float = 0.6,
        label_smoothing: float = 0.15,
        feedback_weight: float = 1.0,
        baseline_decay: float = 0.99,
        student_labeled_weight: float = 0.0,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"label_smoothing": label_smoothing, "baseline_decay": baseline_decay}.items():
            if not 0 <= value < 1:
                msg = f"Expected `{name}` in [0, 1), got {value}."
                raise ValueError(msg)
        if min(temperature, threshold, feedback_weight, student_labeled_weight) < 0:
            msg = (
                "Expected `temperature`, `threshold`, `feedback_weight` and `student_labeled_weight` >= 0, got "
                f"{temperature}, {threshold}, {feedback_weight} and {student_labeled_weight}."
            )
            raise ValueError(msg)
        self.temperature = temperature
        self.threshold = threshold
        self.label_smoothing = label_smoothing
        self.feedback_weight = feedback_weight
        self.baseline_decay = baseline_decay
        self.student_labeled_weight = student_labeled_weight
        self.teacher = teacher
        self.register_buffer("baseline", torch.zeros(1))

    def setup(self, m: Host) -> None:
        """Build the teacher."""
        self.teacher = m.new_network() if self.teacher is None else with_classes(self.teacher, m.num_classes)

    def players(self, m: Host) -> dict[str, nn.Module]:
        """Student and teacher."""
        return {"student": m.network, "teacher": self._teacher}

    @property
    def _teacher(self) -> nn.Module:
        if self.teacher is None:
            msg = "Expected MetaPseudoLabels to be set up by its module before it is used."
            raise RuntimeError(msg)
        return self.teacher

    def turns(self, m: Host, labeled: Batch, unlabeled: Batch) -> Iterator[tuple[str, Loss]]:
        """The student learns the drawn labels; then the teacher learns from what that gained."""
        image, label, strong = labeled["image"], labeled["label"], unlabeled["strong"]
        t_x, t_w, t_s = joint(self._teacher, image, unlabeled["weak"], strong)
        p = t_s.detach().float().softmax(-1)
        drawn = torch.multinomial(p, 1)[:, 0]
        s_x, s_s = joint(m.network, image, strong)
        student = Loss(aux=cross_entropy(s_s, drawn))
        if self.student_labeled_weight > 0:
            student.sup = self.student_labeled_weight * cross_entropy(s_x, label)
        student.guess = Guess(drawn, p.gather(1, drawn[:, None])[:, 0], torch.ones_like(p[:, 0]))
        before = self._labeled_loss(m, image, label)
        yield "student", student
        gain = before - self._labeled_loss(m, image, label)
        yield "teacher", self.teacher_loss(m, labeled, (t_x, t_w, t_s), drawn, gain)

    def teacher_loss(
        self, m: Host, labeled: Batch, logits: tuple[Tensor, Tensor, Tensor], drawn: Tensor, gain: Tensor
    ) -> Loss:
        """UDA and feedback.

        Args:
            m: The module.
            labeled: The labelled batch.
            logits: The teacher's for x, w(u) and s(u), [B, K] each.
            drawn: The labels that the student learnt [B].
            gain: h, a scalar.
        """
        t_x, t_w, t_s = (each.float() for each in logits)
        feedback = self._above_average(m, gain)
        q = t_w.detach().softmax(-1)
        mask = (q.amax(-1) >= self.threshold).float()
        target = sharpen(q, self.temperature)
        return Loss(
            sup=F.cross_entropy(t_x, labeled["label"], label_smoothing=self.label_smoothing),
            unsup=(mask * soft_cross_entropy(t_s, target)).mean(),
            aux=self.feedback_weight * feedback * cross_entropy(t_s, drawn),
            logs={"gain": gain, "teacher_mask_rate": mask.mean()},
        )

    @torch.no_grad()
    def _labeled_loss(self, m: Host, image: Tensor, label: Tensor) -> Tensor:
        # The difference of two of these is of the order of the learning rate, less than 16 bits resolve.
        with batch_statistics(m.network), torch.autocast(image.device.type, enabled=False):
            return F.cross_entropy(m.network(image), label)

    @torch.no_grad()
    def _above_average(self, m: Host, gain: Tensor) -> Tensor:
        """Return the processes' mean h less its moving average, which takes h in first."""
        mean = m.gather(gain[None])[0].mean().to(self.baseline)
        self.baseline.lerp_(mean[None], 1 - self.baseline_decay)
        return mean - self.baseline[0]

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Not used: the networks take `turns`."""
        return super().loss(m, labeled, unlabeled)
