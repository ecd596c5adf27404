"""Which pseudo-labels are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.pseudo_labels import histogram

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Images that the precision of every class counts as seen before.
_PRIOR = 1.0


@dataclass(frozen=True)
class Selection:
    """What leaves pseudo-labels out; the arguments of PseudoLabelWriter of these names.

    Attributes:
        min_confidence: How sure they are at least.
        min_precision: How precise a class is at least.
        balance: Whether every class keeps as many as the rarest one.
        max_per_class: How many a class keeps at most; None keeps all.
    """

    min_confidence: float = 0.0
    min_precision: float = 0.0
    balance: bool = False
    max_per_class: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        for name in ("min_confidence", "min_precision"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                msg = f"Expected `{name}` to be in [0, 1], got {value}; 0 leaves nothing out."
                raise ValueError(msg)
        if self.max_per_class is not None and self.max_per_class < 1:
            msg = f"Expected `max_per_class` to be at least 1, or left out, got {self.max_per_class}."
            raise ValueError(msg)

    def description(self, left_out: int = 0) -> dict[str, Any] | None:
        """Return what a manifest says of it.

        Args:
            left_out: Images that are no part of the data in the first place.

        Returns:
            The options that leave images out; None if there are none.
        """
        options = {
            "min_confidence": self.min_confidence,
            "min_precision": self.min_precision,
            "balance": self.balance,
            "max_per_class": self.max_per_class,
            "not_in_data": left_out,
        }
        set_ = {name: value for name, value in options.items() if value}
        return set_ or None

    def keep(
        self, labels: Int64Array, confidence: Float64Array, fixed: BoolArray, precision: Float64Array | None
    ) -> BoolArray:
        """Choose images.

        Images whose class is not precise enough go first, then those that are not sure enough. Of each class, then,
        the surest stay: with `balance` as many as the rarest class has left, with `max_per_class` so many at most;
        images that are always kept count, and of equally sure ones the first stay. A class without anything but images
        that are always kept is not the rarest: what `min_precision` takes away would take all others with it.

        Args:
            labels: Class ids [N].
            confidence: How sure they are [N].
            fixed: Which images are always kept [N].
            precision: Precision of each class [K]; None where `min_precision` is 0.

        Returns:
            Which images are kept [N].
        """
        sure = confidence >= self.min_confidence
        if precision is not None:
            sure &= precision[labels] >= self.min_precision
        kept = fixed | sure
        most = self._most(labels, kept, fixed)
        if most is None:
            return kept
        chosen = np.flatnonzero(kept)
        place = places_in_class(labels[chosen], confidence[chosen], fixed[chosen])
        kept[chosen[(place >= most) & ~fixed[chosen]]] = False
        return kept

    def _most(self, labels: Int64Array, kept: BoolArray, fixed: BoolArray) -> int | None:
        limits = [] if self.max_per_class is None else [self.max_per_class]
        guessed = np.bincount(labels[kept & ~fixed])
        if self.balance and guessed.any():
            sizes = np.bincount(labels[kept])[: len(guessed)]
            limits.append(int(sizes[guessed > 0].min()))
        return min(limits, default=None)


def places_in_class(
    labels: Int64Array, confidence: npt.NDArray[np.floating[Any]], first: BoolArray | None = None
) -> Int64Array:
    """Tell the place of each image among those of its class, the surest first; equally sure ones in their order.

    Args:
        labels: Class ids [N].
        confidence: How sure they are [N].
        first: Which images come before all others of their class [N]; None for none.

    Returns:
        Places from 0 [N].
    """
    late = np.zeros(len(labels), dtype=bool) if first is None else ~first
    # The sort keeps the order of equals.
    order = np.lexsort((-confidence, late, labels))
    ordered = labels[order]
    places = np.empty(len(labels), dtype=np.int64)
    places[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return places


def precision_of(confusion: Float64Array, prior: float = _PRIOR, prior_precision: float | None = None) -> Float64Array:
    """Tell how precise the pseudo-labels of each class are, from a confusion matrix.

    That of class j is C[j, j] / sum_i C[i, j], the share of the images labelled j that are of class j. A few labelled
    images tell little of it, so that n more images count, of which a share a is right:
    (C[j, j] + n a) / (sum_i C[i, j] + n). A class that nothing was labelled as has the precision a.

    Args:
        confusion: Counts [K, K], row = class, column = pseudo-label; without `prior_precision` at least one image.
        prior: n, at least 0; with 0 a class that nothing was labelled as has the precision 0.
        prior_precision: a, in [0, 1]; None takes that of all classes together, sum_j C[j, j] / sum_ij C[i, j].

    Returns:
        The precision of each class [K].
    """
    right, given = np.diagonal(confusion), confusion.sum(0)
    share: float = right.sum() / confusion.sum() if prior_precision is None else prior_precision
    seen = given + prior
    precision: Float64Array = (right + prior * share) / np.where(seen > 0, seen, 1.0)
    return precision


def require_every_class(labels: Int64Array, class_names: Sequence[str], selection: Selection) -> Int64Array:
    """Refuse pseudo-labels among which a class is missing.

    Args:
        labels: Class ids [N] of the images that are kept.
        class_names: Names of the K classes.
        selection: What left images out.

    Returns:
        Images of each class [K].

    Raises:
        ValueError: A class has none; shows how many each has.
    """
    counts = np.bincount(labels, minlength=len(class_names)).astype(np.int64)
    missing = np.flatnonzero(counts == 0).tolist()
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        options = selection.description()
        remedy = "Train the module for longer, or label images of the class"
        if options is not None:
            shown = ", ".join(f"`{name}` {value}" for name, value in options.items())
            remedy = f"Leave fewer images out ({shown}), train the module for longer, or label images of the class"
        msg = (
            f"Expected pseudo-labels of every class, got none of {class_names[missing[0]]!r} ({missing[0]} of "
            f"{len(class_names)} classes){others}: a generator would draw noise for it. {remedy}. Images of each "
            f"class: {histogram(class_names, counts.tolist())}."
        )
        raise ValueError(msg)
    return counts
