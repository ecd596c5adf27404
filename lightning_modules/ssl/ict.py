"""Interpolation consistency training: be linear between images."""

from lightning_modules.ssl.base import Batch, Host, Loss, Method, TeacherBuffers, Views
from lightning_modules.ssl.mixing import guess_of, mixup, one_hot
from lightning_modules.ssl.parts import cross_entropy, frozen_statistics, soft_cross_entropy, squared_error
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import at_least_zero


class ICT(Method):
    """Lu = mean_{b,c} (p(lambda u_i + (1 - lambda) u_j) - (lambda p'(u_i) + (1 - lambda) p'(u_j)))^2.

    Verma et al., "Interpolation Consistency Training", arXiv 1903.03825, section 2; p' is the moving
    average of the network, as in Mean Teacher. Probabilities are mixed, as the paper writes it; the authors' code
    mixes logits. Each image has a lambda of its own, the larger of lambda and 1 - lambda. Weight 50 and alpha 0.5
    are those of FixMatch's comparison; the authors took weight 100, alpha 1 and a Gaussian ramp over a quarter of
    the training. Only the labelled images move the student's running statistics.

    Args:
        alpha: lambda ~ Beta(alpha, alpha); 0 is Mean Teacher on one view.
        mix_labeled: Mix the labelled images and their labels as well, as the authors do.
        teacher_buffers: BatchNorm of the teacher, see MeanTeacher.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak",))
    batch_norm = "first"
    ramp = Ramp(weight=50.0, until=0.4)

    def __init__(self, alpha: float = 0.5, mix_labeled: bool = True, teacher_buffers: TeacherBuffers = "own") -> None:
        super().__init__()
        if teacher_buffers not in ("own", "copy", "average"):
            msg = f"Expected `teacher_buffers` to be own, copy or average, got {teacher_buffers!r}."
            raise ValueError(msg)
        self.alpha = at_least_zero("alpha", alpha)
        self.mix_labeled = mix_labeled
        self.teacher_buffers = teacher_buffers

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu."""
        if self.mix_labeled:
            image, label = mixup(labeled["image"], one_hot(labeled["label"], m.num_classes), self.alpha)
            sup = soft_cross_entropy(m.network(image).float(), label).mean()
        else:
            sup = cross_entropy(m.network(labeled["image"]), labeled["label"])
        predicted = m.teacher(unlabeled["weak"]).float().softmax(-1)
        mixed, target = mixup(unlabeled["weak"], predicted, self.alpha)
        with frozen_statistics(m.network):
            student = m.network(mixed).float().softmax(-1)
        return Loss(sup=sup, unsup=squared_error(student, target).mean(), guess=guess_of(predicted))
