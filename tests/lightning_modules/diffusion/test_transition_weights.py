"""The theory of transition-aware weighting on Gaussian mixtures, where everything is known in closed form."""

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.transition import reverse_transition
from lightning_modules.diffusion.transition_weights import (
    Denoise,
    Others,
    log_transition,
    mixed_estimate,
    reverse_weights,
    transition_weights,
)


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


class Mixture:
    """Class i is N(mean_i, std_i^2) in one dimension, with prior pi; given labels follow T."""

    def __init__(self, mean: list[float], std: list[float], prior: list[float], transition: Tensor) -> None:
        self.mean, self.std, self.prior = (torch.tensor(v, dtype=torch.float64) for v in (mean, std, prior))
        self.transition = transition.double()

    @property
    def num_classes(self) -> int:
        return len(self.mean)

    def log_posterior(self, x: Tensor, sigma: float) -> Tensor:
        """log p(class | x_sigma), [B, K]."""
        noisy = log_normal(x[:, None], self.mean, (self.std**2 + sigma**2).sqrt())
        return (noisy + self.prior.log()).log_softmax(1)

    def denoised(self, x: Tensor, sigma: float) -> Tensor:
        """E[x_0 | x_sigma, class], [B, K]."""
        gain = sigma**2 / (self.std**2 + sigma**2)
        return x[:, None] + gain * (self.mean - x[:, None])

    def noisy_denoised(self, x: Tensor, sigma: float) -> Tensor:
        """E[x_0 | x_sigma, given label], [B, K], by integrating over x_0: nothing of the theorem is used."""
        x_0 = torch.linspace(-12, 12, 4801, dtype=torch.float64)
        of_class = log_normal(x_0[:, None], self.mean, self.std).exp()
        joint = (self.prior * of_class) @ self.transition  # p(x_0, given label)
        likelihood = log_normal(x_0, x[:, None], torch.tensor(sigma)).exp()
        mass = likelihood @ joint
        mean: Tensor = (likelihood @ (x_0[:, None] * joint)) / mass
        return mean


def symmetric(rate: float, num_classes: int) -> Tensor:
    off = torch.full((num_classes, num_classes), rate / (num_classes - 1), dtype=torch.float64)
    return off.fill_diagonal_(1 - rate)


GOLDEN = Mixture([-2.0, 0.0, 2.0], [0.5] * 3, [1 / 3] * 3, symmetric(0.4, 3))
UNEVEN = Mixture(
    [-1.5, 0.2, 1.0, 2.5],
    [0.4, 0.7, 0.3, 0.5],
    [0.1, 0.4, 0.3, 0.2],
    torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.8, 0.1, 0.1], [0.3, 0.0, 0.6, 0.1], [0.05, 0.05, 0.2, 0.7]]),
)


def weights_of(mixture: Mixture, x: Tensor, sigma: float, label: Tensor) -> Tensor:
    return transition_weights(mixture.log_posterior(x, sigma), label, log_transition(mixture.transition))


def looked_up(table: Tensor) -> Denoise:
    """A denoiser that is a table: images are row numbers, [B, 1, 1, 1] -> table[row, label]."""
    return lambda x, _, label: table[x.flatten().long(), label].view(-1, 1, 1, 1)


def rows(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64).view(-1, 1, 1, 1)


def test_golden_values() -> None:
    x = torch.full((3,), 0.5, dtype=torch.float64)
    log_q = GOLDEN.log_posterior(x, 1.0)
    torch.testing.assert_close(
        log_q[0].exp(), torch.tensor([0.0589059673, 0.6493308669, 0.2917631658], dtype=torch.float64)
    )
    weights = weights_of(GOLDEN, x, 1.0, torch.arange(3))
    expected = torch.tensor(
        [
            [0.1580926955, 0.5808945556, 0.2610127489],
            [0.0256262008, 0.8474463955, 0.1269274037],
            [0.0371992344, 0.4100537225, 0.5527470431],
        ]
    )
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)
    mixed = mixed_estimate(looked_up(GOLDEN.denoised(x, 1.0)), rows(3), x, torch.arange(3), weights.double())
    noisy = torch.tensor([0.2646720855, 0.2620819245, 0.9248764938], dtype=torch.float64)
    torch.testing.assert_close(mixed.flatten(), noisy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mixture", [GOLDEN, UNEVEN])
@pytest.mark.parametrize("sigma", [0.1, 0.6, 3.0])
def test_the_weighted_clean_denoisers_are_the_noisy_one(mixture: Mixture, sigma: float) -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)
    noisy = mixture.noisy_denoised(x, sigma)
    for label in range(mixture.num_classes):
        labels = torch.full((41,), label)
        weights = weights_of(mixture, x, sigma, labels).double()
        mixed = mixed_estimate(looked_up(mixture.denoised(x, sigma)), rows(41), x, labels, weights)
        torch.testing.assert_close(mixed.flatten(), noisy[:, label], rtol=1e-5, atol=1e-5)


