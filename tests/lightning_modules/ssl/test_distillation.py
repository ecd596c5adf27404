"""Distillation: its gradient and minimum in closed form, and a teacher that stays as it is."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor, nn

from lightning_modules.networks.modes import Frozen
from lightning_modules.ssl.distillation import Distillation


class _Given(nn.Module):
    """A student whose logits are a parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits


def _host(method: Distillation) -> ToyHost:
    torch.manual_seed(0)
    return ToyHost(method, network=ToyNet())


def _frozen(method: Distillation) -> Frozen:
    assert method.teacher is not None
    return method.teacher


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
def test_gradient_is_the_difference_of_the_probabilities_over_tau(tau: float) -> None:
    method = Distillation(teacher=ToyNet(width=64), temperature=tau)
    host = _host(method)
    labeled, unlabeled = toy_batch(host)
    teacher = _frozen(method)(unlabeled["weak"])
    student = _Given(torch.randn(18, 3))
    host.network = student
    loss = method.loss(host, labeled, unlabeled)
    assert isinstance(loss.unsup, Tensor)
    (gradient,) = torch.autograd.grad(loss.unsup, student.logits)
    expected = ((student.logits[6:] / tau).softmax(-1) - (teacher / tau).softmax(-1)) / tau / 12
    torch.testing.assert_close(gradient[6:], expected.detach())
    assert float(gradient[:6].abs().sum()) == 0


def test_least_value_is_the_entropy_of_the_teacher() -> None:
    method = Distillation(teacher=ToyNet(), temperature=0.5)
    host = _host(method)
    labeled, unlabeled = toy_batch(host)
    teacher = _frozen(method)(unlabeled["weak"])
    host.network = _Given(torch.cat([torch.zeros(6, 3), teacher]))
    p = (teacher / 0.5).softmax(-1)
    torch.testing.assert_close(method.loss(host, labeled, unlabeled).unsup, -(p * p.log()).sum(-1).mean())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_shares_between_labels_and_teacher(alpha: float) -> None:
    method = Distillation(teacher=ToyNet(), alpha=alpha)
    host = _host(method)
    host.network.eval()
    labeled, unlabeled = toy_batch(host)
    p = _frozen(method)(unlabeled["weak"]).softmax(-1)
    distilled = F.cross_entropy(host.network(unlabeled["weak"]), p)
    given = F.cross_entropy(host.network(labeled["image"]), labeled["label"])
    found = method.loss(host, labeled, unlabeled).total(1.0)
    torch.testing.assert_close(found, (1 - alpha) * given + alpha * distilled)


def test_teacher_is_frozen_and_may_be_larger() -> None:
    teacher = ToyNet(width=64)
    method = Distillation(teacher=teacher)
    host = _host(method)
    player = host.method.players(host)["main"].train()
    assert not any(module.training for module in teacher.modules())
    assert [p for p in player.parameters() if p.requires_grad] == list(host.network.parameters())
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    labeled, unlabeled = toy_batch(host)
    loss = method.loss(host, labeled, unlabeled)
    assert isinstance(loss.unsup, Tensor)
    gradient = torch.autograd.grad(loss.unsup, list(host.network.parameters()))
    assert sum(float(g.abs().sum()) for g in gradient) > 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_teacher_is_loaded_when_a_fit_begins_and_then_in_the_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = ToyNet()
    path = tmp_path / "teacher.ckpt"
    torch.save(trained.state_dict(), path)
    method = Distillation(teacher_from=str(path))
    host = _host(method)
    method.fit_start(host)
    torch.testing.assert_close(_frozen(method)(host.images), trained.eval()(host.images))
    path.unlink()
    resumed = Distillation(teacher_from=str(path))
    other = _host(resumed)
    resumed.load_state_dict(method.state_dict())
    torch.testing.assert_close(_frozen(resumed)(other.images), _frozen(method)(host.images))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Expected `teacher_from` or `teacher` for Distillation"):
        Distillation()
    with pytest.raises(ValueError, match="`temperature` > 0"):
        Distillation(teacher=ToyNet(), temperature=0.0)
    host = _host(Distillation(teacher=ToyNet()))
    labeled, unlabeled = toy_batch(host)
    with pytest.raises(RuntimeError, match="set up"):
        Distillation(teacher_from="x").loss(host, labeled, unlabeled)
