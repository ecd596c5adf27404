"""DivideMix: the division of clean and noisy labels, its edge cases, and the loss against naive loops."""

import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl.base import Batch
from lightning_modules.ssl.dividemix import DivideMix, clean_probability, divide


def _host(method: DivideMix | None = None, epoch: int = 10) -> tuple[ToyHost, DivideMix]:
    torch.manual_seed(0)
    method = method or DivideMix()
    host = ToyHost(method, network=ToyNet(), num_labeled=24)
    host.current_epoch = epoch
    host.batch_number = 10 * epoch + 5
    return host, method


@pytest.mark.parametrize("noise", [0.2, 0.5, 0.8, 0.9])
def test_mixture_tells_clean_from_noisy_losses(noise: float) -> None:
    torch.manual_seed(0)
    size = 4000
    noisy = torch.arange(size) < noise * size
    low = torch.distributions.Gamma(1.0, 20.0).sample((size,))
    losses = torch.where(noisy, 0.75 + 0.12 * torch.randn(size), low).clamp(0, 1)
    w = clean_probability(losses)
    assert ((w > 0.5) == ~noisy).float().mean() >= 0.99
    assert w.dtype == losses.dtype
    assert torch.equal(w, clean_probability(losses))


@pytest.mark.parametrize("losses", [torch.zeros(10), torch.full((5,), 0.3), torch.zeros(1), torch.zeros(0)])
def test_equal_losses_speak_against_no_label(losses: Tensor) -> None:
    assert torch.equal(clean_probability(losses), torch.ones(len(losses)))


def test_a_division_leaves_every_class_something() -> None:
    w = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8, 0.05])
    label = torch.tensor([0, 0, 0, 1, 1, 4])
    assert divide(w, label, 0.5, 0).tolist() == [False, False, False, True, True, False]
    assert divide(w, label, 0.5, 2).tolist() == [False, True, True, True, True, True]
    assert divide(torch.zeros(6), label, 0.5, 1).tolist() == [True, False, False, True, False, True]


def test_each_network_judges_the_given_labels_by_its_own_losses() -> None:
    host, method = _host()
    method.epoch_start(host)
    for row, network in enumerate(method.networks(host)):
        network.eval()
        loss = F.cross_entropy(network(host.images), host.labels, reduction="none").detach()
        network.train()
        scaled = (loss - loss.min()) / (loss.max() - loss.min())
        torch.testing.assert_close(method.history[row, 0], scaled)
        torch.testing.assert_close(method.w[row], clean_probability(scaled))
        assert torch.equal(method.clean[row], divide(method.w[row], host.labels, 0.5, 1))
    assert not torch.equal(method.w[0], method.w[1])
    share = [float(method.clean[:, host.labels == c].float().mean()) for c in range(3)]
    assert method.per_class()["trusted"].tolist() == pytest.approx(share)


def test_memory_averages_the_last_epochs() -> None:
    host, method = _host(DivideMix(memory=2))
    seen = []
    for step in range(3):
        method.epoch_start(host)
        seen.append(method.history[0, step % 2].clone())
        with torch.no_grad():
            for parameter in host.network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    torch.testing.assert_close(method.w[0], clean_probability((seen[1] + seen[2]) / 2))
    assert not torch.equal(method.w[0], clean_probability(seen[2]))


def test_no_division_in_the_warmup() -> None:
    host, method = _host(epoch=9)
    method.epoch_start(host)
    assert int(method.num_sweeps) == 0
    assert bool(method.clean.all())


def test_a_network_trains_on_the_division_of_the_other() -> None:
    host, method = _host()
    labeled, _ = toy_batch(host)
    method.w[0], method.clean[0] = 0.0, False
    guesses = method.guesses(host, labeled)
    given = F.one_hot(labeled["label"], 3).float()
    first, trusted = method.targets(0, labeled, guesses)
    torch.testing.assert_close(first, given)  # w = 1: the label, which sharpening leaves
    assert bool(trusted.all())
    second, trusted = method.targets(1, labeled, guesses)
    assert not bool(trusted.any())
    both = guesses.mean(0).square()
    torch.testing.assert_close(second, both / both.sum(1, keepdim=True))


def test_refinement_is_a_mean_of_label_and_own_guess() -> None:
    host, method = _host()
    labeled, _ = toy_batch(host)
    guesses = torch.stack([torch.full((6, 3), 1 / 3), torch.tensor([0.5, 0.3, 0.2]).repeat(6, 1)])
    method.w[1] = 0.0
    own, _ = method.targets(0, labeled, guesses)
    torch.testing.assert_close(own, guesses[0])
    method.w[1] = 0.4
    refined, _ = method.targets(0, labeled, guesses)
    expected = (0.4 * F.one_hot(labeled["label"], 3) + 0.6 / 3).square()
    torch.testing.assert_close(refined, expected / expected.sum(1, keepdim=True))


def test_guesses_are_made_in_evaluation_mode_over_both_views() -> None:
    host, method = _host()
    labeled, _ = toy_batch(host)
    before = {k: v.clone() for n in method.networks(host) for k, v in n.state_dict().items() if "running" in k}
    found = method.guesses(host, labeled)
    for row, network in enumerate(method.networks(host)):
        assert network.training
        network.eval()
        mean = (network(labeled["image"]).softmax(-1) + network(labeled["weak_2"]).softmax(-1)) / 2
        torch.testing.assert_close(found[row], mean)
        after = {k: v for k, v in network.state_dict().items() if "running" in k}
        assert all(torch.equal(after[k], before[k]) for k in after)
    assert not found.requires_grad


