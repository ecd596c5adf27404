"""MixMatch: guesses, mixing, and the loss against a naive loop."""

import copy
import math

import pytest
import torch
from ssl_toys import ToyHost, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl import mixing
from lightning_modules.ssl.mixing import mixup, one_hot
from lightning_modules.ssl.mixmatch import MixMatch
from lightning_modules.ssl.parts import beta_samples, sharpen, soft_cross_entropy


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("alpha", "mean"), [(0.5, 0.818), (0.75, 0.778), (1.0, 0.750), (4.0, 0.637)])
def test_the_larger_lambda_has_the_expected_mean(alpha: float, mean: float) -> None:
    torch.manual_seed(0)
    drawn = beta_samples(alpha, 40_000, torch.zeros(1))
    assert float(drawn.min()) >= 0.5
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.005)


def test_a_mixed_row_is_a_mixture_of_its_image_with_another_and_its_target_alike() -> None:
    torch.manual_seed(0)
    # Images that are one-hot: row i of the mixture says what it is made of.
    image = torch.eye(8).view(8, 8, 1, 1)
    mixed, target = mixup(image, torch.eye(8), alpha=0.75)
    assert torch.equal(mixed.flatten(1), target)
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    assert bool((target.diagonal() >= 0.5).all())
    assert int((target > 0).sum(1).max()) == 2
    partners = target.clone().fill_diagonal_(0).argmax(1)[target.diagonal() < 1]
    assert len(set(partners.tolist())) == len(partners)
    assert len({round(float(lam), 5) for lam in target.diagonal()}) > 4


def test_no_alpha_mixes_nothing() -> None:
    image, target = torch.rand(4, 1, 2, 2), torch.rand(4, 3).softmax(1)
    assert torch.equal(mixup(image, target, 0.0)[0], image)
    assert torch.equal(mixup(image, target, 0.0)[1], target)


def test_cross_entropy_is_linear_in_the_target() -> None:
    logits, a, b = torch.randn(6, 4), torch.rand(6, 4).softmax(1), torch.rand(6, 4).softmax(1)
    lam = torch.rand(6)
    mixed = soft_cross_entropy(logits, lam[:, None] * a + (1 - lam[:, None]) * b)
    torch.testing.assert_close(mixed, lam * soft_cross_entropy(logits, a) + (1 - lam) * soft_cross_entropy(logits, b))


def test_sharpening_has_the_published_values() -> None:
    p = torch.tensor([0.6, 0.3, 0.1])
    torch.testing.assert_close(sharpen(p, 0.5), torch.tensor([0.7826, 0.1957, 0.0217]), rtol=0, atol=1e-4)
    torch.testing.assert_close(sharpen(p, 1.0), p)
    assert sharpen(p, 0.0).tolist() == [1, 0, 0]


def _softmax(row: list[float]) -> list[float]:
    powers = [math.exp(z) for z in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("num_views", [1, 3])
def test_without_mixing_the_loss_is_that_of_a_naive_loop(num_views: int) -> None:
    host = ToyHost(MixMatch(num_views=num_views, temperature=0.5, alpha=0.0))
    labeled, unlabeled = toy_batch(host)
    keys = ["weak", "weak_2", "weak_3"][:num_views]
    with torch.no_grad():
        of_views = [copy.deepcopy(host.network)(unlabeled[key]).tolist() for key in keys]
        joint = copy.deepcopy(host.network)(torch.cat([labeled["image"], *[unlabeled[key] for key in keys]])).tolist()
    sup, unsup = 0.0, 0.0
    size, ratio = len(labeled["label"]), len(unlabeled["weak"])
    for row, label in zip(joint[:size], labeled["label"].tolist(), strict=True):
        sup -= math.log(_softmax(row)[label]) / size
    for b in range(ratio):
        mean = [sum(p) / num_views for p in zip(*[_softmax(z[b]) for z in of_views], strict=True)]
        q = [p**2 / sum(x**2 for x in mean) for p in mean]
        for k in range(num_views):
            p = _softmax(joint[size + k * ratio + b])
            unsup += sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) / (ratio * num_views * len(q))
    loss = host.method.loss(host, labeled, unlabeled)
    assert float(loss.sup) == pytest.approx(sup, rel=1e-4)
    assert float(loss.unsup) == pytest.approx(unsup, rel=1e-4)


def test_everything_is_mixed_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spied(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        seen.append((images, targets))
        return mixing.mixup(images, targets, alpha)

    monkeypatch.setattr("lightning_modules.ssl.mixmatch.mixup", spied)
    host = ToyHost(MixMatch())
    labeled, unlabeled = toy_batch(host)
    host.method.loss(host, labeled, unlabeled)
    ((images, targets),) = seen
    assert torch.equal(images, torch.cat([labeled["image"], unlabeled["weak"], unlabeled["weak_2"]]))
    size, ratio = len(labeled["label"]), len(unlabeled["weak"])
    assert torch.equal(targets[:size], one_hot(labeled["label"], 3))
    assert torch.equal(targets[size : size + ratio], targets[size + ratio :])
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
    assert not targets.requires_grad


def gradient(network: nn.Module, value: Tensor | float) -> float:
    found = torch.autograd.grad(torch.as_tensor(value), list(network.parameters()), retain_graph=True)
    return sum(float(g.abs().sum()) for g in found)


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_gradients_reach_the_network_in_either_precision(mixed_precision: bool) -> None:
    host = ToyHost(MixMatch())
    labeled, unlabeled = toy_batch(host)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision, cache_enabled=False):
        loss = host.method.loss(host, labeled, unlabeled)
    assert gradient(host.network, loss.sup) > 0
    assert gradient(host.network, loss.unsup) > 0
    assert torch.as_tensor(loss.unsup).dtype == torch.float32


def test_no_gradient_flows_into_guesses() -> None:
    host = ToyHost(MixMatch(num_views=1, temperature=1.0, alpha=0.0))
    labeled, unlabeled = toy_batch(host)
    host.network.eval()
    # In evaluation mode guess and prediction are equal, so with constant guesses the gradient is exactly 0, too.
    loss = host.method.loss(host, labeled, unlabeled)
    assert gradient(host.network, loss.unsup) == pytest.approx(0, abs=1e-6)
    sharp = MixMatch(num_views=1, temperature=0.5, alpha=0.0).loss(host, labeled, unlabeled)
    p = host.network(unlabeled["weak"]).softmax(1)
    constant = (p - sharpen(p.detach(), 0.5)).square().mean()
    assert gradient(host.network, sharp.unsup) == pytest.approx(gradient(host.network, constant), rel=1e-4)


def test_one_forward_moves_the_statistics_that_of_the_mixed_images() -> None:
    host = ToyHost(MixMatch(alpha=0.0))
    labeled, unlabeled = toy_batch(host)
    twin = copy.deepcopy(host.network)
    twin(torch.cat([labeled["image"], unlabeled["weak"], unlabeled["weak_2"]]))
    host.method.loss(host, labeled, unlabeled)
    assert all(torch.equal(a, b) for a, b in zip(host.network.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize(("name", "value"), [("num_views", 0), ("temperature", -1.0), ("alpha", -0.5)])
def test_mixmatch_refuses_what_makes_no_sense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        MixMatch(**{name: value})  # type: ignore[arg-type]  # on purpose
