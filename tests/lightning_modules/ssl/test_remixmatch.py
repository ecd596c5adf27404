"""ReMixMatch: anchoring, alignment, rotations, and the loss against a naive loop."""

import copy
import math

import pytest
import torch
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl import mixing
from lightning_modules.ssl.base import Views
from lightning_modules.ssl.remixmatch import ReMixMatch, rotated
from lightning_modules.ssl_data import LearnsAugmentation


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def cross_entropies(logits: Tensor, target: Tensor) -> list[float]:
    """-sum target log softmax of each row, in plain Python."""
    found = []
    for row, goal in zip(logits.tolist(), target.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(z) for z in row))
        found.append(sum(q * (normaliser - z) for q, z in zip(goal, row, strict=True)))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_alignment_follows_the_paper_and_sharpening_comes_after_it() -> None:
    host = ToyHost(ReMixMatch(temperature=0.5, alpha=0.0, rotation_weight=0.0))
    labeled, unlabeled = toy_batch(host)
    host.method.fit_start(host)
    p = copy.deepcopy(host.network)(unlabeled["weak"]).softmax(1).detach()
    # The first batch of the queue is its whole mean; the labels of the toy are balanced.
    aligned = p * (1 / 3) / p.mean(0)
    aligned = aligned / aligned.sum(1, keepdim=True)
    q = aligned.square() / aligned.square().sum(1, keepdim=True)
    net = copy.deepcopy(host.network)
    size, ratio = len(labeled["label"]), len(p)
    logits = net(torch.cat([labeled["image"], unlabeled["weak"], unlabeled["strong"], unlabeled["strong_2"]]))
    sup = mean(cross_entropies(logits[:size], mixing.one_hot(labeled["label"], 3)))
    match = mean(cross_entropies(logits[size:], torch.cat([q, q, q])))
    assert len(logits) == size + 3 * ratio
    unmixed = mean(cross_entropies(copy.deepcopy(host.network)(unlabeled["strong"]), q))
    loss = host.method.loss(host, labeled, unlabeled)
    assert float(loss.sup) == pytest.approx(sup, rel=1e-4)
    assert float(loss.unsup) == pytest.approx(1.5 * match + 0.5 * unmixed, rel=1e-3)
    assert loss.aux == 0.0
    assert loss.guess is not None
    torch.testing.assert_close(loss.guess.confidence, aligned.amax(1), rtol=1e-3, atol=1e-4)


def test_guesses_are_aligned_to_the_frequencies_of_the_labels() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2] + [0] * 16)
    for target, expected in (("labeled", [0.5, 0.375, 0.125]), ("uniform", [1 / 3] * 3)):
        method = ReMixMatch(target=target)  # type: ignore[arg-type]  # a Literal in a loop
        host = ToyHost(method, labels=labels, num_labeled=8)
        method.fit_start(host)
        host.method.loss(host, *toy_batch(host))
        torch.testing.assert_close(method.alignment.target, torch.tensor(expected))


def test_labels_and_guesses_are_mixed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spied(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        seen.append((images, targets))
        return mixing.mixup(images, targets, alpha)

    monkeypatch.setattr("lightning_modules.ssl.remixmatch.mixup", spied)
    host = ToyHost(ReMixMatch(num_strong=3))
    labeled, unlabeled = toy_batch(host)
    host.method.loss(host, labeled, unlabeled)
    ((images, targets),) = seen
    views = [unlabeled[key] for key in ("weak", "strong", "strong_2", "strong_3")]
    assert torch.equal(images, torch.cat([labeled["image"], *views]))
    guesses = targets[len(labeled["label"]) :].chunk(4)
    assert all(torch.equal(guesses[0], other) for other in guesses[1:])
    assert not targets.requires_grad


def test_rotations_can_be_undone() -> None:
    image = torch.rand(10, 3, 4, 4)
    turned, turns = rotated(image)
    assert turns.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    for before, after, turn in zip(image, turned, turns.tolist(), strict=True):
        assert torch.equal(after.rot90(-turn, (1, 2)), before)
        assert torch.equal(after, before) == (turn == 0)
    corner = torch.zeros(4, 1, 2, 2)
    corner[:, 0, 0, 0] = 1
    # Counter-clockwise: upper left, lower left, lower right, upper right.
    assert rotated(corner)[0].flatten(1).argmax(1).tolist() == [0, 2, 3, 1]


def test_other_images_cannot_be_turned() -> None:
    with pytest.raises(ValueError, match="square images"):
        rotated(torch.rand(4, 3, 4, 5))


def test_a_network_that_does_not_embed_is_refused_for_rotations_only() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    with pytest.raises(TypeError, match="ReMixMatch"):
        ToyHost(ReMixMatch(), network)
    host = ToyHost(ReMixMatch(rotation_weight=0.0), network)
    assert float(host.method.loss(host, *toy_batch(host)).sup) > 0


def gradients(module: nn.Module, value: Tensor | float) -> float:
    found = torch.autograd.grad(torch.as_tensor(value), list(module.parameters()), retain_graph=True, allow_unused=True)
    return sum(float(g.abs().sum()) for g in found if g is not None)


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_each_term_reaches_what_it_trains(mixed_precision: bool) -> None:
    images = torch.rand(24, 2, 3, 3)
    host = ToyHost(ReMixMatch(), ToyNet(18), images=images)
    labeled, unlabeled = toy_batch(host)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision, cache_enabled=False):
        loss = host.method.loss(host, labeled, unlabeled)
    network = host.network
    assert isinstance(network, ToyNet)
    for term in (loss.sup, loss.unsup):
        assert gradients(network.body, term) > 0
        assert gradients(network.head, term) > 0
        assert gradients(host.method, term) == 0
    assert gradients(network.body, loss.aux) > 0
    assert gradients(network.head, loss.aux) == 0
    assert gradients(host.method, loss.aux) > 0


