"""What SSLClassifier reports: which network, on which labels, and which of them was best in validation."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from board import board_trainer, pictures
from ssl_toy_data import ToyData
from ssl_toys import ToyNet
from tiny_nets import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks import ConfusionMatrix, PseudoLabelGrid, ReliabilityDiagram, ViewGrid
from callbacks.confusion_matrix import draw_confusion
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Split, Views
from lightning_modules.ssl.fixmatch import FixMatch
from lightning_modules.ssl.supervised import Supervised
from lightning_modules.ssl_classifier import SSLClassifier

sgd = partial(torch.optim.SGD, lr=0.5)
K = 3
EVALUATED = (("val", [6, 12]), ("test", [12]))


def _items(n: int, seed: int, **changes: Tensor) -> list[dict[str, Tensor]]:
    """Points whose class is the third of the circle that they lie in."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, 2, 1, 1, generator=generator)
    label = ((torch.atan2(image[:, 0], image[:, 1]).flatten() / torch.pi + 1) / 2 * K).long().clamp(max=K - 1)
    columns = {"image": image, "label": label, "index": torch.arange(n)} | changes
    return [{name: values[i] for name, values in columns.items()} for i in range(n)]


def _loader(items: list[dict[str, Tensor]], size: int = 8) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(cast("Dataset[dict[str, Tensor]]", items), batch_size=size)


class Circle(pl.LightningDataModule):
    """Labelled points and a datamodule's answers to SSLClassifier.

    Args:
        changes: Columns of the validation and test items to replace.
    """

    num_classes = K
    class_names = ("north", "east", "west")
    image_channels = 2
    num_labeled = num_unlabeled = 24

    def __init__(self, val: int = 20, **changes: Tensor) -> None:
        super().__init__()
        self.train = _items(24, 0)
        self.val, self.test = (_items(n, seed, **changes) for n, seed in ((val, 1), (20, 2)))
        self.declared: tuple[tuple[str, ...], ...] = ()

    def declare_views(self, labeled: tuple[str, ...], unlabeled: tuple[str, ...]) -> None:
        self.declared = labeled, unlabeled

    def sweep_dataloader(self, split: Split) -> DataLoader[dict[str, Tensor]]:
        return _loader(self.train)

    def labels_of(self, split: Split) -> Tensor:
        return torch.stack([item["label"] for item in self.train])

    def select(self, split: Split, indices: Tensor | None) -> None:
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        batches = [{"labeled": batch} for batch in _loader(self.train)]
        return DataLoader(cast("Dataset[Any]", batches), batch_size=None)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return _loader(self.val)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return _loader(self.test)


def accuracy(network: nn.Module, items: list[dict[str, Tensor]]) -> float:
    """Share of the items that a network gets right, -1 left out, one image at a time."""
    with torch.no_grad():
        right = [
            float(network.eval()(item["image"][None]).argmax() == item["label"]) for item in items if item["label"] >= 0
        ]
    return sum(right) / len(right)


class Rises(Method):
    """Trains on the labels, the other way round in the second half: the best network is not the last one."""

    views = Views(unlabeled=())

    def __init__(self) -> None:
        super().__init__()
        self.after: list[nn.Module] = []

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        loss = nn.functional.cross_entropy(m.network(labeled["image"]), labeled["label"])
        return Loss(sup=loss if m.progress < 0.5 else -0.2 * loss)


class Remembers(pl.Callback):
    """Copies the state of the average at each validation of a fit."""

    def __init__(self) -> None:
        self.states: list[tuple[float, dict[str, Tensor]]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, SSLClassifier) and not trainer.sanity_checking and trainer.state.fn == "fit":
            state = {k: v.clone() for k, v in pl_module.ema_network.state_dict().items()}
            self.states.append((float(trainer.callback_metrics["val_accuracy"]), state))


def fitted(tmp_path: Path, data: Circle, method: Method, *callbacks: pl.Callback, **options: Any) -> SSLClassifier:
    torch.manual_seed(0)
    module = SSLClassifier(ToyNet(), method, K, optimizer=sgd, **options)
    tiny_trainer(tmp_path, max_epochs=6, callbacks=list(callbacks)).fit(module, datamodule=data)
    return module


