"""Which pseudo-labels clients keep, by the errors that the classifier makes on held-out labels of all of them."""

import numpy as np
import numpy.typing as npt

from callbacks.pseudo_label_selection import places_in_class, precision_of
from federated.settings import Selection

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Confidences from which errors are counted, one confusion matrix each."""
EDGES: npt.NDArray[np.float64] = np.arange(1000) / 1000
"""Confidences that the cut of a class is one of, with the ratio rule."""


def precision(confusion: npt.NDArray[np.number], smoothing: float) -> Float64Array:
    """Tell how precise each class is: P_c = (M[c, c] + s / K) / (sum_i M[i, c] + s).

    Args:
        confusion: M, counts [K, K], row = true class, column = prediction.
        smoothing: s, images that each class counts as seen before, as right as chance; at least 0.

    Returns:
        [K]; 0 for a class of which nothing is known, without smoothing either.
    """
    return precision_of(confusion.astype(np.float64), smoothing, 1 / len(confusion))


def count_confidences(labels: Int64Array, confidence: npt.NDArray[np.floating], num_classes: int) -> Int64Array:
    """Count how sure pseudo-labels are.

    Args:
        labels: Pseudo-labels [N].
        confidence: How sure they are [N], in [0, 1].
        num_classes: Classes K.

    Returns:
        Counts [len(EDGES), K]: those of a class that are at least as sure as an edge and less than the next one.
    """
    place = np.searchsorted(EDGES, confidence.astype(np.float64), side="right") - 1
    pairs = np.bincount(place * num_classes + labels, minlength=len(EDGES) * num_classes)
    return pairs.reshape(len(EDGES), num_classes).astype(np.int64)


def cuts(rule: Selection, confusion: Int64Array, confidences: Int64Array) -> Float64Array:
    """Tell how sure a pseudo-label of each class has to be, at any client.

    `ratio` keeps of the n_c images of class c, over all clients, the round(P_c n_c) surest: as many as are expected to
    be right. One cut for all clients matters where they hold different classes: what a client without class c takes for
    c is wrong, and less sure. As many as `EDGES` can tell apart are kept; of two cuts as near, the higher. `threshold`
    takes the lowest confidence from which a class is precise enough, or where there is none that at which it is
    most precise. `fixed` has one confidence for all.

    Args:
        rule: Which rule, and its numbers.
        confusion: Counts [T, K, K] of held-out images at least as sure as each of THRESHOLDS; row = true class, column
            = prediction.
        confidences: Of the images without label, over all clients, see `count_confidences`.

    Returns:
        [K]; above 1 for a class of which nothing is kept.

    Raises:
        ValueError: `confusion` or `confidences` has another shape.
    """
    require_shapes(confusion, confidences)
    classes = confusion.shape[1]
    if rule.rule == "threshold":
        return thresholds(rule, confusion)
    if rule.rule == "fixed":
        return np.full(classes, rule.min_confidence)
    # Row e: images that are kept with a cut at EDGES[e]; the last row keeps none.
    kept = np.concatenate([confidences[::-1].cumsum(0)[::-1], np.zeros((1, classes), dtype=np.int64)])
    missed = np.abs(kept - np.rint(precision(confusion[0], rule.smoothing) * kept[0]))
    place = len(EDGES) - missed[::-1].argmin(0)
    found: Float64Array = np.append(EDGES, np.inf)[place]
    return found


def keep(
    rule: Selection,
    confusion: Int64Array,
    cut: Float64Array,
    labels: Int64Array,
    confidence: npt.NDArray[np.floating],
) -> BoolArray:
    """Choose pseudo-labels of a client: those that are as sure as the `cuts` of their classes.

    `client_ratio` needs no cuts: it keeps of the n_c images that the client takes for class c the round(P_c n_c)
    surest, of equally sure ones the first.

    Args:
        rule: Which rule, and its numbers.
        confusion: See `cuts`.
        cut: What `cuts` told [K].
        labels: Pseudo-labels [N].
        confidence: How sure they are [N], in [0, 1].

    Returns:
        Which are kept [N].
    """
    sure = confidence.astype(np.float64)
    if rule.rule == "client_ratio":
        counts = np.bincount(labels, minlength=confusion.shape[1])
        most = np.rint(precision(confusion[0], rule.smoothing) * counts)
        return places_in_class(labels, sure) < most[labels]
    return np.asarray(sure >= cut[labels])


def require_shapes(confusion: Int64Array, confidences: Int64Array | None = None) -> None:
    """Refuse counts that are no counts of this kind.

    Args:
        confusion: Should be [T, K, K].
        confidences: Should be [len(EDGES), K]; None is not looked at.

    Raises:
        ValueError: They have another shape.
    """
    if confusion.ndim != 3 or len(confusion) != len(THRESHOLDS) or confusion.shape[1] != confusion.shape[2]:
        msg = f"Expected `confusion` of shape [{len(THRESHOLDS)}, K, K], got {list(confusion.shape)}; count anew."
        raise ValueError(msg)
    shape = (len(EDGES), confusion.shape[1])
    if confidences is not None and confidences.shape != shape:
        msg = f"Expected `confidences` of shape {list(shape)}, got {list(confidences.shape)}; count anew."
        raise ValueError(msg)


def thresholds(rule: Selection, confusion: Int64Array) -> Float64Array:
    """Tell from which confidence on each class is precise enough.

    Args:
        rule: What is enough (`min_precision`).
        confusion: See `cuts`.

    Returns:
        [K], each one of THRESHOLDS; where none is enough that of the highest precision, of equal ones the lowest.
    """
    precise = np.stack([precision(matrix, rule.smoothing) for matrix in confusion])
    enough = precise >= rule.min_precision
    chosen = np.where(enough.any(0), enough.argmax(0), precise.argmax(0))
    found: Float64Array = np.asarray(THRESHOLDS)[chosen]
    return found
