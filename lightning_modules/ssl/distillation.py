"""Distillation of a trained network, the last stage of SimCLRv2 (Chen et al., arXiv 2006.10029)."""

from torch import nn

from lightning_modules.networks.modes import Frozen
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Views
from lightning_modules.ssl.companions import require_teacher, with_classes
from lightning_modules.ssl.parts import cross_entropy, joint, soft_cross_entropy
from lightning_modules.ssl.ramps import Ramp


class Distillation(Method):
    """The student learns the teacher's probabilities on unlabelled images.

    L = (1 - a) H(y, p_S(x)) + mu a H(p_T(u; tau), p_S(u; tau)) with p(.; tau) = softmax(logits / tau) (equations 2 and
    3). The teacher sees the same view as the student; the paper crops and flips only. Teacher and student may differ:
    give the teacher's network as `teacher` and the student's as the module's `network`, which may be smaller.

    Reference settings (ImageNet): a = 1, tau 0.1 for a student like its teacher and 1 for a smaller one, 400 epochs.
    The gradient is not multiplied by tau^2.

    Args:
        teacher_from: Checkpoint of the fit that trained the teacher; needed when a fit begins, not when it goes on.
        teacher: The teacher's network, if it is not like the student's. Without `teacher_from` it is taken as it is.
        temperature: tau, > 0.
        alpha: a, the share of the distillation in the loss, in [0, 1].

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak",))
    batch_norm = "joint"
    ramp = Ramp(1.0)

    def __init__(
        self,
        teacher_from: str | None = None,
        teacher: nn.Module | None = None,
        temperature: float = 1.0,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        require_teacher(teacher_from, teacher, type(self).__name__)
        if temperature <= 0 or not 0 <= alpha <= 1:
            msg = f"Expected `temperature` > 0 and `alpha` in [0, 1], got {temperature} and {alpha}."
            raise ValueError(msg)
        self.teacher_from = teacher_from
        self.temperature = temperature
        self.alpha = alpha
        self.teacher = None if teacher is None else Frozen(teacher)

    def setup(self, m: Host) -> None:
        """Build the teacher's network."""
        if self.teacher is None:
            self.teacher = Frozen(m.new_network())
        else:
            self.teacher = Frozen(with_classes(self.teacher.network, m.num_classes))

    def fit_start(self, m: Host) -> None:
        """Load the teacher."""
        if self.teacher is not None and self.teacher_from is not None:
            m.load_trained(self.teacher.network, self.teacher_from, "teacher_from")

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Return cross-entropy with labels and with the teacher.

        Raises:
            RuntimeError: The method is not set up.
        """
        if self.teacher is None:
            msg = "Expected Distillation to be set up by its module before it is used."
            raise RuntimeError(msg)
        x, u = joint(m.network, labeled["image"], unlabeled["weak"])
        target = self.teacher(unlabeled["weak"]).float().div(self.temperature).softmax(-1)
        distilled = soft_cross_entropy(u.float() / self.temperature, target)
        confidence, label = target.max(-1)
        return Loss(
            sup=(1 - self.alpha) * cross_entropy(x, labeled["label"]) if self.alpha < 1 else 0.0,
            unsup=self.alpha * distilled.mean(),
            guess=Guess(label, confidence, distilled.detach().new_ones(len(distilled))),
        )
