"""Labelled subsets by class, and long tails, against their definitions."""

import numpy as np
import pytest

from datamodules.partition import balanced_order, long_tailed_counts, per_class_subset

LABELS = np.repeat(np.arange(4), (3, 10, 1, 20))[np.random.default_rng(0).permutation(34)]


@pytest.mark.parametrize("seed", [0, 1, 12])
def test_every_prefix_is_as_equal_as_it_can_be(seed: int) -> None:
    order = balanced_order(LABELS, seed)
    assert sorted(order) == list(range(34))
    sizes = np.bincount(LABELS)
    for length in range(1, 35):
        counts = np.bincount(LABELS[order[:length]], minlength=4)
        # Classes that still have items left differ by one at most, and no exhausted one is ahead of them.
        left = counts < sizes
        assert counts[left].max(initial=0) - counts[left].min(initial=34) <= 1
        assert counts.max() <= counts[left].min(initial=34) + 1


def test_per_class_choices_are_nested() -> None:
    few, more = per_class_subset(LABELS, [1, 2, 1, 3], 5), per_class_subset(LABELS, [3, 2, 1, 9], 5)
    assert set(few) < set(more)
    assert np.bincount(LABELS[few]).tolist() == [1, 2, 1, 3]
    assert set(per_class_subset(LABELS, [1, 1, 1, 1], 5)) == set(balanced_order(LABELS, 5)[:4])
    assert few != per_class_subset(LABELS, [1, 2, 1, 3], 6)
    with pytest.raises(ValueError, match="at least 2 items of class 2, but got 1"):
        per_class_subset(LABELS, [1, 1, 2, 1], 0)


def test_long_tail() -> None:
    counts = long_tailed_counts(1500, 100, 10)
    assert (counts[0], counts[-1]) == (1500, 15)
    ratios = np.asarray(counts[:-1]) / np.asarray(counts[1:])
    np.testing.assert_allclose(ratios, 100 ** (1 / 9), rtol=0.03)
    assert long_tailed_counts(7, 1, 3) == [7, 7, 7]
    assert long_tailed_counts(2, 50, 3)[-1] == 1
    with pytest.raises(ValueError, match=r"`gamma`.*at least 1"):
        long_tailed_counts(10, 0.5, 3)
