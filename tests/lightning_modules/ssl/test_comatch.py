"""CoMatch: the memory, the smoothing, the graph."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ssl_logits import LogitNet
from ssl_toys import ToyHost, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl.comatch import CoMatch


def made(**arguments: float) -> tuple[ToyHost, CoMatch]:
    torch.manual_seed(0)
    method = CoMatch(**arguments)  # type: ignore[arg-type]  # numbers of either kind
    return ToyHost(method), method


def units(size: int, width: int = 64, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(size, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def rows(size: int, seed: int = 0) -> Tensor:
    return (2 * torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [7, 2, 6, 1], [10, 10], [23, 4], [4, 25]])
def test_the_queue_holds_the_newest_images_whatever_the_batches(sizes: list[int]) -> None:
    # Implementations that fill a slice lose what runs over the end.
    _, method = made(queue=10)
    written = []
    for number, size in enumerate(sizes):
        z, p = units(size, seed=number), rows(size, seed=number)
        method.remember(z, p)
        written += list(zip(z, p, strict=True))
    newest = written[-10:]
    assert int(method.filled) == sum(sizes)
    found = {tuple(p.tolist()): z for z, p in zip(method.queue_embeddings, method.queue_probabilities, strict=True)}
    assert len(found) == min(10, len(written)) + (len(written) < 10)  # and the empty places
    for z, p in newest:
        torch.testing.assert_close(found[tuple(p.tolist())], z)


def test_smoothing_averages_over_neighbours_and_sums_to_one() -> None:
    _, method = made(queue=8, alpha=0.9, temperature=0.2)
    z, p, own = units(5, seed=3), rows(5, seed=4), units(8, seed=5)
    method.remember(own[:7], rows(8, seed=6)[:7])
    assert method.smoothed(p, z).equal(p)  # not full yet
    method.remember(own[7:], rows(8, seed=6)[7:])
    out = method.smoothed(p, z)
    torch.testing.assert_close(out.sum(-1), torch.ones(5))
    for i in range(5):
        nearness = torch.tensor([math.exp(float(z[i] @ own[j]) / 0.2) for j in range(8)])
        neighbours = (nearness / nearness.sum())[:, None] * rows(8, seed=6)
        torch.testing.assert_close(out[i], 0.9 * p[i] + 0.1 * neighbours.sum(0))
    method.alpha = 1.0
    torch.testing.assert_close(method.smoothed(p, z), p)


def test_an_image_next_to_one_entry_takes_its_label() -> None:
    _, method = made(queue=2, alpha=0.0, temperature=0.001)
    z = F.normalize(torch.eye(2, 64), dim=-1)
    method.remember(z, torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    torch.testing.assert_close(method.smoothed(rows(2), z), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))


def test_the_graph_has_a_diagonal_heavy_edges_and_rows_of_one() -> None:
    _, method = made(graph_threshold=0.8)
    q = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0.1, 0.1, 0.8], [0, 0, 1.0]])
    graph = method.graph(q)
    torch.testing.assert_close(graph.sum(-1), torch.ones(4))
    torch.testing.assert_close(graph[0], torch.tensor([1, 0.9, 0, 0]) / 1.9)
    torch.testing.assert_close(graph[2], torch.tensor([0, 0, 1, 0.8]) / 1.8)
    _, strict = made(graph_threshold=1.1)
    assert strict.graph(q).equal(torch.eye(4))


def test_a_diagonal_graph_gives_info_nce() -> None:
    m, method = made(graph_threshold=1.1, threshold=1.1, temperature=0.2)
    m.network.eval()
    labeled, unlabeled = toy_batch(m)
    loss = method.loss(m, labeled, unlabeled)
    embed: Callable[[Tensor], Tensor] = m.network.embed  # type: ignore[assignment]  # a ToyNet
    z0, z1 = (method.projector(embed(unlabeled[key])) for key in ("strong", "strong_2"))
    torch.testing.assert_close(z0.norm(dim=-1), torch.ones(12))
    expected = F.cross_entropy(z0 @ z1.T / 0.2, torch.arange(12))
    torch.testing.assert_close(torch.as_tensor(loss.unsup), expected)  # nothing is confident, so Lu is Lc
    assert float(made(graph_threshold=1.1, threshold=1.1, contrast=0.0)[1].contrast) == 0


def test_alpha_one_is_fixmatch_with_soft_aligned_labels() -> None:
    m, method = made(alpha=1.0, threshold=0.0, contrast=0.0, queue=4, align_queue=1)
    m.network.eval()
    labeled, unlabeled = toy_batch(m)
    for _ in range(2):
        loss = method.loss(m, labeled, unlabeled)
    p = m.network(unlabeled["weak"]).softmax(-1)
    q = p / p.mean(0)
    q = q / q.sum(-1, keepdim=True)
    expected = -(q * m.network(unlabeled["strong"]).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(torch.as_tensor(loss.unsup), expected, rtol=1e-4, atol=1e-5)


def test_labelled_images_are_remembered_with_their_labels() -> None:
    m, method = made(queue=18)
    labeled, unlabeled = toy_batch(m)  # 6 and 12
    method.loss(m, labeled, unlabeled)
    assert int(method.filled) == 18
    held = method.queue_probabilities.max(-1)
    assert held.indices[held.values == 1].tolist() == labeled["label"].tolist()
    assert not method.queue_embeddings.requires_grad


def test_predictions_are_remembered_before_they_are_smoothed() -> None:
    m, method = made(queue=18, alpha=0.1, align_queue=1)
    m.network.eval()
    labeled, unlabeled = toy_batch(m)
    p = m.network(unlabeled["weak"]).softmax(-1)
    aligned = p / p.mean(0)
    aligned = aligned / aligned.sum(-1, keepdim=True)
    for _ in range(2):  # smoothed in the second
        loss = method.loss(m, labeled, unlabeled)
        torch.testing.assert_close(method.queue_probabilities[:12], aligned, rtol=1e-4, atol=1e-5)
    assert loss.guess is not None
    assert not torch.allclose(loss.guess.confidence, aligned.amax(-1), atol=1e-3)


def test_the_projector_is_trained_by_the_contrast() -> None:
    m, method = made(threshold=1.1)
    loss = method.loss(m, *toy_batch(m))
    torch.autograd.backward(torch.as_tensor(loss.unsup))
    assert all(p.grad is not None and p.grad.any() for p in method.projector.layers[2].parameters())
    assert {id(p) for p in method.projector.parameters()} <= {id(p) for p in method.players(m)["main"].parameters()}


def test_wrong_arguments_and_networks_are_refused() -> None:
    for name, value in (("alpha", 1.1), ("temperature", 0.0), ("queue", 0), ("threshold", -1.0), ("contrast", -1.0)):
        with pytest.raises(ValueError, match=f"`{name}`"):
            made(**{name: value})
    network: nn.Module = LogitNet()
    with pytest.raises(TypeError, match="embed"):
        ToyHost(CoMatch(), network)
