"""Transition matrices: limits, condition numbers, files, counts, the learned one, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_modules import (
    AsymmetricTransition,
    ConfusionTransition,
    FileTransition,
    IdentityTransition,
    LearnedTransition,
    SymmetricTransition,
    TransitionMatrix,
)
from lightning_modules.diffusion.learned_transition import log_volume
from lightning_modules.diffusion.transition import (
    condition_number,
    given_log_likelihood,
    given_log_posterior,
    require_transition,
    reverse_transition,
)

MNIST = {2: 7, 3: 8, 5: 6, 6: 5}
CIFAR10 = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


def some_transition(classes: int, seed: int = 0) -> Tensor:
    """A matrix without structure whose diagonal dominates."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(classes, classes, generator=generator, dtype=torch.float64) + 2 * torch.eye(classes)
    return raw / raw.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("transition", "expected"),
    [
        (IdentityTransition(), 1.0),
        (SymmetricTransition(0.0), 1.0),
        (SymmetricTransition(0.2), 9 / 7),
        (SymmetricTransition(0.4), 1.8),
        (SymmetricTransition(0.8), 9.0),
        (AsymmetricTransition(0.2, MNIST), 1.7449),
        (AsymmetricTransition(0.4, MNIST), 5.5373),
        (AsymmetricTransition(0.2, CIFAR10), 1.7449),
        (AsymmetricTransition(0.4, CIFAR10), 5.5373),
    ],
)
def test_condition_numbers_of_ten_classes(transition: TransitionMatrix, expected: float) -> None:
    found = require_transition(transition.matrix(10), 10, "transition")
    assert found.dtype == torch.float64
    assert condition_number(found) == pytest.approx(expected, abs=5e-5)


