"""The objective of the probe, its minimum, and its verdicts on rows left out, against autograd and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression as Reference
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

from lightning_modules import logistic_regression
from lightning_modules.logistic_regression import LogisticRegression, Minimum, lbfgs, left_out, minimise, out_of_fold
from lightning_modules.networks.probe import preprocess_rows

DIGITS = load_digits()
K, L2 = 10, 0.0025


def problem(n: int, weight: Tensor | None = None, start: int = 0) -> LogisticRegression:
    rows = preprocess_rows(torch.from_numpy(DIGITS.data[start : start + n]))
    label = torch.from_numpy(DIGITS.target[start : start + n])
    return LogisticRegression(rows, label, torch.ones(n, dtype=torch.float64) if weight is None else weight, L2)


def solved(of: LogisticRegression, tol: float = 1e-13, max_iter: int = 10_000) -> tuple[Tensor, Minimum]:
    matrix = nn.Parameter(torch.zeros(K, of.rows.shape[1], dtype=torch.float64))
    found = minimise(of, matrix, lbfgs(matrix), tol, max_iter)
    return matrix.detach(), found


def reference(of: LogisticRegression, keep: Tensor | None = None, tol: float = 1e-7) -> Reference:
    keep = torch.ones(len(of.label), dtype=torch.bool) if keep is None else keep
    model = Reference(C=1 / L2, fit_intercept=False, tol=tol, max_iter=10_000)
    return model.fit(of.rows[keep].numpy(), of.label[keep].numpy(), of.weight[keep].numpy())


def test_rows_have_mean_0_and_length_1_by_themselves() -> None:
    features = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) + 3
    features[4] = 0.1  # a constant one has no direction
    rows = preprocess_rows(features)
    assert rows.dtype == torch.float64
    x = features.numpy().astype(np.float64)
    x -= x.mean(1, keepdims=True)
    np.testing.assert_allclose(rows[:4], x[:4] / np.sqrt((x[:4] ** 2).sum(1, keepdims=True)), atol=1e-12)
    assert torch.equal(rows[4], torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(preprocess_rows(features, normalize=False)[:4], torch.from_numpy(x[:4]))
    assert torch.equal(preprocess_rows(features, centre=False, normalize=False), features.double())


def test_value_and_gradient_are_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    of = problem(23, torch.rand(23, generator=generator, dtype=torch.float64))
    matrix = torch.randn(K, 64, generator=generator, dtype=torch.float64).requires_grad_()
    each = F.cross_entropy(of.rows @ matrix.T, of.label, reduction="none")
    expected = (of.weight * each).sum() + L2 / 2 * (matrix**2).sum()
    (gradient,) = torch.autograd.grad(expected, matrix)
    for block in (2**24, 50):  # all rows at once, and five at a time
        monkeypatch.setattr(logistic_regression, "_BLOCK", block)
        found = of.value_and_gradient(matrix.detach())
        torch.testing.assert_close(found, (expected.detach(), gradient))


def test_the_minimum_is_that_of_scikit_learn() -> None:
    of = problem(100)
    matrix, found = solved(of)
    theirs = reference(of, tol=1e-10)
    np.testing.assert_allclose(matrix, theirs.coef_, atol=1e-4)
    test = problem(300, start=1000).rows
    np.testing.assert_allclose((test @ matrix.T).softmax(1), theirs.predict_proba(test.numpy()), atol=1e-5)
    assert found.converged
    assert found.gap <= 1e-13 * found.value
    # Rows of mean 0 leave nothing to learn about the constant direction.
    assert float(matrix.sum(1).abs().max()) < 1e-9


def test_a_weight_is_a_number_of_repeats() -> None:
    times = torch.arange(40) % 3
    weighted, _ = solved(problem(40, times.double()))
    one = problem(40)
    repeated, _ = solved(
        LogisticRegression(
            one.rows.repeat_interleave(times, 0),
            one.label.repeat_interleave(times),
            torch.ones(int(times.sum()), dtype=torch.float64),
            L2,
        )
    )
    torch.testing.assert_close(weighted, repeated, atol=1e-5, rtol=0)
    assert not torch.allclose(weighted, solved(one)[0], atol=1e-2)


def test_the_gap_bounds_what_is_missing_to_the_minimum() -> None:
    of = problem(60)
    _, best = solved(of)
    gaps = []
    for most in (5, 15, 25):
        _, early = solved(of, max_iter=most)
        assert early.iterations == most
        assert not early.converged
        assert 0 < early.value - best.value <= early.gap
        gaps.append(early.gap)
    assert gaps == sorted(gaps, reverse=True)


def test_what_float64_cannot_reach_is_not_converged() -> None:
    _, found = solved(problem(30), tol=1e-300, max_iter=100_000)
    assert not found.converged
    assert found.iterations < 10_000


def test_rows_are_left_out_one_by_one_unless_a_class_would_lose_all() -> None:
    label = torch.tensor([0, 0, 1, 2, 2, 3, 3])
    weight = torch.tensor([1, 1, 1, 1, 1, 1, 0.0], dtype=torch.float64)
    candidates = torch.tensor([1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    of = LogisticRegression(torch.zeros(7, 2, dtype=torch.float64), label, weight, L2)
    # 1 is the only one of its class. So is the first of class 3, as the second counts for nothing and can go.
    assert left_out(of, candidates, 4, folds=2).tolist() == [0, 1, -1, 2, -1, -1, 3]


def test_many_rows_are_left_out_in_folds_that_classes_are_spread_over() -> None:
    label = torch.cat([torch.zeros(150), torch.ones(75), torch.full((2,), 2.0)]).long()
    of = LogisticRegression(torch.zeros(227, 2, dtype=torch.float64), label, torch.ones(227, dtype=torch.float64), L2)
    group = left_out(of, torch.ones(227, dtype=torch.bool), 3, folds=5)
    for k, size in ((0, 30), (1, 15)):
        assert torch.bincount(group[label == k], minlength=5).tolist() == [size] * 5
    first, second = group[225:].tolist()
    assert first != second
    assert torch.equal(group, left_out(of, torch.ones(227, dtype=torch.bool), 3, folds=5))
    assert not torch.equal(group, left_out(of, torch.ones(227, dtype=torch.bool), 3, folds=5, seed=1))


@pytest.mark.parametrize(("size", "folds"), [(25, 2), (260, 3)])
def test_out_of_fold_counts_are_those_of_a_loop_over_scikit_learn(size: int, folds: int) -> None:
    of = problem(size)
    candidates = torch.arange(size) % 5 != 4
    group = left_out(of, candidates, K, folds)
    expected = np.zeros((K, K), int)
    for number in range(int(group.max()) + 1):
        out = group == number
        verdicts = reference(of, keep=~out).predict(of.rows[out].numpy())
        np.add.at(expected, (of.label[out].numpy(), verdicts), 1)
    matrix, _ = solved(of, tol=1e-6)
    counts, unfinished = out_of_fold(of, matrix, group, 1e-4, 10_000)
    assert unfinished == 0
    assert np.array_equal(counts, expected)
    assert 0 < int(counts.sum()) == int((group >= 0).sum()) <= int(candidates.sum())
    shares = [out_of_fold(of, matrix, group, 1e-4, 10_000, slice(rank, None, 2))[0] for rank in (0, 1)]
    assert torch.equal(shares[0] + shares[1], counts)
    assert out_of_fold(of, matrix, group, 1e-12, 1)[1] > 0
