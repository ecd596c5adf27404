"""Pictures of where a segmenter is unsure."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # publishes no types
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import UncertaintyGrid
from callbacks.drawing import PREDICTION, TRUTH, heat

BLACK, LIGHTEST = heat(torch.tensor([[0.0, 1.0]]), 1.0)[0].tolist()


class Doubts(pl.LightningModule):
    """Predicts the bright half, and is unsure in the lower half of the image: half as much as it could be."""

    def __init__(self, classes: int = 2, most: float = 0.5) -> None:
        super().__init__()
        self.classes, self.most = classes, most

    def segment(self, image: Tensor) -> Tensor:
        labels = (image.mean(1) > 0.5).long() * (self.classes - 1)
        return torch.nn.functional.one_hot(labels, self.classes).movedim(-1, 1).float()

    def uncertainty(self, image: Tensor) -> Tensor:
        doubt = torch.zeros_like(image[:, 0])
        doubt[:, image.shape[2] // 2 :] = self.most * math.log(self.classes)
        return doubt

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        return None

    def test_step(self, batch: dict[str, Tensor]) -> None:
        return None


def batch(classes: int = 2) -> tuple[Tensor, Tensor]:
    """Two images that are bright on the right; the truth is bright on the left, the first row has no label."""
    image = torch.zeros(2, 3, 16, 16)
    image[..., 8:] = 0.9
    mask = torch.zeros(2, 16, 16, dtype=torch.long)
    mask[..., :8] = classes - 1
    mask[:, 0] = 255
    return image, mask


def loader() -> DataLoader[Any]:
    image, mask = batch()
    return DataLoader([{"image": i, "mask": m} for i, m in zip(image, mask, strict=True)])  # type: ignore[arg-type] # a list is enough


def cells(picture: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """The four cells of the first image: 192 pixels wide, 4 apart, below 24 of headers."""
    return [picture[24 : 24 + 192, 4 + k * 196 : 196 + k * 196] for k in range(4)]


def has(picture: np.ndarray[Any, Any], color: tuple[int, int, int]) -> bool:
    return bool((picture == color).all(-1).any())


def trainer(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_each_cell_shows_its_own(classes: int) -> None:
    picture = UncertaintyGrid().picture(Doubts(classes), *batch(classes))
    assert picture is not None
    # Headers, two rows, and the colour bar of three lines.
    assert picture.shape == (24 + 2 * 196 + 3 * 24, 4 * 196 + 4, 3)
    plain, truth, said, hot = cells(picture)
    assert not has(plain, TRUTH)
    assert not has(plain, PREDICTION)
    assert has(truth[:, :96], TRUTH)
    assert not has(truth[:, 96:], TRUTH)
    assert has(said[:, 96:], PREDICTION)
    assert not has(said[:, :96], PREDICTION)
    assert (hot[:96] == BLACK).all()
    # Half of what is possible is the middle of the colours.
    assert (hot[96:170] == heat(torch.full((1, 1), 0.5), 1.0)[0, 0]).all()


def test_scales() -> None:
    most = {}
    for scale in ("log_classes", "largest"):
        grid = UncertaintyGrid(scale=scale)
        picture = grid.picture(Doubts(most=0.01), *batch())
        assert picture is not None
        most[scale] = cells(picture)[3][100].tolist()
    assert most["largest"] == [LIGHTEST] * 192
    assert most["log_classes"] == [heat(torch.full((1, 1), 0.01), 1.0)[0, 0].tolist()] * 192
    certain = UncertaintyGrid(scale="largest").picture(Doubts(most=0.0), *batch())
    assert certain is not None
    assert (cells(certain)[3][:170] == BLACK).all()
    with pytest.raises(ValueError, match="`scale` to be one of log_classes, largest, got 'max'"):
        UncertaintyGrid(scale="max")  # type: ignore[arg-type] # on purpose
    with pytest.raises(ValueError, match="`num_images` to be at least 1, got 0"):
        UncertaintyGrid(num_images=0)


def test_pictures_of_validation_and_test(tmp_path: Path) -> None:
    run = trainer(tmp_path, UncertaintyGrid(every_n_epochs=3, num_images=1))
    run.validate(Doubts(), loader(), verbose=False)
    run.test(Doubts(), loader(), verbose=False)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["test/uncertainty", "val/uncertainty"]
    drawn = np.asarray(Image.open(io.BytesIO(events.Images("val/uncertainty")[0].encoded_image_string)))
    image, mask = batch()
    expected = UncertaintyGrid().picture(Doubts(), image[:1], mask[:1])
    assert expected is not None
    assert np.array_equal(drawn, expected)


def test_modules_that_cannot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Certain(pl.LightningModule):
        def segment(self, image: Tensor) -> Tensor:
            return image

        def validation_step(self, batch: dict[str, Tensor]) -> None:
            return None

    with pytest.raises(
        TypeError, match=r"segment\(image\) and uncertainty\(image\), got Certain; .* UncertaintyGrid out"
    ):
        trainer(tmp_path, UncertaintyGrid()).validate(Certain(), loader())
    module = Doubts()
    module.objective = "generative"  # type: ignore[assignment] # as HybridSegmentation has it
    with caplog.at_level("INFO"):
        assert UncertaintyGrid().picture(module, *batch()) is None
    assert "objective 'generative' trains no masks" in caplog.text
