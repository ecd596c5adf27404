"""Soft pseudo-labels: MixUp and regularisers against naive ones, and labels that are renewed."""

import math

import pytest
import torch
import torch.nn.functional as F
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor

from lightning_modules.ssl.parts import class_divergence
from lightning_modules.ssl.soft_pseudo_labels import SoftPseudoLabels


def _host(method: SoftPseudoLabels | None = None, epoch: int = 10) -> tuple[ToyHost, SoftPseudoLabels]:
    torch.manual_seed(0)
    method = method or SoftPseudoLabels()
    host = ToyHost(method, network=ToyNet())
    host.current_epoch = epoch
    return host, method


def test_class_divergence_is_zero_at_the_uniform_mean_only() -> None:
    assert float(class_divergence(50 * torch.eye(4))) == pytest.approx(0, abs=1e-6)
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])
    expected = sum(math.log((1 / 3) / q) / 3 for q in (0.6, 0.3, 0.1))
    assert float(class_divergence(p.log())) == pytest.approx(expected, rel=1e-5)


def test_class_divergence_pulls_back_a_class_that_nobody_predicts() -> None:
    logits = torch.tensor([[0.0, -200.0, 0.0]]).requires_grad_()
    (gradient,) = torch.autograd.grad(class_divergence(logits), logits)
    assert torch.isfinite(gradient).all()
    assert float(gradient[0, 1]) < -0.1


def test_labels_are_renewed_from_the_network_and_given_ones_stay() -> None:
    host, method = _host()
    method.epoch_start(host)
    host.network.eval()
    p = host.network(host.images).softmax(-1)
    torch.testing.assert_close(method.soft_label[6:], p[6:])
    assert torch.equal(method.soft_label[:6], F.one_hot(host.labels[:6], 3).float())
    assert not method.soft_label.requires_grad


def test_loss_equals_naive_loop() -> None:
    host, method = _host()
    method.epoch_start(host)
    labeled, unlabeled = toy_batch(host)
    torch.manual_seed(3)
    loss = method.loss(host, labeled, unlabeled)
    torch.manual_seed(3)
    lam = float(torch.distributions.Beta(1.0, 1.0).sample((1,)))
    order = torch.randperm(18)
    images = torch.cat([labeled["image"], unlabeled["weak"]])
    target = torch.cat([F.one_hot(labeled["label"], 3).float(), method.soft_label[unlabeled["index"]]])
    log_p = host.network(lam * images + (1 - lam) * images[order]).log_softmax(-1)
    # MixUp's loss is linear in the target: lam H(y, p) + (1 - lam) H(y', p).
    each = [-lam * log_p[i] @ target[i] - (1 - lam) * log_p[i] @ target[int(order[i])] for i in range(18)]
    torch.testing.assert_close(loss.sup, torch.stack(each[:6]).sum() / 18)
    torch.testing.assert_close(loss.unsup, torch.stack(each[6:]).sum() / 18)
    p = log_p.exp()
    regularisers = 0.8 * -(3 * p.mean(0)).log().mean() + 0.4 * -(p * log_p).sum(-1).mean()
    torch.testing.assert_close(loss.aux, regularisers)


def test_gradient_reaches_the_network() -> None:
    host, method = _host(SoftPseudoLabels(warmup_epochs=0), epoch=0)
    method.epoch_start(host)
    loss = method.loss(host, *toy_batch(host))
    for term in (loss.sup, loss.unsup, loss.aux):
        assert isinstance(term, Tensor)
        gradient = torch.autograd.grad(term, list(host.network.parameters()), retain_graph=True)
        assert sum(float(g.abs().sum()) for g in gradient) > 0


def test_warmup_learns_mixed_labelled_images_only() -> None:
    host, method = _host(SoftPseudoLabels(alpha=0.0), epoch=9)
    method.epoch_start(host)
    torch.testing.assert_close(method.soft_label, torch.full((24, 3), 1 / 3))
    labeled, unlabeled = toy_batch(host)
    loss = method.loss(host, labeled, unlabeled)
    torch.testing.assert_close(loss.sup, F.cross_entropy(host.network(labeled["image"]), labeled["label"]))
    assert (loss.unsup, loss.aux, loss.guess) == (0.0, 0.0, None)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`entropy_weight` >= 0"):
        SoftPseudoLabels(entropy_weight=-0.1)
