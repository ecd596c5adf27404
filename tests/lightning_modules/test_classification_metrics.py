"""What is measured on classified images and on pseudo-labels, against scikit-learn and counting by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import Tensor

from lightning_modules.classification_metrics import ClassificationMetrics, PseudoLabelCounts

K = 5


def seen(n: int = 60) -> tuple[Tensor, Tensor]:
    """Logits and labels: class 3 never occurs but is predicted, class 4 neither, and a label in five is unknown."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, K, generator=generator)
    logits[:, 4] = -9.0
    label = torch.randint(0, 3, (n,), generator=generator)
    label[::5] = -1
    return logits, label


def measured(*names: str) -> ClassificationMetrics:
    """Metrics of two batches."""
    metrics = ClassificationMetrics(K, "val")
    logits, label = seen()
    for name in ("", *names):
        for part in (slice(0, 23), slice(23, None)):
            metrics.update(name, logits[part], label[part])
    return metrics


def test_scores_are_those_of_scikit_learn() -> None:
    logits, label = seen()
    known = label >= 0
    true, guessed = label[known].numpy(), logits.argmax(-1)[known].numpy()
    found = {name: float(value) for name, value in measured().compute().items()}
    precision, recall, f1, _ = precision_recall_fscore_support(true, guessed, average="macro", zero_division=0)
    assert found["val_accuracy"] == pytest.approx(accuracy_score(true, guessed))
    assert [found[f"val_{n}"] for n in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    each = precision_recall_fscore_support(true, guessed, labels=range(K), average=None, zero_division=0)
    for name, values in zip(("precision", "recall"), each[:2], strict=True):
        assert [found[f"val_{name}/{c}"] for c in range(4)] == pytest.approx(list(values[:4]))
        assert math.isnan(found[f"val_{name}/4"])
    assert found["val_recall/3"] == 0.0
    expected = torch.from_numpy(confusion_matrix(true, guessed, labels=np.arange(K)))
    assert torch.equal(measured().confusion(), expected)


def test_the_headline_comes_first() -> None:
    names = list(measured("student").compute())
    assert names[:7] == [f"val_{n}" for n in ("accuracy", "accuracy_student", "precision", "recall", "f1", "ece")] + [
        "val_precision/0"
    ]


def test_calibration_error_is_the_mean_gap_over_bins() -> None:
    logits, label = seen()
    confidence, guessed = logits.softmax(-1).max(-1)
    gap = 0.0
    for m in range(15):
        member = (label >= 0) & (confidence > m / 15) & (confidence <= (m + 1) / 15)
        gap += abs(float((guessed[member] == label[member]).float().sum() - confidence[member].sum()))
    metrics = measured()
    assert float(metrics.compute()["val_ece"]) == pytest.approx(gap / int((label >= 0).sum()), rel=1e-5)
    assert int(metrics.reliability()[2].sum()) == int((label >= 0).sum())


def test_other_networks_are_measured_by_accuracy_alone() -> None:
    metrics = measured("student")
    logits, label = seen()
    metrics.update("best", logits.flip(-1), label)
    found, known = metrics.compute(), label >= 0
    assert float(found["val_accuracy_student"]) == float(found["val_accuracy"])
    right = (logits.flip(-1).argmax(-1) == label)[known].float().mean()
    assert float(found["val_accuracy_best"]) == pytest.approx(float(right))


def test_nothing_counted_is_nothing_found() -> None:
    metrics = ClassificationMetrics(K, "test")
    assert metrics.compute() == {}
    metrics.update("", torch.zeros(4, K), torch.full((4,), -1))
    assert metrics.compute() == {}
    assert int(metrics.confusion().sum()) == int(metrics.reliability()[2].sum()) == 0
    again = measured()
    again.reset()
    assert again.compute() == {}


@pytest.mark.parametrize(("classes", "listed"), [(100, 200), (101, 0)])
def test_many_classes_are_not_listed_one_by_one(classes: int, listed: int) -> None:
    metrics = ClassificationMetrics(classes, "val")
    metrics.update("", torch.rand(8, classes), torch.arange(8))
    assert sum("/" in name for name in metrics.compute()) == listed


def test_pseudo_labels_are_counted_by_the_class_guessed() -> None:
    counts = PseudoLabelCounts(3)
    counts.update(torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([0, 1, 0, -1]))
    counts.update(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    found = {name: float(value) for name, value in counts.summary(lambda x: [x]).items()}
    # Used with a known truth: 0 (right), 1 (wrong), 0 (right).
    assert found == pytest.approx(
        {"mask_rate_epoch": 4 / 6, "mask_rate/0": 2 / 3, "mask_rate/1": 2 / 3, "pseudo_label_accuracy": 2 / 3}
    )
    # Two processes that counted the same.
    assert counts.summary(lambda x: [torch.cat([x, x])])["pseudo_label_accuracy"] == pytest.approx(2 / 3)
    counts.reset()
    assert counts.summary(lambda x: [x]) == {}


def test_without_true_labels_there_is_no_accuracy_of_pseudo_labels() -> None:
    counts = PseudoLabelCounts(3)
    counts.update(torch.tensor([2]), torch.ones(1), torch.tensor([-1]))
    assert set(counts.summary(lambda x: [x])) == {"mask_rate_epoch", "mask_rate/2"}
