"""How labels become wrong: transition matrices T[i, j] = p(given label j | clean label i), known or counted.

Label noise is class-conditional here: given its clean class, the given label of an image does not depend on the image.
What is known about the clean conditional then passes through T, and T has to be invertible to be undone (Patrini et
al., arXiv 1609.03683; for diffusion models Na et al., "Label-Noise Robust Diffusion Models", arXiv 2402.17517,
theorem 3). Symmetric noise is singular at the rate (K - 1) / K, where labels say nothing any more; two classes that are
taken for each other are at the rate 0.5, where they cannot be told apart.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_modules.diffusion.noise import wide

LARGEST_CONDITION = 1000.0
"""Condition number from which a matrix counts as singular: errors of a permille would then be as large as what is
undone. Symmetric noise of 10 classes reaches it at a rate of 0.8991."""


class TransitionMatrix(ABC):
    """A transition matrix for as many classes as the data has."""

    @abstractmethod
    def matrix(self, num_classes: int) -> Tensor:
        """The matrix; what it returns is still to be checked with `require_transition`.

        Args:
            num_classes: Classes K.

        Returns:
            float64 [K, K], rows = clean classes, columns = given labels, rows sum to 1.
        """


def condition_number(matrix: Tensor) -> float:
    """The largest singular value over the smallest: how much an error can grow where a matrix is undone.

    Args:
        matrix: [K, K].

    Returns:
        1 for the identity, infinity for a singular matrix.
    """
    values = torch.linalg.svdvals(matrix.detach().cpu().double())
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf


def require_transition(matrix: Tensor, num_classes: int, argument: str) -> Tensor:
    """Return a transition matrix if it is one that can be undone.

    Args:
        matrix: What may be one.
        num_classes: Classes K that it has to have.
        argument: Name of the argument that it came from, for the error.

    Returns:
        float64 [K, K] on the CPU.

    Raises:
        ValueError: It is not square with K rows, has entries that are no probabilities, rows that do not sum to 1
            within 1e-6, or a condition number of `LARGEST_CONDITION` or more.
    """
    found = matrix.detach().cpu().double()
    if tuple(found.shape) != (num_classes, num_classes):
        msg = (
            f"Expected `{argument}` to be a matrix of {num_classes} x {num_classes} for `num_classes` = {num_classes}, "
            f"got shape {tuple(found.shape)}; give one row for each clean class and one column for each given label."
        )
        raise ValueError(msg)
    if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        msg = (
            f"Expected `{argument}` to hold probabilities, got {float(found.min())} to {float(found.max())}; give "
            "T[i, j] = p(given label j | clean label i)."
        )
        raise ValueError(msg)
    sums = found.sum(1)
    worst = int((sums - 1).abs().argmax())
    if abs(float(sums[worst]) - 1) > 1e-6:
        columns = bool(((found.sum(0) - 1).abs() <= 1e-6).all())
        advice = "its columns do, so transpose it" if columns else "divide each row by its sum"
        msg = f"Expected the rows of `{argument}` to sum to 1, got {float(sums[worst]):.8g} in row {worst}; {advice}."
        raise ValueError(msg)
    condition = condition_number(found)
    if condition >= LARGEST_CONDITION:
        msg = (
            f"Expected an invertible `{argument}`, got one with condition number {condition:.4g} (at most "
            f"{LARGEST_CONDITION:g}): some classes cannot be told apart by their given labels. Symmetric noise is "
            f"singular at the rate {(num_classes - 1) / num_classes:.4g} (K = {num_classes}), two classes taken for "
            "each other at 0.5; lower the rate, or mix the matrix with the identity, 0.9 T + 0.1 I."
        )
        raise ValueError(msg)
    return found


def reverse_transition(matrix: Tensor, prior: Tensor | None = None) -> Tensor:
    """Turn T around with Bayes: S[j, i] = p(clean label i | given label j), rows = given labels.

    Args:
        matrix: T, [K, K].
        prior: Probabilities of the clean classes [K]; None for equal ones. Counts will do.

    Returns:
        float64 [K, K] (float32 on devices without) whose rows sum to 1.

    Raises:
        ValueError: `prior` is not of K positive numbers, or a given label never occurs.
    """
    forward = wide(matrix)
    clean = torch.ones_like(forward[0]) if prior is None else prior.to(forward)
    if clean.shape != forward.shape[:1] or not bool((clean > 0).all()) or not bool(torch.isfinite(clean).all()):
        msg = f"Expected `prior` to be {len(forward)} positive numbers, got {clean.tolist()}; leave out empty classes."
        raise ValueError(msg)
    joint = (forward * (clean / clean.sum())[:, None]).T
    given = joint.sum(1, keepdim=True)
    if not bool((given > 0).all()):
        never = (given[:, 0] <= 0).nonzero().flatten().tolist()
        msg = f"Expected each given label to occur under `matrix`, got columns of zeros for {never}; leave them out."
        raise ValueError(msg)
    return joint / given


def given_log_likelihood(
    log_posterior: Tensor, label: Tensor, log_transition: Tensor, trusted: Tensor | None = None
) -> Tensor:
    """Log-probabilities of given labels, log sum_i q_i T[i, label] (forward correction, Patrini et al. 1609.03683).

    Args:
        log_posterior: log q, the log-probabilities of the clean classes [B, K].
        label: Given labels [B].
        log_transition: log T [K, K]; -inf where T is 0.
        trusted: Labels that are right for certain, whose log-probability is log q_label, bool [B]; None for none.

    Returns:
        [B].
    """
    corrected = torch.logsumexp(log_posterior + log_transition[:, label].T, 1)
    if trusted is None:
        return corrected
    return torch.where(trusted, log_posterior.gather(1, label[:, None])[:, 0], corrected)


def given_log_posterior(log_posterior: Tensor, log_transition: Tensor) -> Tensor:
    """Log-probabilities of all given labels, log sum_i q_i T[i, j].

    Args:
        log_posterior: log q [B, K].
        log_transition: log T [K, K]; -inf where T is 0.

    Returns:
        [B, K].
    """
    return torch.logsumexp(log_posterior[:, :, None] + log_transition, 1)


class IdentityTransition(TransitionMatrix):
    """Given labels are right."""

    def matrix(self, num_classes: int) -> Tensor:
        """Return the identity.

        Args:
            num_classes: Classes K.
        """
        return torch.eye(num_classes, dtype=torch.float64)


class SymmetricTransition(TransitionMatrix):
    """A label is wrong with the same probability in every class, and then any other class equally often.

    T[i, i] = 1 - rate, T[i, j] = rate / (K - 1).

    Args:
        rate: Probability of a wrong label, in [0, (K - 1) / K).

    Raises:
        ValueError: `rate` is no probability.
    """

    def __init__(self, rate: float) -> None:
        self.rate = _probability(rate)

    def matrix(self, num_classes: int) -> Tensor:
        """Return the matrix.

        Args:
            num_classes: Classes K, at least 2.
        """
        clean = torch.eye(num_classes, dtype=torch.float64)
        return (1 - self.rate) * clean + self.rate / (num_classes - 1) * (1 - clean)


class AsymmetricTransition(TransitionMatrix):
    """Some classes are taken for one other class each: T[i, i] = 1 - rate, T[i, pairs[i]] = rate.

    The maps in use for MNIST and CIFAR are known to the data: with `label_noise` there, leave the module's transition
    None, and it takes the data's matrix.

    Args:
        rate: Probability of a wrong label in the classes of `pairs`, in [0, 1].
        pairs: The class that a class is taken for; the others stay right. None takes every class for the next one,
            the last for the first.

    Raises:
        ValueError: `rate` is no probability, or a class is its own pair.
    """

    def __init__(self, rate: float, pairs: dict[int, int] | None = None) -> None:
        self.rate = _probability(rate)
        self.pairs = None if pairs is None else {int(true): int(wrong) for true, wrong in pairs.items()}

    def matrix(self, num_classes: int) -> Tensor:
        """Return the matrix.

        Args:
            num_classes: Classes K.

        Raises:
            ValueError: `pairs` names no class, or a class as its own pair.
        """
        found = torch.eye(num_classes, dtype=torch.float64)
        pairs = {i: (i + 1) % num_classes for i in range(num_classes)} if self.pairs is None else self.pairs
        for true, wrong in pairs.items():
            if not 0 <= true < num_classes or not 0 <= wrong < num_classes or true == wrong:
                msg = (
                    f"Expected `pairs` to map classes from 0 to {num_classes - 1} to other ones, got {true}: {wrong}; "
                    "number the classes from 0, and choose the pairs of this data."
                )
                raise ValueError(msg)
            found[true, true], found[true, wrong] = 1 - self.rate, self.rate
        return found


class FileTransition(TransitionMatrix):
    """A matrix from a file: .csv (K lines of K numbers; # begins a comment), .json (a list of rows) or .npy.

    Args:
        path: The file. Rows are clean classes, columns given labels.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def matrix(self, num_classes: int) -> Tensor:
        """Read the matrix.

        Args:
            num_classes: Classes K; not used, `require_transition` compares.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no table of numbers.
        """
        return _read_table(self.path)


class ConfusionTransition(TransitionMatrix):
    """The matrix that a labelled subset tells: how often images of a clean class were given each label.

    Rows have a Dirichlet prior, and the matrix is the posterior mean,

        T[i, j] = (n[i, j] + prior / K + diagonal_prior * [i = j]) / (n[i] + prior + diagonal_prior),

    so that no entry is exactly 0, and a class without a checked image has labels more often right than wrong: with
    equal entries, the rows of two such classes would be equal, and the matrix singular.

    Args:
        counts: n, K rows (clean) of K numbers (given labels), or a file of it, see FileTransition, or the manifest.json
            of pseudo-labels.
        prior: Images that every row counts as seen before, spread over all labels; not negative.
        diagonal_prior: Images that every row counts as seen before with the right label; not negative.
        kind: What to take from a manifest: labelled images that were held out ("confusion"; few, but true labels), or
            what the module that labelled the images expects of its own labels, its probabilities summed over all
            images ("expected_confusion"; many, but as good as its probabilities are).

    Raises:
        ValueError: A prior is negative.
    """

    def __init__(
        self,
        counts: list[list[float]] | str,
        prior: float = 1.0,
        diagonal_prior: float = 1.0,
        kind: Literal["confusion", "expected_confusion"] = "confusion",
    ) -> None:
        for name, value in (("prior", prior), ("diagonal_prior", diagonal_prior)):
            if not 0 <= value < math.inf:
                msg = f"Expected `{name}` to be at least 0, got {value}; it counts images."
                raise ValueError(msg)
        self.counts = counts
        self.prior = prior
        self.diagonal_prior = diagonal_prior
        self.kind = kind

    def matrix(self, num_classes: int) -> Tensor:
        """Return the posterior mean.

        Args:
            num_classes: Classes K.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: `counts` is not a table of K x K numbers that are not negative, or says nothing of a class and
                neither does a prior.
        """
        counts = (
            _read_table(self.counts, self.kind) if isinstance(self.counts, str) else _table(self.counts, "`counts`")
        )
        if tuple(counts.shape) != (num_classes, num_classes) or not bool((counts >= 0).all()):
            msg = (
                f"Expected `counts` of {num_classes} x {num_classes} images, none negative, for `num_classes` = "
                f"{num_classes}, got shape {tuple(counts.shape)} from {float(counts.min()):g}; count over all classes."
            )
            raise ValueError(msg)
        known = counts + self.prior / num_classes + self.diagonal_prior * torch.eye(num_classes, dtype=torch.float64)
        rows = known.sum(1, keepdim=True)
        if not bool((rows > 0).all()):
            empty = (rows[:, 0] == 0).nonzero().flatten().tolist()
            msg = f"Expected `counts` with images of each class, got none of {empty}; use a positive `prior`."
            raise ValueError(msg)
        return known / rows


def _probability(rate: float) -> float:
    if not 0 <= rate <= 1:
        msg = f"Expected `rate` to be a probability in [0, 1], got {rate}; 40 % wrong labels are 0.4."
        raise ValueError(msg)
    return rate


def _read_table(path: str, kind: str = "confusion") -> Tensor:
    file = Path(path)
    if not file.is_file():
        msg = f"Expected `path` to be a file with a matrix, but there is none at {file}; looked in {Path.cwd()}."
        raise FileNotFoundError(msg)
    suffix = file.suffix.lower()
    if suffix not in _READERS:
        msg = f"Expected `path` to end with {', '.join(_READERS)}, got {file}; write the matrix as one of them."
        raise ValueError(msg)
    try:
        rows = _rows_in(_READERS[suffix](file), kind)
    except (ValueError, OSError) as error:
        msg = f"Expected a table of numbers in {file}, got none: {error}; write one row for each clean class."
        raise ValueError(msg) from error
    return _table(rows, str(file))


def _rows_in(content: object, kind: str) -> object:
    """The table of a file, or what the manifest of pseudo-labels knows of how wrong they are.

    Raises:
        ValueError: The manifest knows nothing of it.
    """
    if not isinstance(content, dict):
        return content
    if content.get(kind) is None:
        msg = f"it has no `{kind}`; the module that labelled the images tells none"
        raise ValueError(msg)
    return content[kind]


_READERS: dict[str, Callable[[Path], object]] = {
    ".csv": partial(np.loadtxt, delimiter=",", ndmin=2),
    ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
    ".npy": partial(np.load, allow_pickle=False),
}


def _table(rows: object, where: str) -> Tensor:
    try:
        found = torch.as_tensor(np.asarray(rows, dtype=np.float64))
    except (TypeError, ValueError) as error:
        msg = f"Expected {where} to be rows of numbers, all of one length: {error}."
        raise ValueError(msg) from error
    if found.ndim != 2 or not found.numel():
        msg = f"Expected {where} to be a table of rows and columns, got shape {tuple(found.shape)}."
        raise ValueError(msg)
    return found
