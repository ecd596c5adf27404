"""Labelled subsets that keep the groups of a data set in proportion."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def stratified_order(strata: Sequence[str], seed: int) -> list[int]:
    """Order items so that every prefix holds the groups in proportion.

    Inside a group the order is random. Which group comes next follows the chairman-assignment rule of R.
    Tijdeman (Discrete Mathematics 32, 1980): with m groups of shares s, the first k items hold k s of each
    group within 1 - 1 / (2 m - 2), which no rule can improve. Prefixes are nested by construction.

    Args:
        strata: Group of each item.
        seed: Seed of the order; ties between groups are broken by it too.

    Returns:
        A permutation of the positions of `strata`.
    """
    generator = np.random.default_rng(seed)
    every = np.asarray(strata)
    # Sorted, so that the result does not depend on which group happens to come first.
    members = {name: generator.permutation(np.flatnonzero(every == name)) for name in sorted(set(strata))}
    groups = [members[str(name)] for name in generator.permutation(sorted(members))]
    sizes = np.asarray([len(group) for group in groups], dtype=np.int64)
    total = len(strata)
    # Everything times `slack * total`: integers, so that no rounding decides a tie.
    slack = 2 * max(len(groups), 2) - 2
    taken, lag = np.zeros_like(sizes), np.zeros_like(sizes)
    order = []
    for _ in range(total):
        lag += slack * sizes
        # The group whose share will be overdue first.
        overdue = np.where((taken < sizes) & (lag >= total), ((slack - 1) * total - lag) / sizes, np.inf)
        chosen = int(overdue.argmin())
        order.append(int(groups[chosen][taken[chosen]]))
        taken[chosen] += 1
        lag[chosen] -= slack * total
    return order


def labelled_subset(strata: Sequence[str], num_labels: int, seed: int) -> list[int]:
    """Choose the items whose labels may be used.

    The subsets of one seed are nested: that of 20 contains that of 10.

    Args:
        strata: Group of each item.
        num_labels: How many to choose.
        seed: Seed of the choice.

    Returns:
        Positions in `strata`, in the order of choice.

    Raises:
        ValueError: If fewer items exist.
    """
    if not 1 <= num_labels <= len(strata):
        msg = (
            f"Expected argument `num_labels` to be from 1 to {len(strata)}, the number of labelled images, "
            f"but got {num_labels}. Leave it out to use them all."
        )
        raise ValueError(msg)
    return stratified_order(strata, seed)[:num_labels]


def carve_validation(strata: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split labelled items into training and validation.

    Args:
        strata: Group of each labelled item.
        share: Share to validate on, in [0, 1); above 0 at least one item is, unless that is the only one.
        seed: Seed of the split.

    Returns:
        Positions for training and positions for validation, both sorted; training is never empty.
    """
    wanted = max(round(share * len(strata)), 1) if share > 0 else 0
    wanted = min(wanted, len(strata) - 1)
    # Another stream than the labelled subset's, which was chosen by the same seed.
    order = stratified_order(strata, int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]))
    return sorted(order[wanted:]), sorted(order[:wanted])


def balanced_order(labels: npt.NDArray[np.int64], seed: int) -> list[int]:
    """Order items so that every prefix holds the classes as equally as it can.

    The classes take turns, in an order drawn anew for each round; one that has no items left is passed over. Prefixes
    are nested by construction, and the prefix of n K items holds n of each of K classes that are large enough.

    Args:
        labels: Class id of each item.
        seed: Seed of the order.

    Returns:
        A permutation of the positions of `labels`.
    """
    generator = np.random.default_rng(seed)
    members = {int(label): generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)}
    order: list[int] = []
    for turn in range(max((len(rows) for rows in members.values()), default=0)):
        for label in generator.permutation(list(members)):
            order += [int(row) for row in members[int(label)][turn : turn + 1]]
    return order


def per_class_subset(labels: npt.NDArray[np.int64], counts: Sequence[int], seed: int) -> list[int]:
    """Choose a number of items of each class; the choices of one seed are nested, and in `balanced_order`'s order.

    Args:
        labels: Class id of each item.
        counts: How many of each class.
        seed: Seed of the choice.

    Returns:
        Sorted positions in `labels`.

    Raises:
        ValueError: A class has fewer items.
    """
    left = list(counts)
    chosen = []
    for position in balanced_order(labels, seed):
        label = int(labels[position])
        if label < len(left) and left[label] > 0:
            left[label] -= 1
            chosen.append(position)
    if any(left):
        label = next(label for label, missing in enumerate(left) if missing)
        available = int((labels == label).sum())
        msg = f"Expected at least {counts[label]} items of class {label}, but got {available}; choose fewer."
        raise ValueError(msg)
    return sorted(chosen)


def long_tailed_counts(largest: int, gamma: float, num_classes: int) -> list[int]:
    """Sizes of classes of a long-tailed data set, N_k = N_1 gamma^(-k / (K - 1)) (Cui et al. 2019, arXiv 1901.05555).

    Args:
        largest: Size of the first class N_1.
        gamma: Ratio of the largest and the smallest class, at least 1.
        num_classes: Number of classes K.

    Returns:
        K sizes, rounded, at least 1 each.

    Raises:
        ValueError: An argument is out of range.
    """
    if largest < 1 or gamma < 1 or num_classes < 1:
        msg = (
            f"Expected `largest`, `gamma` and `num_classes` to be at least 1, but got {largest}, {gamma}, "
            f"{num_classes}. A class that should be the smallest goes last."
        )
        raise ValueError(msg)
    last = max(num_classes - 1, 1)
    return [max(round(largest * gamma ** (-rank / last)), 1) for rank in range(num_classes)]
