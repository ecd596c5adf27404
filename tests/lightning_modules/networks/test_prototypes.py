"""Prototypes: closed forms of the assignments, their balance, and the pairing of anchors with targets."""

import math

import pytest
import torch

from lightning_modules.networks.prototypes import (
    Prototypes,
    assignment_loss,
    entropy,
    mean_entropy_gap,
    sharpen,
    sinkhorn,
)


def _assignments(rows: int, columns: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, columns, generator=generator)).softmax(1)


def test_prototypes_start_uniform_and_assign_by_the_angle() -> None:
    torch.manual_seed(0)
    prototypes = Prototypes(512, 256, temperature=0.1)
    assert prototypes.weight.abs().max() <= 1 / 16
    assert float(prototypes.weight.std()) == pytest.approx(1 / 16 / math.sqrt(3), rel=0.01)
    z = torch.randn(4, 256)
    naive = [
        torch.stack([torch.dot(a, q) / a.norm() / q.norm() / 0.1 for q in prototypes.weight]).softmax(0) for a in z
    ]
    torch.testing.assert_close(prototypes(z).exp(), torch.stack(naive))
    torch.testing.assert_close(prototypes(7 * z), prototypes(z))


def test_sharpening_divides_the_temperature() -> None:
    cosine = 2 * torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) - 1
    torch.testing.assert_close(sharpen((cosine / 0.1).softmax(1), 0.25), (cosine / 0.025).softmax(1))


def test_sinkhorn_keeps_rows_and_balances_columns() -> None:
    p = _assignments(64, 16)
    before = p.sum(0)
    balanced = sinkhorn(p, 3)
    torch.testing.assert_close(balanced.sum(1), torch.ones(64))
    # Far closer to B / K = 4 than before, and closer with every step.
    gaps = [float((sinkhorn(p, n).sum(0) - 4).abs().max()) for n in (0, 1, 3, 50)]
    assert gaps[0] == pytest.approx(float((before - 4).abs().max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[2] < 0.2 * gaps[0]
    assert gaps[3] < 1e-3


def test_sinkhorn_spreads_a_collapsed_batch_that_keeps_an_order() -> None:
    torch.manual_seed(0)
    p = (torch.tensor([8.0, *[0.0] * 7]) + 0.5 * torch.randn(64, 8)).softmax(1)
    assert set(p.argmax(1).tolist()) == {0}
    assert len(set(sinkhorn(p, 3).argmax(1).tolist())) == 8


def test_sinkhorn_over_two_processes_is_that_of_their_batches_together() -> None:
    p = _assignments(32, 8)
    halves = list(p.chunk(2))
    # Both processes step by step: each is told the other's mean of a step.
    for _ in range(3):
        mean = torch.stack([half.mean(0) for half in halves]).mean(0)
        halves = [sinkhorn(half, 1, lambda _, mean=mean: mean) for half in halves]  # type: ignore[misc]
    torch.testing.assert_close(torch.cat(halves), sinkhorn(p, 3))


def test_the_gap_of_the_mean_entropy() -> None:
    uniform = torch.eye(8).repeat(3, 1)  # every row certain, all prototypes equally often
    assert float(mean_entropy_gap(uniform)) == pytest.approx(0, abs=1e-6)
    collapsed = torch.eye(8)[:1].repeat(24, 1)
    assert float(mean_entropy_gap(collapsed)) == pytest.approx(math.log(8))


def test_the_gap_of_two_processes_and_its_gradient_are_those_of_one_batch() -> None:
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = mean_entropy_gap(logits.softmax(1))
    whole.backward()  # type: ignore[no-untyped-call] # torch's
    expected = logits.grad
    mean = logits.detach().softmax(1).mean(0)
    parts = logits.detach().requires_grad_()
    gaps = [mean_entropy_gap(part.softmax(1), lambda _: mean) for part in parts.chunk(2)]
    torch.testing.assert_close(torch.stack(gaps), whole.detach().expand(2))
    torch.stack(gaps).mean().backward()  # type: ignore[no-untyped-call] # as data-parallel training averages
    torch.testing.assert_close(parts.grad, expected)


def test_anchors_are_paired_with_targets_view_by_view() -> None:
    targets = torch.eye(4)
    sure = (30 * torch.eye(4)).log_softmax(1)
    views = [sure.roll(0, 0), sure, sure]
    view_major = torch.cat(views)
    image_major = torch.stack(views, 1).flatten(0, 1)
    assert float(assignment_loss(view_major, targets)) < 1e-6
    assert float(assignment_loss(image_major, targets)) > 10


def test_the_loss_is_the_mean_over_all_pairs_without_a_gradient_of_the_targets() -> None:
    log_p = _assignments(6, 5, seed=1).log().requires_grad_()
    targets = _assignments(2, 5, seed=2).requires_grad_()
    loss = assignment_loss(log_p, targets)
    naive = [-(targets[i] * log_p[2 * v + i]).sum() for v in range(3) for i in range(2)]
    torch.testing.assert_close(loss, torch.stack(naive).mean())
    loss.backward()  # type: ignore[no-untyped-call] # torch's
    assert targets.grad is None
    assert log_p.grad is not None


def test_the_loss_starts_near_the_log_of_the_number_of_prototypes() -> None:
    torch.manual_seed(0)
    prototypes = Prototypes(1024, 256)
    with torch.no_grad():
        log_p, raw = prototypes(torch.randn(128, 256)), prototypes(torch.randn(128, 256)).exp()
    loss = float(assignment_loss(log_p, sinkhorn(sharpen(raw))))
    # Angles have a deviation of 1/16, so log p one of 1/1.6: half its square on top of ln K.
    assert loss == pytest.approx(math.log(1024) + 0.5 / 1.6**2, abs=0.05)


def test_entropy_of_certain_and_of_uniform_assignments() -> None:
    assert float(entropy(torch.eye(4))) == pytest.approx(0)
    assert float(entropy(torch.full((3, 4), 0.25))) == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prototypes": 1}, "Expected `num_prototypes` >= 2, got 1"),
        ({"temperature": 0.0}, "positive `temperature`"),
    ],
)
def test_impossible_prototypes(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prototypes(**arguments)  # type: ignore[arg-type]
