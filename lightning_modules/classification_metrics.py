"""What is measured on classified images, and on the pseudo-labels that a method trains with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_modules.metrics.calibration import CalibrationError

UNKNOWN = -1


class ClassificationMetrics(nn.Module):
    """Metrics of one split, for the predictor and, by accuracy alone, for other networks beside it.

    Logged are `{split}_accuracy`, `_precision`, `_recall`, `_f1` (macro: mean over the classes), `_ece` (expected
    calibration error, 15 bins), `_precision/{class}`, `_recall/{class}`, and `{split}_accuracy_{name}` for the others.
    Labels of -1 count nowhere.

    Args:
        num_classes: Classes K.
        split: Prefix of the names.
    """

    def __init__(self, num_classes: int, split: str) -> None:
        super().__init__()
        self.split = split
        options = {"num_classes": num_classes, "ignore_index": UNKNOWN}
        self.scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(average="micro", **options),
                "precision": MulticlassPrecision(average="macro", **options),
                "recall": MulticlassRecall(average="macro", **options),
                "f1": MulticlassF1Score(average="macro", **options),
                "precision_of": MulticlassPrecision(average="none", **options),
                "recall_of": MulticlassRecall(average="none", **options),
            }
        )
        self.counts = MulticlassConfusionMatrix(**options)
        self.calibration = CalibrationError(num_classes, ignore_index=UNKNOWN)
        self.others = nn.ModuleDict(
            {name: MulticlassAccuracy(average="micro", **options) for name in ("student", "best")}
        )

    def update(self, name: str, logits: Tensor, label: Tensor) -> None:
        """Count a batch.

        Args:
            name: "" for the predictor, else which other network: "student" or "best".
            logits: [B, K].
            label: [B], -1 for unknown.
        """
        if name:
            self.others[name].update(logits, label)
            return
        self.scores.update(logits, label)
        self.counts.update(logits, label)
        self.calibration.update(logits.softmax(-1)[..., None, None], label[:, None, None])

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name; none where nothing was counted."""
        if not self.scores["accuracy"].update_called:
            return {}
        found = {}
        for name, value in self.scores.compute().items():
            if name.endswith("_of"):
                found |= {f"{name.removesuffix('_of')}/{c}": number for c, number in enumerate(value)}
            else:
                found[name] = value
        found["ece"] = self.calibration.compute()
        found |= {f"accuracy_{n}": other.compute() for n, other in self.others.items() if other.update_called}
        return {f"{self.split}_{name}": value for name, value in found.items()}

    def reset(self) -> None:
        """Start again."""
        for metric in (self.scores, self.counts, self.calibration, *self.others.values()):
            metric.reset()

    def confusion(self) -> Tensor:
        """Counts [K, K]: row = true class, column = predicted class."""
        counts: Tensor = self.counts.compute()
        return counts

    def reliability(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Confidence, accuracy and count of each bin; None where nothing was counted."""
        return self.calibration.bins() if self.calibration.update_called else None


class PseudoLabelCounts(nn.Module):
    """How many pseudo-labels were used in an epoch and, where the true label is known, how many were right.

    Args:
        num_classes: Classes K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # Rows: all, used, used with a known true label, those of them that are right; all by the class guessed.
        self.register_buffer("counts", torch.zeros(4, num_classes), persistent=False)
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
        if seen.sum() == 0:
            return {}
        rates = {f"mask_rate/{c}": u / s for c, (u, s) in enumerate(zip(used, seen, strict=True)) if s > 0}
        found = {"mask_rate_epoch": used.sum() / seen.sum(), **rates}
        if known.sum() > 0:
            found["pseudo_label_accuracy"] = right.sum() / known.sum()
        return found

    def reset(self) -> None:
        """Start again."""
        self.counts.zero_()
