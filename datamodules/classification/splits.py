"""Which images keep their labels, which are validated on, and which count as unlabelled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.classification.contents import Int64Array
from datamodules.partition import (
    balanced_order,
    labelled_subset,
    long_tailed_counts,
    per_class_subset,
    stratified_order,
)
from datamodules.pseudo_labels import histogram


@dataclass(frozen=True)
class LongTail:
    """Classes of unequal size, N_k = N_1 gamma^(-k / (K - 1)) for class k = 0 .. K - 1.

    The largest labelled class has `labels_per_class` images, or as many as the data allow. The largest unlabelled one
    has as many as the data allow; labelled images are not counted there, and belong to the unlabelled ones as well
    where `include_labeled` says so. Thinning the unlabelled images takes their true labels: it makes a benchmark, and
    nothing else uses them.

    Attributes:
        gamma_labeled: Ratio of the largest and the smallest labelled class, at least 1.
        gamma_unlabeled: That of the unlabelled images; None takes them all.
        reverse_unlabeled: Let the last class be the largest unlabelled one.
    """

    gamma_labeled: float = 1.0
    gamma_unlabeled: float | None = None
    reverse_unlabeled: bool = False

    def __post_init__(self) -> None:
        """Check the ratios.

        Raises:
            ValueError: A ratio is below 1.
        """
        for name in ("gamma_labeled", "gamma_unlabeled"):
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"Expected argument `{name}` to be at least 1, but got {value}; see `reverse_unlabeled`."
                raise ValueError(msg)


@dataclass(frozen=True)
class LabelPlan:
    """How labelled images are chosen; the arguments of SemiSupervisedDataModule of these names.

    Attributes:
        num_labels: Labelled images in all.
        labels_per_class: Labelled images of each class.
        seed: Seed of the choice.
        balanced: Classes as equal as possible with `num_labels`, else in proportion.
        val_share: Share of the labelled images to validate on.
        include_labeled: Whether labelled images are unlabelled ones too.
        imbalance: Long tails.
    """

    num_labels: int | None = None
    labels_per_class: int | None = None
    seed: int = 0
    balanced: bool = True
    val_share: float = 0.0
    include_labeled: bool = True
    imbalance: LongTail | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range, or two contradict each other.
        """
        for name, value in (("num_labels", self.num_labels), ("labels_per_class", self.labels_per_class)):
            if value is not None and value < 1:
                msg = f"Expected argument `{name}` to be at least 1, or left out, but got {value}."
                raise ValueError(msg)
        if self.num_labels is not None and self.labels_per_class is not None:
            msg = (
                "Expected only one of the arguments `num_labels` and `labels_per_class`, but got both, "
                f"{self.num_labels} and {self.labels_per_class}; leave one out."
            )
            raise ValueError(msg)
        if self.imbalance is not None and self.imbalance.gamma_labeled > 1 and self.num_labels is not None:
            msg = (
                "Expected argument `labels_per_class`, the size of the largest class, with `gamma_labeled`, but got "
                f"`num_labels` {self.num_labels}; classes differ in size."
            )
            raise ValueError(msg)
        if self.seed < 0:
            msg = f"Expected argument `labels_seed` to be at least 0, but got {self.seed}."
            raise ValueError(msg)
        if not 0 <= self.val_share < 1:
            msg = f"Expected argument `val_share` to be in [0, 1), but got {self.val_share}."
            raise ValueError(msg)


@dataclass(frozen=True)
class Split:
    """Rows of the data set by use, each sorted.

    Attributes:
        labeled: Images trained on with their labels.
        unlabeled: Images trained on without.
        val: Images to validate on.
        test: Images to test on.
    """

    labeled: Int64Array
    unlabeled: Int64Array
    val: Int64Array
    test: Int64Array


def split_rows(
    truth: Int64Array,
    given: Int64Array,
    roles: Sequence[str],
    names: Sequence[str],
    plan: LabelPlan,
    is_part: bool = False,
) -> Split:
    """Decide what each image is used for.

    Args:
        truth: True class ids [N], -1 where unknown.
        given: Training rows whose labels may be used, sorted.
        roles: train, val or test for each image.
        names: Names of the classes.
        plan: How labelled images are chosen.
        is_part: Whether classes may be missing, see ImageSource.

    Returns:
        The rows of each use.

    Raises:
        ValueError: The labels do not suffice for the plan.
    """
    by_role = {role: np.flatnonzero(np.asarray(roles) == role) for role in ("train", "val", "test")}
    least = 0 if is_part else 1
    available = require_every_class(truth[given], names, "Label some, or take the class out", least)
    labeled = given[_choose(truth[given], available, names, plan)]
    val = by_role["val"]
    # A part that has hardly more labels than classes keeps them all to train on.
    if not len(val) and plan.val_share > 0 and (len(labeled) > len(names) or not is_part):
        labeled, val = _carve(labeled, truth, names, plan, is_part)
    rest = np.setdiff1d(by_role["train"], np.concatenate([labeled, val]))
    if plan.imbalance is not None and plan.imbalance.gamma_unlabeled is not None:
        rest = rest[_thin(truth[rest], names, plan.imbalance, plan.seed)]
    unlabeled = np.union1d(rest, labeled) if plan.include_labeled else rest
    return Split(np.sort(labeled), unlabeled.astype(np.int64), np.sort(val), by_role["test"])


