"""How images are dealt out to clients: partitions, proportions, and the moments of a Dirichlet distribution."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from datamodules.partition import ClientRows, ClientSplit, Int64Array, client_split, client_tests, folds_of

K = 7
LABELS: Int64Array = np.random.default_rng(4).choice(K, 900, p=np.arange(1, K + 1) / 28)
# 200 classes of 100 images: enough classes to measure a distribution over clients.
MANY: Int64Array = np.random.default_rng(5).permutation(np.repeat(np.arange(200), 100))


def counts_of(rows: Int64Array, labels: Int64Array = LABELS) -> list[int]:
    return [int((labels[rows] == label).sum()) for label in range(K)]


def every(rows: list[ClientRows]) -> list[int]:
    return sorted(int(row) for own in rows for part in (own.labeled, own.unlabeled) for row in part)


@pytest.mark.parametrize("alphas", [(None, None), (0.1, None), (None, 0.1), (0.3, 0.05), (100.0, 100.0)])
@pytest.mark.parametrize("num_clients", [1, 2, 9])
def test_every_image_belongs_to_one_client(alphas: tuple[float | None, float | None], num_clients: int) -> None:
    rows = client_split(LABELS, ClientSplit(num_clients, 0.2, *alphas, seed=3))
    assert len(rows) == num_clients
    assert every(rows) == list(range(900))
    for own in rows:
        for part in (own.labeled, own.unlabeled):
            assert part.tolist() == sorted(part.tolist())


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_labels_are_a_stratified_choice_that_no_other_setting_changes(share: float) -> None:
    rows = client_split(LABELS, ClientSplit(4, share, seed=8))
    labeled: Int64Array = np.concatenate([own.labeled for own in rows])
    assert len(labeled) == round(share * 900)
    for count, there_are in zip(counts_of(labeled), counts_of(np.arange(900)), strict=True):
        assert abs(count - share * there_are) < 1
    other = client_split(LABELS, ClientSplit(6, share, 0.5, 0.2, seed=8))
    assert set(np.concatenate([own.labeled for own in other])) == set(labeled)
    more = client_split(LABELS, ClientSplit(4, min(1.0, share + 0.1), seed=8))
    assert set(labeled) <= {row for own in more for row in own.labeled}
    if share < 1:
        again = client_split(LABELS, ClientSplit(4, share, seed=9))
        assert set(np.concatenate([own.labeled for own in again])) != set(labeled)


def test_without_alpha_clients_have_alike() -> None:
    rows = client_split(LABELS, ClientSplit(8, 0.25))
    tests = client_tests(LABELS, ClientSplit(8, 0.25))
    for parts in ([own.labeled for own in rows], [own.unlabeled for own in rows], tests):
        table = np.array([counts_of(part) for part in parts])
        assert np.ptp(table, axis=0).max() <= 1
        assert np.ptp(table.sum(1)) <= 1


def shares(parts: list[Int64Array], labels: Int64Array) -> npt.NDArray[np.float64]:
    """Which share of a class each client has, [classes, clients]."""
    table = np.array([np.bincount(labels[part], minlength=200) for part in parts])
    found: npt.NDArray[np.float64] = (table / table.sum(0)).T
    return found


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_shares_have_the_moments_of_the_distribution(alpha: float) -> None:
    clients = 4
    rows = client_split(MANY, ClientSplit(clients, 0.5, alpha, alpha, seed=1))
    labeled, unlabeled = (shares([getattr(own, name) for own in rows], MANY) for name in ("labeled", "unlabeled"))
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    for found in (labeled, unlabeled):
        error = 4 * (variance / 200) ** 0.5
        assert np.abs(found.mean(0) - 1 / clients).max() < error
        assert found.var() == pytest.approx(variance, rel=0.2)
    # Dual heterogeneity: who has the labels of a class says nothing about who has its other images.
    assert abs(np.corrcoef(labeled.ravel(), unlabeled.ravel())[0, 1]) < 0.2


def test_each_of_the_two_parts_has_its_own_alpha() -> None:
    rows = client_split(MANY, ClientSplit(4, 0.5, 1e-3, 1e4, seed=1))
    # Nearly all of a class at one client, or nearly a quarter of it at each.
    assert shares([own.labeled for own in rows], MANY).max(1).mean() > 0.95
    assert shares([own.unlabeled for own in rows], MANY).max() < 0.3


def test_tests_are_dealt_out_as_the_unlabelled_images_are() -> None:
    split = ClientSplit(5, 0.2, 0.1, 0.2, seed=6)
    tested: Int64Array = np.random.default_rng(7).integers(0, K, 400)
    tests, rows = client_tests(tested, split), client_split(LABELS, split)
    assert sorted(int(row) for part in tests for row in part) == list(range(400))
    here = np.array([counts_of(part, tested) for part in tests])
    there = np.array([counts_of(own.unlabeled) for own in rows])
    # Either count is within 1 of its share of the class.
    bound = 1 / here.sum(0) + 1 / there.sum(0)
    assert (np.abs(here / here.sum(0) - there / there.sum(0)) <= bound + 1e-9).all()
    labeled = np.array([counts_of(own.labeled) for own in rows])
    assert np.abs(here / here.sum(0) - labeled / labeled.sum(0)).max() > 0.3


def test_images_of_unknown_class_are_never_labelled_and_dealt_out_evenly() -> None:
    labels = np.where(np.arange(900) % 3 == 0, LABELS, -1)
    rows = client_split(labels, ClientSplit(7, 0.5, 0.2, 0.2, seed=2))
    assert every(rows) == list(range(900))
    assert all((labels[own.labeled] >= 0).all() for own in rows)
    assert sum(len(own.labeled) for own in rows) == 150
    unknown = [int((labels[own.unlabeled] < 0).sum()) for own in rows]
    assert sum(unknown) == 600
    assert max(unknown) - min(unknown) <= 1


def test_a_split_is_a_function_of_its_seed() -> None:
    def tables(seed: int) -> list[list[int]]:
        return [own.unlabeled.tolist() for own in client_split(LABELS, ClientSplit(5, 0.2, 0.3, 0.3, seed))]

    first = tables(0)
    # Whoever changes the rows that it got changes nobody else's list.
    client_split(LABELS, ClientSplit(5, 0.2, 0.3, 0.3, 0)).clear()
    assert tables(0) == first
    assert tables(1) != first


@pytest.mark.parametrize("folds", [2, 3])
def test_folds_are_even(folds: int) -> None:
    parts = folds_of(LABELS, folds, seed=1)
    assert sorted(int(row) for part in parts for row in part) == list(range(900))
    table = np.array([counts_of(part) for part in parts])
    assert np.ptp(table, axis=0).max() <= 1
    assert np.ptp(table.sum(1)) <= 1
    assert [len(part) for part in folds_of(LABELS[:1], folds, seed=1)] == [1] + [0] * (folds - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clients": 0}, r"`num_clients` to be at least 1.*got 0"),
        ({"seed": -1}, r"`seed` at least 0.*-1"),
        ({"label_share": 0.0}, r"`label_share` to be in \(0, 1\], but got 0.0"),
        ({"label_share": 1.5}, r"`label_share`.*1.5"),
        ({"alpha_labeled": 0.0}, r"`alpha_labeled` to be above 0, but got 0.0"),
        ({"alpha_unlabeled": float("nan")}, r"`alpha_unlabeled`.*nan"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClientSplit(**change)


def test_data_that_cannot_be_dealt_out() -> None:
    few = np.arange(6) % 3
    with pytest.raises(ValueError, match=r"each of 7 clients, but client 6 and 0 more.*`num_clients`"):
        client_split(few, ClientSplit(7, 1.0))
    with pytest.raises(ValueError, match=r"`alpha_labeled` 0.001, `alpha_unlabeled` 0.002 and `seed` 4"):
        client_split(few, ClientSplit(6, 0.5, 0.001, 0.002, seed=4))
    with pytest.raises(ValueError, match=r"`label_share` 0.2 of 6 images leaves none of class"):
        client_split(few, ClientSplit(2, 0.2))
    with pytest.raises(ValueError, match="leaves no image with a label"):
        client_split(np.full(6, -1), ClientSplit(2, 0.5))
