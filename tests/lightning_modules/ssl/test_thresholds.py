"""Thresholds and weights of pseudo-labels against closed forms, naive loops and limits."""

import math
from collections.abc import Callable

import pytest
import torch
from ssl_logits import logit_host, on_two_ranks
from ssl_toys import ToyHost
from torch import Tensor

from lightning_modules.ssl.banks import newest
from lightning_modules.ssl.thresholds import (
    FixedThreshold,
    FlexThreshold,
    FreeThreshold,
    LossThreshold,
    RelativeThreshold,
    Seen,
    SoftThreshold,
    Threshold,
)
from lightning_modules.ssl.weak_to_strong import WeakToStrong


def seen(probabilities: Tensor, index: Tensor | None = None, labeled: Tensor | None = None) -> Seen:
    labeled = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2]]) if labeled is None else labeled
    return Seen(probabilities, labeled, torch.arange(len(labeled)), index)


def confident(label: Tensor, confidence: float, num_classes: int = 3) -> Tensor:
    rest = (1 - confidence) / (num_classes - 1)
    return torch.full((len(label), num_classes), rest).scatter(1, label[:, None], confidence)


def drawn(size: int, num_classes: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(size, num_classes, generator=generator)).softmax(-1)


def host_of(threshold: Threshold, num_classes: int = 3) -> ToyHost:
    return logit_host(WeakToStrong(threshold), num_classes)


def test_fixed_threshold_and_its_limits() -> None:
    p = torch.tensor([[0.96, 0.02, 0.02], [0.95, 0.05, 0.0], [0.94, 0.06, 0.0]])
    for tau, expected in ((0.95, [1, 1, 0]), (0.0, [1, 1, 1]), (1.1, [0, 0, 0])):
        threshold = FixedThreshold(tau)
        assert threshold(host_of(threshold), seen(p)).tolist() == expected
    assert FixedThreshold().per_class() == {}


def test_newest_is_the_last_of_several() -> None:
    index, valid = torch.tensor([3, 1, 3, 0, 1]), torch.tensor([True, True, True, True, False])
    assert newest(index, 5).tolist() == [3, 4, -1, 2, -1]
    assert newest(index, 5, valid).tolist() == [3, 1, -1, 2, -1]


# ---------------------------------------------------------------- FlexMatch


@pytest.mark.parametrize(("share", "factor"), [(0, 0.0), (1, 0.143), (2, 0.333), (3, 0.6), (4, 1.0)])
def test_flex_thresholds_map_the_learning_effect_convexly(share: int, factor: float) -> None:
    threshold = FlexThreshold(0.95)
    host_of(threshold)
    # beta_1 is share / 4 of class 0's: no image is left, so that nothing warms up.
    threshold.last_label = torch.tensor([0] * 4 + [1] * share)
    assert threshold.thresholds()[:2].tolist() == pytest.approx([0.95, 0.95 * factor], abs=1e-3)
    assert threshold.per_class()["threshold"].equal(threshold.thresholds())


def test_flex_thresholds_start_at_zero_and_warm_up() -> None:
    threshold = FlexThreshold(0.95)
    m = host_of(threshold)
    assert threshold(m, seen(drawn(8), torch.arange(8))).tolist() == [1.0] * 8
    threshold.last_label = torch.tensor([0, 0, 1, -1, -1, -1])
    assert threshold.learning_effect().tolist() == pytest.approx([2 / 3, 1 / 3, 0.0])  # 3 have none
    rising = []
    for number in range(5):
        threshold.last_label = torch.tensor([1] * number + [0] * 4)
        rising.append(threshold.thresholds()[1].item())
    assert rising == sorted(rising)


def test_flex_is_fixmatch_when_all_classes_are_learnt_equally() -> None:
    flex, fixed, p = FlexThreshold(0.6), FixedThreshold(0.6), drawn(24)
    m = host_of(flex)
    flex.last_label = torch.arange(24) % 3
    weights = flex(m, seen(p, torch.arange(24)))
    assert weights.equal(fixed(m, seen(p)))
    assert 0 < weights.sum() < 24


def test_flex_bank_equals_a_naive_loop() -> None:
    threshold = FlexThreshold(0.7)
    m = host_of(threshold)
    bank = [-1] * 24
    for step in range(20):
        p = drawn(10, seed=step)
        index = torch.randint(0, 24, (10,), generator=torch.Generator().manual_seed(step))
        counts = [bank.count(c) for c in range(3)]
        beta = [n / max([*counts, bank.count(-1)]) for n in counts]
        expected = [
            float(max(row) >= 0.7 * beta[row.index(max(row))] / (2 - beta[row.index(max(row))])) for row in p.tolist()
        ]
        assert threshold(m, seen(p, index)).tolist() == expected
        for i, row in zip(index.tolist(), p.tolist(), strict=True):
            if max(row) >= 0.7:
                bank[i] = row.index(max(row))
        assert threshold.last_label.tolist() == bank
    assert set(bank) == {0, 1, 2}