def test_entries() -> None:
    assert torch.equal(IdentityTransition().matrix(3), torch.eye(3, dtype=torch.float64))
    symmetric = SymmetricTransition(0.3).matrix(4).tolist()
    assert symmetric[2] == pytest.approx([0.1, 0.1, 0.7, 0.1])
    assert AsymmetricTransition(0.3, {0: 2}).matrix(3).tolist() == [[0.7, 0.0, 0.3], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert AsymmetricTransition(0.25).matrix(3).tolist() == [[0.75, 0.25, 0.0], [0.0, 0.75, 0.25], [0.25, 0.0, 0.75]]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (
            SymmetricTransition(0.9).matrix(10),
            r"invertible `T`, .* rate 0.9 \(K = 10\).* mix the matrix",
        ),
        (AsymmetricTransition(0.5, {0: 1, 1: 0}).matrix(10), r"got one with condition number (inf|\d\.\d+e\+1\d)"),
        (torch.eye(9), r"10 x 10 for `num_classes` = 10, got shape \(9, 9\)"),
        (torch.eye(10) * 1.5 - 0.05, "hold probabilities, got -0.05"),
        (torch.eye(10) * math.nan, "hold probabilities, got nan"),
        (torch.eye(10) * 0.75, "rows of `T` to sum to 1, got 0.75 in row 0; divide each row by its sum"),
        (AsymmetricTransition(0.4, MNIST).matrix(10).T, "got 0.6 in row 2; its columns do, so transpose it"),
    ],
)
def test_what_is_no_transition_matrix(matrix: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_transition(matrix, 10, "T")


def test_near_singularity_and_back() -> None:
    with pytest.raises(ValueError, match=r"condition number 9000 \(at most 1000\)"):
        require_transition(SymmetricTransition(0.8999).matrix(10), 10, "transition")
    mixed = 0.9 * SymmetricTransition(0.9).matrix(10) + 0.1 * torch.eye(10, dtype=torch.float64)
    assert condition_number(require_transition(mixed, 10, "transition")) == pytest.approx(10)


def test_reverse_is_bayes() -> None:
    matrix, prior = some_transition(4), torch.tensor([4.0, 3.0, 2.0, 1.0])
    found = reverse_transition(matrix, prior)
    for j in range(4):
        weights = [float(matrix[i, j] * prior[i]) for i in range(4)]
        assert found[j].tolist() == pytest.approx([w / sum(weights) for w in weights])
    # Symmetric noise of classes of one size is its own reverse.
    symmetric = SymmetricTransition(0.4).matrix(10)
    torch.testing.assert_close(reverse_transition(symmetric), symmetric)
    with pytest.raises(ValueError, match="`prior` to be 4 positive numbers"):
        reverse_transition(matrix, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"columns of zeros for \[1\]"):
        reverse_transition(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("kind", ["csv", "json", "npy"])
def test_files(tmp_path: Path, kind: str) -> None:
    matrix = some_transition(3)
    file = tmp_path / f"T.{kind}"
    if kind == "csv":
        file.write_text("# clean in rows\n" + "\n".join(",".join(map(repr, row)) for row in matrix.tolist()))
    elif kind == "json":
        file.write_text(json.dumps(matrix.tolist()))
    else:
        np.save(file, matrix.numpy())
    assert torch.equal(FileTransition(str(file)).matrix(3), matrix)


def test_files_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none at missing\.csv"):
        FileTransition("missing.csv").matrix(3)
    for name, text, message in (
        ("a.txt", "1", "end with .csv, .json, .npy"),
        ("a.csv", "cat,dog", "table of numbers in .*a.csv"),
        ("a.json", "[[1, 0], [1]]", "rows of numbers, all of one length"),
        ("b.json", "{", "table of numbers"),
        ("c.json", "[1, 2]", r"rows and columns, got shape \(2,\)"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            FileTransition(str(tmp_path / name)).matrix(2)
    np.save(tmp_path / "a.npy", np.array([{"not": "numbers"}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        FileTransition(str(tmp_path / "a.npy")).matrix(2)


def test_counts_and_their_prior(tmp_path: Path) -> None:
    counts = [[8.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]]
    found = ConfusionTransition(counts, prior=0.6, diagonal_prior=2.0).matrix(3)
    for i, row in enumerate(counts):
        expected = [(n + 0.2 + 2.0 * (i == j)) / (sum(row) + 2.6) for j, n in enumerate(row)]
        assert found[i].tolist() == pytest.approx(expected)
    require_transition(found, 3, "transition")
    # Many images outweigh the prior.
    true = some_transition(3)
    many = ConfusionTransition((1e9 * true).tolist()).matrix(3)
    torch.testing.assert_close(many, true, atol=1e-8, rtol=0)
    (tmp_path / "n.json").write_text(json.dumps(counts))
    assert torch.equal(ConfusionTransition(str(tmp_path / "n.json"), 0.6, 2.0).matrix(3), found)
    manifest = {"kind": "pseudo_labels", "confusion": counts, "expected_confusion": (4 * true).tolist()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    expected_by_module = ConfusionTransition(str(tmp_path / "manifest.json"), 0.0, 0.0, "expected_confusion").matrix(3)
    torch.testing.assert_close(expected_by_module, true)
    assert torch.equal(ConfusionTransition(str(tmp_path / "manifest.json"), 0.6, 2.0).matrix(3), found)
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "pseudo_labels", "confusion": None}))
    with pytest.raises(ValueError, match="has no `confusion`"):
        ConfusionTransition(str(tmp_path / "manifest.json")).matrix(3)
    with pytest.raises(ValueError, match=r"got none of \[1\]; use a positive `prior`"):
        ConfusionTransition(counts, prior=0.0, diagonal_prior=0.0).matrix(3)
    with pytest.raises(ValueError, match="`counts` of 4 x 4 images"):
        ConfusionTransition(counts).matrix(4)
    with pytest.raises(ValueError, match="none negative"):
        ConfusionTransition([[1.0, -1.0], [0.0, 1.0]]).matrix(2)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"`rate` to be a probability in \[0, 1\], got 1.1"):
        SymmetricTransition(1.1)
    with pytest.raises(ValueError, match="classes from 0 to 3 to other ones, got 3: 4"):
        AsymmetricTransition(0.2, {3: 4}).matrix(4)
    with pytest.raises(ValueError, match="`diagonal_prior` to be at least 0"):
        ConfusionTransition([[1.0]], diagonal_prior=-1.0)
    with pytest.raises(ValueError, match="`volume_weight` to be at least 0"):
        LearnedTransition(volume_weight=-1.0)
    with pytest.raises(ValueError, match="positive `lr_scale`"):
        LearnedTransition(lr_scale=0.0)
    with pytest.raises(ValueError, match="`freeze_after` to be at least 0"):
        LearnedTransition(freeze_after=-1)


# ---------------------------------------------------------------- likelihoods


def test_likelihood_of_given_labels_is_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    log_q = torch.randn(6, 4, generator=generator).log_softmax(1)
    matrix = AsymmetricTransition(0.3, {0: 1, 2: 3}).matrix(4)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    found = given_log_likelihood(log_q, label, matrix.log().float())
    everything = given_log_posterior(log_q, matrix.log().float())
    for b in range(6):
        for j in range(4):
            expected = math.log(sum(math.exp(float(log_q[b, i])) * float(matrix[i, j]) for i in range(4)))
            assert float(everything[b, j]) == pytest.approx(expected, abs=1e-6)
            if j == int(label[b]):
                assert float(found[b]) == pytest.approx(expected, abs=1e-6)


def test_trusted_labels_are_not_corrected() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 4, generator=generator, requires_grad=True)
    log_t = AsymmetricTransition(0.3, {0: 1, 2: 3}).matrix(4).log().float().requires_grad_()
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    trusted = torch.tensor([True, False, False, True, True, False])
    log_q = logits.log_softmax(1)
    found = given_log_likelihood(log_q, label, log_t, trusted)
    corrected = given_log_likelihood(log_q, label, log_t)
    for b in range(6):
        expected = log_q[b, label[b]] if trusted[b] else corrected[b]
        assert float(found[b]) == float(expected)
    nobody = given_log_likelihood(log_q, label, log_t, torch.zeros(6, dtype=torch.bool))
    assert torch.equal(nobody, corrected)
    of_logits, of_t = torch.autograd.grad(found.sum(), (logits, log_t), retain_graph=True)
    assert bool(torch.isfinite(of_logits).all())
    # A learned matrix learns from the others alone.
    (others,) = torch.autograd.grad(corrected[~trusted].sum(), log_t)
    torch.testing.assert_close(of_t, others)


def test_the_identity_gives_cross_entropy_and_its_gradient() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    label = torch.arange(8) % 5
    log_t = IdentityTransition().matrix(5).log().float()
    loss = -given_log_likelihood(logits.log_softmax(1), label, log_t).mean()
    plain = nn.functional.cross_entropy(logits, label)
    assert float(loss) == pytest.approx(float(plain), abs=1e-6)
    (mine,), (theirs,) = torch.autograd.grad(loss, logits), torch.autograd.grad(plain, logits)
    torch.testing.assert_close(mine, theirs)


def test_sure_classifiers_give_no_nan() -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    log_t = AsymmetricTransition(0.3, {0: 1}).matrix(3).log().float()
    loss = -given_log_likelihood(logits.log_softmax(1), torch.tensor([2]), log_t).sum()
    assert float(loss) == pytest.approx(500.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[1.0, 0.0, -1.0]]


# ---------------------------------------------------------------- learned


@pytest.mark.parametrize(("classes", "diagonal"), [(2, 2 / 3), (3, 0.5), (10, 0.48243), (100, 0.48243)])
def test_the_start_is_alike_for_any_number_of_classes(classes: int, diagonal: float) -> None:
    found = LearnedTransition().matrix(classes)
    torch.testing.assert_close(found.diagonal(), torch.full((classes,), diagonal).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(classes).double())


def test_the_released_start_and_formula() -> None:
    learned = LearnedTransition(init=-2.0)
    assert float(learned.matrix(100)[0, 0]) == pytest.approx(0.0781, abs=5e-5)
    with torch.no_grad():
        learned.raw.copy_(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)) * 4)
    own = torch.eye(100, dtype=torch.float64)
    raw = own + (1 - own) * learned.raw.double().sigmoid()
    torch.testing.assert_close(learned.matrix(100), raw / raw.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="for `num_classes` = 10, got one for 100"):
        learned.matrix(10)


def test_the_logarithm_survives_an_entry_that_goes_to_zero() -> None:
    learned = LearnedTransition(init=-200.0)
    learned.reset_classes(3)
    log_t = learned.log_matrix().float()
    (gradient,) = torch.autograd.grad(log_t.sum(), learned.raw)
    assert bool(torch.isfinite(log_t).all())
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("swapped", [False, True])
def test_gradient_of_the_volume_is_a_finite_difference(swapped: bool) -> None:
    """Swapped rows make the determinant negative, where log(det) is NaN."""
    matrix = some_transition(4)[[1, 0, 2, 3] if swapped else [0, 1, 2, 3]].requires_grad_()
    assert (float(torch.linalg.det(matrix.detach())) < 0) == swapped
    (gradient,) = torch.autograd.grad(log_volume(matrix), matrix)
    for i, j in ((0, 0), (1, 3), (2, 1)):
        step = torch.zeros(4, 4, dtype=torch.float64)
        step[i, j] = 1e-6
        up, down = (math.log(abs(float(torch.linalg.det(matrix.detach() + s)))) for s in (step, -step))
        assert float(gradient[i, j]) == pytest.approx((up - down) / 2e-6, rel=1e-6)


def test_the_penalty_is_the_weighted_volume() -> None:
    learned = LearnedTransition(volume_weight=0.5)
    volume = math.log(abs(float(torch.linalg.det(learned.matrix(5).detach()))))
    assert float(learned.penalty()) == pytest.approx(0.5 * volume)
    assert float(log_volume(torch.eye(4, dtype=torch.float64))) == 0.0
