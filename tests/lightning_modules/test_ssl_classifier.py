"""SSLClassifier: how it trains one player and several, what counts, and what moves the average."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from ssl_methods import build
from ssl_toy_data import ToyData
from ssl_toys import ToyNet
from tiny_nets import tiny_trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, Dataset

from lightning_modules.ssl.base import Batch, Host, Loss, Method, TeacherBuffers, Views, view_keys
from lightning_modules.ssl.distillation import Distillation
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.supervised import Supervised
from lightning_modules.ssl_classifier import SSLClassifier

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)


def batches(steps: int = 4, size: int = 6, **changes: Tensor) -> list[dict[str, Any]]:
    """Batches for methods with a weak and a strong view, on images of 2 numbers."""
    generator = torch.Generator().manual_seed(0)

    def images(n: int) -> Tensor:
        return torch.rand(n, 2, 1, 1, generator=generator)

    return [
        {
            "labeled": {"image": images(size), "label": torch.arange(size) % 3, "index": torch.arange(size)} | changes,
            "unlabeled": {
                "weak": images(2 * size),
                "strong": images(2 * size),
                "index": torch.arange(2 * size),
                "true_label": torch.zeros(2 * size, dtype=torch.int64),
            },
        }
        for _ in range(steps)
    ]


class Pulls(Method):
    """Squared distance of the logits to 1 (labelled), -1 (unlabelled), and of a constant's to 0 (auxiliary)."""

    ramp = Ramp(weight=8.0, until=1.0)

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[float, int]] = []
        self.keys: set[str] = set()

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        self.seen.append((m.progress, m.batch_number))
        self.keys |= {*labeled, *unlabeled}
        return Loss(
            sup=(m.network(labeled["image"]) - 1).square().mean(),
            unsup=(m.network(unlabeled["weak"]) + 1).square().mean(),
            aux=self.own.square(),
        )


class Two(Method):
    """Two networks in turn; after its turn a player's new weights are seen."""

    views = Views(unlabeled=())

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[bool] = []

    def setup(self, m: Host) -> None:
        self.second = m.new_network()

    def players(self, m: Host) -> dict[str, nn.Module]:
        return {"first": m.network, "second": self.second}

    def turns(self, m: Host, labeled: Batch, unlabeled: Batch) -> Iterator[tuple[str, Loss]]:
        for name, network in self.players(m).items():
            before = [p.detach().clone() for p in network.parameters()]
            yield name, Loss(sup=F.cross_entropy(network(labeled["image"]), labeled["label"]), logs={name: 1.0})
            self.moved.append(any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)))


def loader(given: list[dict[str, Any]]) -> DataLoader[dict[str, Any]]:
    """A loader that gives these batches."""
    return DataLoader(cast("Dataset[dict[str, Any]]", given), batch_size=None)


def fitted(method: Method, tmp_path: Path, steps: int = 4, **options: Any) -> SSLClassifier:
    torch.manual_seed(0)
    module_options = {k: options.pop(k) for k in ("ramp", "lr_scheduler", "ema_decay", "optimizer") if k in options}
    module = SSLClassifier(ToyNet(), method, 3, **{"optimizer": sgd, **module_options})
    trainer = tiny_trainer(tmp_path, **{"max_epochs": -1, "max_steps": steps, **options})
    trainer.fit(module, loader(batches(steps)))
    return module


def test_repeated_views_have_numbers_and_the_first_labelled_one_is_the_image() -> None:
    assert view_keys(("weak", "strong", "strong")) == ("weak", "strong", "strong_2")
    assert view_keys(("weak", "weak", "probe"), labeled=True) == ("image", "weak_2", "probe")


def test_the_loss_is_sup_plus_aux_plus_mu_times_unsup() -> None:
    terms = Loss(sup=torch.tensor(1.0), unsup=torch.tensor(10.0), aux=torch.tensor(100.0))
    assert float(terms.total(0.5)) == 106.0
    assert float(Loss(sup=torch.tensor(1.0), unsup=torch.tensor(torch.nan)).total(0.0)) == 1.0
    with pytest.raises(TypeError, match="a tensor among its terms"):
        Loss(sup=1.0).total(1.0)


def test_a_step_is_the_gradient_of_the_three_terms_at_this_mu(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "ramp": Ramp(weight=4.0),
        "ema_decay": 0.0,
        "optimizer": partial(torch.optim.SGD, lr=0.1),
    }
    module = fitted(Pulls(), tmp_path, steps=1, **options)
    torch.manual_seed(0)
    alone = ToyNet()
    (batch,) = batches(1)
    labelled = (alone(batch["labeled"]["image"]) - 1).square().mean()
    loss = labelled + 4.0 * (alone(batch["unlabeled"]["weak"]) + 1).square().mean()
    loss.backward()
    for own, other in zip(module.network.parameters(), alone.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own, other - 0.1 * other.grad)
    method = module.method
    assert isinstance(method, Pulls)
    assert float(method.own) == pytest.approx(1 - 0.1 * 2)


def test_progress_and_batches_are_counted_and_hidden_labels_are_taken_away(tmp_path: Path) -> None:
    method = Pulls()
    fitted(method, tmp_path, steps=4)
    assert method.seen == [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)]
    assert "true_label" not in method.keys
    accumulating = Pulls()
    fitted(accumulating, tmp_path, steps=2, accumulate_grad_batches=2, limit_train_batches=4, max_epochs=1)
    assert [number for _, number in accumulating.seen] == [0, 1]