def test_an_unsure_visit_does_not_clear_the_bank() -> None:
    threshold = FlexThreshold(0.95)
    m = host_of(threshold)
    threshold(m, seen(confident(torch.tensor([2]), 0.97), torch.tensor([5])))
    threshold(m, seen(confident(torch.tensor([1]), 0.9), torch.tensor([5])))
    assert threshold.last_label[5] == 2


def test_flex_without_an_index_says_so() -> None:
    threshold = FlexThreshold()
    with pytest.raises(ValueError, match="`index`"):
        threshold(host_of(threshold), seen(drawn(2)))


# ---------------------------------------------------------------- FreeMatch


def test_free_thresholds_are_moving_averages() -> None:
    threshold = FreeThreshold(decay=0.9)
    m = host_of(threshold)
    tau, p, h = torch.tensor(1 / 3), torch.full((3,), 1 / 3), torch.full((3,), 1 / 3)
    for step in range(4):
        q = drawn(12, seed=step)
        weights = threshold(m, seen(q))
        tau = 0.9 * tau + 0.1 * q.amax(-1).mean()
        p = 0.9 * p + 0.1 * q.mean(0)
        h = 0.9 * h + 0.1 * torch.bincount(q.argmax(-1), minlength=3) / 12
        expected = tau * p / p.max()
        torch.testing.assert_close(threshold.per_class()["threshold"], expected)
        torch.testing.assert_close(threshold.histogram, h)
        assert weights.equal((q.amax(-1) >= expected[q.argmax(-1)]).float())


def test_free_has_one_threshold_when_predictions_are_uniform_on_average() -> None:
    threshold = FreeThreshold(decay=0.5)
    m = host_of(threshold)
    threshold(m, seen(confident(torch.arange(3), 0.9)))
    torch.testing.assert_close(threshold.thresholds(), torch.full((3,), 0.5 / 3 + 0.45))


def test_free_threshold_is_never_above_the_highest() -> None:
    threshold = FreeThreshold(decay=0.0, highest=0.95)
    threshold(host_of(threshold), seen(confident(torch.arange(3), 0.99)))
    assert threshold.thresholds().tolist() == pytest.approx([0.95] * 3)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_fairness_is_minus_log_k_at_balance(num_classes: int) -> None:
    threshold = FreeThreshold(fairness=1.0)
    host_of(threshold, num_classes)
    logits = 4 * torch.eye(num_classes)
    value = threshold.penalty(logits, torch.ones(num_classes))
    assert float(value) == pytest.approx(-math.log(num_classes), abs=1e-6)


def test_fairness_equals_the_formula_on_confident_images_only() -> None:
    threshold = FreeThreshold(decay=0.5, fairness=0.01)
    threshold(host_of(threshold), seen(drawn(30, seed=1)))
    logits, weight = 2 * torch.randn(40, 3, generator=torch.Generator().manual_seed(2)), torch.arange(40) % 2
    kept = logits[weight == 1].softmax(-1)
    histogram = torch.bincount(kept.argmax(-1), minlength=3) / len(kept)
    assert (histogram > 0).all()
    wanted, reached = threshold.probabilities / threshold.histogram, kept.mean(0) / histogram
    expected = 0.01 * (wanted / wanted.sum() * (reached / reached.sum()).log()).sum()
    torch.testing.assert_close(threshold.penalty(logits, weight.float()), expected)


def test_fairness_of_an_empty_mask_is_zero_with_a_finite_gradient() -> None:
    threshold = FreeThreshold(fairness=1.0)
    host_of(threshold)
    for weight in (torch.zeros(4), torch.tensor([1.0, 0, 0, 0])):
        logits = torch.randn(4, 3, requires_grad=True)
        value = threshold.penalty(logits, weight)
        assert isinstance(value, Tensor)
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient.isfinite().all()
        assert weight.any() or (value == 0 and not gradient.any())
    assert FreeThreshold(fairness=0.0).penalty(torch.zeros(1, 3), torch.ones(1)) == 0.0


# ---------------------------------------------------------------- SoftMatch


def test_soft_weights_are_one_above_the_mean_and_a_gaussian_below() -> None:
    threshold = SoftThreshold()
    host_of(threshold)
    threshold.mean, threshold.variance = torch.tensor(0.8), torch.tensor(0.01)
    weights = threshold.weights(torch.tensor([1.0, 0.8, 0.75, 0.7]))
    # One standard deviation (0.1) below: exp(-n^2 / 2), n = 2.
    assert weights.tolist() == pytest.approx([1.0, 1.0, math.exp(-0.5), math.exp(-2.0)], rel=1e-4)
    threshold.variance = torch.tensor(1e12)
    assert threshold.weights(torch.rand(9)).tolist() == [1.0] * 9