def test_weights_are_probabilities() -> None:
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)
    for label in range(4):
        weights = weights_of(UNEVEN, x, 0.3, torch.full((50,), label))
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(1), torch.ones(50))
        assert bool((weights[:, UNEVEN.transition[:, label] == 0] == 0).all())


def test_limits_of_the_noise_level() -> None:
    labels = torch.arange(4)
    prior_seen = reverse_transition(UNEVEN.transition, UNEVEN.prior)
    far = weights_of(UNEVEN, torch.zeros(4, dtype=torch.float64), 1e4, labels)
    torch.testing.assert_close(far.double(), prior_seen, rtol=0, atol=1e-3)
    torch.testing.assert_close(reverse_weights(labels, prior_seen), prior_seen.float())
    # With little noise an image tells its class: all weight on it, whatever the label says, if the label is possible.
    separate = Mixture([-6.0, 0.0, 6.0], [0.2] * 3, [1 / 3] * 3, symmetric(0.4, 3))
    near = weights_of(separate, torch.full((3,), 6.0, dtype=torch.float64), 0.01, torch.arange(3))
    torch.testing.assert_close(near, torch.eye(3)[2].expand(3, 3))


def test_an_impossible_pair_of_image_and_label_falls_back_to_the_label() -> None:
    log_q = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    transition = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.75, 0.25], [0.0, 0.25, 0.75]])
    weights = transition_weights(log_q, torch.tensor([1]), log_transition(transition))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.75, 0.25]]))


