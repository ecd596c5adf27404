"""Mean Teacher: agree with the moving average of oneself."""

from lightning_modules.ssl.base import Batch, Host, Loss, Method, TeacherBuffers, Views
from lightning_modules.ssl.mixing import guess_of
from lightning_modules.ssl.parts import cross_entropy, joint, squared_error
from lightning_modules.ssl.ramps import Ramp


class MeanTeacher(Method):
    """Lu = mean_{b,c} (p_student(w2(u)) - p_teacher(w1(u)))^2, the teacher being the moving average of the weights.

    Tarvainen & Valpola, "Mean teachers are better role models", arXiv 1703.01780, section 2. Both see a weak view of
    their own; no gradient reaches the teacher. Weight 50 with a linear ramp over 40 % of the training and decay 0.999
    are the settings of Oliver et al.'s comparison (arXiv 1804.09170) as run for FixMatch; the authors took weight 100
    for CIFAR-10 and a decay of 0.99, which suits short trainings. The authors' consistency also counts labelled
    images; here it counts the unlabelled ones, which contain them. Labelled and unlabelled images go through the
    student in one forward, as theirs.

    Args:
        teacher_buffers: BatchNorm of the teacher. "own" (the authors'): it runs in training mode and has statistics of
            its own, so they belong to its weights. "copy": the student's latest. "average": averaged like the weights.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "weak"))
    batch_norm = "joint"
    ramp = Ramp(weight=50.0, until=0.4)

    def __init__(self, teacher_buffers: TeacherBuffers = "own") -> None:
        super().__init__()
        if teacher_buffers not in ("own", "copy", "average"):
            msg = f"Expected `teacher_buffers` to be own, copy or average, got {teacher_buffers!r}."
            raise ValueError(msg)
        self.teacher_buffers = teacher_buffers

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu; the student's prediction is of the second view, the teacher's of the first."""
        target = m.teacher(unlabeled["weak"]).float().softmax(-1)
        logits, student = joint(m.network, labeled["image"], unlabeled["weak_2"])
        return Loss(
            sup=cross_entropy(logits, labeled["label"]),
            unsup=squared_error(student.float().softmax(-1), target).mean(),
            guess=guess_of(target),
        )
