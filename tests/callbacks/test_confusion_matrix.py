"""Confusion matrices: when they are drawn, from which counts, and that every cell has its colour."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from board import board_trainer, pictures
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks import ConfusionMatrix
from callbacks.confusion_matrix import draw_confusion
from callbacks.picture import EvalSplit
from lightning_modules.classification_metrics import ClassificationMetrics

WHITE, GREY = (255, 255, 255), (236, 236, 236)


class Says(pl.LightningModule):
    """Takes the class of an image from its first number, and counts like a real module."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.ones(()))
        self.metrics = ClassificationMetrics(classes, "val")
        self.asked: list[tuple[str, int]] = []

    def confusion(self, split: EvalSplit) -> Tensor:
        counts = self.metrics.confusion()
        self.asked.append((split, int(counts.sum())))
        return counts

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.weight.square()

    def validation_step(self, batch: list[Tensor]) -> None:
        image, label = batch
        self.metrics.update("", nn.functional.one_hot(image[:, 0], self.classes).float(), label)

    def test_step(self, batch: list[Tensor]) -> None:
        self.validation_step(batch)

    def on_validation_epoch_end(self) -> None:
        self.metrics.reset()

    def on_test_epoch_end(self) -> None:
        self.metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Named(pl.LightningDataModule):
    """Six images: class 0 taken once for 1 and once for itself, 1 right twice, 2 taken for 0, and one unknown."""

    class_names = ("ant", "bee", "cat")

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        pairs = [(1, 0), (0, 0), (1, 1), (1, 1), (0, 2), (2, -1)]
        self.items = [(torch.tensor([guess]), torch.tensor(label)) for guess, label in pairs]
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(cast("Dataset[Any]", self.items), batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


def background(picture: np.ndarray[Any, Any], top: int, left: int, cell: int) -> tuple[int, ...]:
    """Colour of a cell away from its number."""
    return tuple(picture[top + cell // 5, left + cell // 5].tolist())


def cells(counts: list[list[int]], names: list[str] | None = None) -> list[list[tuple[int, ...]]]:
    """Draw, find the frame, and return the colour of every cell."""
    picture = draw_confusion(torch.tensor(counts), names or [str(k) for k in range(len(counts))], "Test")
    dark = (picture == (40, 40, 40)).all(-1)
    lines, columns = (np.flatnonzero(dark.sum(axis) > 0.5 * 88 * len(counts)) for axis in (1, 0))
    top, left = lines[0] + 1, columns[0] + 1
    cell = (lines[-1] - lines[0] - 1) // len(counts)
    return [
        [background(picture, top + i * cell, left + j * cell, cell) for j in range(len(counts))]
        for i in range(len(counts))
    ]


def test_colours_are_shares_of_the_row() -> None:
    found = cells([[100, 0, 0], [0, 25, 75], [0, 0, 0]])
    assert found[0] == [(8, 64, 129), WHITE, WHITE]
    assert found[1][0] == WHITE
    # A quarter is half the way from white, by the square root.
    assert np.allclose(found[1][1], [(255 + c) / 2 for c in (8, 64, 129)], atol=0.51)
    red, green, blue = found[1][2]
    assert red > 180
    assert green < 90
    assert blue < 90
    assert found[2] == [GREY] * 3
    # Shares, not numbers.
    assert cells([[4, 0], [1, 3]]) == cells([[400, 0], [100, 300]])


def test_numbers_and_names_are_written_up_to_25_classes() -> None:
    one, other = (torch.eye(25, dtype=torch.long) * n for n in (7, 8))
    names = [f"name {k}" for k in range(25)]
    assert not np.array_equal(draw_confusion(one, names, "Test")[60:700], draw_confusion(other, names, "Test")[60:700])
    assert not np.array_equal(draw_confusion(one, names, "Test"), draw_confusion(one, names[::-1], "Test"))
    one, other = (torch.eye(26, dtype=torch.long) * n for n in (7, 8))
    names = [f"name {k}" for k in range(26)]
    assert np.array_equal(draw_confusion(one, names, "Test")[40:], draw_confusion(other, names[::-1], "Test")[40:])


@pytest.mark.parametrize("classes", [2, 3, 11, 25, 26, 100, 1000])
def test_any_number_of_classes_fits(classes: int) -> None:
    counts = torch.eye(classes, dtype=torch.long) * 1_234_567
    picture = draw_confusion(counts, ["a name that is much too long to be written"] * classes, "Validation")
    height, width, _ = picture.shape
    assert max(height, width) < 1300
    # Nothing reaches the edges.
    edges = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3), picture[:, -4:].reshape(-1, 3)])
    assert (edges == 255).all()
    # The diagonal and no more is blue.
    blue = (picture == (8, 64, 129)).all(-1).sum()
    assert blue > 0.5 * classes * max(1, min(88, 700 // classes)) ** 2


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2, 2\) and 3 names"):
        draw_confusion(torch.zeros(2, 2), ["a", "b", "c"], "Test")
    with pytest.raises(ValueError, match="`every_n_epochs` to be at least 1, got 0"):
        ConfusionMatrix(every_n_epochs=0)


def test_drawn_before_the_module_forgets(tmp_path: Path) -> None:
    module, data = Says(), Named()
    trainer = board_trainer(tmp_path, ConfusionMatrix(every_n_epochs=2), max_epochs=3)
    trainer.fit(module, datamodule=data)
    # Epoch 2 of 3, and the last one; not the sanity check; the unknown label does not count.
    assert module.asked == [("val", 5)] * 2
    trainer.test(module, datamodule=data, verbose=False)
    found = pictures(tmp_path)
    assert set(found) == {"val/confusion_matrix", "test/confusion_matrix"}
    assert list(found["val/confusion_matrix"]) == [6, 9]
    expected = draw_confusion(torch.tensor([[1, 1, 0], [0, 2, 0], [1, 0, 0]]), Named.class_names, "Validation")
    assert np.array_equal(found["val/confusion_matrix"][9], expected)


@pytest.mark.parametrize("steps", [{"max_steps": 9}, {"max_steps": 6, "accumulate_grad_batches": 2}])
def test_the_last_epoch_of_a_fit_by_steps_is_drawn(tmp_path: Path, steps: dict[str, int]) -> None:
    module = Says()
    board_trainer(tmp_path, ConfusionMatrix(every_n_epochs=2), max_epochs=-1, **steps).fit(module, datamodule=Named())
    assert list(pictures(tmp_path)["val/confusion_matrix"]) == [steps["max_steps"] * 2 // 3, steps["max_steps"]]


def test_nothing_to_draw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unknown = [(torch.tensor([1]), torch.tensor(-1))] * 2
    with caplog.at_level("INFO"):
        trainer = board_trainer(tmp_path / "u", ConfusionMatrix())
        trainer.validate(Says(), DataLoader(cast("Dataset[Any]", unknown)), verbose=False)
        trainer = board_trainer(tmp_path / "c", ConfusionMatrix(), logger=CSVLogger(tmp_path))
        trainer.validate(Says(), datamodule=Named(), verbose=False)
    assert "ConfusionMatrix: the val data has no labelled images" in caplog.text
    assert "no logger takes images" in caplog.text
    assert pictures(tmp_path / "u") == {}


def test_modules_that_cannot_tell(tmp_path: Path) -> None:
    class Silent(pl.LightningModule):
        def validation_step(self, batch: list[Tensor]) -> None:
            return None

    with pytest.raises(TypeError, match=r"method confusion\(split\), got Silent; .* ConfusionMatrix out of"):
        board_trainer(tmp_path, ConfusionMatrix()).validate(Silent(), datamodule=Named())


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    data = Named(batch_size=1)
    two = board_trainer(tmp_path / "two", ConfusionMatrix(), devices=2, strategy="ddp_fork")
    two.validate(Says(), datamodule=data, verbose=False)
    board_trainer(tmp_path / "one", ConfusionMatrix()).validate(Says(), datamodule=data, verbose=False)
    mine, theirs = (pictures(tmp_path / name)["val/confusion_matrix"][0] for name in ("one", "two"))
    assert np.array_equal(mine, theirs)