def test_soft_weights_follow_mean_and_unbiased_variance() -> None:
    threshold = SoftThreshold(decay=0.9)
    m = host_of(threshold)
    assert [threshold.mean.item(), threshold.variance.item()] == pytest.approx([1 / 3, 1.0])
    q = drawn(20)
    weights, confidence = threshold(m, seen(q)), q.amax(-1)
    assert threshold.mean.item() == pytest.approx(0.9 / 3 + 0.1 * confidence.mean().item())
    assert threshold.variance.item() == pytest.approx(0.9 + 0.1 * confidence.var(correction=1).item())
    assert ((weights > 0) & (weights <= 1)).all()
    assert weights[confidence >= threshold.mean].eq(1).all()
    threshold(m, seen(q[:1]))
    assert threshold.variance.isfinite()


# ---------------------------------------------------------------- AdaMatch, Dash


def test_relative_threshold_is_a_share_of_the_labelled_confidence() -> None:
    threshold = RelativeThreshold(0.9)
    p = torch.tensor([[0.64, 0.36, 0.0], [0.62, 0.38, 0.0]])
    # Labelled confidences are 0.8 and 0.6: 0.9 * 0.7 = 0.63.
    assert threshold(host_of(threshold), seen(p)).tolist() == [1.0, 0.0]
    none = RelativeThreshold(0.0)
    assert none(host_of(none), seen(p)).tolist() == [1.0, 1.0]


def test_loss_threshold_shrinks_to_a_confidence_of_exp_minus_rho() -> None:
    threshold = LossThreshold(warmup=0.1, period=0.1)
    m = host_of(threshold)
    labeled = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]])
    p = confident(torch.arange(3).repeat(20), 0.5)
    for m.progress in (0.0, 0.05):
        assert threshold(m, seen(p, labeled=labeled)).sum() == 0
    rho = -(math.log(0.5) + math.log(0.4)) / 2
    assert threshold.initial.item() == pytest.approx(rho)
    for m.progress, k in ((0.15, 0), (0.199, 0), (0.25, 1), (0.85, 7), (1.0, 9)):
        threshold(m, seen(p, labeled=labeled))
        value = max(1.0001 * 1.27**-k * rho, 0.05)
        assert threshold.bound(m.progress).item() == pytest.approx(value)
        for side in (-1e-3, 1e-3):
            sure = confident(torch.arange(3), math.exp(-value) + side)
            assert threshold(m, seen(sure)).tolist() == [float(side > 0)] * 3
    assert threshold.initial.item() == pytest.approx(rho)


def test_loss_threshold_ends_at_its_floor() -> None:
    threshold = LossThreshold(warmup=0.0, period=0.01)
    m = host_of(threshold)
    for m.progress in (0.0, 0.9):
        threshold(m, seen(drawn(4)))
    assert threshold.bound(0.9).item() == pytest.approx(0.05)
    assert threshold(m, seen(confident(torch.tensor([0]), 0.952))).item() == 1
    assert threshold(m, seen(confident(torch.tensor([0]), 0.95))).item() == 0


# ---------------------------------------------------------------- processes, arguments


@pytest.mark.parametrize("make", [FlexThreshold, FreeThreshold, SoftThreshold, lambda: LossThreshold(warmup=1.0)])
def test_memories_of_two_processes_are_those_of_one(make: Callable[[], Threshold]) -> None:
    index = torch.randint(0, 24, (5, 12), generator=torch.Generator().manual_seed(3))

    def work(m: ToyHost, rank: int | None) -> dict[str, Tensor]:
        method = m.method
        assert isinstance(method, WeakToStrong)
        for step in range(5):
            part = slice(None) if rank is None else slice(6 * rank, 6 * rank + 6)
            labeled = drawn(6, seed=9)[part if rank is None else slice(3 * rank, 3 * rank + 3)]
            batch = Seen(drawn(12, seed=step)[part], labeled, torch.zeros(len(labeled)).long(), index[step][part])
            method.threshold(m, batch)
        return dict(method.threshold.state_dict())

    alone = work(host_of(make()), None)
    first, second = on_two_ranks(lambda: WeakToStrong(make()), work)
    fresh = dict(host_of(make()).method.threshold.state_dict())  # type: ignore[union-attr]  # of a Method
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value)
        assert first[name].equal(second[name])
    assert any(not value.equal(fresh[name]) for name, value in alone.items())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FixedThreshold(-0.1), "threshold"),
        (lambda: FlexThreshold(-1), "threshold"),
        (lambda: RelativeThreshold(-1), "threshold"),
        (lambda: FreeThreshold(decay=1.0), "decay"),
        (lambda: FreeThreshold(fairness=-1), "fairness"),
        (lambda: SoftThreshold(sharpness=0), "sharpness"),
        (lambda: LossThreshold(shrink=0.9), "shrink"),
        (lambda: LossThreshold(warmup=2), "warmup"),
        (lambda: LossThreshold(lowest=-1), "lowest"),
    ],
)
def test_thresholds_refuse_what_makes_no_sense(make: Callable[[], Threshold], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()


def test_a_threshold_must_say_what_it_does() -> None:
    threshold = Threshold()
    with pytest.raises(NotImplementedError, match="`forward`"):
        threshold(host_of(threshold), seen(drawn(2)))
    assert threshold.penalty(torch.zeros(1, 3), torch.ones(1)) == 0.0