def test_players_take_turns_and_steps_count_batches(tmp_path: Path) -> None:
    method = Two()
    module = fitted(
        method, tmp_path, steps=3, lr_scheduler=partial(LinearLR, start_factor=1.0, end_factor=0.5, total_iters=2)
    )
    assert method.moved == [True] * 6
    assert module.trainer.global_step == 3
    assert module.trainer.fit_loop.epoch_loop.total_batch_idx == 2
    assert [schedule.last_epoch for schedule in module.lr_schedulers()] == [3, 3]  # type: ignore[union-attr]
    assert module.ema is not None
    assert int(module.ema.n_averaged) == 3


@pytest.mark.parametrize("method", [Pulls, Two])
def test_gradients_are_clipped_for_one_player_and_for_two(method: type[Method], tmp_path: Path) -> None:
    plain = partial(torch.optim.SGD, lr=1.0)
    module = fitted(method(), tmp_path, steps=1, gradient_clip_val=1e-3, optimizer=plain, ema_decay=0.0)
    torch.manual_seed(0)
    start = ToyNet()
    moved = [(a - b).square().sum() for a, b in zip(module.network.parameters(), start.parameters(), strict=True)]
    assert 0 < float(sum(moved)) ** 0.5 <= 1.001e-3


def test_several_players_refuse_to_accumulate_gradients(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`trainer.accumulate_grad_batches` 1 for Two"):
        fitted(Two(), tmp_path, accumulate_grad_batches=2)


def test_biases_and_norms_are_not_decayed(tmp_path: Path) -> None:
    module = fitted(Pulls(), tmp_path, steps=1)
    (optimizer,) = module.trainer.optimizers
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in module.network.parameters() if p.ndim > 1} == {0.1}
    assert {decays[id(p)] for p in module.network.parameters() if p.ndim == 1} == {0.0}
    assert len(decays) == len(list(module.network.parameters())) + 1


class _Shifts(Method):
    """Draws the BatchNorm of its network through ever larger inputs."""

    views = Views(unlabeled=())

    def __init__(self, buffers: TeacherBuffers) -> None:
        super().__init__()
        self.teacher_buffers = buffers

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        m.teacher(labeled["image"] + 1000.0)
        return Loss(sup=m.network(labeled["image"] + m.batch_number).square().mean())


@pytest.mark.parametrize("buffers", ["copy", "average", "own"])
def test_buffers_of_the_average_follow_the_policy(buffers: TeacherBuffers, tmp_path: Path) -> None:
    module = fitted(_Shifts(buffers), tmp_path, steps=4, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert module.ema is not None
    student, average = (net.body[2].running_mean for net in (module.network, module.ema.module))  # type: ignore[union-attr, index]
    torch.manual_seed(0)
    alone = ToyNet().train()
    norm: Any = alone.body[2]
    expected = torch.zeros(())
    for number, batch in enumerate(batches(4)):
        alone.body(batch["labeled"]["image"] + number)
        weight = 1.0 if number == 0 else 1 - min(0.999, (1 + number) / (10 + number))
        expected = norm.running_mean.clone() if number == 0 else expected.lerp(norm.running_mean, weight)
    torch.testing.assert_close(student, norm.running_mean)
    if buffers == "copy":
        torch.testing.assert_close(average, student)
    elif buffers == "average":
        torch.testing.assert_close(average, expected)
    else:
        assert float((average - student).abs().max()) > 10


def test_a_method_that_asks_for_a_view_the_data_lack_says_so(tmp_path: Path) -> None:
    incomplete = batches(1)
    del incomplete[0]["unlabeled"]["strong"]
    module = SSLClassifier(ToyNet(), Pulls(), 3, optimizer=sgd)
    with pytest.raises(ValueError, match=r"weak, strong under `unlabeled` for Pulls, got index, .*give strong"):
        tiny_trainer(tmp_path).fit(module, loader(incomplete))


def test_a_label_outside_the_classes_is_named(tmp_path: Path) -> None:
    module = SSLClassifier(ToyNet(), Supervised(), 3, optimizer=sgd)
    with pytest.raises(ValueError, match=r"labels from 0 to 2 .*got 3"):
        tiny_trainer(tmp_path).fit(module, loader(batches(1, label=torch.tensor([0, 1, 3, 0, 1, 2]))))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    module = SSLClassifier(ToyNet(), Supervised(), 3, optimizer=sgd)
    with pytest.raises(FloatingPointError, match=r"finite training loss, got nan at step 0 \(sup = nan"):
        tiny_trainer(tmp_path).fit(module, loader(batches(1, image=torch.full((6, 2, 1, 1), torch.nan))))


def test_a_method_that_needs_an_index_needs_a_datamodule(tmp_path: Path) -> None:
    method = Supervised()
    method.views = Views(index=True)
    with pytest.raises(TypeError, match=r"a datamodule with num_unlabeled for Supervised, got NoneType"):
        tiny_trainer(tmp_path).fit(SSLClassifier(ToyNet(), method, 3, optimizer=sgd), loader(batches(1)))


@pytest.mark.parametrize("name", ["flexmatch", "simmatch", "dividemix", "distillation"])
def test_a_module_that_predicted_before_its_fit_is_set_up_for_the_data(name: str, tmp_path: Path) -> None:
    method = Distillation(teacher=ToyNet(num_classes=2)) if name == "distillation" else build(name)
    module, data = SSLClassifier(ToyNet(num_classes=2), method, 2, optimizer=sgd), ToyData(steps=2)
    module(torch.rand(2, 2, 1, 1))
    tiny_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    trainer = tiny_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert (module.num_labeled, module.num_unlabeled) == (8, 300)
    with pytest.raises(ValueError, match="build a new module for other data"):
        tiny_trainer(tmp_path).fit(module, datamodule=ToyData(size=200))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`num_classes` >= 2"):
        SSLClassifier(ToyNet(), Supervised(), 1)
    with pytest.raises(ValueError, match="Expected an `optimizer` for fit"):
        SSLClassifier(ToyNet(), Supervised(), 3).configure_optimizers()
