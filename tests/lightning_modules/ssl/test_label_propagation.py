"""Label propagation: the graph and the solver against dense and naive ones, and what the method does with them."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse
from sklearn.datasets import make_moons
from sklearn.semi_supervised import LabelSpreading
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor

from lightning_modules.ssl import graph
from lightning_modules.ssl.graph import certainty, nearest_neighbors, neighbor_graph, normalized, propagate
from lightning_modules.ssl.label_propagation import LabelPropagation


def _unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("block", [2**25, 100])
def test_neighbors_are_the_nearest_without_oneself(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_BLOCK", block)
    features = _unit(30, 4)
    value, place = nearest_neighbors(features, 5)
    for i in range(30):
        others = sorted((j for j in range(30) if j != i), key=lambda j: -float(features[i] @ features[j]))
        assert place[i].tolist() == others[:5]
        torch.testing.assert_close(value[i], features[others[:5]] @ features[i])


def test_there_are_at_most_all_others() -> None:
    assert nearest_neighbors(_unit(4, 3), 50)[1].shape == (4, 3)


def test_graph_equals_naive_loop() -> None:
    features, k, gamma = _unit(20, 3), 4, 3.0
    expected = np.zeros((20, 20))
    for i in range(20):
        for j in sorted((j for j in range(20) if j != i), key=lambda j: -float(features[i] @ features[j]))[:k]:
            a = max(float(features[i] @ features[j]), 0.0) ** gamma
            expected[i, j] += a
            expected[j, i] += a
    found = neighbor_graph(features, k, gamma)
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-6)
    degree = expected.sum(1)
    np.testing.assert_allclose(normalized(found).toarray(), expected / np.sqrt(np.outer(degree, degree)), atol=1e-6)


def test_solution_equals_dense_one_and_is_the_fixed_point() -> None:
    s = normalized(neighbor_graph(_unit(40, 3), 5, 3.0))
    label = np.full(40, -1)
    label[[0, 1, 2, 7]] = [0, 1, 2, 0]
    y = np.stack([(label == c) / (label == c).sum() for c in range(3)], axis=1)
    exact = np.linalg.solve(np.eye(40) - 0.9 * s.toarray(), y)
    found = propagate(s, label, 3, 0.9, 500)
    np.testing.assert_allclose(found, exact.clip(0) / exact.clip(0).sum(1, keepdims=True), atol=1e-4)
    spread = 0.1 * exact
    np.testing.assert_allclose(0.9 * s @ spread + 0.1 * y, spread, atol=1e-12)


def test_labels_agree_with_label_spreading_of_sklearn() -> None:
    points, truth = make_moons(200, noise=0.1, random_state=0)
    # Points on a sphere, so that near means a large inner product.
    lifted = np.concatenate([points, np.full((200, 1), 3.0)], axis=1).astype(np.float32)
    weights = neighbor_graph(F.normalize(torch.from_numpy(lifted), dim=1), 10, 50.0)
    label = np.full(200, -1)
    for number in (0, 1):
        label[np.flatnonzero(truth == number)[:4]] = number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LabelSpreading(kernel=lambda *_: weights, alpha=0.99, max_iter=1000, tol=1e-9).fit(points, label)
    ours = propagate(normalized(weights), label, 2, 0.99, 300).argmax(axis=1)
    assert (ours == theirs.transduction_).all()


def test_two_cliques_take_their_only_labels_for_certain() -> None:
    first, second = torch.zeros(5, 2), torch.zeros(5, 2)
    first[:, 0], second[:, 1] = 1, 1
    label = np.full(10, -1)
    label[0], label[9] = 1, 0
    z = propagate(normalized(neighbor_graph(torch.cat([first, second]), 4, 3.0)), label, 2, 0.99, 20)
    assert z.argmax(axis=1).tolist() == [1] * 5 + [0] * 5
    np.testing.assert_allclose(certainty(z), 1.0)


def test_images_that_no_label_reaches_are_not_certain() -> None:
    s = sparse.csr_matrix((3, 3))
    z = propagate(s, np.array([0, -1, -1]), 2, 0.99, 20)
    np.testing.assert_allclose(z, np.array([[1, 0], [0.5, 0.5], [0.5, 0.5]]))
    np.testing.assert_allclose(certainty(z), [1, 0, 0])
    np.testing.assert_allclose(certainty(np.full((2, 2), 0.5)), [0, 0])


def test_certain_labels_are_right_more_often() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(300) % 3
    features = F.normalize(torch.eye(3)[truth] + 0.6 * torch.randn(300, 3, generator=generator), dim=1)
    label = np.full(300, -1)
    label[:6] = truth[:6]
    z = propagate(normalized(neighbor_graph(features, 10, 3.0)), label, 3, 0.99, 20)
    right = (z.argmax(axis=1) == truth.numpy())[np.argsort(-certainty(z))]
    assert right[:60].mean() > right[-60:].mean() + 0.1


def _host(**arguments: float) -> ToyHost:
    torch.manual_seed(0)
    host = ToyHost(LabelPropagation(neighbors=5, **arguments), network=ToyNet())  # type: ignore[arg-type]
    host.current_epoch = 10
    return host


def test_labelled_images_keep_their_labels_and_are_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    host = _host()
    sizes = []

    def watched(features: Tensor, neighbors: int, exponent: float) -> sparse.csr_matrix:
        sizes.append(features.shape)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
        return neighbor_graph(features, neighbors, exponent)

    monkeypatch.setattr("lightning_modules.ssl.label_propagation.neighbor_graph", watched)
    host.method.epoch_start(host)
    assert sizes == [(24, 32)]
    method = host.method
    assert isinstance(method, LabelPropagation)
    assert method.label[:6].tolist() == host.labels[:6].tolist()
    assert method.omega[:6].tolist() == [1.0] * 6
    count = torch.bincount(method.label, minlength=3)
    torch.testing.assert_close(method.zeta, (24 / 3 / count.clamp_min(1)).clamp_max(10))


def test_class_weights_are_finite_when_a_class_vanishes() -> None:
    host = _host(max_class_weight=3.0)
    host.labels = torch.zeros(24, dtype=torch.long)
    host.method.epoch_start(host)
    torch.testing.assert_close(host.method.per_class()["class_weight"], torch.tensor([1 / 3, 3.0, 3.0]))


def test_loss_is_the_weighted_mean_over_the_whole_batch() -> None:
    host = _host()
    host.method.epoch_start(host)
    labeled, unlabeled = toy_batch(host)
    loss = host.method.loss(host, labeled, unlabeled)
    method = host.method
    assert isinstance(method, LabelPropagation)
    log_p = host.network(torch.cat([labeled["image"], unlabeled["weak"]])).log_softmax(-1)
    sup = sum(-method.zeta[y] * log_p[i, y] for i, y in enumerate(labeled["label"])) / 6
    unsup = torch.zeros(())
    for i, j in enumerate(unlabeled["index"]):
        label = method.label[j]
        unsup = unsup - method.omega[j] * method.zeta[label] * log_p[6 + i, label] / 12
    torch.testing.assert_close(loss.sup, sup)
    torch.testing.assert_close(loss.unsup, unsup)
    gradient = torch.autograd.grad(unsup, list(host.network.parameters()))
    assert all(float(g.abs().sum()) > 0 for g in gradient if g.ndim > 1)


def test_warmup_is_supervised_and_leaves_the_graph_alone() -> None:
    host = _host(warmup_epochs=11)
    host.method.epoch_start(host)
    labeled, unlabeled = toy_batch(host)
    loss = host.method.loss(host, labeled, unlabeled)
    torch.testing.assert_close(loss.sup, F.cross_entropy(host.network(labeled["image"]), labeled["label"]))
    assert loss.unsup == 0
    assert host.method.state_dict()["omega"].sum() == 0


def test_propagation_leaves_modes_and_random_numbers_alone() -> None:
    host = _host()
    state = torch.get_rng_state()
    host.method.epoch_start(host)
    first = {k: v.clone() for k, v in host.method.state_dict().items()}
    assert host.network.training
    assert torch.equal(torch.get_rng_state(), state)
    host.method.epoch_start(host)
    assert all(torch.equal(v, first[k]) for k, v in host.method.state_dict().items())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Expected `alpha`"):
        LabelPropagation(alpha=1.0)
    with pytest.raises(ValueError, match="`neighbors` >= 1"):
        LabelPropagation(neighbors=0)
    with pytest.raises(TypeError, match="embed"):
        ToyHost(LabelPropagation(), network=torch.nn.Linear(2, 3))
