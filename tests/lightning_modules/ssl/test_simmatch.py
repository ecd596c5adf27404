"""SimMatch: the bank of labelled images, unfolding and aggregation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from ssl_toys import ToyHost, toy_batch
from torch import Tensor

from lightning_modules.ssl.simmatch import SimMatch


def made(**arguments: float) -> tuple[ToyHost, SimMatch]:
    torch.manual_seed(0)
    method = SimMatch(**arguments)  # type: ignore[arg-type]  # numbers of either kind
    return ToyHost(method), method


def units(size: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(size, 128, generator=torch.Generator().manual_seed(seed)), dim=-1)


def rows(size: int, seed: int = 0) -> Tensor:
    return (2 * torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def filled() -> tuple[ToyHost, SimMatch, Tensor, Tensor]:
    m, method = made(alpha=0.9, temperature=0.1)
    bank, label = units(6), torch.tensor([0, 1, 2, 0, 1, 1])
    method.remember(bank, label, torch.arange(6))
    return m, method, bank, label


def test_similarities_are_a_softmax_over_the_bank() -> None:
    _, method, bank, _ = filled()
    z = units(4, seed=1)
    q = method.similarity(z)
    for i in range(4):
        weights = torch.tensor([math.exp(float(z[i] @ bank[j]) / 0.1) for j in range(6)])
        torch.testing.assert_close(q[i], weights / weights.sum())


def test_unfolding_and_aggregation_sum_to_one_and_equal_a_loop() -> None:
    _, method, _, label = filled()
    p, q = rows(4), method.similarity(units(4, seed=1))
    unfolded, aggregated = method.unfolded(p, q), method.aggregated(p, q)
    torch.testing.assert_close(unfolded.sum(-1), torch.ones(4))
    torch.testing.assert_close(aggregated.sum(-1), torch.ones(4))
    for i in range(4):
        product = [float(q[i, j] * p[i, label[j]]) for j in range(6)]
        assert unfolded[i].tolist() == pytest.approx([value / sum(product) for value in product], rel=1e-4)
        classes = [sum(float(q[i, j]) for j in range(6) if label[j] == c) for c in range(3)]
        expected = [0.9 * float(p[i, c]) + 0.1 * classes[c] for c in range(3)]
        assert aggregated[i].tolist() == pytest.approx(expected, rel=1e-4)
    # A class that is certain leaves only its own entries.
    sure = method.unfolded(torch.tensor([[0.0, 1.0, 0.0]]), q[:1])
    assert sure[0, label != 1].sum() == 0
    method.alpha = 1.0
    torch.testing.assert_close(method.aggregated(p, q), p)


def test_the_bank_keeps_the_last_of_several_views_and_moves_slowly() -> None:
    _, method = made(bank_momentum=0.7)
    z = units(4)
    method.remember(z[:3], torch.tensor([2, 0, 2]), torch.tensor([1, 3, 1]))
    torch.testing.assert_close(method.bank[1], z[2])  # the first time without momentum
    assert method.bank_label.tolist() == [-1, 2, -1, 0, -1, -1]
    method.remember(z[3:], torch.tensor([2]), torch.tensor([1]))
    torch.testing.assert_close(method.bank[1], F.normalize(0.7 * z[2] + 0.3 * z[3], dim=-1))
    torch.testing.assert_close(method.bank.norm(dim=-1), torch.tensor([0.0, 1, 0, 1, 0, 0]))


def test_unseen_entries_do_not_count() -> None:
    _, method = made()
    method.remember(units(2), torch.tensor([1, 2]), torch.tensor([0, 4]))
    q = method.similarity(units(3, seed=2))
    assert not q[:, [1, 2, 3, 5]].any()
    torch.testing.assert_close(q.sum(-1), torch.ones(3))


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_the_empty_bank_and_the_start_leave_fixmatch_with_soft_labels(progress: float) -> None:
    m, method = made(threshold=0.0, start=0.1, align_queue=1)
    m.network.eval()
    m.progress = progress
    labeled, unlabeled = toy_batch(m)
    # Before the start the bank is full and not used, after it the bank is still empty.
    if progress < 0.1:
        method.remember(units(6), m.labels_of("labeled"), torch.arange(6))
    loss = method.loss(m, labeled, unlabeled)
    p = m.network(unlabeled["weak"]).softmax(-1)
    q = p / p.mean(0)
    q = q / q.sum(-1, keepdim=True)
    expected = -(q * m.network(unlabeled["strong"]).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(torch.as_tensor(loss.unsup), expected, rtol=1e-4, atol=1e-5)
    assert (method.bank_label >= 0).all()
    assert float(loss.logs["instance"]) == 0
    following = method.loss(m, labeled, unlabeled)
    assert (float(following.logs["instance"]) > 0) == (progress > 0.1)


def test_the_instance_loss_is_a_cross_entropy_with_the_unfolded_similarities() -> None:
    m, method = made(threshold=1.1, instance=2.0, align_queue=1)
    m.network.eval()
    labeled, unlabeled = toy_batch(m)
    method.loss(m, labeled, unlabeled)
    before = copy.deepcopy(method)
    loss = method.loss(m, labeled, unlabeled)
    network = m.network
    features = {key: before.projector(network.embed(unlabeled[key])) for key in ("weak", "strong")}  # type: ignore[operator]
    p = network(unlabeled["weak"]).softmax(-1)
    aligned = p / p.mean(0) / (p / p.mean(0)).sum(-1, keepdim=True)
    target = before.unfolded(aligned, before.similarity(features["weak"]))
    expected = -2 * (target * before.similarity(features["strong"]).log()).sum(-1).mean()
    torch.testing.assert_close(torch.as_tensor(loss.unsup), expected, rtol=1e-4, atol=1e-5)
    torch.autograd.backward(torch.as_tensor(loss.unsup))  # although the bank was written to meanwhile
    assert all(p.grad is not None and p.grad.any() for p in method.projector.layers[2].parameters())


def test_a_teacher_makes_targets_and_bank() -> None:
    m, method = made(ema_teacher=True, threshold=0.0, bank_momentum=0.0, teacher_decay=0.9)
    assert method.teacher_buffers == "average"
    assert SimMatch().teacher_buffers == "copy"
    m.network.eval()
    with torch.no_grad():
        for parameter in m.ema_network.parameters():
            parameter.mul_(2)
        for own, theirs in zip(method.projector.parameters(), method.teacher_projector.parameters(), strict=True):
            own.add_(1.0)
            expected = 0.1 * own + 0.9 * theirs
    labeled, unlabeled = toy_batch(m)
    loss = method.loss(m, labeled, unlabeled)
    torch.testing.assert_close(list(method.teacher_projector.parameters())[-1].data, expected)
    teacher = m.ema_network
    wanted = method.teacher_projector(teacher.embed(labeled["image"]))  # type: ignore[operator]  # a ToyNet
    torch.testing.assert_close(method.bank[labeled["index"]], wanted, rtol=1e-4, atol=1e-5)
    assert loss.guess is not None
    p = teacher(unlabeled["weak"]).softmax(-1)
    assert loss.guess.label.tolist() == (p / p.mean(0)).argmax(-1).tolist()
    torch.autograd.backward(torch.as_tensor(loss.unsup))
    assert all(parameter.grad is None for parameter in method.teacher_projector.parameters())
    m.ema_network = m.network
    with pytest.raises(ValueError, match="`ema_decay`"):
        method.loss(m, labeled, unlabeled)


def test_wrong_arguments_and_data_are_refused() -> None:
    for name, value in (("alpha", -0.1), ("temperature", 0.0), ("bank_momentum", 1.0), ("instance", -1.0)):
        with pytest.raises(ValueError, match=f"`{name}`"):
            made(**{name: value})
    m, method = made()
    labeled, unlabeled = toy_batch(m)
    with pytest.raises(ValueError, match="`index`"):
        method.loss(m, {k: v for k, v in labeled.items() if k != "index"}, unlabeled)
