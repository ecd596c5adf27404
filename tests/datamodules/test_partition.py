"""Labelled subsets against the definitions of nested and in proportion."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from datamodules.partition import carve_validation, labelled_subset, stratified_order

PH2 = ["common"] * 80 + ["atypical"] * 80 + ["melanoma"] * 40


@pytest.mark.parametrize("sizes", [(80, 80, 40), (7,), (1, 50), (3, 5, 11, 2), (1, 1, 1, 1, 30), (9, 9, 9)])
@pytest.mark.parametrize("seed", [0, 1, 17])
def test_every_prefix_is_in_proportion(sizes: tuple[int, ...], seed: int) -> None:
    strata = [f"s{group}" for group, size in enumerate(sizes) for _ in range(size)]
    order = stratified_order(strata, seed)
    assert sorted(order) == list(range(len(strata)))
    bound = 1 - 1 / (2 * len(sizes) - 2) if len(sizes) > 1 else 0.0
    for length in range(1, len(order) + 1):
        counts = Counter(strata[position] for position in order[:length])
        for group, size in enumerate(sizes):
            assert abs(counts[f"s{group}"] - length * size / len(strata)) <= bound + 1e-9


@pytest.mark.parametrize("sizes", [(80, 80, 40), (3, 5, 11, 2), (1,) * 30, tuple(range(1, 25))])
def test_the_group_whose_share_is_overdue_first_comes_next(sizes: tuple[int, ...]) -> None:
    strata = [f"s{group}" for group, size in enumerate(sizes) for _ in range(size)]
    order, total = stratified_order(strata, 3), len(strata)
    taken = dict.fromkeys(sorted(set(strata)), 0)
    least = Fraction(1, 2 * len(sizes) - 2)
    for count, chosen in enumerate((strata[position] for position in order), start=1):
        share = {name: Fraction(sizes[int(name[1:])], total) for name in taken}
        due = {
            name: (taken[name] + 1 - least) / share[name]
            for name in taken
            if count * share[name] - taken[name] >= least and taken[name] < sizes[int(name[1:])]
        }
        assert due[chosen] == min(due.values())
        taken[chosen] += 1


def test_ph2_twenty_are_eight_eight_four() -> None:
    for seed in range(5):
        chosen = labelled_subset(PH2, 20, seed)
        assert Counter(PH2[position] for position in chosen) == {"common": 8, "atypical": 8, "melanoma": 4}
        assert set(labelled_subset(PH2, 10, seed)) < set(chosen)


def test_seeds_choose_differently_and_reproducibly() -> None:
    assert stratified_order(PH2, 3) == stratified_order(PH2, 3)
    assert set(labelled_subset(PH2, 20, 3)) != set(labelled_subset(PH2, 20, 4))


def test_every_item_of_a_group_is_equally_likely() -> None:
    strata = ["a"] * 4 + ["b"] * 4
    hits = np.zeros(8)
    for seed in range(400):
        hits[labelled_subset(strata, 2, seed)] += 1
    # Each of 8 items is one of 2 chosen with probability 1/4: 100 +- 8.7 (one standard deviation) of 400.
    assert np.abs(hits - 100).max() < 40


@pytest.mark.parametrize("count", [0, 201])
def test_num_labels_outside_what_exists(count: int) -> None:
    with pytest.raises(ValueError, match=r"`num_labels` to be from 1 to 200.*but got"):
        labelled_subset(PH2, count, 0)


@pytest.mark.parametrize(
    ("items", "share", "expected"), [(20, 0.1, 2), (20, 0.0, 0), (3, 0.1, 1), (1, 0.5, 0), (4, 0.99, 3)]
)
def test_validation_share(items: int, share: float, expected: int) -> None:
    strata = PH2[:items]
    train, val = carve_validation(strata, share, seed=0)
    assert len(val) == expected
    assert sorted(train + val) == list(range(items))
    assert carve_validation(strata, share, seed=0) == (train, val)


def test_validation_is_stratified() -> None:
    _, val = carve_validation(PH2, 0.1, seed=2)
    assert Counter(PH2[position] for position in val) == {"common": 8, "atypical": 8, "melanoma": 4}