def test_only_the_given_label_gets_a_gradient() -> None:
    x = torch.linspace(-2, 2, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    table = UNEVEN.denoised(x, 1.0).requires_grad_()
    weights = weights_of(UNEVEN, x, 1.0, labels).double()
    choices: tuple[Others, ...] = ("exact", "sampled")
    for others in choices:
        table.grad = None
        mixed = mixed_estimate(looked_up(table), rows(6), x, labels, weights, others)
        torch.autograd.backward(mixed.sum())
        assert table.grad is not None
        own = weights.gather(1, labels[:, None])
        torch.testing.assert_close(table.grad, torch.zeros_like(table).scatter(1, labels[:, None], own))


def expected_gradient(mixture: Mixture, table: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Semi-gradient of E (sum_i w_i D_i - x_0)^2 over given labels and x_0, at each x; [B, K]."""
    count, classes = len(x), mixture.num_classes
    table = table.clone().requires_grad_()
    labels = torch.arange(classes).repeat_interleave(count)
    many = x.repeat(classes)
    weights = weights_of(mixture, many, sigma, labels).double()
    mixed = mixed_estimate(looked_up(table), rows(count).repeat(classes, 1, 1, 1), many, labels, weights).flatten()
    of_label = (mixture.log_posterior(x, sigma).exp() @ mixture.transition).T.flatten()  # p(given label | x)
    mean = mixture.noisy_denoised(x, sigma).T.flatten()  # the square's gradient is linear in x_0
    torch.autograd.backward((of_label * (mixed**2 - 2 * mixed * mean)).sum())
    assert table.grad is not None
    return table.grad


def test_the_fixed_point_is_the_clean_denoiser() -> None:
    x, sigma = torch.linspace(-3, 3, 25, dtype=torch.float64), 0.7
    at_clean = expected_gradient(UNEVEN, UNEVEN.denoised(x, sigma), x, sigma)
    at_noisy = expected_gradient(UNEVEN, UNEVEN.noisy_denoised(x, sigma), x, sigma)
    assert float(at_clean.abs().max()) < 1e-5
    assert float(at_noisy.abs().max()) > 0.05


def test_the_expected_semi_gradient_is_the_published_one() -> None:
    x, sigma = torch.linspace(-3, 3, 9, dtype=torch.float64), 1.3
    table = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = UNEVEN.log_posterior(x, sigma).exp()
    expected = torch.empty_like(table)
    for i in range(4):
        w = weights_of(UNEVEN, x, sigma, torch.full((9,), i)).double()
        residual = (w * table).sum(1) - UNEVEN.noisy_denoised(x, sigma)[:, i]
        expected[:, i] = 2 * UNEVEN.transition[i, i] * q[:, i] * residual
    torch.testing.assert_close(expected_gradient(UNEVEN, table, x, sigma), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("pairs_at_once", [None, 3])
def test_exact_is_the_loop_over_classes(renormalize: bool, threshold: float, pairs_at_once: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(8, 5, generator=generator).double().softmax(1)
    labels = torch.randint(5, (8,), generator=generator)
    table = torch.randn(8, 5, generator=generator).double()
    expected = torch.zeros(8, dtype=torch.float64)
    for b in range(8):
        kept = [i for i in range(5) if i == labels[b] or weights[b, i] > threshold]
        total = sum(float(weights[b, i]) for i in kept) if renormalize else 1.0
        expected[b] = sum(float(weights[b, i] * table[b, i]) for i in kept) / total
    mixed = mixed_estimate(
        looked_up(table), rows(8), rows(8).flatten(), labels, weights, "exact", threshold, renormalize, pairs_at_once
    )
    torch.testing.assert_close(mixed.flatten(), expected)


def test_sampled_equals_exact_on_average() -> None:
    copies = 40_000
    weights = torch.tensor([[0.1, 0.5, 0.05, 0.35]], dtype=torch.float64)
    table = torch.tensor([[1.0, -2.0, 5.0, 3.0]], dtype=torch.float64)
    label = torch.tensor([0])
    exact = mixed_estimate(looked_up(table), rows(1), torch.ones(1), label, weights)
    torch.manual_seed(0)
    x = torch.zeros(copies, 1, 1, 1, dtype=torch.float64)
    sampled = mixed_estimate(
        looked_up(table), x, torch.ones(copies), label.expand(copies), weights.expand(copies, 4), others="sampled"
    ).flatten()
    error = sampled.std() / copies**0.5
    assert abs(float(sampled.mean() - exact)) < 4 * float(error)
    assert float(error) < 0.02
    # What may come out: the own term, and one other class with all the rest of the weight.
    assert {round(v, 6) for v in sampled.tolist()} == {round(0.1 + 0.9 * v, 6) for v in (-2.0, 5.0, 3.0)}


@pytest.mark.parametrize("others", ["exact", "sampled"])
def test_a_certain_label_costs_no_other_pass(others: Others) -> None:
    calls = []

    def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        calls.append(len(x))
        return x * 0.3 + sigma.view(-1, 1, 1, 1) + label.view(-1, 1, 1, 1)

    x, sigma, labels = torch.randn(4, 1, 2, 2), torch.rand(4), torch.tensor([2, 0, 1, 2])
    weights = transition_weights(torch.randn(4, 3).log_softmax(1), labels, log_transition(torch.eye(3)))
    mixed = mixed_estimate(denoise, x, sigma, labels, weights, others)
    assert calls == [4]
    assert torch.equal(mixed, denoise(x, sigma, labels))


def test_a_pass_without_gradient_is_no_larger_than_the_batch() -> None:
    calls = []

    def denoise(x: Tensor, _: Tensor, label: Tensor) -> Tensor:
        calls.append(len(x))
        return x

    x = torch.zeros(4, 1, 1, 1)
    weights = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(4, 4)
    mixed_estimate(denoise, x, torch.ones(4), torch.tensor([0, 1, 2, 0]), weights)
    assert calls == [4, 4, 4, 4]
    calls.clear()
    mixed_estimate(denoise, x, torch.ones(4), torch.tensor([0, 1, 2, 0]), weights, pairs_at_once=12)
    assert calls == [12, 4]  # before the one with gradient, which fills the memory


def fitted(num_classes: int, rate: float, threshold: float, renormalize: bool, others: Others = "exact") -> Tensor:
    """The table D_i that gradient descent ends at, at infinite noise and with x_0 of mean 1 in every class."""
    transition = symmetric(rate, num_classes)
    table = torch.zeros(1, num_classes, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(num_classes)
    weights = reverse_weights(labels, reverse_transition(transition)).double()
    torch.manual_seed(0)
    for _ in range(60):
        x = torch.zeros(num_classes, 1, 1, 1, dtype=torch.float64)
        mixed = mixed_estimate(
            looked_up(table),
            x,
            torch.ones(num_classes),
            labels,
            weights,
            others=others,
            threshold=threshold,
            renormalize=renormalize,
        )
        table.grad = None
        torch.autograd.backward(((mixed - 1.0) ** 2).sum())
        assert table.grad is not None
        table.data -= 0.5 * table.grad
    return table.detach().flatten()


def test_a_threshold_without_renormalising_inflates_images_with_100_classes() -> None:
    # Every other class weighs 0.4 / 99 < 0.01, so all are dropped and 0.6 D = 1 is what is learnt.
    released = fitted(100, 0.4, threshold=0.01, renormalize=False)
    torch.testing.assert_close(released, torch.full((100,), 1 / 0.6, dtype=torch.float64))
    right: tuple[tuple[Others, float], ...] = (("exact", 0.01), ("exact", 0.0), ("sampled", 0.0))
    for others, threshold in right:
        ours = fitted(100, 0.4, threshold, renormalize=True, others=others)
        torch.testing.assert_close(ours, torch.ones(100, dtype=torch.float64))
