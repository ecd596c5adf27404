"""Label noise against the matrices it is defined by."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from datamodules import LabelNoise, transition_matrix
from datamodules.label_noise import PairsName, confused_pairs, instance_probabilities


def no_images(places: npt.NDArray[np.int64]) -> Tensor:
    raise AssertionError(places)


def test_symmetric_matrices() -> None:
    matrix = transition_matrix("symmetric", 0.4, 5)
    assert matrix.diagonal().tolist() == pytest.approx([0.6] * 5)
    assert matrix[0, 1:].tolist() == pytest.approx([0.1] * 4)
    including = transition_matrix("symmetric", 0.4, 5, including_true=True)
    assert including.diagonal().tolist() == pytest.approx([0.68] * 5)
    assert including[0, 1:].tolist() == pytest.approx([0.08] * 4)


@pytest.mark.parametrize(
    ("name", "flips"),
    [
        ("mnist", {2: 7, 3: 8, 5: 6, 6: 5}),
        ("cifar10", {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}),
    ],
)
def test_asymmetric_presets(name: PairsName, flips: dict[int, int]) -> None:
    matrix = transition_matrix("asymmetric", 0.3, 10, name)
    for true in range(10):
        expected = np.zeros(10)
        expected[true] = 1.0
        if true in flips:
            expected[true], expected[flips[true]] = 0.7, 0.3
        assert matrix[true].tolist() == pytest.approx(expected.tolist())


def test_cifar100_stays_within_superclasses() -> None:
    pairs = confused_pairs("cifar100", 100)
    # Apple -> mushroom, aquarium fish -> flatfish, ..., worm -> crab, the first of its superclass.
    assert [pairs[label] for label in range(6)] == [51, 32, 11, 42, 30, 20]
    assert pairs[99] == 26
    assert sorted(pairs.values()) == list(range(100))
    for start in range(100):
        circle, label = [start], pairs[start]
        while label != start:
            circle.append(label)
            label = pairs[label]
        assert len(circle) == 5
        assert sum(after < before for before, after in zip(circle, [*circle[1:], start], strict=True)) == 1


@pytest.mark.parametrize("noise", [("symmetric", None), ("asymmetric", None), ("asymmetric", {0: 3})])
def test_rows_sum_to_one_and_draws_follow_them(noise: tuple[Any, Any]) -> None:
    kind, pairs = noise
    matrix = transition_matrix(kind, 0.35, 4, pairs)
    assert torch.allclose(matrix.sum(1), torch.ones(4, dtype=torch.float64))
    labels = torch.arange(4).repeat(5000)
    drawn = LabelNoise(kind, 0.35, 3, pairs).apply(labels, 4, no_images)
    counts = torch.zeros(4, 4)
    counts.index_put_((labels, drawn), torch.ones(len(labels)), accumulate=True)
    assert torch.allclose(counts.double() / 5000, matrix, atol=0.03)
    assert bool((counts[matrix == 0] == 0).all())
    again = LabelNoise(kind, 0.35, 3, pairs).apply(labels, 4, no_images)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, LabelNoise(kind, 0.35, 4, pairs).apply(labels, 4, no_images))


def test_extreme_rates() -> None:
    labels = torch.arange(4).repeat(50)
    assert torch.equal(LabelNoise("symmetric", 0.0).apply(labels, 4, no_images), labels)
    assert torch.equal(LabelNoise("asymmetric", 1.0).apply(labels, 4, no_images), (labels + 1) % 4)


def test_instance_noise_depends_on_image_and_class() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (900, 1, 2, 2), generator=generator, dtype=torch.uint8)
    labels = torch.arange(3).repeat(300)
    images[3:6] = images[:3]

    def fetch(places: npt.NDArray[np.int64]) -> Tensor:
        return images[torch.from_numpy(places)]

    found = instance_probabilities(labels, 3, fetch, 0.3, torch.Generator().manual_seed(1))
    assert torch.allclose(found.sum(1), torch.ones(900, dtype=torch.float64))
    flips = 1 - found[torch.arange(900), labels]
    assert float(flips.mean()) == pytest.approx(0.3, abs=0.015)
    assert float(flips.std()) == pytest.approx(0.1, abs=0.01)
    # Equal images of a class differ in the rate only: the odds among wrong classes are those of the pixels.
    for label in range(3):
        others = [other for other in range(3) if other != label]
        first, second = (found[label + 3 * copy][others] for copy in (0, 1))
        assert torch.allclose(first / first.sum(), second / second.sum())
    assert float((found[0][1] / found[0][1:].sum() - found[6][1] / found[6][1:].sum()).abs()) > 1e-6
    noisy = LabelNoise("instance", 0.3, 2).apply(labels, 3, fetch)
    assert float((noisy != labels).double().mean()) == pytest.approx(0.3, abs=0.06)
    assert LabelNoise("instance").matrix(3) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "random"}, "`kind` to be"),
        ({"rate": 1.5}, r"`rate` to be in \[0, 1\], but got 1.5"),
        ({"seed": -1}, "`seed` to be at least 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelNoise(**arguments)


def test_pairs_must_fit_the_classes() -> None:
    with pytest.raises(ValueError, match=r"`pairs` to map class ids from 0 to 4.*9 to 1"):
        transition_matrix("asymmetric", 0.2, 5, "cifar10")
    with pytest.raises(ValueError, match="maps 1 to 1"):
        transition_matrix("asymmetric", 0.2, 5, {1: 1})
    with pytest.raises(ValueError, match="`num_classes` to be at least 2"):
        transition_matrix("symmetric", 0.2, 1)
