"""Heat maps of transition matrices: what is in them, and when the true one is beside."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from board import board_trainer, pictures
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import TransitionGrid
from callbacks.transition_grid import draw_transition

TRUE = torch.tensor([[0.8, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.3, 0.7]], dtype=torch.float64)
NAMES = ["ant", "bee", "cat"]


class Estimates(pl.LightningModule):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def current_transition(self) -> Tensor:
        return self.matrix

    def validation_step(self, batch: Tensor) -> None:
        return None

    def test_step(self, batch: Tensor) -> None:
        return None


class Knows(pl.LightningDataModule):
    class_names = tuple(NAMES)

    def __init__(self, matrix: Tensor | None) -> None:
        super().__init__()
        self.transition_matrix = matrix

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(cast("Dataset[Any]", [torch.zeros(1)]))

    test_dataloader = val_dataloader


def drawn(path: Path, module: pl.LightningModule, known: Tensor | None) -> dict[str, dict[int, np.ndarray[Any, Any]]]:
    board_trainer(path, TransitionGrid()).validate(module, datamodule=Knows(known), verbose=False)
    return pictures(path)


def test_cells_are_the_probabilities() -> None:
    picture = draw_transition(TRUE, NAMES, "T")
    dark = (picture == (40, 40, 40)).all(-1)
    lines, columns = (np.flatnonzero(dark.sum(axis) > 0.5 * 88 * 3) for axis in (1, 0))
    top, left = lines[0] + 1, columns[0] + 1

    def cell(i: int, j: int) -> list[int]:
        found: list[int] = picture[top + 88 * i + 10, left + 88 * j + 10].tolist()
        return found

    assert cell(1, 1) == [8, 64, 129]
    for i, j in ((0, 2), (1, 0), (1, 2), (2, 0)):
        assert cell(i, j) == [255, 255, 255]
    for i, j, full in ((0, 0, (8, 64, 129)), (0, 1, (178, 24, 43)), (2, 1, (178, 24, 43))):
        strength = float(TRUE[i, j]) ** 0.5
        expected = [(1 - strength) * 255 + strength * c for c in full]
        assert np.allclose(cell(i, j), expected, atol=0.51)


def test_title_tells_the_condition_number() -> None:
    # Two matrices with the same picture but for the line above.
    near, far = (torch.tensor([[0.5 + e, 0.5 - e], [0.5 - e, 0.5 + e]]).double() for e in (1e-7, 0.0))
    one, other = (draw_transition(m, ["a", "b"], "T") for m in (near, far))
    assert not np.array_equal(one[:40], other[:40])
    assert np.array_equal(one[40:], other[40:])


def test_the_true_matrix_is_beside_an_estimate_of_it(tmp_path: Path) -> None:
    estimate = 0.9 * TRUE + 0.1 / 3
    alone = draw_transition(estimate, NAMES, "Transition matrix of the module")
    beside = draw_transition(TRUE, NAMES, "Transition matrix of the data, up to 0.067 away")
    found = drawn(tmp_path / "both", Estimates(estimate), TRUE)["val/transition_matrix"][0]
    assert np.array_equal(found[:, : alone.shape[1]], alone)
    assert np.array_equal(found[:, alone.shape[1] :], beside)
    # Nothing beside it where the true one is not known, or is the same.
    found = drawn(tmp_path / "unknown", Estimates(estimate), None)["val/transition_matrix"][0]
    assert np.array_equal(found, alone)
    found = drawn(tmp_path / "same", Estimates(TRUE), TRUE.clone())["val/transition_matrix"][0]
    assert np.array_equal(found, draw_transition(TRUE, NAMES, "Transition matrix of the module"))


def test_after_a_test_too(tmp_path: Path) -> None:
    trainer = board_trainer(tmp_path, TransitionGrid())
    trainer.test(Estimates(TRUE), datamodule=Knows(None), verbose=False)
    assert list(pictures(tmp_path)) == ["test/transition_matrix"]


def test_nothing_to_draw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert drawn(tmp_path, Estimates(torch.full((3, 3), torch.nan)), TRUE) == {}
    assert "TransitionGrid: the module does not know its transition matrix" in caplog.text


def test_modules_and_matrices_that_do_not_fit(tmp_path: Path) -> None:
    class Silent(pl.LightningModule):
        def validation_step(self, batch: Tensor) -> None:
            return None

    with pytest.raises(TypeError, match=r"method current_transition\(\), got Silent"):
        drawn(tmp_path, Silent(), None)
    with pytest.raises(ValueError, match=r"got shape \(3, 3\) and 2 names"):
        draw_transition(TRUE, ["a", "b"], "T")
