"""The table that `predict` writes of a classifier's images."""

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import PredictionTable
from datamodules.loading import EvalSampler

P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0], [0.6, 0.4, 0.0]])


class Numbered(Dataset[dict[str, Tensor]]):
    """Five images that are their own numbers."""

    def __len__(self) -> int:
        return len(P)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": torch.tensor(i), "index": torch.tensor(i)}


class Named(Numbered):
    keys = ("a, b.png", "b.png", "c/c.png", "c/d.png", "e.png")


class Data(pl.LightningDataModule):
    """Predicts these data sets, whose classes may have names."""

    def __init__(self, *data: Numbered, class_names: tuple[str, ...] = ("cat", "dog", "eel")) -> None:
        super().__init__()
        self.data, self.class_names = data, class_names

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(data, batch_size=2, sampler=EvalSampler(len(data), pad=False)) for data in self.data]


class Table(pl.LightningModule):
    """Looks its predictions up; leaves out what it is told to, and calls some images padding."""

    def __init__(self, without: str = "", padding: int = -1) -> None:
        super().__init__()
        self.without, self.padding = without, padding

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        p = P[batch["image"]]
        index = torch.where(batch["index"] == self.padding, -1, batch["index"])
        found = {"probabilities": p, "label": p.argmax(1), "confidence": p.amax(1), "index": index}
        return {name: value for name, value in found.items() if name != self.without}


def predict(
    folder: Path,
    data: pl.LightningDataModule,
    module: pl.LightningModule | None = None,
    devices: int = 1,
    **options: bool,
) -> list[list[str]]:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PredictionTable(str(folder), **options)],
    )
    trainer.predict(module or Table(), datamodule=data, return_predictions=False)
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_each_image_has_a_row(tmp_path: Path) -> None:
    assert predict(tmp_path, Data(Named())) == [
        ["image", "label", "class", "confidence"],
        ["a, b.png", "0", "cat", "0.700000"],
        ["b.png", "1", "dog", "0.800000"],
        ["c/c.png", "2", "eel", "0.500000"],
        ["c/d.png", "2", "eel", "1.000000"],
        ["e.png", "0", "cat", "0.600000"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_probabilities_of_all_classes(tmp_path: Path) -> None:
    head, *rows = predict(tmp_path, Data(Named()), write_probabilities=True)
    assert head[4:] == ["probability_cat", "probability_dog", "probability_eel"]
    torch.testing.assert_close(torch.tensor([[float(x) for x in row[4:]] for row in rows]), P)


def test_images_without_names_have_numbers_and_padding_no_row(tmp_path: Path) -> None:
    rows = predict(tmp_path, Data(Numbered(), class_names=()), Table(padding=3))[1:]
    assert [row[:3] for row in rows] == [["0", "0", "0"], ["1", "1", "1"], ["2", "2", "2"], ["4", "0", "0"]]


def test_several_loaders_follow_each_other(tmp_path: Path) -> None:
    rows = predict(tmp_path, Data(Named(), Numbered()))[1:]
    assert [row[0] for row in rows] == [*Named.keys, *"01234"]


@pytest.mark.parametrize("write_probabilities", [False, True])
def test_two_processes_write_what_one_writes(tmp_path: Path, write_probabilities: bool) -> None:
    one = predict(tmp_path / "one", Data(Named()), write_probabilities=write_probabilities)
    # Three images and two: padding of what is sent must not become rows.
    two = predict(tmp_path / "two", Data(Named()), devices=2, write_probabilities=write_probabilities)
    assert one == two


def test_nothing_is_replaced_without_leave(tmp_path: Path) -> None:
    predict(tmp_path, Data(Named()), overwrite=False)
    with pytest.raises(FileExistsError, match=r"without predictions\.csv, as `overwrite` is off"):
        predict(tmp_path, Data(Named()), overwrite=False)
    assert len(predict(tmp_path, Data(Numbered()))) == 6


@pytest.mark.parametrize("without", ["label", "confidence", "index", "probabilities"])
def test_a_prediction_that_lacks_something(tmp_path: Path, without: str) -> None:
    with pytest.raises(TypeError, match=rf"`predict_step` of Table to return a dict of .*{without}.*, got "):
        predict(tmp_path, Data(Named()), Table(without), write_probabilities=True)
    assert not list(tmp_path.iterdir())