def _divided(host: ToyHost, method: DivideMix) -> Batch:
    labeled, _ = toy_batch(host)
    method.w.copy_(torch.rand_like(method.w))
    method.clean.copy_(method.w > 0.5)
    assert 0 < int(method.clean[1, labeled["index"]].sum()) < 6
    return labeled


def test_loss_equals_naive_loop() -> None:
    host, method = _host(epoch=14)
    labeled = _divided(host, method)
    guesses = method.guesses(host, labeled)
    torch.manual_seed(3)
    loss = method.player_loss(host, host.network, 0, labeled, guesses)
    torch.manual_seed(3)
    order = torch.randperm(12)
    drawn = float(torch.distributions.Beta(4.0, 4.0).sample((1,)))
    lam = max(drawn, 1 - drawn)
    target, clean = method.targets(0, labeled, guesses)
    images = torch.cat([labeled["image"], labeled["weak_2"]])
    mixed = torch.stack([lam * images[i] + (1 - lam) * images[order[i]] for i in range(12)])
    p = host.network(mixed).softmax(-1)
    lx, lu = [], []
    for i in range(12):
        goal = lam * target[i % 6] + (1 - lam) * target[int(order[i]) % 6]
        if clean[i % 6]:
            lx.append(-(goal * p[i].log()).sum())
        else:
            lu.append((p[i] - goal).square().sum() / 3)
    torch.testing.assert_close(loss.sup, torch.stack(lx).sum() / 12)
    torch.testing.assert_close(loss.unsup, 4.5 / 16 * torch.stack(lu).sum() / 12)
    torch.testing.assert_close(loss.aux, -(p.mean(0) * 3).log().mean())


@pytest.mark.parametrize("trusted", [True, False])
def test_an_empty_part_of_a_batch_costs_nothing(trusted: bool) -> None:
    host, method = _host(epoch=30)
    labeled, _ = toy_batch(host)
    method.clean[:] = trusted
    for _, loss in method.turns(host, labeled, {}):
        assert isinstance(loss.sup, Tensor)
        assert isinstance(loss.unsup, Tensor)
        assert (float(loss.unsup) == 0) == trusted
        assert (float(loss.sup) == 0) != trusted
        assert math.isfinite(float(loss.total(25.0)))
        loss.total(25.0).backward()  # type: ignore[no-untyped-call]


def test_an_epoch_whose_labels_all_look_wrong_still_trains() -> None:
    host, method = _host(DivideMix(threshold=1.0, min_clean=2), epoch=30)
    method.epoch_start(host)
    assert all(int(method.clean[row][host.labels == c].sum()) >= 2 for row in range(2) for c in range(3))


def test_gradients_reach_their_own_player_only() -> None:
    host, method = _host(epoch=20)
    labeled = _divided(host, method)
    networks = method.players(host)
    for name, loss in method.turns(host, labeled, {}):
        assert isinstance(loss.unsup, Tensor)
        for other, network in networks.items():
            gradient = torch.autograd.grad(loss.unsup, list(network.parameters()), allow_unused=True, retain_graph=True)
            if other == name:
                assert sum(float(g.abs().sum()) for g in gradient if g is not None) > 0
            else:
                assert all(g is None for g in gradient)


def test_warmup_is_cross_entropy_with_the_given_labels() -> None:
    host, method = _host(DivideMix(confidence_penalty=True), epoch=0)
    labeled, _ = toy_batch(host)
    for (name, loss), network in zip(method.turns(host, labeled, {}), method.networks(host), strict=True):
        assert name in "ab"
        logits = network(labeled["image"])
        torch.testing.assert_close(loss.sup, F.cross_entropy(logits, labeled["label"]))
        p = logits.softmax(-1)
        torch.testing.assert_close(loss.aux, (p * p.log()).sum(-1).mean())
        assert loss.unsup == 0


def test_unlabelled_loss_grows_after_the_warmup() -> None:
    host, method = _host()
    for batch, expected in ((0, 0), (99, 0), (100, 0), (180, 0.5), (260, 1), (1000, 1)):
        host.batch_number = batch
        assert method.growth(host) == pytest.approx(expected)
    assert DivideMix(ramp_epochs=0).growth(host) == 1


def test_a_class_that_a_network_has_given_up_is_pulled_back() -> None:
    host, method = _host()
    labeled, _ = toy_batch(host)
    with torch.no_grad():
        for network in method.networks(host):
            cast("ToyNet", network).head.bias.copy_(torch.tensor([0.0, -60.0, 0.0]))
    loss = method.player_loss(host, host.network, 0, labeled, method.guesses(host, labeled))
    assert isinstance(loss.aux, Tensor)
    (gradient,) = torch.autograd.grad(loss.aux, cast("ToyNet", host.network).head.bias)
    assert float(gradient[1]) == pytest.approx(-1 / 3, abs=1e-3)


def test_predictions_are_the_sum_of_both_networks() -> None:
    host, method = _host()
    a, b = method.networks(host)
    a.eval()
    b.eval()
    predictor = method.predictor(host)
    assert not predictor.training
    torch.testing.assert_close(predictor(host.images), a(host.images) + b(host.images))


def test_players_are_two_networks_with_weights_of_their_own() -> None:
    host, method = _host()
    a, b = method.players(host).values()
    assert a is host.network
    assert b is method.players(host)["b"]
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    given: nn.Module = ToyNet(width=8)
    assert _host(DivideMix(second=given))[1].networks(host)[1] is given


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`memory` >= 1"):
        DivideMix(memory=0)
    with pytest.raises(ValueError, match="`alpha` > 0"):
        DivideMix(alpha=0.0)
    with pytest.raises(RuntimeError, match="set up"):
        DivideMix().networks(ToyHost(DivideMix()))
