"""Noisy Student: balanced classes, what the teacher's labels become, and the combined loss."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl.balancing import balanced_copies
from lightning_modules.ssl.noisy_student import NoisyStudent


class _Fixed(nn.Module):
    """Logits that are the first inputs: what the teacher says is in the image."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1)[:, :3]


class _Says(nn.Module):
    """A student with these logits, whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: Tensor) -> Tensor:
        return self.logits


def _host(method: NoisyStudent | None = None, p: Tensor | None = None) -> tuple[ToyHost, NoisyStudent]:
    torch.manual_seed(0)
    method = method or NoisyStudent(teacher=_Fixed(), threshold=0.0)
    p = torch.rand(24, 3).softmax(-1) if p is None else p
    return ToyHost(method, network=ToyNet(3), images=p.log().view(24, 3, 1, 1)), method


def _certain(counts: tuple[int, int, int], confidence: float = 0.8) -> Tensor:
    label = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    return torch.where(F.one_hot(label, 3).bool(), confidence, (1 - confidence) / 2)


def test_classes_are_drawn_alike() -> None:
    torch.manual_seed(0)
    label = torch.randint(0, 5, (500,)) * torch.randint(0, 2, (500,))
    confidence = torch.rand(500)
    kept = confidence >= 0.3
    for wanted in (20, 137, None):
        copies = balanced_copies(label, confidence, 5, 0.3, wanted)
        expected = wanted or -(-int(kept.sum()) // 5)
        assert torch.bincount(label, copies, minlength=5).tolist() == [expected] * 5
        assert int(copies[~kept].sum()) == 0


def test_small_classes_are_repeated_evenly_and_large_ones_keep_the_surest() -> None:
    label = torch.tensor([0] * 6 + [1] * 3 + [2] * 2)
    confidence = torch.tensor([0.5, 0.9, 0.6, 0.95, 0.4, 0.7, 0.8, 0.8, 0.8, 0.9, 0.9])
    torch.manual_seed(0)
    drawn = torch.stack([balanced_copies(label, confidence, 4, 0.3, 4) for _ in range(600)]).float()
    assert (drawn[:, :6] == torch.tensor([0, 1, 1, 1, 0, 1])).all()
    assert (drawn[:, 6:9].sum(1) == 4).all()
    assert set(drawn[:, 6:9].flatten().tolist()) == {1.0, 2.0}
    torch.testing.assert_close(drawn[:, 6:9].mean(0), torch.full((3,), 4 / 3), atol=0.08, rtol=0)
    assert (drawn[:, 9:] == 2).all()


def test_balancing_is_seeded_and_survives_empty_classes() -> None:
    label, confidence = torch.tensor([0, 0, 0, 2]), torch.full((4,), 0.9)
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(balanced_copies(label, confidence, 3, 0.3, 5))
    assert torch.equal(*results)
    assert torch.bincount(label, results[0], minlength=3).tolist() == [5, 0, 5]
    assert balanced_copies(label, confidence, 3, 0.95, 5).tolist() == [0] * 4


def test_teacher_labels_before_the_fit_and_given_labels_stay() -> None:
    p = torch.rand(24, 3, generator=torch.Generator().manual_seed(1)).softmax(-1)
    host, method = _host(p=p)
    assert method.select() is None
    method.fit_start(host)
    torch.testing.assert_close(method.soft_label[6:], p[6:])
    assert torch.equal(method.soft_label[:6], F.one_hot(host.labels[:6], 3).float())
    chosen = method.select()
    assert chosen is not None
    count = torch.bincount(method.soft_label.argmax(1)[chosen["unlabeled"]], minlength=3)
    assert count.tolist() == [8, 8, 8]
    assert torch.equal(torch.bincount(chosen["unlabeled"], minlength=24), method.copies)


@pytest.mark.parametrize(("hard", "temperature"), [(True, 1.0), (False, 0.5)])
def test_hard_labels_and_temperature(hard: bool, temperature: float) -> None:
    method = NoisyStudent(teacher=_Fixed(), threshold=0.0, hard_labels=hard, temperature=temperature)
    host, _ = _host(method)
    method.fit_start(host)
    p = host.images.flatten(1).exp()[6:]
    square = p**2 / (p**2).sum(1, keepdim=True)
    torch.testing.assert_close(method.soft_label[6:], F.one_hot(p.argmax(1), 3).float() if hard else square)


def test_images_that_the_teacher_is_not_sure_of_are_left_out() -> None:
    p = _certain((8, 8, 8))
    p[10:] = 1 / 3
    host, method = _host(NoisyStudent(teacher=_Fixed(), threshold=0.5, balance=False), p)
    method.fit_start(host)
    assert method.copies.tolist() == [1] * 10 + [0] * 14


def test_a_teacher_that_is_sure_of_nothing_is_an_error() -> None:
    host, method = _host(NoisyStudent(teacher=_Fixed(), threshold=0.9), torch.full((24, 3), 1 / 3))
    host.num_labeled = 0
    with pytest.raises(ValueError, match="sure of some images"):
        method.fit_start(host)


def test_teacher_comes_from_a_checkpoint_and_into_none(tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = ToyNet(3)
    torch.save(trained.state_dict(), tmp_path / "teacher.ckpt")
    host, method = _host(NoisyStudent(teacher_from=str(tmp_path / "teacher.ckpt"), threshold=0.0))
    method.fit_start(host)
    p = trained.eval()(host.images).softmax(-1)
    torch.testing.assert_close(method.soft_label[6:], p[6:])
    assert set(method.state_dict()) == {"soft_label", "copies", "loss_means"}
    assert list(method.parameters()) == []


def test_loss_is_the_mean_over_all_images_of_the_batch() -> None:
    host, method = _host()
    method.fit_start(host)
    labeled, unlabeled = toy_batch(host)
    method.copies[3] = 0
    loss = method.loss(host, labeled, unlabeled)
    log_p = host.network(torch.cat([labeled["image"], unlabeled["strong"]])).log_softmax(-1)
    sup, unsup = torch.zeros(()), torch.zeros(())
    for i, y in enumerate(labeled["label"]):
        sup = sup - log_p[i] @ (0.9 * F.one_hot(y, 3) + 0.1 / 3) / 18
    for i, j in enumerate(unlabeled["index"].tolist()):
        if int(method.copies[j]) > 0:
            unsup = unsup - log_p[6 + i] @ method.soft_label[j] / 18
    torch.testing.assert_close(loss.sup, sup)
    torch.testing.assert_close(loss.unsup, unsup)
    gradient = torch.autograd.grad(unsup, list(host.network.parameters()))
    assert sum(float(g.abs().sum()) for g in gradient) > 0
    assert loss.guess is not None
    assert loss.guess.weight.tolist() == (method.copies[:12] > 0).float().tolist()
    assert loss.guess.weight[3] == 0


def test_soft_loss_is_least_where_the_student_says_what_the_teacher_says() -> None:
    host, method = _host()
    method.fit_start(host)
    labeled, unlabeled = toy_batch(host, size=24, ratio=1, noise=0.0)
    target = method.soft_label.clamp_min(1e-6).log()
    logits = torch.cat([torch.zeros(24, 3), target]).requires_grad_()
    host.network = _Says(logits)
    loss = method.loss(host, labeled, unlabeled)
    assert isinstance(loss.unsup, Tensor)
    (gradient,) = torch.autograd.grad(loss.unsup, logits)
    assert float(gradient.abs().max()) < 1e-6


def test_loss_normalization_is_the_ratio_of_running_means() -> None:
    host, method = _host(NoisyStudent(teacher=_Fixed(), threshold=0.0, loss_normalization=True, loss_decay=0.8))
    method.fit_start(host)
    labeled, unlabeled = toy_batch(host)
    host.network.eval()
    plain = NoisyStudent(teacher=_Fixed(), threshold=0.0)
    plain.setup(host)
    plain.load_state_dict(method.state_dict())
    means: list[float] = []
    for step in range(3):
        with torch.no_grad():
            for parameter in host.network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        loss, raw = method.loss(host, labeled, unlabeled), plain.loss(host, labeled, unlabeled)
        now = [float(raw.sup) * 3, float(raw.unsup) * 1.5]
        means = now if step == 0 else [0.8 * m + 0.2 * n for m, n in zip(means, now, strict=True)]
        assert method.loss_means.tolist() == pytest.approx(means)
        assert float(loss.sup) == pytest.approx(float(raw.sup))
        assert float(loss.unsup) == pytest.approx(float(raw.unsup) * means[0] / means[1])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Expected `teacher_from` or `teacher` for NoisyStudent"):
        NoisyStudent()
    with pytest.raises(ValueError, match="`images_per_class` >= 1"):
        NoisyStudent(teacher=_Fixed(), images_per_class=0)
    with pytest.raises(ValueError, match="Expected `label_smoothing`"):
        NoisyStudent(teacher=_Fixed(), label_smoothing=1.0)
