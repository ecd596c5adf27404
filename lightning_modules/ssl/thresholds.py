"""How much an unlabelled image is learnt from: thresholds and weights of pseudo-labels, each with its memory."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.ssl.banks import newest
from lightning_modules.ssl.base import Host


@dataclass(frozen=True)
class Seen:
    """What a threshold may decide by: a batch, without gradient.

    Attributes:
        probabilities: Of weak views of unlabelled images [B, K], after alignment if there is one.
        labeled_probabilities: Of weak views of labelled images [A, K].
        label: Labels of these [A].
        index: Numbers of the unlabelled images in the data [B]; None unless the threshold needs them.
    """

    probabilities: Tensor
    labeled_probabilities: Tensor
    label: Tensor
    index: Tensor | None = None


class Threshold(nn.Module):
    """Decides with what weight in [0, 1] each unlabelled image counts; `forward` is what a subclass writes.

    Attributes:
        needs_index: Whether it remembers single images, so that the method must declare `views` with an index.
    """

    needs_index = False

    def setup(self, m: Host) -> None:
        """Build buffers whose size depends on the data; called once."""

    def forward(self, m: Host, seen: Seen) -> Tensor:
        """Return weights [B] and learn from the batch; called once a batch, without gradient."""
        msg = f"{type(self).__name__} must define `forward`."
        raise NotImplementedError(msg)

    def penalty(self, student_logits: Tensor, weight: Tensor) -> Tensor | float:
        """A term to add to the loss of a batch, not ramped.

        Args:
            student_logits: Of the views that are learnt from [B, K].
            weight: What `forward` returned [B].
        """
        return 0.0

    def per_class(self) -> dict[str, Tensor]:
        """Thresholds [K] for reports; empty where they are not per class."""
        return {}


class FixedThreshold(Threshold):
    """1[max p >= tau] (FixMatch, Sohn et al., arXiv 2001.07685, equation 4).

    Args:
        threshold: tau >= 0; 0 takes every image, above 1 none.

    Raises:
        ValueError: It is negative.
    """

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__()
        self.threshold = at_least_zero("threshold", threshold)

    def forward(self, m: Host, seen: Seen) -> Tensor:
        """Return 1 for the confident images, 0 for the others [B]."""
        return (seen.probabilities.amax(-1) >= self.threshold).float()


class FlexThreshold(Threshold):
    """tau_c = tau * beta_c / (2 - beta_c), lower for classes that few images have been learnt for.

    FlexMatch (Zhang et al., arXiv 2110.08263, algorithm 1 with warm-up and convex mapping): each image remembers the
    class that it was last confidently (max p >= tau) taken for. sigma_c images are remembered for class c, and
    beta_c = sigma_c / max(max_c sigma_c, number of images with none), in which the second number warms up.

    Buffers: last_label, long [num_unlabeled], -1 = never confident.

    Args:
        threshold: tau >= 0.

    Raises:
        ValueError: It is negative.
    """

    needs_index = True
    last_label: Tensor

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__()
        self.threshold = at_least_zero("threshold", threshold)

    def setup(self, m: Host) -> None:
        """Build a place for each unlabelled image."""
        self.num_classes = m.num_classes
        self.register_buffer("last_label", torch.full((m.num_unlabeled,), -1))

    def learning_effect(self) -> Tensor:
        """beta_c [K], in [0, 1]."""
        counts = torch.bincount(self.last_label + 1, minlength=self.num_classes + 1)  # the first: never confident
        return counts[1:] / counts.max().clamp_min(1)

    def thresholds(self) -> Tensor:
        """tau_c [K], in [0, tau]."""
        beta = self.learning_effect()
        return self.threshold * beta / (2 - beta)

    def forward(self, m: Host, seen: Seen) -> Tensor:
        """Return 1[max p >= tau_c] [B] by what was known before the batch, then remember the batch."""
        if seen.index is None:
            msg = "Expected a batch with an `index` for FlexThreshold, got none; declare `views` with index=True."
            raise ValueError(msg)
        confidence, label = seen.probabilities.max(-1)
        weight = (confidence >= self.thresholds()[label]).float()
        index, label, confidence = m.gather(seen.index, label, confidence)
        place = newest(index, len(self.last_label), confidence >= self.threshold)
        self.last_label.copy_(torch.where(place >= 0, label[place.clamp_min(0)], self.last_label))
        return weight

    def per_class(self) -> dict[str, Tensor]:
        """tau_c [K]."""
        return {"threshold": self.thresholds()}


class FreeThreshold(Threshold):
    """tau_c = tau * p_c / max_c p_c, with tau and p learnt from the predictions (FreeMatch).

    Wang et al., arXiv 2205.07246, section 3: tau is the moving average of the mean confidence, p that of the mean
    probabilities; both start at 1 / K. `penalty` is the self-adaptive fairness term,
    w_f * sum_c SumNorm(p / h)_c * log SumNorm(p_s / h_s)_c, where h is the moving average of the
    histogram of pseudo-labels and p_s, h_s are mean probabilities and histogram of the student's confident images. It
    is the negative of a cross-entropy, as in paper and reference code; it is -log K if all is uniform.

    Classes that no confident image is taken for are left out of the sum. In the reference they add a constant.

    Buffers: confidence [], probabilities [K], histogram [K].

    Args:
        decay: Decay of the moving averages, in [0, 1).
        fairness: w_f >= 0.
        highest: tau is never above; 0.95 for SVHN, 1 elsewhere.

    Raises:
        ValueError: An argument is out of range.
    """

    confidence: Tensor
    probabilities: Tensor
    histogram: Tensor

    def __init__(self, decay: float = 0.999, fairness: float = 0.001, highest: float = 1.0) -> None:
        super().__init__()
        self.decay = decay_of("decay", decay)
        self.fairness = at_least_zero("fairness", fairness)
        self.highest = at_least_zero("highest", highest)

    def setup(self, m: Host) -> None:
        """Start from uniform predictions."""
        self.register_buffer("confidence", torch.tensor(1 / m.num_classes))
        self.register_buffer("probabilities", torch.full((m.num_classes,), 1 / m.num_classes))
        self.register_buffer("histogram", torch.full((m.num_classes,), 1 / m.num_classes))

    def thresholds(self) -> Tensor:
        """tau_c [K]."""
        return self.confidence.clamp_max(self.highest) * self.probabilities / self.probabilities.max()

    def forward(self, m: Host, seen: Seen) -> Tensor:
        """Take the batch into the averages, then return 1[max p >= tau_c] [B]."""
        (everyone,) = m.gather(seen.probabilities)
        labels = F.one_hot(everyone.argmax(-1), everyone.shape[-1]).float()
        self.confidence.lerp_(everyone.amax(-1).mean(), 1 - self.decay)
        self.probabilities.lerp_(everyone.mean(0), 1 - self.decay)
        self.histogram.lerp_(labels.mean(0), 1 - self.decay)
        confidence, label = seen.probabilities.max(-1)
        return (confidence >= self.thresholds()[label]).float()

    def penalty(self, student_logits: Tensor, weight: Tensor) -> Tensor | float:
        """w_f * L_f, a scalar; 0 if no image of the batch is confident."""
        if self.fairness == 0:
            return 0.0
        p = student_logits.float().softmax(-1)
        kept = (weight > 0).float()
        counts = (F.one_hot(p.argmax(-1), p.shape[-1]) * kept.unsqueeze(-1)).sum(0)
        # p_s / h_s up to a factor, which SumNorm takes away.
        ratio = torch.where(counts > 0, (p * kept.unsqueeze(-1)).sum(0) / counts.clamp_min(1), 0.0)
        reached = ratio / ratio.sum().clamp_min(torch.finfo(ratio.dtype).tiny)
        wanted = _sum_norm(self.probabilities / self.histogram.clamp_min(1e-12))
        return self.fairness * (wanted * torch.where(counts > 0, reached, 1.0).log()).sum()

    def per_class(self) -> dict[str, Tensor]:
        """tau_c [K]."""
        return {"threshold": self.thresholds()}


class SoftThreshold(Threshold):
    """A truncated Gaussian of the confidence: 1 if max p >= mu, else exp(-n^2 (max p - mu)^2 / (2 sigma^2)).

    SoftMatch (Chen et al., arXiv 2301.10921, section 3, with n standard deviations as in its code): mu and
    sigma^2 are moving averages of mean and unbiased variance of the confidence, starting at 1 / K and 1.

    Buffers: mean [], variance [].

    Args:
        decay: Decay of the moving averages, in [0, 1).
        sharpness: n > 0; larger values leave unsure images out more.

    Raises:
        ValueError: An argument is out of range.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, decay: float = 0.999, sharpness: float = 2.0) -> None:
        super().__init__()
        if sharpness <= 0:
            msg = f"Expected `sharpness` > 0, got {sharpness}; the paper has 2."
            raise ValueError(msg)
        self.decay = decay_of("decay", decay)
        self.sharpness = sharpness

    def setup(self, m: Host) -> None:
        """Start from an unsure network, whose images all count."""
        self.register_buffer("mean", torch.tensor(1 / m.num_classes))
        self.register_buffer("variance", torch.tensor(1.0))

    def forward(self, m: Host, seen: Seen) -> Tensor:
        """Take the batch into the averages, then return the weights [B]."""
        confidence = seen.probabilities.amax(-1)
        (everyone,) = m.gather(confidence)
        self.mean.lerp_(everyone.mean(), 1 - self.decay)
        if len(everyone) > 1:
            self.variance.lerp_(everyone.var(), 1 - self.decay)
        return self.weights(confidence)

    def weights(self, confidence: Tensor) -> Tensor:
        """The weights of images with these confidences [B], in [0, 1]."""
        below = (confidence - self.mean).clamp_max(0)
        spread = 2 * self.variance / self.sharpness**2
        return (-below.square() / spread.clamp_min(torch.finfo(spread.dtype).tiny)).exp()


