"""Metrics of drawn images against closed forms, SciPy, torchmetrics and loops."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_modules.metrics import (
    ClassificationAccuracyScore,
    ClassifierScore,
    FrechetDistance,
    GenerationMetric,
    LabelConsistency,
    ManifoldMetrics,
)
from lightning_modules.metrics.frechet import gaussian_distance
from lightning_modules.metrics.manifold import prdc

Array = npt.NDArray[np.float64]
D, K = 5, 3


def toy(count: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated features, labels that cycle, probabilities."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % K
    features = torch.randn(count, D, generator=generator) @ mix + shift + labels[:, None]
    return features, labels, torch.randn(count, K, generator=generator).softmax(1)


def feed(metric: GenerationMetric, parts: tuple[Tensor, Tensor, Tensor], rows: slice, real: bool) -> None:
    metric.update(parts[0][rows], parts[1][rows], parts[2][rows], real)


def fill(metric: GenerationMetric, batch: int = 7, real: int = 30, drawn: int = 41) -> GenerationMetric:
    """Give a metric toy images, in batches."""
    metric.set_up(D, K)
    for kind, parts in ((True, toy(real, 0)), (False, toy(drawn, 1, 1.5))):
        for start in range(0, len(parts[0]), batch):
            feed(metric, parts, slice(start, start + batch), kind)
    return metric


def scipy_distance(a: Array, b: Array) -> float:
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    trace = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False)) - 2 * np.trace(root).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + trace)


def arrays() -> tuple[Array, Array]:
    return toy(30, 0)[0].double().numpy(), toy(41, 1, 1.5)[0].double().numpy()


# ---------------------------------------------------------------- Frechet distance


def test_distance_of_two_gaussians_in_closed_form() -> None:
    # Commuting covariances: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2.
    a, b = torch.tensor([4.0, 9.0, 0.0]).double(), torch.tensor([1.0, 16.0, 0.0]).double()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    mean = torch.tensor([3.0, 0.0, 4.0]).double()
    found = gaussian_distance(mean, turn @ a.diag() @ turn.T, torch.zeros(3).double(), turn @ b.diag() @ turn.T)
    assert found.item() == pytest.approx(25 + 1 + 1, rel=1e-9)
    same = gaussian_distance(mean, turn @ a.diag() @ turn.T, mean, turn @ a.diag() @ turn.T)
    assert same.item() == pytest.approx(0, abs=1e-9)


def test_distance_against_scipy_and_torchmetrics() -> None:
    real, drawn = arrays()
    found = fill(FrechetDistance()).compute()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(scipy_distance(real, drawn), rel=1e-9)

    class Same(nn.Module):
        num_features = D

        def forward(self, x: Tensor) -> Tensor:
            return x

    theirs = FrechetInceptionDistance(feature=Same())
    theirs.update(torch.from_numpy(real), real=True)
    theirs.update(torch.from_numpy(drawn), real=False)
    assert found.item() == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_distance_of_each_class() -> None:
    real, drawn = arrays()
    each = [scipy_distance(real[c::K], drawn[c::K]) for c in range(K)]
    assert fill(FrechetDistance(per_class=True)).compute().item() == pytest.approx(np.mean(each), rel=1e-9)


def test_fewer_images_than_features_leave_a_finite_distance() -> None:
    metric = fill(FrechetDistance(per_class=True), real=2 * K, drawn=2 * K)
    real, drawn = toy(2 * K, 0)[0].double().numpy(), toy(2 * K, 1, 1.5)[0].double().numpy()
    expected = np.mean([scipy_distance(real[c::K], drawn[c::K]) for c in range(K)])
    # SciPy's root of a singular matrix is not exact itself.
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- neighbourhoods


def naive_prdc(real: Array, drawn: Array, k: int) -> list[float]:
    """The four definitions, image by image."""

    def reach(points: Array, i: int) -> float:
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    of_real = [reach(real, i) for i in range(len(real))]
    of_drawn = [reach(drawn, j) for j in range(len(drawn))]
    n, m = len(real), len(drawn)
    inside = [[math.dist(real[i], drawn[j]) <= of_real[i] for i in range(n)] for j in range(m)]
    precision = sum(any(row) for row in inside) / m
    recall = sum(any(math.dist(real[i], drawn[j]) <= of_drawn[j] for j in range(m)) for i in range(n)) / n
    density = sum(sum(row) for row in inside) / (k * m)
    coverage = sum(any(inside[j][i] for j in range(m)) for i in range(n)) / n
    return [precision, recall, density, coverage]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbourhoods_against_loops(k: int) -> None:
    found = fill(ManifoldMetrics(k)).compute()
    expected = naive_prdc(*arrays(), k)
    assert list(found) == [f"{name}_k{k}" for name in ("precision", "recall", "density", "coverage")]
    assert [value.item() for value in found.values()] == pytest.approx(expected)
    assert 0 < expected[0] < 1  # or the toy would show nothing


def test_neighbourhoods_of_each_class() -> None:
    real, drawn = arrays()
    expected = np.mean([naive_prdc(real[c::K], drawn[c::K], 2) for c in range(K)], 0)
    found = fill(ManifoldMetrics(2, per_class=True)).compute()
    assert next(iter(found)) == "cw_precision_k2"
    assert [value.item() for value in found.values()] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("chunk_size", [1, 7, 30, 1000])
def test_chunks_do_not_matter(chunk_size: int) -> None:
    real, drawn = toy(30, 0)[0], toy(41, 1, 1.5)[0]
    assert torch.equal(prdc(real, drawn, 3, chunk_size), prdc(real, drawn, 3, 64))


def test_a_copy_of_the_data_far_from_the_origin_is_perfect() -> None:
    features = toy(30, 0)[0].double() + 1e6
    found = prdc(features, features.clone(), 3, 8)
    assert found[[0, 1, 3]].tolist() == [1, 1, 1]
    assert found[2] > 1
    assert prdc(features, features + 1e3, 3).tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- verdicts


def test_classifier_score() -> None:
    p = toy(41, 1)[2].double().numpy()
    marginal = p.mean(0)
    expected = math.exp(
        float(np.mean([sum(q * math.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in p]))
    )
    metric = ClassifierScore().set_up(D, K)
    features, labels, probabilities = toy(41, 1)
    metric.update(features, labels, probabilities, real=False)
    metric.update(*toy(30, 0), real=True)
    assert as_dict(metric.compute())[""] == pytest.approx(expected, rel=1e-5)
    sure = ClassifierScore().set_up(D, K)
    sure.update(features[:30], labels[:30], torch.eye(K)[labels[:30]], real=False)
    assert as_dict(sure.compute())[""] == pytest.approx(K)


def test_splits_of_the_classifier_score() -> None:
    features, labels, _ = toy(60, 1)
    metric = ClassifierScore(splits=4).set_up(D, K)
    # In order of class: parts that are not drawn at random would hold one class each, of score 1.
    metric.update(features, labels.sort().values, torch.eye(K)[labels.sort().values], real=False)
    found = metric.compute()
    assert isinstance(found, dict)
    assert 2 < found["is"] <= K
    assert 0 < found["is_std"] < 1


def test_label_consistency_of_drawn_and_real_images() -> None:
    metric = LabelConsistency().set_up(D, K)
    features, labels, _ = toy(6, 0)
    seen = torch.tensor([0, 1, 2, 0, 0, 0])
    metric.update(features, labels, torch.eye(K)[seen], real=False)
    assert metric.compute()["label_consistency_real"].isnan()
    metric.update(features[:4], labels[:4], torch.eye(K)[seen.flip(0)[:4]], real=True)
    assert as_dict(metric.compute()) == pytest.approx({"label_consistency": 4 / 6, "label_consistency_real": 1 / 4})


# ---------------------------------------------------------------- CAS


class Linear(nn.Module):
    """Logits from pixels, after a BatchNorm that remembers too long."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.norm = nn.BatchNorm1d(8, momentum=1e-4)
        self.head = nn.Linear(8, num_classes or 1)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(8, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(image.flatten(1)))
        return logits


