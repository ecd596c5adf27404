"""VAT: its direction against eigenvectors, what it leaves alone, and its terms."""

import copy
from collections.abc import Callable

import pytest
import torch
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl.adversarial_training import of_length
from lightning_modules.ssl.vat import VAT, divergence


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda image: image.flatten(1) @ weight.T


def test_the_divergence_is_zero_at_home_and_that_of_a_loop_elsewhere() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    assert float(divergence(a, a).abs().max()) == 0
    p, q = a.softmax(1), b.softmax(1)
    naive = [sum(float(x * (x / y).log()) for x, y in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    torch.testing.assert_close(divergence(a, b), torch.tensor(naive), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_iteration_is_exact_for_two_classes(seed: int) -> None:
    # The Hessian of the KL of a linear model with two classes has rank 1.
    torch.manual_seed(seed)
    weight = torch.randn(2, 12, dtype=torch.float64)
    image = torch.rand(5, 3, 2, 2, dtype=torch.float64)
    forward = linear(weight)
    r = VAT(epsilon=2.5, xi=1e-2).perturbation(forward, image, forward(image), torch.randn_like(image))
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((5,), 2.5, dtype=torch.float64))
    cosine = torch.cosine_similarity(r.flatten(1), (weight[1] - weight[0])[None], dim=1).abs()
    assert float(cosine.min()) > 1 - 1e-6


def test_iterations_come_closer_to_the_hessian_s_first_eigenvector() -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 24, dtype=torch.float64)
    image = 0.1 * torch.randn(64, 24, 1, 1, dtype=torch.float64)
    forward, start = linear(weight), torch.randn_like(image)
    p = forward(image).softmax(1)
    hessian = weight.T @ (torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ weight
    first = torch.linalg.eigh(hessian).eigenvectors[:, :, -1]
    cosines, expected = [], start.flatten(1)
    for iterations in range(1, 9):
        r = VAT(xi=1e-3, num_iterations=iterations).perturbation(forward, image, forward(image), start).flatten(1)
        expected = torch.einsum("bij,bj->bi", hessian, expected)
        assert float(torch.cosine_similarity(r, expected, dim=1).min()) > 0.99
        cosines.append(float(torch.cosine_similarity(r, first, dim=1).abs().mean()))
    assert cosines == sorted(cosines)


def test_float32_finds_the_direction_at_the_default_step_and_not_at_a_millionth() -> None:
    torch.manual_seed(0)
    weight, image = torch.randn(10, 24, dtype=torch.float64), torch.rand(64, 24, 1, 1, dtype=torch.float64)
    start = torch.randn_like(image)

    def agreement(xi: float) -> float:
        rs = []
        for kind in (torch.float32, torch.float64):
            forward, x = linear(weight.to(kind)), image.to(kind)
            step = xi if kind == torch.float32 else 1e-4
            rs.append(VAT(xi=step).perturbation(forward, x, forward(x), start.to(kind)).double().flatten(1))
        return float(torch.cosine_similarity(rs[0], rs[1], dim=1).mean())

    assert agreement(VAT().xi) > 0.99
    assert agreement(1e-6) < 0.95


def test_the_direction_is_worse_than_random_ones() -> None:
    host = ToyHost(VAT(epsilon=0.2))
    image = host.images
    host.network.eval()
    forward: Callable[[Tensor], Tensor] = host.network
    target = forward(image).detach()
    r = VAT(epsilon=0.2).perturbation(forward, image, target, torch.randn_like(image))
    ours = divergence(target, forward(image + r)).mean()
    others = [divergence(target, forward(image + of_length(torch.randn_like(image), 0.2))).mean() for _ in range(10)]
    assert float(ours) > float(torch.stack(others).mean())


def test_lengths_survive_tiny_gradients_and_zeros_stay() -> None:
    direction = torch.tensor([[3e-30, 4e-30], [0.0, 0.0]])
    assert of_length(direction, 5.0).tolist() == [pytest.approx([3.0, 4.0]), [0.0, 0.0]]


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_neither_statistics_nor_gradients_are_touched_in_either_precision(mixed_precision: bool) -> None:
    host = ToyHost(VAT(epsilon=0.2))
    labeled, unlabeled = toy_batch(host)
    for parameter in host.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    twin = copy.deepcopy(host.network)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision, cache_enabled=False):
        twin(labeled["image"])
        loss = host.method.loss(host, labeled, unlabeled)
    assert all(torch.equal(a, b) for a, b in zip(host.network.buffers(), twin.buffers(), strict=True))
    assert all(bool((p.grad == 1).all()) for p in host.network.parameters() if p.grad is not None)
    unsup = torch.as_tensor(loss.unsup)
    assert torch.isfinite(unsup)
    found = torch.autograd.grad(unsup, list(host.network.parameters()))
    assert sum(float(g.abs().sum()) for g in found) > 0


class SeesTypes(nn.Module):
    """Remembers in which type its first layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.types: list[torch.dtype] = []

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layer(image.flatten(1))
        self.types.append(logits.dtype)
        return logits


def test_the_direction_is_found_in_float32_under_autocast() -> None:
    network = SeesTypes()
    host = ToyHost(VAT(), network=network)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        host.method.loss(host, *toy_batch(host))
    labelled, clean, step, last = network.types
    assert (clean, step) == (torch.float32, torch.float32)
    assert (labelled, last) == (torch.bfloat16, torch.bfloat16)


class Dropped(ToyNet):
    """A toy network with dropout on the features."""

    def embed(self, image: Tensor) -> Tensor:
        return nn.functional.dropout(super().embed(image), 0.5)


def test_all_forwards_drop_the_same_features() -> None:
    # Without a perturbation nothing but dropout could make the predictions differ.
    host = ToyHost(VAT(epsilon=0.0), network=Dropped())
    assert float(host.method.loss(host, *toy_batch(host)).unsup) == pytest.approx(0, abs=1e-7)
    first, second = (host.method.loss(host, *toy_batch(host)).logs["entropy"] for _ in range(2))
    assert first != second


def test_entropy_is_an_unramped_term_that_can_be_left_out() -> None:
    host = ToyHost(VAT(entropy_weight=0.5))
    labeled, unlabeled = toy_batch(host)
    loss = host.method.loss(host, labeled, unlabeled)
    p = host.network(unlabeled["weak"]).softmax(1)
    assert float(loss.aux) == pytest.approx(-0.5 * float((p * p.log()).sum(1).mean()), rel=1e-4)
    assert torch.as_tensor(loss.aux).requires_grad
    without = VAT(entropy_weight=0.0).loss(host, labeled, unlabeled)
    assert float(without.aux) == 0
    assert not torch.as_tensor(without.aux).requires_grad


@pytest.mark.parametrize(
    ("name", "value"), [("epsilon", -1.0), ("xi", 0.0), ("num_iterations", 0), ("entropy_weight", -1.0)]
)
def test_vat_refuses_what_makes_no_sense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        VAT(**{name: value})  # type: ignore[arg-type]  # on purpose
