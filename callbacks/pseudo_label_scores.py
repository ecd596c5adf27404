"""How right pseudo-labels are, as a whole and by class, counted against true labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.pseudo_labels import PseudoLabels

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PseudoLabelScores:
    """What is right about the pseudo-labels of K classes.

    Only images that people did not label count. Of class k, the precision is the share of the images with pseudo-label
    k that are of class k, the recall the share of the images of class k that have pseudo-label k; an image without a
    pseudo-label counts nowhere. As in the metrics of a test they are 0 where no image is labelled k or none is of k,
    and NaN where both are so; their macro averages are over the other classes.

    Attributes:
        labels: Pseudo-labels of each class, int64 [K].
        known: How many of the images have a known true label.
        accuracy: Share of right labels among those; NaN if there are none.
        precision: Of each class [K], in [0, 1].
        recall: Of each class [K], in [0, 1].
    """

    labels: Int64Array
    known: int
    accuracy: float
    precision: Float64Array
    recall: Float64Array

    @property
    def macro_precision(self) -> float:
        """Mean precision of the classes that occur or are guessed; NaN without any."""
        return _mean(self.precision)

    @property
    def macro_recall(self) -> float:
        """Mean recall of the classes that occur or are guessed; NaN without any."""
        return _mean(self.recall)


def score(labels: PseudoLabels, truth_of: Callable[[Sequence[str]], npt.NDArray[np.integer[Any]]]) -> PseudoLabelScores:
    """Count which pseudo-labels of images that people did not label are right.

    Args:
        labels: The pseudo-labels.
        truth_of: True class ids [N] of images by their names, -1 where nobody knows.
    """
    classes, table = len(labels.manifest["class_names"]), labels.table
    own = ~labels.of_people
    guessed = table.labels[own]
    truth = np.asarray(truth_of(table.keys.filter(own).to_pylist()), dtype=np.int64)
    known = (truth >= 0) & (truth < classes)
    right = np.bincount(truth[known & (truth == guessed)], minlength=classes)
    true, predicted = (np.bincount(column[known], minlength=classes) for column in (truth, guessed))
    nowhere = true + predicted == 0
    precision, recall = (np.where(nowhere, np.nan, right / np.maximum(count, 1)) for count in (predicted, true))
    total = int(known.sum())
    accuracy = float(right.sum() / total) if total else float("nan")
    return PseudoLabelScores(np.bincount(guessed, minlength=classes), total, accuracy, precision, recall)


def _mean(values: Float64Array) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