def test_no_gradient_flows_through_the_weak_view_into_guesses() -> None:
    host = ToyHost(ReMixMatch(alpha=0.0, match_weight=0.0, rotation_weight=0.0))
    labeled, unlabeled = toy_batch(host)
    weak = unlabeled["weak"].clone().requires_grad_()
    strong = unlabeled["strong"].clone().requires_grad_()
    loss = host.method.loss(host, labeled, {**unlabeled, "weak": weak, "strong": strong})
    at_weak, at_strong = torch.autograd.grad(torch.as_tensor(loss.unsup), [weak, strong], allow_unused=True)
    # The mixed weak view has weight 0 here, the unmixed strong one learns from a constant.
    assert at_weak is None or float(at_weak.abs().sum()) == 0
    assert float(at_strong.abs().sum()) > 0


def test_only_the_mixed_images_move_the_statistics() -> None:
    host = ToyHost(ReMixMatch(alpha=0.0))
    labeled, unlabeled = toy_batch(host)
    twin = copy.deepcopy(host.network)
    twin(torch.cat([labeled["image"], unlabeled["weak"], unlabeled["strong"], unlabeled["strong_2"]]))
    host.method.loss(host, labeled, unlabeled)
    assert all(torch.equal(a, b) for a, b in zip(host.network.buffers(), twin.buffers(), strict=True))


def test_ctaugment_needs_probes_and_shows_its_rates() -> None:
    assert not isinstance(ReMixMatch(), LearnsAugmentation)
    method = ReMixMatch(num_strong=1, ctaugment=True)
    assert isinstance(method, LearnsAugmentation)
    assert method.views == Views(labeled=("strong", "probe"), unlabeled=("weak", "strong"))
    host = ToyHost(method)
    labeled, unlabeled = toy_batch(host)
    size = len(labeled["label"])
    ops, bins = torch.zeros(size, 2, dtype=torch.long), torch.tensor([5, -1]).expand(size, 2, 2)
    method.loss(host, {**labeled, "probe_ops": ops, "probe_bins": bins}, unlabeled)
    assert method.rates.untyped_storage().is_shared()
    assert float(method.rates[0, 0, 5]) < 1
    assert int((method.rates != 1).sum()) == 1


def test_memory_goes_through_a_state_dict() -> None:
    host, other = ToyHost(ReMixMatch()), ToyHost(ReMixMatch())
    for _ in range(3):
        host.method.loss(host, *toy_batch(host))
    other.method.load_state_dict(host.method.state_dict())
    other.network.load_state_dict(host.network.state_dict())
    batch = toy_batch(host)
    losses = []
    for each in (host, other):
        torch.manual_seed(1)
        losses.append(float(each.method.loss(each, *batch).total(1.0)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_strong", 0), ("temperature", -1.0), ("alpha", -1.0), ("rotation_weight", -1.0), ("target", "other")],
)
def test_remixmatch_refuses_what_makes_no_sense(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        ReMixMatch(**{name: value})  # type: ignore[arg-type]  # on purpose
