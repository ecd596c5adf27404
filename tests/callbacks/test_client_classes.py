"""The picture of who holds what, by what changes in it."""

import numpy as np
import pytest

from callbacks.client_classes import Counts, draw_client_classes

NAMES = ["ant", "bee", "cow", "dog"]


def changed(before: Counts, after: Counts, *, unlabeled: bool = False, names: list[str] | None = None) -> list[int]:
    """Top, bottom, left and right of what differs between two pictures."""
    other = np.ones_like(before)
    pairs = [(other, counts) if unlabeled else (counts, other) for counts in (before, after)]
    first, second = (draw_client_classes(*pair, names or NAMES) for pair in pairs)
    assert first.shape == second.shape
    rows, columns = np.nonzero((first != second).any(2))
    return [int(edge) for edge in (rows.min(), rows.max(), columns.min(), columns.max())]


def test_counts_stand_in_the_row_of_the_client_and_the_column_of_the_class() -> None:
    counts: Counts = np.arange(12).reshape(3, 4)
    # Within a client: its sum and all headlines stay.
    moved = counts.copy()
    moved[1, [0, 3]] = moved[1, [3, 0]]
    top, bottom, left, right = changed(counts, moved)
    # A cell is 44 wide and high; the lines between cells stay.
    assert bottom - top < 44
    assert 3 * 44 < right - left + 1 <= 4 * 44
    next_row = counts.copy()
    next_row[2, [0, 3]] = next_row[2, [3, 0]]
    assert changed(counts, next_row)[0] == pytest.approx(top + 44, abs=1)
    one_left = counts.copy()
    one_left[1, [0, 2]] = one_left[1, [2, 0]]
    assert changed(counts, one_left)[3] == pytest.approx(right - 44, abs=1)
    # The same cells of the panel beside it.
    beside = changed(counts, moved, unlabeled=True)
    assert beside[:2] == [top, bottom]
    assert beside[2] > right
    assert beside[3] - beside[2] == right - left


def test_colours_grow_with_the_root_of_the_count() -> None:
    # Too many clients for numbers: the middle of a cell is its colour.
    counts = np.zeros((42, 2), dtype=np.int64)
    counts[10:21], counts[21:31], counts[31:] = 1, 25, 100
    picture = draw_client_classes(counts, counts[::-1], ["a", "b"])
    # Cells are 10 high, the panel begins at 44.
    column = np.flatnonzero((picture[44 + 415] != 255).any(1))[10]
    shades = [picture[44 + 10 * client + 5, column].astype(float) for client in (5, 15, 25, 35)]
    full = np.array([8, 64, 129])
    for shade, strength in zip(shades, (0.0, 0.1, 0.5, 1.0), strict=True):
        np.testing.assert_allclose(shade, 255 + strength * (full - 255), atol=1)


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (3, 25), (40, 3), (41, 3), (5, 300), (700, 26)])
def test_any_number_of_clients_and_classes_fits(clients: int, classes: int) -> None:
    counts = np.random.default_rng(0).poisson(3, (clients, classes))
    picture = draw_client_classes(counts, 1000 * counts, [f"class number {k}" for k in range(classes)])
    assert picture.dtype == np.uint8
    for edge in (picture[:5], picture[-5:], picture[:, :5], picture[:, -5:]):
        assert (edge == 255).all()


def test_nobody_has_a_label() -> None:
    nothing = np.zeros((2, 4), dtype=np.int64)
    picture, other = (draw_client_classes(nothing, nothing + extra, NAMES) for extra in (0, 1))
    assert picture.shape == other.shape
    assert (picture != 255).any()


def test_shapes_that_do_not_fit() -> None:
    counts = np.ones((2, 4), dtype=np.int64)
    for labeled, unlabeled, names in (
        (counts, counts[:1], NAMES),
        (counts, counts, NAMES[:3]),
        (counts[:0], counts[:0], NAMES),
    ):
        with pytest.raises(ValueError, match=r"`labeled` and `unlabeled` \[C, K\] with at least one client"):
            draw_client_classes(labeled, unlabeled, names)
