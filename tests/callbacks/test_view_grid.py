"""The grid of views: which columns it has, where the labels are, and that it comes once a fit."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from board import board_trainer, pictures
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks import ViewGrid
from callbacks.drawing import PAPER
from callbacks.view_grid import to_cell

SIDE, GAP, HEADER = 144, 4, 24


def batch(labelled: int = 2, unlabelled: int = 3, channels: int = 3) -> dict[str, dict[str, Tensor]]:
    """Images of 16 px, each of one grey: 0.1 and 0.2 labelled, 0.3 + 0.1 times the image in weak, +0.05 in strong."""

    def grey(*values: float) -> Tensor:
        return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, channels, 16, 16).clone()

    return {
        "labeled": {
            "image": grey(*(0.1 * (i + 1) for i in range(labelled))),
            "probe_ops": torch.zeros(labelled, 2, dtype=torch.long),
            "label": torch.arange(labelled) % 2,
            "index": torch.arange(labelled),
        },
        "unlabeled": {
            "weak": grey(*(0.3 + 0.1 * i for i in range(unlabelled))),
            "strong": grey(*(0.35 + 0.1 * i for i in range(unlabelled))),
            "index": torch.arange(unlabelled),
        },
    }


def cell(picture: np.ndarray[Any, Any], row: int, column: int) -> np.ndarray[Any, Any]:
    top, left = HEADER + row * (SIDE + GAP), GAP + column * (SIDE + GAP)
    return picture[top : top + SIDE, left : left + SIDE]


def middle(picture: np.ndarray[Any, Any], row: int, column: int) -> int:
    return int(cell(picture, row, column)[SIDE // 2, SIDE // 2, 0])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_row_has_the_views_of_an_image(channels: int) -> None:
    picture = ViewGrid().picture(batch(channels=channels))
    assert picture is not None
    assert picture.shape == (HEADER + 3 * (SIDE + GAP), 3 * (SIDE + GAP) + GAP, 3)
    values = [[middle(picture, i, j) for j in range(3)] for i in range(3)]
    expected = [[0.1, 0.3, 0.35], [0.2, 0.4, 0.45], [PAPER / 255, 0.5, 0.55]]
    assert np.allclose(np.array(values), 255 * np.array(expected), atol=0.6)
    # The label is written on labelled images, and on no others.
    for i in range(2):
        assert (cell(picture, i, 0) == 255).any()
    assert not any((cell(picture, i, j) == 255).any() for i in range(3) for j in (1, 2))


def test_rows_and_parts_may_be_few() -> None:
    one = ViewGrid(num_images=1).picture(batch())
    assert one is not None
    assert one.shape[0] == HEADER + SIDE + GAP
    labelled = ViewGrid().picture({"labeled": batch()["labeled"]})
    assert labelled is not None
    assert labelled.shape[1] == SIDE + 2 * GAP
    unlabelled = ViewGrid().picture({"unlabeled": batch()["unlabeled"]})
    assert unlabelled is not None
    assert middle(unlabelled, 0, 0) == round(0.3 * 255)
    for nothing in ({}, [torch.zeros(2, 3, 4, 4)], {"labeled": {"label": torch.zeros(2)}}):
        assert ViewGrid().picture(nothing) is None


def test_views_of_other_sizes_keep_their_own() -> None:
    given = batch()
    given["unlabeled"]["strong"] = torch.full((3, 3, 8, 200), 0.7)
    picture = ViewGrid().picture(given)
    assert picture is not None
    assert picture.shape == (HEADER + 3 * (SIDE + GAP), 3 * (200 + GAP) + GAP, 3)
    strong = picture[HEADER : HEADER + SIDE, GAP + 2 * 204 : GAP + 2 * 204 + 200]
    assert (strong[:8] == round(0.7 * 255)).all()
    assert (strong[8:] == PAPER).all()
    assert to_cell(torch.full((4, 2, 2), 0.5), 5).shape == (6, 6, 3)


class Trains(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: object) -> Tensor:
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    class_names = ("ant", "bee")

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(cast("Dataset[Any]", [batch(), batch(1, 1)]), batch_size=None)


def test_drawn_once_a_fit_with_names(tmp_path: Path) -> None:
    trainer = board_trainer(tmp_path, ViewGrid(), max_epochs=2)
    trainer.fit(Trains(), datamodule=Data())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Trains(), datamodule=Data())
    found = pictures(tmp_path)
    assert {tag: list(steps) for tag, steps in found.items()} == {"train/views": [0, 4]}
    expected = ViewGrid().picture(batch(), lambda k: ("ant", "bee")[k])
    assert expected is not None
    assert np.array_equal(found["train/views"][0], expected)


def test_nothing_to_draw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer = board_trainer(tmp_path, ViewGrid())
        trainer.fit(Trains(), DataLoader(cast("Dataset[Any]", [torch.zeros(1)])))
        board_trainer(tmp_path / "n", ViewGrid(), logger=False).fit(Trains(), datamodule=Data())
    assert "ViewGrid: batches have no images under `labeled` or `unlabeled`" in caplog.text
    assert "ViewGrid: no logger takes images" in caplog.text
    assert pictures(tmp_path) == {}
    with pytest.raises(ValueError, match="`num_images` to be at least 1, got 0"):
        ViewGrid(num_images=0)
