"""Pi-model, Mean Teacher and adversarial training: what is compared with what, and where gradients go."""

import copy

import pytest
import torch
from ssl_toys import ToyHost, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl.adversarial_training import AdversarialTraining
from lightning_modules.ssl.base import TeacherBuffers
from lightning_modules.ssl.mean_teacher import MeanTeacher
from lightning_modules.ssl.pi_model import PiModel


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


class Statistics(nn.Module):
    """The running statistics of a network after a forward of these images, from where they are now."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def after(self, *images: Tensor) -> list[Tensor]:
        self.network(torch.cat(images))
        return list(self.network.buffers())


def gradients(network: nn.Module, value: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value, list(network.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(network.parameters(), found, strict=True)]


def size_of(gradient: list[Tensor]) -> float:
    return sum(float(g.abs().sum()) for g in gradient)


def p_of(network: nn.Module, image: Tensor) -> Tensor:
    probabilities: Tensor = network(image).softmax(-1)
    return probabilities


def test_pi_compares_two_views_and_averages_over_classes() -> None:
    host = ToyHost(PiModel())
    labeled, unlabeled = toy_batch(host)
    loss = host.method.loss(host, labeled, unlabeled)
    first, second = (p_of(host.network, unlabeled[key]) for key in ("weak", "weak_2"))
    naive = sum(float((a - b) ** 2) for a, b in zip(first.flatten(), second.flatten(), strict=True)) / first.numel()
    assert float(loss.unsup) == pytest.approx(naive, rel=1e-5)
    same = host.method.loss(host, labeled, {**unlabeled, "weak_2": unlabeled["weak"]})
    assert float(same.unsup) == 0


def test_pi_without_a_gradient_into_one_view_has_half_the_gradient_on_average() -> None:
    host = ToyHost(PiModel())
    labeled, unlabeled = toy_batch(host)
    swapped = {"weak": unlabeled["weak_2"], "weak_2": unlabeled["weak"]}
    one, other = (
        gradients(host.network, torch.as_tensor(host.method.loss(host, labeled, u).unsup)) for u in (unlabeled, swapped)
    )
    both = gradients(host.network, torch.as_tensor(PiModel(stop_gradient=False).loss(host, labeled, unlabeled).unsup))
    assert size_of(one) > 0
    for a, b, whole in zip(one, other, both, strict=True):
        torch.testing.assert_close((a + b) / 2, whole / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_pi_moves_the_statistics_by_labelled_images_alone(stop_gradient: bool) -> None:
    host = ToyHost(PiModel(stop_gradient))
    labeled, unlabeled = toy_batch(host)
    expected = Statistics(host.network).after(labeled["image"])
    host.method.loss(host, labeled, unlabeled)
    assert all(torch.equal(a, b) for a, b in zip(host.network.buffers(), expected, strict=True))


def test_mean_teacher_has_a_gradient_that_reaches_the_student_and_not_the_teacher() -> None:
    # A known implementation reads the student's logits from the teacher's output without gradient: a loss of 0.
    host = ToyHost(MeanTeacher())
    host.ema_network.requires_grad_(True)
    labeled, unlabeled = toy_batch(host)
    loss = host.method.loss(host, labeled, unlabeled)
    unsup = torch.as_tensor(loss.unsup)
    assert unsup > 0
    assert size_of(gradients(host.network, unsup)) > 0
    assert size_of(gradients(host.ema_network, unsup)) == 0


def test_mean_teacher_learns_from_the_teacher_of_the_first_view() -> None:
    host = ToyHost(MeanTeacher())
    labeled, unlabeled = toy_batch(host)
    with torch.no_grad():
        for parameter in host.ema_network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    student = p_of(host.network, torch.cat([labeled["image"], unlabeled["weak_2"]]))[len(labeled["image"]) :]
    teacher = p_of(host.ema_network, unlabeled["weak"])
    loss = host.method.loss(host, labeled, unlabeled)
    assert float(loss.unsup) == pytest.approx(float((student - teacher).square().mean()), rel=1e-5)
    assert loss.guess is not None
    assert torch.equal(loss.guess.label, teacher.argmax(-1))


def test_a_student_that_is_its_teacher_agrees_with_it() -> None:
    host = ToyHost(MeanTeacher())
    host.network.eval()
    labeled, unlabeled = toy_batch(host)
    loss = host.method.loss(host, labeled, {**unlabeled, "weak_2": unlabeled["weak"]})
    assert float(loss.unsup) == pytest.approx(0, abs=1e-12)


def test_mean_teacher_moves_the_statistics_by_all_images_together() -> None:
    host = ToyHost(MeanTeacher())
    labeled, unlabeled = toy_batch(host)
    expected = Statistics(host.network).after(labeled["image"], unlabeled["weak_2"])
    host.method.loss(host, labeled, unlabeled)
    assert all(torch.equal(a, b) for a, b in zip(host.network.buffers(), expected, strict=True))


@pytest.mark.parametrize("buffers", ["own", "copy", "average"])
def test_the_teacher_s_buffers_can_be_chosen(buffers: TeacherBuffers) -> None:
    assert MeanTeacher(buffers).teacher_buffers == buffers


def test_other_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="`teacher_buffers`"):
        MeanTeacher("mine")  # type: ignore[arg-type]  # on purpose


class Linear(nn.Module):
    """Logits of two classes whose margin is w . x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))

    def forward(self, image: Tensor) -> Tensor:
        margin = image.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(margin), margin], 1)