def results(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_average_student_and_best_are_reported(tmp_path: Path) -> None:
    data, seen = Circle(), Remembers()
    module = fitted(tmp_path, data, Rises(), seen, ema_decay=0.5)
    assert data.declared == (("weak",), ())
    found = results(module.trainer)
    assert found["val_accuracy"] == pytest.approx(accuracy(module.ema_network, data.val))
    assert found["val_accuracy_student"] == pytest.approx(accuracy(module.network, data.val))
    assert {"val_precision", "val_recall", "val_f1", "val_ece", "val_precision/0", "val_recall/2"} <= set(found)
    values = [value for value, _ in seen.states]
    best = ToyNet()
    best.load_state_dict(seen.states[values.index(max(values))][1])
    module.trainer.test(module, datamodule=data, verbose=False)
    found = results(module.trainer)
    assert found["test_accuracy"] == pytest.approx(accuracy(module.ema_network, data.test))
    assert found["test_accuracy_student"] == pytest.approx(accuracy(module.network, data.test))
    assert found["test_accuracy_best"] == pytest.approx(accuracy(best, data.test))
    # Otherwise the last one would pass for the best.
    assert found["test_accuracy_best"] != found["test_accuracy"]
    assert next(iter(found)) == "test_accuracy"


def test_a_validation_on_its_own_chooses_nothing(tmp_path: Path) -> None:
    data = Circle()
    module = fitted(tmp_path, data, Supervised())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    chosen = {k: v.clone() for k, v in module._best.items()}
    assert chosen
    torch.nn.init.zeros_(cast("Any", module.ema_network).head.weight)
    easy = Circle()
    easy.val = [item | {"label": torch.tensor(int(module(item["image"][None]).argmax()))} for item in easy.val]
    module.trainer.validate(module, datamodule=easy, verbose=False)
    assert results(module.trainer)["val_accuracy"] == 1.0
    assert all(torch.equal(chosen[k], v) for k, v in module._best.items())
    assert not all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_prediction_leaves_every_layer_in_its_mode() -> None:
    module = SSLClassifier(ToyNet(), Supervised(), K, ema_decay=0.0)
    module.train()
    frozen = cast("ToyNet", module.network).body[2].eval()
    module(torch.rand(4, 2, 1, 1))
    assert module.network.training
    assert not frozen.training


def test_the_best_network_is_found_again_in_a_checkpoint(tmp_path: Path) -> None:
    data = Circle()
    module = fitted(tmp_path, data, Rises(), ema_decay=0.5)
    module.trainer.test(module, datamodule=data, verbose=False)
    first = results(module.trainer)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = tiny_trainer(tmp_path)
    other = SSLClassifier(ToyNet(), Rises(), K, optimizer=sgd, ema_decay=0.5)
    again.test(other, datamodule=Circle(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert results(again) == pytest.approx(first)


def test_unknown_labels_and_padding_count_nowhere(tmp_path: Path) -> None:
    label = torch.tensor([item["label"] for item in Circle().test])
    index = torch.arange(20)
    index[10:] = -1  # padding repeats images
    label[:4] = -1
    data = Circle(label=label, index=index)
    module = fitted(tmp_path, Circle(), Supervised(), ema_decay=0.5)
    module.trainer.test(module, datamodule=data, verbose=False)
    found = results(module.trainer)
    counted = [item | {"label": label[i]} for i, item in enumerate(data.test[:10])]
    for name, network in (("", module.ema_network), ("_student", module.network)):
        assert found[f"test_accuracy{name}"] == pytest.approx(accuracy(network, counted))


def test_without_known_labels_nothing_is_reported_or_chosen(tmp_path: Path) -> None:
    data = Circle(label=torch.full((20,), -1))
    module = fitted(tmp_path, data, Supervised())
    module.trainer.test(module, datamodule=data, verbose=False)
    assert not any("accuracy" in name for name in results(module.trainer))
    assert module._best == {}


def test_without_an_average_there_is_one_network(tmp_path: Path) -> None:
    data = Circle()
    module = fitted(tmp_path, data, Supervised(), ema_decay=0.0)
    module.trainer.test(module, datamodule=data, verbose=False)
    found = results(module.trainer)
    assert "test_accuracy_student" not in found
    assert found["test_accuracy"] == pytest.approx(accuracy(module.network, data.test))


class Guesses(Method):
    """Takes unlabelled images to be of class 1, in as many turns as asked."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.count = turns

    def setup(self, m: Host) -> None:
        self.other = m.new_network()

    def players(self, m: Host) -> dict[str, nn.Module]:
        return {"a": m.network, "b": self.other} if self.count == 2 else super().players(m)

    def turns(self, m: Host, labeled: Batch, unlabeled: Batch) -> Iterator[tuple[str, Loss]]:
        for name in self.players(m):
            logits = (self.other if name == "b" else m.network)(unlabeled["weak"])
            guess = Guess(torch.ones(len(logits), dtype=torch.long), logits.softmax(-1)[:, 1], torch.ones(len(logits)))
            yield name, Loss(sup=logits.square().mean(), guess=guess)


class Hears(pl.Callback):
    """Keeps what callbacks are told after a batch."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.outputs.append(dict(cast("dict[str, Any]", outputs)))


@pytest.mark.parametrize("turns", [1, 2])
def test_callbacks_hear_of_pseudo_labels_under_both_kinds_of_optimisation(turns: int, tmp_path: Path) -> None:
    batch = {
        "labeled": {"image": torch.rand(4, 2, 1, 1), "label": torch.arange(4) % K},
        "unlabeled": {"weak": torch.rand(6, 2, 1, 1), "strong": torch.rand(6, 2, 1, 1), "true_label": torch.arange(6)},
    }
    hears = Hears()
    module = SSLClassifier(ToyNet(), Guesses(turns), K, optimizer=sgd)
    loader = DataLoader(cast("Dataset[Any]", [batch]), batch_size=None)
    trainer = tiny_trainer(tmp_path, callbacks=[hears])
    trainer.fit(module, loader)
    (outputs,) = hears.outputs
    guess = outputs["guess"]
    assert guess.label.tolist() == [1] * 6
    assert outputs["true_label"].tolist() == list(range(6))
    assert not any(x.requires_grad for x in (outputs["loss"], guess.confidence, guess.weight))
    # One of the six is of class 1.
    assert results(trainer)["train_pseudo_label_accuracy"] == pytest.approx(1 / 6)
    assert results(trainer)["train_mask_rate/1"] == 1.0


def test_the_pictures_of_a_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = ToyData(steps=6)
    module = SSLClassifier(ToyNet(2, 2), FixMatch(threshold=0.5), 2, optimizer=sgd, ema_decay=0.5)
    drawn = [ConfusionMatrix(), ReliabilityDiagram(), ViewGrid(), PseudoLabelGrid(num_images=4)]
    trainer = board_trainer(tmp_path, *drawn, max_epochs=2)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    found = pictures(tmp_path)
    assert {tag: list(steps) for tag, steps in found.items()} == {
        "train/views": [0],
        "train/wrong_pseudo_labels": [6, 12],
        **{f"{split}/{name}": steps for name in ("confusion_matrix", "reliability") for split, steps in EVALUATED},
    }
    # Callbacks are asked before the module forgets.
    counts = torch.zeros(2, 2, dtype=torch.long)
    for batch in data.test_dataloader():
        for label, guess in zip(batch["label"], module(batch["image"]).argmax(-1), strict=True):
            counts[label, guess] += 1
    expected = draw_confusion(counts, ToyData.class_names, "Test")
    assert np.array_equal(found["test/confusion_matrix"][12], expected)


@pytest.mark.filterwarnings("error:.*sync_dist")
def test_two_processes_report_what_one_reports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = ToyData(steps=6)

    def module() -> SSLClassifier:
        return SSLClassifier(ToyNet(2, 2), Rises(), 2, optimizer=sgd, ema_decay=0.5)

    trainer = tiny_trainer(tmp_path, max_epochs=3)
    trainer.fit(module(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = []
    for processes in ({}, {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}):
        trainer = tiny_trainer(tmp_path, **processes)
        trainer.test(module(), datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
        found.append(results(trainer))
    assert "test_accuracy_best" in found[0]
    assert found[1] == pytest.approx(found[0])
