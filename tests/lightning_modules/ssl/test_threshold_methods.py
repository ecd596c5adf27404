"""FixMatch and its relatives: closed forms, limits, where gradients go, memory in checkpoints."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ssl_logits import LogitNet, logit_batch, logit_host, probabilities_to_logits
from ssl_toys import ToyHost, toy_batch
from torch import Tensor, nn

from lightning_modules.ssl.adamatch import AdaMatch
from lightning_modules.ssl.alignment import Alignment
from lightning_modules.ssl.base import Batch, Loss, Method
from lightning_modules.ssl.comatch import CoMatch
from lightning_modules.ssl.dash import Dash
from lightning_modules.ssl.fixmatch import FixMatch
from lightning_modules.ssl.flexmatch import FlexMatch
from lightning_modules.ssl.freematch import FreeMatch
from lightning_modules.ssl.parts import sharpen
from lightning_modules.ssl.pseudo_label import PseudoLabel
from lightning_modules.ssl.simmatch import SimMatch
from lightning_modules.ssl.softmatch import SoftMatch
from lightning_modules.ssl.thresholds import FixedThreshold
from lightning_modules.ssl.uda import UDA, annealed
from lightning_modules.ssl.weak_to_strong import WeakToStrong

X = probabilities_to_logits([0.7, 0.2, 0.1], [0.2, 0.5, 0.3])
Y = torch.tensor([0, 2])
W = probabilities_to_logits([0.97, 0.02, 0.01], [0.3, 0.6, 0.1], [0.05, 0.05, 0.9], [0.01, 0.98, 0.01])
S = probabilities_to_logits([0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1])

# Every method with strong views, each so that it learns from most images of a toy batch.
MAKERS: list[Callable[[], Method]] = [
    lambda: FixMatch(0.2),
    lambda: UDA(0.2, annealing="log"),
    lambda: FlexMatch(0.2),
    lambda: FreeMatch(fairness=0.1),
    lambda: SoftMatch(),
    lambda: Dash(warmup=0.1, period=1.0),
    lambda: AdaMatch(0.2),
    lambda: CoMatch(0.2, queue=20),
    lambda: SimMatch(0.2),
    lambda: SimMatch(0.2, ema_teacher=True),
]


def value(method: Method, **views: Tensor) -> Loss:
    views = views or {"weak": W, "strong": S}
    return method.loss(logit_host(method), *logit_batch(method, X, Y, **views))


def unsup(method: Method, **views: Tensor) -> float:
    return float(value(method, **views).unsup)


# ---------------------------------------------------------------- FixMatch


def test_fixmatch_averages_over_the_whole_unlabelled_batch() -> None:
    loss = value(FixMatch())
    assert float(loss.sup) == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    # The first and the last image are confident.
    assert float(loss.unsup) == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 4)
    assert loss.guess is not None
    assert loss.guess.label.tolist() == [0, 1, 2, 1]
    assert loss.guess.weight.tolist() == [1, 0, 0, 1]
    assert loss.guess.confidence.tolist() == pytest.approx([0.97, 0.6, 0.9, 0.98])
    assert loss.aux == 0.0


def test_fixmatch_without_a_threshold_is_hard_pseudo_labels_on_the_strong_view() -> None:
    assert unsup(FixMatch(0.0)) == pytest.approx(F.cross_entropy(S, W.argmax(-1)).item())


def test_fixmatch_above_one_and_with_an_empty_mask_learns_nothing() -> None:
    for method in (FixMatch(1.1), FixMatch(0.99)):
        loss = value(method)
        assert isinstance(loss.unsup, Tensor)
        assert loss.unsup == 0
        assert loss.unsup.requires_grad  # other processes may have confident images


def test_two_classes_and_a_batch_of_one_class() -> None:
    method, logits = FixMatch(0.9), probabilities_to_logits([0.95, 0.05], [0.99, 0.01])
    loss = method.loss(
        logit_host(method, 2), *logit_batch(method, logits, torch.zeros(2).long(), weak=logits, strong=logits)
    )
    assert float(loss.unsup) == pytest.approx(-(math.log(0.95) + math.log(0.99)) / 2, rel=1e-4)


def test_pseudo_labels_are_those_of_the_student_not_of_its_average() -> None:
    method = FixMatch(0.0)
    m = logit_host(method)
    m.ema_network = nn.Module()  # it cannot be called
    assert float(method.loss(m, *logit_batch(method, X, Y, weak=W, strong=S)).unsup) > 0


# ---------------------------------------------------------------- UDA


def test_sharpening_is_a_softmax_with_a_temperature() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1]])
    expected = [0.7826, 0.1957, 0.0217]
    assert sharpen(p, 0.5)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert (p.log() / 0.5).softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(sharpen(p, 1.0), p)
    assert sharpen(p, 0.0).tolist() == [[1, 0, 0]]
    torch.testing.assert_close(sharpen(p, 1e-3), torch.tensor([[1.0, 0, 0]]))


def test_uda_applies_its_temperature() -> None:
    # Toolkits pass probabilities on and lose T on the way: then the loss is the same for each T.
    method = UDA(threshold=0.8, temperature=0.4)
    target = (W / 0.4).softmax(-1) * torch.tensor([1.0, 0, 1, 1])[:, None]
    assert unsup(method) == pytest.approx((-(target * S.log_softmax(-1)).sum() / 4).item(), rel=1e-5)
    values = [unsup(UDA(0.8, t)) for t in (1.0, 0.4, 0.1, 0.0)]
    assert len({round(v, 6) for v in values}) > 2
    assert values[-1] == pytest.approx(unsup(FixMatch(0.8)))
    assert unsup(UDA(0.8, 1e-3)) == pytest.approx(values[-1], rel=1e-5)


def test_uda_is_confident_before_sharpening() -> None:
    # 0.6 sharpened with T = 0.1 is above 0.99.
    loss = value(UDA(0.95, 0.1))
    assert loss.guess is not None
    assert loss.guess.weight.tolist() == [1, 0, 0, 1]
    assert loss.guess.confidence[1].item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("linear", [0.1, 0.325, 0.55, 0.775, 1.0]),
        ("exp", [0.1061, 0.1212, 0.1739, 0.3579, 1.0]),
        ("log", [0.1, 0.7421, 0.9261, 0.9788, 0.9939]),
        ("none", [1.0] * 5),
    ],
)
def test_signal_annealing_has_the_published_values(schedule: str, values: list[float]) -> None:
    found = [annealed(schedule, t, 10) for t in (0, 0.25, 0.5, 0.75, 1)]  # type: ignore[arg-type]  # parametrised
    assert found == pytest.approx(values, abs=5e-5)


def test_signal_annealing_keeps_by_the_true_class_and_averages_over_those_kept() -> None:
    # eta = 2/3 half-way with three classes. The second image is sure of a wrong class: its true class has 0.05.
    logits = probabilities_to_logits([0.7, 0.2, 0.1], [0.9, 0.05, 0.05], [0.3, 0.4, 0.3])
    label = torch.tensor([0, 1, 2])
    method = UDA(annealing="linear")
    m = logit_host(method)
    batch = logit_batch(method, logits, label, weak=W, strong=S)
    assert float(method.loss(m, *batch).sup) == pytest.approx(-(math.log(0.05) + math.log(0.3)) / 2, rel=1e-5)
    plain = UDA()
    whole = float(plain.loss(m, *batch).sup)
    assert whole == pytest.approx(F.cross_entropy(logits, label).item())
    m.progress = 1.0
    assert float(method.loss(m, *batch).sup) == pytest.approx(whole)


def test_signal_annealing_that_keeps_none_is_zero() -> None:
    method = UDA(annealing="exp")
    m = logit_host(method)
    m.progress = 0.0
    sure = probabilities_to_logits([0.99, 0.005, 0.005])
    loss = method.loss(m, *logit_batch(method, sure, torch.tensor([0]), weak=W, strong=S))
    assert float(loss.sup) == 0.0


# ---------------------------------------------------------------- Pseudo-Label


def test_pseudo_label_has_the_gradient_of_p_minus_onehot() -> None:
    method = PseudoLabel(0.0)
    m = logit_host(method)
    weak = W.clone().requires_grad_()
    loss = method.loss(m, *logit_batch(method, X, Y, weak=weak))
    assert float(loss.unsup) == pytest.approx(-W.softmax(-1).amax(-1).log().mean().item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(torch.as_tensor(loss.unsup), weak)
    torch.testing.assert_close(gradient, (W.softmax(-1) - F.one_hot(W.argmax(-1), 3)) / 4)
    assert method.views == PseudoLabel.views


def test_pseudo_label_leaves_unsure_images_out() -> None:
    loss = value(PseudoLabel(), weak=W)
    assert float(loss.unsup) == pytest.approx(-(math.log(0.97) + math.log(0.98)) / 4, rel=1e-4)
    assert [PseudoLabel.ramp(t) for t in (0.0, 0.2, 0.4)] == pytest.approx([0, 0.5, 1])


# ---------------------------------------------------------------- the others, against FixMatch


def test_flexmatch_takes_every_image_at_first() -> None:
    assert unsup(FlexMatch()) == pytest.approx(unsup(FixMatch(0.0)))
    assert FlexMatch.views.index
    assert WeakToStrong(FlexMatch().threshold).views.index  # also where it is put together by hand


def test_freematch_at_first_takes_images_surer_than_chance() -> None:
    loss = value(FreeMatch(fairness=0.5))
    assert float(loss.unsup) == pytest.approx(unsup(FixMatch(0.0)))
    p, label = S.softmax(-1), S.argmax(-1)
    assert label.tolist() == [0, 2, 2, 1]
    ratio = p.mean(0) / (torch.bincount(label, minlength=3) / 4)
    assert isinstance(loss.aux, Tensor)
    # p / h is uniform but for one batch with weight 0.001.
    assert float(loss.aux) == pytest.approx(0.5 * (ratio / ratio.sum()).log().mean().item(), rel=1e-3)


def test_softmatch_aligns_weights_but_not_labels() -> None:
    method = SoftMatch(decay=0.0)
    weak = probabilities_to_logits([0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.9, 0.02, 0.08])
    loss = value(method, weak=weak, strong=S)
    p = weak.softmax(-1)
    aligned = p / p.mean(0)
    aligned = aligned / aligned.sum(-1, keepdim=True)
    assert loss.guess is not None
    assert loss.guess.label.tolist() == [0, 0, 0, 0]
    assert aligned.argmax(-1).tolist() != [0, 0, 0, 0]
    confidence = aligned.amax(-1)
    below = (confidence - confidence.mean()).clamp_max(0)
    weight = (-(below**2) * 2 / confidence.var()).exp()
    torch.testing.assert_close(loss.guess.weight, weight, rtol=1e-3, atol=1e-4)
    expected = (weight * F.cross_entropy(S, weak.argmax(-1), reduction="none")).mean()
    assert float(loss.unsup) == pytest.approx(expected.item(), rel=1e-3)
    assert "alignment.means" not in SoftMatch(align=False).state_dict()
    assert SoftMatch(align=False).alignment is None


def test_dash_is_fixmatch_with_the_confidence_of_its_loss() -> None:
    method = Dash(warmup=0.1, lowest=0.0)
    m = logit_host(method)
    batch = logit_batch(method, X, Y, weak=W, strong=S)
    m.progress = 0.0
    assert float(method.loss(m, *batch).unsup) == 0.0
    rho = 1.0001 * -(math.log(0.7) + math.log(0.3)) / 2
    m.progress = 0.105
    assert float(method.loss(m, *batch).unsup) == pytest.approx(unsup(FixMatch(math.exp(-rho))))
    m.progress = 0.101 + 0.09
    assert float(method.loss(m, *batch).unsup) == pytest.approx(unsup(FixMatch(math.exp(-rho / 1.27**9))))


def test_soft_targets_and_alignment_are_parts() -> None:
    method = WeakToStrong(FixedThreshold(0.0), temperature=1.0, alignment=Alignment("uniform", length=1))
    p = W.softmax(-1)
    q = p / p.mean(0)
    q = q / q.sum(-1, keepdim=True)
    assert unsup(method) == pytest.approx(-(q * S.log_softmax(-1)).sum(-1).mean().item(), rel=1e-4)


# ---------------------------------------------------------------- AdaMatch


def test_adamatch_without_interpolation_and_alignment_is_a_relative_fixmatch() -> None:
    method = AdaMatch(0.9, interpolate=False, decay=0.999, queue=0)
    loss = value(method)
    # Mean labelled confidence 0.6, so 0.54 of a nearly unaligned prediction is enough.
    assert loss.guess is not None
    assert loss.guess.weight.tolist() == [1, 1, 1, 1]
    strict = value(AdaMatch(1.55, interpolate=False, queue=0))
    assert strict.guess is not None
    assert strict.guess.weight.tolist() == [1, 0, 0, 1]
    assert float(strict.unsup) == pytest.approx(unsup(FixMatch()))
    assert [AdaMatch.ramp(t) for t in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.5, 1, 1])


def test_adamatch_interpolates_between_both_forwards() -> None:
    class ByCompany(LogitNet):
        """Logits that depend on how many images there are, as BatchNorm's do."""

        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) * (1.0 if len(image) == 4 else 3.0)

    method = AdaMatch()
    m = logit_host(method)
    m.network = ByCompany()
    torch.manual_seed(5)
    r = torch.rand(4, 3)  # one number for each logit, of weak and strong views
    torch.manual_seed(5)
    loss = method.loss(m, *logit_batch(method, X, Y, weak=W, strong=S))
    twice = torch.cat([X, X])
    mixed = 3 * twice + r * (twice - 3 * twice)
    assert float(loss.sup) == pytest.approx(F.cross_entropy(mixed, Y.repeat(2)).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(torch.as_tensor(loss.sup), list(m.network.parameters()))
    scale = torch.ones((), requires_grad=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(scale * mixed, Y.repeat(2)), scale)
    torch.testing.assert_close(gradient, expected)  # both forwards have it


def test_adamatch_moves_running_statistics_by_the_joint_forward_only() -> None:
    method = AdaMatch()
    m = ToyHost(method)
    labeled, unlabeled = toy_batch(m)
    twin = copy.deepcopy(m.network).train()
    m.network.train()
    method.loss(m, labeled, unlabeled)
    twin(torch.cat([labeled["image"], labeled["strong"], unlabeled["weak"], unlabeled["strong"]]))
    for own, theirs in zip(m.network.buffers(), twin.buffers(), strict=True):
        assert own.equal(theirs)


# ---------------------------------------------------------------- all of them


def _batch(m: ToyHost, seed: int) -> tuple[Batch, Batch]:
    torch.manual_seed(seed)
    return toy_batch(m)


def _trained(make: Callable[[], Method], steps: int = 3) -> ToyHost:
    torch.manual_seed(0)
    m = ToyHost(make())
    for step in range(steps):
        m.progress = step / steps
        m.method.loss(m, *_batch(m, step))
    return m


@pytest.mark.parametrize("make", MAKERS)
def test_gradient_goes_through_the_strong_view_only(make: Callable[[], Method]) -> None:
    m = _trained(make)
    m.network.eval()  # BatchNorm would couple the views
    labeled, unlabeled = _batch(m, 9)
    unlabeled = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in unlabeled.items()}
    loss = m.method.loss(m, labeled, unlabeled)
    assert isinstance(loss.unsup, Tensor)
    torch.autograd.backward(loss.unsup)
    for key, view in unlabeled.items():
        if key.startswith("strong"):
            assert view.grad is not None
            assert view.grad.abs().sum() > 0
        elif key == "weak":
            assert view.grad is None or not view.grad.any()
    gradients = [p.grad for p in m.network.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g is not None and g.any() for g in gradients)
    assert all(p.grad is None for p in m.ema_network.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_the_strong_view_matters(make: Callable[[], Method]) -> None:
    m = _trained(make)
    m.network.eval()
    labeled, unlabeled = _batch(m, 9)
    stronger = dict(unlabeled) | {k: 3 * v for k, v in unlabeled.items() if k.startswith("strong")}
    state = copy.deepcopy(m.method.state_dict())
    losses = []
    for batch in (unlabeled, stronger):
        m.method.load_state_dict(state)
        torch.manual_seed(1)
        losses.append(float(m.method.loss(m, labeled, batch).unsup))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("make", [*MAKERS, lambda: PseudoLabel(0.2)])
def test_a_reloaded_method_has_the_same_loss(make: Callable[[], Method]) -> None:
    m = _trained(make, steps=4)
    twin = ToyHost(make(), network=copy.deepcopy(m.network))
    twin.ema_network, twin.progress = m.ema_network, m.progress
    twin.method.load_state_dict(copy.deepcopy(m.method.state_dict()))
    results = []
    for host in (m, twin):
        batch = _batch(host, 7)
        loss = host.method.loss(host, *batch)
        results.append([float(loss.sup), float(loss.unsup), float(loss.aux)])
    assert results[0] == results[1]
    for own, theirs in zip(m.method.state_dict().values(), twin.method.state_dict().values(), strict=True):
        assert own.equal(theirs)


@pytest.mark.parametrize("make", [*MAKERS, lambda: PseudoLabel(0.2)])
def test_only_buffers_change_in_training(make: Callable[[], Method]) -> None:
    m = _trained(make, steps=1)
    plain = {
        (name, k): repr(v)
        for name, module in m.method.named_modules()
        for k, v in vars(module).items()
        if not k.startswith("_") and k != "training"
    }
    m.progress = 0.9
    m.method.loss(m, *_batch(m, 5))
    for name, module in m.method.named_modules():
        for k, v in vars(module).items():
            if (name, k) in plain:
                assert plain[name, k] == repr(v), (name, k)


@pytest.mark.parametrize("make", MAKERS)
def test_one_joint_forward_moves_the_statistics(make: Callable[[], Method]) -> None:
    m = ToyHost(make())
    m.network.train()
    m.method.loss(m, *_batch(m, 0))
    tracked = [n.num_batches_tracked for n in m.network.modules() if isinstance(n, nn.BatchNorm1d)]
    assert [int(n) for n in tracked if n is not None] == [1]
    assert m.method.batch_norm == "joint"


@pytest.mark.parametrize("kind", [FixMatch, UDA, FlexMatch, FreeMatch, SoftMatch, Dash, AdaMatch, PseudoLabel])
def test_views_are_those_that_the_class_states(kind: Callable[[], WeakToStrong]) -> None:
    method = kind()
    assert method.views == type(method).views


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`annealing`"):
        UDA(annealing="cubic")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="`temperature`"):
        UDA(temperature=-1)
    with pytest.raises(ValueError, match="`student`"):
        WeakToStrong(FixedThreshold(), student="hard")  # type: ignore[arg-type]  # on purpose