def require_every_class(labels: Int64Array, names: Sequence[str], remedy: str, least: int = 1) -> Int64Array:
    """Refuse labels among which a class is missing.

    Args:
        labels: Class ids [N].
        names: Names of the classes.
        remedy: What to do about it, without a full stop.
        least: How many images of a class are enough.

    Returns:
        Images of each class [K].

    Raises:
        ValueError: A class has fewer; shows how many each has.
    """
    counts = np.bincount(labels, minlength=len(names))
    missing = np.flatnonzero(counts < least).tolist()
    if missing:
        wanted = f"{'' if least == 1 else f'{least} '}labelled images of every class"
        has = f"has {counts[missing[0]] or 'none'}"
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        msg = (
            f"Expected {wanted}, but class {names[missing[0]]!r} ({missing[0]} of {len(names)} classes) {has}{others}. "
            f"{remedy}. Images of each class: {histogram(names, counts.tolist())}."
        )
        raise ValueError(msg)
    return counts


def _choose(labels: Int64Array, available: Int64Array, names: Sequence[str], plan: LabelPlan) -> Int64Array:
    """Positions of the labelled images, sorted."""
    classes, per_class = len(names), plan.labels_per_class
    if plan.imbalance is not None and plan.imbalance.gamma_labeled > 1:
        shape = [plan.imbalance.gamma_labeled ** (-rank / max(classes - 1, 1)) for rank in range(classes)]
        largest = per_class or int(min(n / share for n, share in zip(available, shape, strict=True)))
        counts = long_tailed_counts(max(largest, 1), plan.imbalance.gamma_labeled, classes)
        if per_class is None:  # rounding may ask for one more than there is
            counts = [min(wanted, int(n)) for wanted, n in zip(counts, available, strict=True)]
    elif per_class is not None:
        counts = [per_class] * classes
    elif plan.num_labels is not None:
        return _choose_total(labels, names, plan.num_labels, plan)
    else:
        return np.arange(len(labels))
    for label, wanted in enumerate(counts):
        if wanted > available[label]:
            msg = (
                f"Expected argument `labels_per_class` to be at most the number of labelled images of a class, but "
                f"got {per_class}, and class {names[label]!r} has {available[label]} where {wanted} are wanted."
            )
            raise ValueError(msg)
    return np.asarray(per_class_subset(labels, counts, plan.seed))


def _choose_total(labels: Int64Array, names: Sequence[str], wanted: int, plan: LabelPlan) -> Int64Array:
    if wanted < len(names):
        msg = (
            f"Expected argument `num_labels` to be at least {len(names)}, one for each class, but got {wanted}. "
            "A class without labels cannot be learnt."
        )
        raise ValueError(msg)
    if wanted > len(labels):
        msg = (
            f"Expected argument `num_labels` to be at most {len(labels)}, the number of labelled images, but got "
            f"{wanted}. Leave it out to use them all."
        )
        raise ValueError(msg)
    if plan.balanced:
        return np.sort(np.asarray(balanced_order(labels, plan.seed)[:wanted]))
    chosen = np.sort(np.asarray(labelled_subset([str(label) for label in labels], wanted, plan.seed)))
    missing = sorted(set(range(len(names))) - set(labels[chosen].tolist()))
    if missing:
        msg = (
            f"Expected argument `num_labels` to give every class a label, but with {wanted} in proportion class "
            f"{names[missing[0]]!r} gets none. Raise it, or set `labels_balanced: true`."
        )
        raise ValueError(msg)
    return chosen


def _carve(
    labeled: Int64Array, truth: Int64Array, names: Sequence[str], plan: LabelPlan, is_part: bool
) -> tuple[Int64Array, Int64Array]:
    """Take validation images from the labelled ones, in proportion, leaving at least one of each class."""
    seed = int(np.random.SeedSequence((plan.seed, 2)).generate_state(1)[0])
    order = np.asarray(balanced_order(truth[labeled], seed))
    kept, free = labeled[order[: len(names)]], labeled[np.sort(order[len(names) :])]
    wanted = max(round(plan.val_share * len(labeled)), 1)
    if is_part:
        wanted = min(wanted, len(free))
    if wanted > len(free):
        msg = (
            f"Expected argument `val_share` to leave a labelled image of each of {len(names)} classes to train on, "
            f"but {plan.val_share} of {len(labeled)} are {wanted}, which would empty a class. Lower it, or label more."
        )
        raise ValueError(msg)
    places = stratified_order([str(label) for label in truth[free]], seed)
    val = free[np.asarray(places[:wanted])]
    return np.concatenate([kept, free[np.asarray(places[wanted:], dtype=np.int64)]]), val


def _thin(labels: Int64Array, names: Sequence[str], tail: LongTail, seed: int) -> Int64Array:
    """Positions of the unlabelled images that a long tail leaves."""
    if (labels < 0).any():
        msg = (
            "Expected unlabelled images whose true labels are known for `gamma_unlabeled`, but "
            f"{int((labels < 0).sum())} of {len(labels)} have none. Leave it out."
        )
        raise ValueError(msg)
    gamma, classes = tail.gamma_unlabeled or 1.0, len(names)
    shares = [gamma ** (-rank / max(classes - 1, 1)) for rank in range(classes)]
    if tail.reverse_unlabeled:
        shares.reverse()
    available = np.bincount(labels, minlength=classes)
    largest = int(min(n / share for n, share in zip(available, shares, strict=True)))
    counts = [min(round(largest * share), int(n)) for n, share in zip(available, shares, strict=True)]
    return np.asarray(per_class_subset(labels, counts, seed), dtype=np.int64)
