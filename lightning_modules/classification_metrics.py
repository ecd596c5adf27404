"""What is measured on classified images, and on the pseudo-labels that a method trains with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_modules.metrics.calibration import CalibrationError

UNKNOWN = -1
# Above this, two scalars a class would bury the others; the confusion matrix has them all.
_MOST_CLASSES_LISTED = 100


class ClassificationMetrics(nn.Module):
    """Metrics of one split, for the predictor and, by accuracy alone, for other networks beside it.

    By name: `{split}_accuracy`, `{split}_accuracy_{other}` for the others, `_precision`, `_recall` and `_f1` (means
    over the classes that occur or are predicted), `_ece` (expected calibration error, 15 bins) and, with at most 100
    classes, `_precision/{class}` and `_recall/{class}`: 0 where no image is predicted to be of it or none is, NaN
    where both are so. Labels of -1 count nowhere.

    Args:
        num_classes: Classes K.
        split: Prefix of the names.
    """

    def __init__(self, num_classes: int, split: str) -> None:
        super().__init__()
        self.split = split
        # Everything but calibration follows from these counts, which are exact and add up over processes.
        self.counts = MulticlassConfusionMatrix(num_classes, ignore_index=UNKNOWN)
        self.calibration = CalibrationError(num_classes, ignore_index=UNKNOWN)
        self.student = MulticlassAccuracy(num_classes, average="micro", ignore_index=UNKNOWN)
        self.best = MulticlassAccuracy(num_classes, average="micro", ignore_index=UNKNOWN)

    def _others(self) -> dict[str, Metric]:
        return {"student": self.student, "best": self.best}

    def update(self, name: str, logits: Tensor, label: Tensor) -> None:
        """Count a batch.

        Args:
            name: "" for the predictor, else which other network: "student" or "best".
            logits: [B, K].
            label: [B], -1 for unknown.
        """
        if name:
            self._others()[name].update(logits, label)
            return
        self.counts.update(logits, label)
        # It is made for pixels: an image is one of them.
        self.calibration.update(logits.float().softmax(-1)[..., None, None], label[:, None, None])

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name, over all processes; none where no label was known. Every process has to ask."""
        # By the sum over processes, so that all of them go the same way.
        if not bool(self.calibration.bins()[2].any()):
            return {}
        means, per_class = _scores(self.confusion())
        others = {f"accuracy_{n}": other.compute() for n, other in self._others().items() if other.update_called}
        found = {"accuracy": means.pop("accuracy"), **others, **means, "ece": self.calibration.compute()}
        if self.counts.num_classes <= _MOST_CLASSES_LISTED:
            found |= {f"{name}/{c}": value for name, values in per_class.items() for c, value in enumerate(values)}
        return {f"{self.split}_{name}": value for name, value in found.items()}

    def reset(self) -> None:
        """Start again."""
        for metric in (self.counts, self.calibration, self.student, self.best):
            metric.reset()

    def confusion(self) -> Tensor:
        """Counts [K, K] over all processes: row = true class, column = predicted class. Every process has to ask."""
        with self.counts.sync_context(dist_sync_fn=self.counts.dist_sync_fn):
            counts = self.counts.confmat
            return counts.clone() if isinstance(counts, Tensor) else torch.stack(counts).sum(0)

    def reliability(self) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence, accuracy (NaN where empty) and count of each bin over all processes; every one has to ask."""
        return self.calibration.bins()


def _scores(counts: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Accuracy and the means of precision, recall and F1; precision and recall of each class; of a confusion matrix."""
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    there = true + predicted > 0
    per_class = {
        "precision": right / predicted.clamp(min=1),
        "recall": right / true.clamp(min=1),
        "f1": 2 * right / (true + predicted).clamp(min=1),
    }
    means = {"accuracy": right.sum() / counts.sum()} | {n: values[there].mean() for n, values in per_class.items()}
    listed = {n: torch.where(there, per_class[n], torch.nan) for n in ("precision", "recall")}
    return means, listed


class PseudoLabelCounts(nn.Module):
    """How many pseudo-labels were used in an epoch and, where the true label is known, how many were right.

    Args:
        num_classes: Classes K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # Rows: all, used, used with a known true label, those of them that are right; all by the class guessed.
        self.register_buffer("counts", torch.zeros(4, num_classes, dtype=torch.long), persistent=False)
        self.counts: Tensor

    @torch.no_grad()
    def update(self, label: Tensor, weight: Tensor, true_label: Tensor) -> None:
        """Count a batch.

        Args:
            label: Guessed classes [B].
            weight: Weights [B]; 0 is "not used".
            true_label: True classes [B], -1 for unknown.
        """
        used = weight > 0
        known = used & (true_label >= 0)
        rows = torch.stack([torch.ones_like(used), used, known, known & (label == true_label)])
        self.counts.index_add_(1, label, rows.to(self.counts))

    def summary(self, gather: Callable[[Tensor], list[Tensor]]) -> dict[str, Tensor]:
        """mask_rate/{class} and pseudo_label_accuracy over all processes; empty where nothing was counted.

        Args:
            gather: Returns the tensors of all processes, one after the other along the first axis.
        """
        (everywhere,) = gather(self.counts[None])
        seen, used, known, right = everywhere.sum(0)
        guessed = seen.nonzero().flatten().tolist()
        if not guessed:
            return {}
        rates = {f"mask_rate/{c}": used[c] / seen[c] for c in guessed}
        found = {"mask_rate_epoch": used.sum() / seen.sum(), **rates}
        if known.sum() > 0:
            found["pseudo_label_accuracy"] = right.sum() / known.sum()
        return found

    def reset(self) -> None:
        """Start again."""
        self.counts.zero_()