def dots(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 1, 8] with one bright pixel, which is the class."""
    labels = torch.arange(count) % K
    noise = torch.rand(count, 8, generator=torch.Generator().manual_seed(seed))
    return (0.5 * noise + 0.5 * torch.eye(8)[labels]).view(count, 1, 1, 8), labels


def cas(asked: Callable[[Tensor], Tensor], **options: Any) -> tuple[ClassificationAccuracyScore, nn.Module]:
    network = Linear()
    metric = ClassificationAccuracyScore(network, **{"steps": 150, "batch_size": 16, "learning_rate": 0.03} | options)
    metric.set_up(D, K)
    for real, count in ((False, 90), (True, 60)):
        images, labels = dots(count, int(real))
        given = labels if real else asked(labels)
        metric.update(torch.zeros(count, D), given, torch.zeros(count, K), real=real, images=images)
    return metric, network


def test_accuracy_of_a_classifier_trained_on_drawn_images() -> None:
    with torch.inference_mode():
        right, network = cas(lambda labels: labels)
        before = copy.deepcopy(network.state_dict())
        state = torch.get_rng_state()
        assert right.compute() > 0.95
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert right.name == "cas_linear"
    wrong, _ = cas(lambda labels: (labels + 1) % K)
    assert wrong.compute() < 0.05


def test_same_images_and_seed_give_the_same_classifier() -> None:
    torch.manual_seed(1)
    first = cas(lambda labels: labels, steps=3)[0].compute()
    torch.manual_seed(2)
    assert cas(lambda labels: labels, steps=3)[0].compute() == first


def test_no_accuracy_without_images() -> None:
    with pytest.raises(ValueError, match=r"Expected `images` \[B, C, H, W\] for `cas_linear`, got None"):
        ClassificationAccuracyScore(Linear()).set_up(D, K).update(*toy(4, 0), real=True)


# ---------------------------------------------------------------- processes

METRICS: list[Callable[[], GenerationMetric]] = [
    FrechetDistance,
    lambda: FrechetDistance(per_class=True),
    ManifoldMetrics,
    lambda: ManifoldMetrics(per_class=True),
    ClassifierScore,
    LabelConsistency,
]


def as_dict(found: Tensor | dict[str, Tensor]) -> dict[str, float]:
    named = found if isinstance(found, dict) else {"": found}
    return {name: value.item() for name, value in named.items()}


@pytest.mark.parametrize("make", METRICS)
def test_merged_states_and_other_batches_give_the_same(make: Callable[[], GenerationMetric]) -> None:
    whole, halves = fill(make()), [make().set_up(D, K), make().set_up(D, K)]
    for real, parts in ((True, toy(30, 0)), (False, toy(41, 1, 1.5))):
        for half, rows in zip(halves, (slice(0, 13), slice(13, None)), strict=True):
            feed(half, parts, rows, real)
    merged = make().set_up(D, K)
    for half in halves:
        merged.merge_state(half)
    assert as_dict(merged.compute()) == pytest.approx(as_dict(whole.compute()), rel=1e-9)
    merged.reset()
    with pytest.raises(ValueError, match=r"Expected .*, got 0|got none"):
        merged.compute()


def _one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for number, make in enumerate(METRICS):
        metric = make().set_up(D, K)
        for real, parts in ((True, toy(30, 0)), (False, toy(41, 1, 1.5))):
            rows = slice(0, 13) if rank == 0 else slice(13, None)
            feed(metric, parts, rows, real)
        found[number] = as_dict(metric.compute())
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    start_processes(_one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call] # torch has none
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for number, make in enumerate(METRICS):
            assert found[number] == pytest.approx(as_dict(fill(make()).compute()), rel=1e-9)


# ---------------------------------------------------------------- errors


def test_too_few_images() -> None:
    metric = FrechetDistance(per_class=True).set_up(D, K)
    feed(metric, toy(9, 0), slice(4), True)
    metric.update(*toy(9, 0), real=False)
    with pytest.raises(
        ValueError, match="at least 2 real images of every class for `cw_fid`, got 1 of class 1 and too"
    ):
        metric.compute()
    with pytest.raises(ValueError, match="at least 4 drawn images for `prdc_k3`, got 3"):
        fill(ManifoldMetrics(), drawn=3).compute()
    with pytest.raises(ValueError, match="at least 9 drawn images for as many `splits`, got 4"):
        fill(ClassifierScore(9), drawn=4).compute()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`k` to be at least 1, got 0"):
        ManifoldMetrics(0)
    with pytest.raises(ValueError, match="`chunk_size` to be at least 1"):
        ManifoldMetrics(chunk_size=0)
    with pytest.raises(ValueError, match="`splits` to be at least 1"):
        ClassifierScore(0)
    with pytest.raises(ValueError, match="`steps` to be at least 1"):
        ClassificationAccuracyScore(Linear(), steps=0)
    with pytest.raises(ValueError, match="positive `learning_rate`, got -1"):
        ClassificationAccuracyScore(Linear(), learning_rate=-1)
    with pytest.raises(ValueError, match="`num_classes` to be at least 1, got 0"):
        FrechetDistance().set_up(4, 0)


def test_wrong_batches() -> None:
    features, labels, probabilities = toy(4, 0)
    with pytest.raises(RuntimeError, match=r"Call set_up\(num_features, num_classes\) of FrechetDistance"):
        FrechetDistance().update(features, labels, probabilities, real=True)
    metric = LabelConsistency().set_up(D, K)
    with pytest.raises(ValueError, match=r"`features` \[B, 5\].*got shapes \(4, 4\)"):
        metric.update(features[:, 1:], labels, probabilities, real=True)
    with pytest.raises(ValueError, match=r"`labels` \[B\]"):
        metric.update(features, labels[1:], probabilities, real=True)
    with pytest.raises(ValueError, match=r"class ids in 0..2, got torch.int64 from -1 to 2"):
        metric.update(features, torch.tensor([0, 1, 2, -1]), probabilities, real=True)
    with pytest.raises(ValueError, match="`probabilities` of the 3 classes of the data for `label_consistency`, got 1"):
        metric.update(features, labels, probabilities[:, :1], real=False)
    with pytest.raises(ValueError, match="finite `features` and `probabilities`, got NaN"):
        metric.update(features * torch.nan, labels, probabilities, real=False)
