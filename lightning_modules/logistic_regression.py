"""Multinomial logistic regression on rows of features: its objective, its minimum, its verdicts on rows left out."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

# Iterations between two looks at how far the minimum can be.
_AT_ONCE = 5
# Numbers of a block of logits: the rows of a million images do not need all of theirs at once.
_BLOCK = 2**24
# With so many rows or fewer each of them is left out alone.
_MOST_ALONE = 200


@dataclass(frozen=True)
class LogisticRegression:
    r"""The objective f(W) = sum_i w_i CE(W x_i, y_i) + (l2 / 2) ||W||^2, without intercepts.

    It is that of the low-shot evaluation of Assran et al. (arXiv 2204.07141), and of scikit-learn's
    LogisticRegression(C=1 / l2, fit_intercept=False). f is l2-strongly convex: it has one minimum f*, and

        f(W) - f* <= ||grad f(W)||^2 / (2 l2)

    says how far that can be at most.

    Args:
        rows: x, float64 [N, D].
        label: y, int64 [N].
        weight: w, float64 [N], not negative; 0 leaves a row out.
        l2: Total weight decay, positive.
    """

    rows: Tensor
    label: Tensor
    weight: Tensor
    l2: float

    @torch.no_grad()
    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return f and its gradient [K, D] at W.

        Args:
            matrix: W, float64 [K, D].
        """
        value, gradient = self.l2 / 2 * matrix.square().sum(), self.l2 * matrix
        for part in self._blocks(len(matrix)):
            rows, label, weight = self.rows[part], self.label[part][:, None], self.weight[part][:, None]
            log_p = (rows @ matrix.T).log_softmax(1)
            value = value - (weight * log_p.gather(1, label)).sum()
            error = log_p.exp().scatter_add(1, label, -torch.ones_like(weight))  # p - e_y
            gradient = gradient + (weight * error).T @ rows
        return value, gradient

    def _blocks(self, num_classes: int) -> Iterator[slice]:
        size = max(1, _BLOCK // num_classes)
        return (slice(start, start + size) for start in range(0, len(self.rows), size))


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        value: f.
        gap: What f - f* is at most.
        iterations: Of L-BFGS.
        converged: Whether the gap is within the tolerance.
    """

    value: float
    gap: float
    iterations: int
    converged: bool


def lbfgs(matrix: nn.Parameter) -> LBFGS:
    """The optimiser that `minimise` takes.

    Args:
        matrix: W, float64 [K, D].
    """
    options = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    return LBFGS([matrix], max_iter=_AT_ONCE, max_eval=5 * _AT_ONCE, history_size=20, **options)  # type: ignore[arg-type]  # of mixed types


def minimise(
    problem: LogisticRegression,
    matrix: nn.Parameter,
    optimizer: LBFGS,
    tol: float,
    max_iter: int,
    first_step: Callable[[Callable[[], Tensor]], object] | None = None,
) -> Minimum:
    """Minimise f from where W is until f - f* <= tol f is certain.

    Args:
        problem: f.
        matrix: W, changed in place.
        optimizer: What `lbfgs` made for it; its memory is emptied at the end.
        tol: Relative tolerance.
        max_iter: Most iterations.
        first_step: Called with the closure for the first iterations, instead of the optimiser's `step`.

    Returns:
        Where it ended.
    """

    def closure() -> Tensor:
        value, matrix.grad = problem.value_and_gradient(matrix.detach())
        return value

    step: Callable[[Callable[[], Tensor]], object] = first_step or optimizer.step
    iterations, group = 0, optimizer.param_groups[0]
    while True:
        group["max_iter"] = min(_AT_ONCE, max_iter - iterations)
        before = matrix.detach().clone()
        step(closure)
        step = optimizer.step
        iterations = int(optimizer.state[matrix].get("n_iter", 0))
        value, gradient = problem.value_and_gradient(matrix.detach())
        gap = float(gradient.square().sum() / (2 * problem.l2))
        converged = gap <= tol * float(value)
        # It stands still where float64 ends, or where values are none.
        if converged or iterations >= max_iter or torch.equal(before, matrix) or not math.isfinite(gap):
            break
    # As large as W many times over, and of no use at the minimum: checkpoints would hold it.
    optimizer.state.clear()
    return Minimum(float(value), gap, iterations, converged)


def left_out(problem: LogisticRegression, candidates: Tensor, num_classes: int, folds: int, seed: int = 0) -> Tensor:
    """Choose which rows are left out together, such that every class keeps a row to learn from.

    Up to 200 rows are left out one by one; more in folds that every class is spread over.

    Args:
        problem: The rows and their labels.
        candidates: Which rows may be left out, bool [N].
        num_classes: Classes K.
        folds: Number of folds, at least 2.
        seed: Decides which row is in which fold.

    Returns:
        Number of the group that a row is left out with, from 0, or -1; int64 [N].
    """
    label, used = problem.label.cpu(), (problem.weight > 0).cpu()
    among = candidates.cpu()
    there = torch.bincount(label[used], minlength=num_classes)
    rest = there[label] - used.long()
    rows = (among & (rest > 0)).nonzero().flatten()
    group = torch.full_like(label, -1)
    if len(rows) <= _MOST_ALONE:
        group[rows] = torch.arange(len(rows))
    else:
        shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        by_class = shuffled[label[shuffled].argsort(stable=True)]
        group[by_class] = torch.arange(len(by_class)) % folds
    return group


def out_of_fold(
    problem: LogisticRegression, matrix: Tensor, group: Tensor, tol: float, max_iter: int, turns: slice = slice(None)
) -> tuple[Tensor, int]:
    """Count what rows are taken for by fits without them.

    Args:
        problem: f with all rows.
        matrix: Its minimum, which every fit starts from; float64 [K, D].
        group: Which rows are left out together, see `left_out`.
        tol: Relative tolerance of each fit.
        max_iter: Most iterations of each fit.
        turns: Which of the groups to do, for several processes.

    Returns:
        Counts int64 [K, K], row = label, column = verdict; and how many fits did not converge.
    """
    num_classes = len(matrix)
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=matrix.device)
    group, unfinished = group.to(matrix.device), 0
    for number in range(int(group.max()) + 1 if len(group) else 0)[turns]:
        out = group == number
        own = nn.Parameter(matrix.detach().clone())
        fitted = minimise(replace(problem, weight=problem.weight.masked_fill(out, 0)), own, lbfgs(own), tol, max_iter)
        unfinished += not fitted.converged
        verdict = (problem.rows[out] @ own.detach().T).argmax(1)
        counts += torch.bincount(problem.label[out] * num_classes + verdict, minlength=len(counts))
    return counts.view(num_classes, num_classes), unfinished
