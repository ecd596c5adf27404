"""Which pseudo-labels clients keep, against loops that are written down as the rules are."""

import numpy as np
import numpy.typing as npt
import pytest

from federated.selection import EDGES, THRESHOLDS, count_confidences, cuts, keep, precision, thresholds
from federated.settings import Selection

Int64Array = npt.NDArray[np.int64]


def confusions(num_classes: int = 4, images: int = 300, seed: int = 0) -> Int64Array:
    """Counts of images of a classifier that is right the more often the surer it is."""
    generator = np.random.default_rng(seed)
    truth, confidence = generator.integers(0, num_classes, images), generator.uniform(0.25, 1, images)
    wrong = (truth + generator.integers(1, num_classes, images)) % num_classes
    label = np.where(generator.random(images) < confidence * (0.4 + 0.2 * truth), truth, wrong)
    found = np.zeros((len(THRESHOLDS), num_classes, num_classes), dtype=np.int64)
    for place, threshold in enumerate(THRESHOLDS):
        for i, j, sure in zip(truth, label, confidence, strict=True):
            found[place, i, j] += int(sure >= threshold)
    return found


def labelled(seed: int = 1, images: int = 120) -> tuple[Int64Array, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    confidence = (generator.integers(25, 101, images) / 100).astype(np.float32)  # many are equally sure
    return generator.integers(0, 4, images), confidence


@pytest.mark.parametrize("smoothing", [0.0, 1.0, 2.5])
def test_precision_is_that_of_a_loop(smoothing: float) -> None:
    matrix = confusions()[0]
    found = precision(matrix, smoothing)
    for c in range(4):
        given = sum(int(matrix[i, c]) for i in range(4))
        assert found[c] == pytest.approx((matrix[c, c] + smoothing / 4) / (given + smoothing))
    # Columns, not rows: recall is another number.
    assert not np.allclose(precision(matrix, 0), precision(matrix.T, 0))


def test_a_class_that_nothing_was_taken_for_is_as_precise_as_chance() -> None:
    matrix = np.array([[5, 0, 1], [2, 0, 0], [0, 0, 4]])
    assert precision(matrix, 1.0)[1] == pytest.approx(1 / 3)
    assert precision(matrix, 0.0)[1] == 0


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_the_ratio_of_a_client_keeps_as_many_as_are_expected_to_be_right(smoothing: float) -> None:
    counts, (labels, confidence) = confusions(), labelled()
    kept = keep(Selection("client_ratio", smoothing), counts, np.ones(4), labels, confidence)
    precise = precision(counts[0], smoothing)
    for c in range(4):
        own = [n for n in range(len(labels)) if labels[n] == c]
        ordered = sorted(own, key=lambda n: (-confidence[n], n))
        assert np.flatnonzero(kept & (labels == c)).tolist() == sorted(ordered[: round(precise[c] * len(own))])
    assert 0 < kept.sum() < len(labels)


def kept_by_cuts(
    rule: Selection, counts: Int64Array, labels: Int64Array, confidence: npt.NDArray[np.floating]
) -> npt.NDArray[np.bool_]:
    return keep(rule, counts, cuts(rule, counts, count_confidences(labels, confidence, 4)), labels, confidence)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_the_ratio_rule_has_one_cut_for_all_clients(smoothing: float) -> None:
    generator, rule, counts = np.random.default_rng(5), Selection("ratio", smoothing), confusions()
    labels, confidence = generator.integers(0, 4, 400), generator.random(400)
    clients = generator.integers(0, 3, 400)
    confidences = sum(count_confidences(labels[clients == k], confidence[clients == k], 4) for k in range(3))
    cut = cuts(rule, counts, np.asarray(confidences))
    kept = np.zeros(400, dtype=bool)
    for k in range(3):
        kept[clients == k] = keep(rule, counts, cut, labels[clients == k], confidence[clients == k])
    precise = precision(counts[0], smoothing)
    for c in range(4):
        own = sorted((float(sure) for sure in confidence[labels == c]), reverse=True)
        # Each edge by hand: how many images it would keep, and how far from the expected number that is.
        kept_at = {edge: sum(sure >= edge for sure in own) for edge in [*EDGES.tolist(), np.inf]}
        least = min(abs(number - round(precise[c] * len(own))) for number in kept_at.values())
        best = max(edge for edge, number in kept_at.items() if abs(number - round(precise[c] * len(own))) == least)
        assert cut[c] == best
        assert kept[labels == c].sum() == kept_at[best]
        assert least <= 1  # a thousand edges tell a hundred images apart


def test_confidences_are_counted_between_edges() -> None:
    counts = count_confidences(np.array([1, 1, 0, 2]), np.array([0.0, 0.9995, 1.0, 0.25]), 3)
    assert {(int(e), int(c)): int(counts[e, c]) for e, c in np.argwhere(counts)} == {
        (0, 1): 1,
        (999, 1): 1,
        (999, 0): 1,
        (250, 2): 1,
    }


@pytest.mark.parametrize("enough", [0.5, 0.7, 1.0])
def test_the_threshold_rule_takes_the_lowest_confidence_that_is_precise_enough(enough: float) -> None:
    counts, (labels, confidence) = confusions(), labelled()
    rule = Selection("threshold", 1.0, min_precision=enough)
    wanted = []
    for c in range(4):
        by_threshold = [float(precision(matrix, 1.0)[c]) for matrix in counts]
        good = [place for place, value in enumerate(by_threshold) if value >= enough]
        wanted.append(THRESHOLDS[good[0] if good else by_threshold.index(max(by_threshold))])
    assert thresholds(rule, counts).tolist() == wanted
    expected = [float(sure) >= wanted[label] for label, sure in zip(labels, confidence, strict=True)]
    assert kept_by_cuts(rule, counts, labels, confidence).tolist() == expected


def test_enough_is_reached_by_some_classes_only() -> None:
    # Otherwise the test above would look at one branch.
    counts = confusions()
    precise = np.stack([precision(matrix, 1.0) for matrix in counts])
    assert (precise >= 0.7).any(0).any()
    assert not (precise >= 1.0).any()
    assert len(set(thresholds(Selection("threshold", min_precision=0.7), counts))) > 1


def test_the_fixed_rule_has_one_confidence() -> None:
    labels, confidence = labelled()
    kept = kept_by_cuts(Selection("fixed", min_confidence=0.75), confusions(), labels, confidence)
    assert kept.tolist() == [float(sure) >= 0.75 for sure in confidence]


def test_nothing_is_kept_of_nothing() -> None:
    none = np.zeros(0, dtype=np.int64)
    for rule in (Selection("ratio"), Selection("client_ratio"), Selection("threshold"), Selection("fixed")):
        assert kept_by_cuts(rule, confusions(), none, none.astype(np.float32)).shape == (0,)


def test_other_counts_are_refused() -> None:
    counts = np.zeros((len(EDGES), 4), dtype=np.int64)
    with pytest.raises(ValueError, match=r"`confusion` of shape \[7, K, K\], got \[4, 4\]"):
        cuts(Selection(), confusions()[0], counts)
    with pytest.raises(ValueError, match=r"`confidences` of shape \[1000, 4\], got \[9, 4\]"):
        cuts(Selection(), confusions(), counts[:9])