def test_adversarial_images_lower_a_linear_margin_by_the_dual_norm_of_the_weights() -> None:
    network = Linear(12)
    image = torch.rand(5, 3, 2, 2)
    label = torch.tensor([0, 1, 1, 0, 1])
    sign = torch.where(label == 1, 1.0, -1.0)
    for norm, dual in (("linf", network.w.norm(1)), ("l2", network.w.norm(2))):
        method = AdversarialTraining(epsilon=0.3, norm=norm)  # type: ignore[arg-type]  # a Literal in a loop
        logits, r = method.attack(network, image, label)
        before, after = (sign * (z[:, 1] - z[:, 0]) for z in (logits, network(image + r)))
        torch.testing.assert_close(before - after, (0.3 * dual).expand(5))
        order = float("inf") if norm == "linf" else 2
        torch.testing.assert_close(torch.linalg.vector_norm(r.flatten(1), order, dim=1), torch.full((5,), 0.3))
        assert not r.requires_grad


def test_adversarial_training_mixes_the_two_losses() -> None:
    host = ToyHost(AdversarialTraining(epsilon=0.1, share=0.3))
    labeled, _ = toy_batch(host)
    logits, r = AdversarialTraining(epsilon=0.1).attack(host.network, labeled["image"], labeled["label"])
    ce = nn.CrossEntropyLoss()
    expected = 0.3 * ce(logits, labeled["label"]) + 0.7 * ce(host.network(labeled["image"] + r), labeled["label"])
    loss = host.method.loss(host, labeled, {})
    assert float(loss.sup) == pytest.approx(float(expected), rel=1e-5)
    assert loss.unsup == 0.0
    host.network.eval()
    _, r = AdversarialTraining(epsilon=0.01).attack(host.network, labeled["image"], labeled["label"])
    clean, attacked = (float(ce(host.network(labeled["image"] + k * r), labeled["label"])) for k in (0, 1))
    assert attacked > clean


def test_attacks_on_sure_predictions_survive_16_bits_whatever_the_batch_size() -> None:
    head = nn.Linear(4, 2, bias=False)
    head.weight.data = torch.tensor([[1.0], [-1.0]]).repeat(1, 4)
    network = nn.Sequential(nn.Flatten(), head)
    image, label = torch.full((256, 1, 2, 2), 1.5), torch.zeros(256, dtype=torch.long)  # a margin of 12
    with torch.autocast("cpu", torch.float16):
        logits, r = AdversarialTraining(epsilon=0.1).attack(network, image, label)
    assert logits.dtype == torch.float16
    torch.testing.assert_close(r, torch.full_like(image, -0.1))


def test_adversarial_training_leaves_gradients_alone_and_moves_statistics_by_clean_images() -> None:
    host = ToyHost(AdversarialTraining())
    labeled, _ = toy_batch(host)
    for parameter in host.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected = Statistics(host.network).after(labeled["image"])
    host.method.loss(host, labeled, {})
    assert all(torch.equal(a, b) for a, b in zip(host.network.buffers(), expected, strict=True))
    assert all(bool((p.grad == 1).all()) for p in host.network.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "value"), [("epsilon", -1.0), ("share", 1.5), ("norm", "l1")])
def test_adversarial_training_refuses_what_makes_no_sense(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        AdversarialTraining(**{name: value})  # type: ignore[arg-type]  # on purpose
