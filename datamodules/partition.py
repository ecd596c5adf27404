"""Labelled subsets that keep the groups of a data set in proportion."""

from collections.abc import Sequence

import numpy as np


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
    members: dict[str, list[int]] = {}
    # Sorted, so that the result does not depend on which group happens to come first.
    for name in sorted(set(strata)):
        positions = np.flatnonzero(np.asarray(strata) == name)
        members[name] = [int(position) for position in generator.permutation(positions)]
    names = [str(name) for name in generator.permutation(sorted(members))]
    total, groups = len(strata), max(len(names), 2)
    # Everything times `slack * total`: integers, so that no rounding decides a tie.
    slack = 2 * groups - 2
    taken = dict.fromkeys(names, 0)
    order = []
    for count in range(1, total + 1):
        lag = {name: slack * (count * len(members[name]) - taken[name] * total) for name in names}
        open_groups = [name for name in names if taken[name] < len(members[name]) and lag[name] >= total]
        # The group whose share will be overdue first.
        chosen = min(open_groups, key=lambda name: ((slack - 1) * total - lag[name]) / len(members[name]))
        order.append(members[chosen][taken[chosen]])
        taken[chosen] += 1
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