class RelativeThreshold(Threshold):
    """1[max p >= tau * mean max p_labeled]: as sure as on labelled images (AdaMatch).

    Berthelot et al., arXiv 2106.04732, section 3. The mean is over the labelled images of the batch, of all processes.

    Args:
        threshold: tau >= 0.

    Raises:
        ValueError: It is negative.
    """

    def __init__(self, threshold: float = 0.9) -> None:
        super().__init__()
        self.threshold = at_least_zero("threshold", threshold)

    def forward(self, m: Host, seen: Seen) -> Tensor:
        """Return 1 for the confident images, 0 for the others [B]."""
        (labeled,) = m.gather(seen.labeled_probabilities.amax(-1))
        return (seen.probabilities.amax(-1) >= self.threshold * labeled.mean()).float()


class LossThreshold(Threshold):
    """1[-log max p <= rho_t] with rho_t = max(C * gamma^-k * rho_0, rho_min), a loss that shrinks (Dash).

    Xu et al., arXiv 2109.00650, algorithm 1. The loss of an image is that of its weak view with its own
    pseudo-label (as in TorchSSL and USB), which makes this 1[max p >= exp(-rho_t)]. During the warm-up no unlabelled
    image counts; rho_0 is the labelled loss at its end, here an average of its batches with decay 0.99. k counts the
    periods since.

    Buffers: initial [], rho_0; -1 before the first batch.

    Args:
        warmup: Share of the training without unlabelled images, in [0, 1]; 2048 of 2^20 batches in the reference.
        period: Share of the training after which the threshold shrinks, positive; 10 of 1024 in the reference.
        shrink: gamma >= 1.
        scale: C >= 1.
        lowest: rho_min >= 0; 0.05 is a confidence of 0.951.

    Raises:
        ValueError: An argument is out of range.
    """

    initial: Tensor

    def __init__(
        self,
        warmup: float = 0.002,
        period: float = 0.01,
        shrink: float = 1.27,
        scale: float = 1.0001,
        lowest: float = 0.05,
    ) -> None:
        super().__init__()
        for name, value, least in (("shrink", shrink, 1.0), ("scale", scale, 1.0), ("lowest", lowest, 0.0)):
            if value < least:
                msg = f"Expected `{name}` >= {least}, got {value}."
                raise ValueError(msg)
        if not 0 <= warmup <= 1 or period <= 0:
            msg = f"Expected `warmup` in [0, 1] and `period` > 0, shares of the training, got {warmup} and {period}."
            raise ValueError(msg)
        self.warmup = warmup
        self.period = period
        self.shrink = shrink
        self.scale = scale
        self.lowest = lowest

    def setup(self, m: Host) -> None:
        """Start without a threshold."""
        self.register_buffer("initial", torch.tensor(-1.0))

    def forward(self, m: Host, seen: Seen) -> Tensor:
        """Return 1 for images with a small loss, 0 for the others and during the warm-up [B]."""
        smallest = torch.finfo(seen.probabilities.dtype).tiny
        confidence = seen.probabilities.amax(-1)
        warming = m.progress <= self.warmup  # so the first batch is always one
        if warming:
            true = seen.labeled_probabilities.gather(-1, seen.label.unsqueeze(-1)).clamp_min(smallest)
            (labeled,) = m.gather(-true.log())
            mean = labeled.mean()
            self.initial.copy_(torch.where(self.initial < 0, mean, self.initial.lerp(mean, 0.01)))
            return torch.zeros_like(confidence)
        return (-confidence.clamp_min(smallest).log() <= self.bound(m.progress)).float()

    def bound(self, t: float) -> Tensor:
        """rho_t, a scalar, when the share t of the training is done."""
        k = int(max(0.0, t - self.warmup) / self.period)
        return (self.scale * self.shrink**-k * self.initial).clamp_min(self.lowest)


def require_above_zero(**arguments: float) -> None:
    """Refuse values that are not positive.

    Args:
        arguments: The values by name.

    Raises:
        ValueError: One is not.
    """
    for name, value in arguments.items():
        if value <= 0:
            msg = f"Expected `{name}` > 0, got {value}."
            raise ValueError(msg)


def at_least_zero(name: str, value: float) -> float:
    """Return a value that must not be negative.

    Args:
        name: Name of the argument, for the error.
        value: Its value.

    Raises:
        ValueError: It is negative.
    """
    if value < 0:
        msg = f"Expected `{name}` >= 0, got {value}."
        raise ValueError(msg)
    return value


def decay_of(name: str, value: float) -> float:
    """Return the decay of a moving average.

    Args:
        name: Name of the argument, for the error.
        value: Its value.

    Raises:
        ValueError: It is not in [0, 1).
    """
    if not 0 <= value < 1:
        msg = f"Expected `{name}` in [0, 1), got {value}; 0.999 remembers about 1000 batches, 0 the last one."
        raise ValueError(msg)
    return value


def _sum_norm(values: Tensor) -> Tensor:
    return values / values.sum()
