"""ICT: a teacher's predictions mixed as the images are."""

import copy
from functools import partial

import pytest
import torch
from ssl_toys import ToyHost, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl import mixing
from lightning_modules.ssl.ict import ICT
from lightning_modules.ssl.parts import beta_samples, mix


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def test_without_mixing_it_is_mean_teacher_on_one_view() -> None:
    host = ToyHost(ICT(alpha=0.0))
    labeled, unlabeled = toy_batch(host)
    with torch.no_grad():
        for parameter in host.ema_network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    loss = host.method.loss(host, labeled, unlabeled)
    student, teacher = (net(unlabeled["weak"]).softmax(1) for net in (host.network, host.ema_network))
    assert float(loss.unsup) == pytest.approx(float((student - teacher).square().mean()), rel=1e-4)
    ce = nn.functional.cross_entropy(host.network(labeled["image"]), labeled["label"])
    assert float(loss.sup) == pytest.approx(float(ce), rel=1e-4)


class LinearProbabilities(nn.Module):
    """A network whose probabilities are a linear function of the image, so that it keeps any mixture."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.columns = nn.Parameter(torch.rand(3, 4, generator=generator).softmax(0))

    def forward(self, image: Tensor) -> Tensor:
        # Pixels sum to 1, so these are probabilities.
        return (image.flatten(1) @ self.columns.T).log()


def test_a_linear_network_that_is_its_teacher_is_consistent_for_every_mixture() -> None:
    # Probabilities are mixed: mixed logits would not be those of the mixed image.
    images = torch.rand(24, 4).softmax(1).view(24, 4, 1, 1)
    host = ToyHost(ICT(alpha=1.0), LinearProbabilities(), images=images)
    labeled, unlabeled = toy_batch(host, noise=0.0)
    assert float(host.method.loss(host, labeled, unlabeled).unsup) == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        host.ema_network.get_parameter("columns").copy_(torch.rand(3, 4).softmax(0))
    assert float(host.method.loss(host, labeled, unlabeled).unsup) > 1e-4


@pytest.mark.parametrize("mix_labeled", [True, False])
def test_the_loss_is_that_of_mixtures_drawn_alike(mix_labeled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unit mixtures with known partners: everyone's neighbour, lambda 0.7.
    monkeypatch.setattr(mixing, "beta_samples", lambda alpha, size, like: like.new_full((size,), 0.7))
    monkeypatch.setattr(torch, "randperm", lambda size, device: torch.arange(size).roll(1))
    host = ToyHost(ICT(mix_labeled=mix_labeled))
    labeled, unlabeled = toy_batch(host)
    loss = host.method.loss(host, labeled, unlabeled)
    mixed = partial(mix, lam=torch.full((1,), 0.7))
    u, x = unlabeled["weak"], labeled["image"]
    p = host.ema_network(u).softmax(1)
    student = host.network(mixed(u, u.roll(1, 0))).softmax(1)
    expected = (student - mixed(p, p.roll(1, 0))).square().mean()
    assert float(loss.unsup) == pytest.approx(float(expected), rel=1e-4)
    ce = partial(nn.functional.cross_entropy, reduction="mean")
    y = labeled["label"]
    if mix_labeled:
        logits = host.network(mixed(x, x.roll(1, 0)))
        sup = 0.7 * ce(logits, y) + 0.3 * ce(logits, y.roll(1))
    else:
        sup = ce(host.network(x), y)
    assert float(loss.sup) == pytest.approx(float(sup), rel=1e-4)


def test_gradients_reach_the_student_only_and_labelled_images_move_the_statistics() -> None:
    host = ToyHost(ICT(mix_labeled=False))
    host.ema_network.requires_grad_(True)
    labeled, unlabeled = toy_batch(host)
    twin = copy.deepcopy(host.network)
    twin(labeled["image"])
    unsup = torch.as_tensor(host.method.loss(host, labeled, unlabeled).unsup)
    assert all(torch.equal(a, b) for a, b in zip(host.network.buffers(), twin.buffers(), strict=True))
    student = torch.autograd.grad(unsup, list(host.network.parameters()), retain_graph=True)
    assert sum(float(g.abs().sum()) for g in student) > 0
    teacher = torch.autograd.grad(unsup, list(host.ema_network.parameters()), allow_unused=True)
    assert set(teacher) == {None}


def test_each_image_has_a_lambda_of_its_own_and_stays_the_main_one() -> None:
    drawn = beta_samples(ICT().alpha, 64, torch.zeros(1))
    assert len(set(drawn.tolist())) > 32
    assert float(drawn.min()) >= 0.5


def test_ict_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="`alpha`"):
        ICT(alpha=-1.0)
    with pytest.raises(ValueError, match="`teacher_buffers`"):
        ICT(teacher_buffers="mine")  # type: ignore[arg-type]  # on purpose
