"""Meta Pseudo Labels: the sign of the feedback, and that it has a gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl.base import Loss
from lightning_modules.ssl.companions import batch_statistics
from lightning_modules.ssl.meta_pseudo_labels import MetaPseudoLabels


def _host(method: MetaPseudoLabels | None = None, dropout: float = 0.0) -> ToyHost:
    torch.manual_seed(0)
    network = ToyNet()
    network.body.append(nn.Dropout(dropout))
    return ToyHost(method or MetaPseudoLabels(), network=network)


def _teacher(host: ToyHost) -> nn.Module:
    return host.method.players(host)["teacher"]


def _turns(host: ToyHost, lr: float) -> tuple[Loss, Loss, list[Tensor]]:
    """Both losses, the student stepping by plain SGD in between, and the gradient of its step."""
    labeled, unlabeled = toy_batch(host)
    turns = host.method.turns(host, labeled, unlabeled)
    name, student = next(turns)
    assert name == "student"
    parameters = list(host.network.parameters())
    gradient = list(torch.autograd.grad(student.total(8.0), parameters))
    with torch.no_grad():
        for parameter, g in zip(parameters, gradient, strict=True):
            parameter.sub_(lr * g)
    name, teacher = next(turns)
    assert name == "teacher"
    assert next(turns, None) is None
    return student, teacher, gradient


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gain_is_the_learning_rate_times_the_product_of_the_gradients(dropout: float) -> None:
    host = _host(dropout=dropout)
    host.network.double()
    host.images = host.images.double()
    _teacher(host).double()
    before = copy.deepcopy(host.network)
    torch.manual_seed(1)
    labeled, _ = toy_batch(host)
    for lr in (1e-3, 1e-5):
        host.network.load_state_dict(before.state_dict())
        torch.manual_seed(1)
        _, teacher, step = _turns(host, lr)
        with batch_statistics(before):
            labeled_loss = F.cross_entropy(before(labeled["image"]), labeled["label"])
        gradient = torch.autograd.grad(labeled_loss, list(before.parameters()))
        product = sum(float((g * s).sum()) for g, s in zip(gradient, step, strict=True))
        assert float(teacher.logs["gain"]) == pytest.approx(lr * product, rel=1e3 * lr, abs=1e-3 * lr)
        assert abs(product) > 1e-3


def test_labels_that_helped_become_likelier() -> None:
    host = _host(MetaPseudoLabels(baseline_decay=0.5))
    method = host.method
    assert isinstance(method, MetaPseudoLabels)
    labeled, _ = toy_batch(host)
    logits = torch.zeros(4, 3, requires_grad=True)
    drawn = torch.tensor([0, 1, 2, 0])
    x = torch.zeros(6, 3)
    for gain, sign in ((0.4, -1), (-0.9, 1)):
        method.baseline.zero_()
        loss = method.teacher_loss(host, labeled, (x, torch.zeros(4, 3), logits), drawn, torch.tensor(gain))
        assert isinstance(loss.aux, Tensor)
        (gradient,) = torch.autograd.grad(loss.aux, logits)
        # (gain - its average) (p - y') / B
        expected = 0.5 * gain * (1 / 3 - F.one_hot(drawn, 3)) / 4
        torch.testing.assert_close(gradient, expected)
        assert (gradient.gather(1, drawn[:, None]).sign() == sign).all()


def test_feedback_reaches_the_teacher_and_nothing_reaches_the_targets() -> None:
    host = _host()
    student, teacher, _ = _turns(host, 0.1)
    assert isinstance(teacher.aux, Tensor)
    parameters = list(_teacher(host).parameters())
    gradient = torch.autograd.grad(teacher.aux, parameters, retain_graph=True)
    assert sum(float(g.abs().sum()) for g in gradient) > 1e-6
    own = torch.autograd.grad(student.total(1.0), parameters, allow_unused=True, retain_graph=True)
    assert all(g is None for g in own)
    theirs = torch.autograd.grad(teacher.total(1.0), list(host.network.parameters()), allow_unused=True)
    assert all(g is None for g in theirs)


def test_soft_self_targets_would_give_no_gradient() -> None:
    """Why labels are drawn: the published code's term is constant in the logits."""
    logits = torch.randn(4, 3, requires_grad=True)
    soft = -(logits.detach().softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(soft, logits)
    assert float(gradient.abs().max()) < 1e-7


def test_without_gain_the_teacher_learns_by_uda() -> None:
    host = _host(MetaPseudoLabels(temperature=0.5, threshold=0.4, label_smoothing=0.1))
    method = host.method
    assert isinstance(method, MetaPseudoLabels)
    labeled, _ = toy_batch(host)
    x, w, s = torch.randn(6, 3), torch.randn(12, 3), torch.randn(12, 3)
    drawn = torch.zeros(12, dtype=torch.long)
    loss = method.teacher_loss(host, labeled, (x, w, s), drawn, torch.tensor(0.0))
    sup, unsup = torch.zeros(()), torch.zeros(())
    for i, y in enumerate(labeled["label"]):
        sup = sup - x[i].log_softmax(-1) @ (0.9 * F.one_hot(y, 3) + 0.1 / 3) / 6
    for i in range(12):
        if float(w[i].softmax(-1).max()) >= 0.4:
            unsup = unsup - (w[i] / 0.5).softmax(-1) @ s[i].log_softmax(-1) / 12
    assert float(loss.aux) == 0
    torch.testing.assert_close(loss.sup, sup)
    torch.testing.assert_close(loss.unsup, unsup)


def test_targets_of_uda_get_no_gradient() -> None:
    host = _host(MetaPseudoLabels(threshold=0.0))
    method = host.method
    assert isinstance(method, MetaPseudoLabels)
    labeled, _ = toy_batch(host)
    x, w, s = (torch.randn(n, 3, requires_grad=True) for n in (6, 12, 12))
    loss = method.teacher_loss(host, labeled, (x, w, s), torch.zeros(12, dtype=torch.long), torch.tensor(0.1))
    gradient = torch.autograd.grad(loss.total(1.0), [x, w, s], allow_unused=True)
    assert gradient[1] is None
    assert gradient[0] is not None
    assert gradient[2] is not None


def test_baseline_is_the_moving_average_of_the_gains() -> None:
    host = _host(MetaPseudoLabels(baseline_decay=0.9))
    method = host.method
    assert isinstance(method, MetaPseudoLabels)
    labeled, _ = toy_batch(host)
    logits = torch.zeros(6, 3), torch.zeros(12, 3), torch.zeros(12, 3)
    expected = 0.0
    for gain in (0.3, -0.1, 0.2):
        expected = 0.9 * expected + 0.1 * gain
        loss = method.teacher_loss(host, labeled, logits, torch.zeros(12, dtype=torch.long), torch.tensor(gain))
        assert float(method.baseline) == pytest.approx(expected)
        assert float(loss.aux) == pytest.approx((gain - expected) * float(torch.tensor(3.0).log()), rel=1e-5)


def test_labels_are_drawn_from_the_teacher() -> None:
    host = _host()
    labeled, unlabeled = toy_batch(host)
    one = {key: value[:1].repeat(500, *[1] * (value.ndim - 1)) for key, value in unlabeled.items()}
    _, student = next(host.method.turns(host, labeled, one))
    assert student.guess is not None
    counts = torch.bincount(student.guess.label, minlength=3) / 500
    images = torch.cat([labeled["image"], one["weak"], one["strong"]])
    p = _teacher(host)(images)[-1].softmax(-1)
    assert (counts - p).abs().max() < 0.08
    torch.testing.assert_close(student.guess.confidence, p[student.guess.label])


def test_student_learns_labels_only_if_asked() -> None:
    labeled, unlabeled = toy_batch(_host())
    host = _host()
    assert next(host.method.turns(host, labeled, unlabeled))[1].sup == 0.0
    host = _host(MetaPseudoLabels(student_labeled_weight=0.5))
    joint = host.network(torch.cat([labeled["image"], unlabeled["strong"]]))[:6]
    expected = 0.5 * F.cross_entropy(joint, labeled["label"])
    torch.testing.assert_close(next(host.method.turns(host, labeled, unlabeled))[1].sup, expected)


def test_running_statistics_move_once_a_batch() -> None:
    host = _host()
    _turns(host, 0.1)
    for player in host.method.players(host).values():
        assert [int(v) for k, v in player.state_dict().items() if k.endswith("num_batches_tracked")] == [1]
        assert all(module.training for module in player.modules())


def test_players_are_the_same_every_time_and_own_their_weights() -> None:
    host = _host()
    first, second = host.method.players(host), host.method.players(host)
    assert all(first[name] is second[name] for name in ("student", "teacher"))
    shared = {id(p) for p in first["student"].parameters()} & {id(p) for p in first["teacher"].parameters()}
    assert not shared
    assert host.method.predictor(host) is host.ema_network


def test_an_injected_teacher_is_used() -> None:
    teacher = ToyNet(width=64)
    assert _teacher(_host(MetaPseudoLabels(teacher=teacher))) is teacher


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Expected `baseline_decay`"):
        MetaPseudoLabels(baseline_decay=1.0)
    with pytest.raises(ValueError, match="`student_labeled_weight` >= 0"):
        MetaPseudoLabels(student_labeled_weight=-1.0)
    with pytest.raises(RuntimeError, match="set up"):
        MetaPseudoLabels().players(ToyHost(MetaPseudoLabels()))
