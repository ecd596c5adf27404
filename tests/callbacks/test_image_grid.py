"""Pictures in TensorBoard."""

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # publishes no types
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks import DenoisingGrid, SegmentationGrid
from callbacks.drawing import PREDICTION, TRUTH
from callbacks.image_grid import _jaccard


class Squares(Dataset[dict[str, Tensor]]):
    """Images with one bright square, moving with the index; asked with a tuple, the image is black."""

    def __init__(self, length: int = 3, classes: int = 2) -> None:
        self.length, self.classes = length, classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        mask = torch.zeros(16, 16, dtype=torch.long)
        mask[4:12, 2 + i : 8 + i] = self.classes - 1
        mask[0] = 255
        return {
            "image": (mask == self.classes - 1).float().expand(3, -1, -1),
            "mask": mask,
            "index": torch.tensor(i),
        }


class Sees(pl.LightningModule):
    """Finds the squares exactly, if a weight is 1, and has dropout that must be off while it does."""

    def __init__(self, objective: Literal["hybrid", "supervised", "generative"] = "hybrid", classes: int = 2) -> None:
        super().__init__()
        self.objective, self.classes = objective, classes
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.999)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.asked: list[tuple[float, Tensor]] = []

    def segment(self, image: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        p = self.dropout(image.mean(1)).float()
        parts = [1 - p, *[torch.zeros_like(p)] * (self.classes - 2), p]
        return torch.stack(parts, 1)

    def denoise(
        self, image: Tensor, level: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.rand(image.shape, generator=generator)
        self.asked.append((level, noise))
        return (1 - level) * image + level * noise, image, self.segment(image)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        assert self.dropout.training
        assert not self.frozen.training
        return self.weight.square()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("val_loss", 0.0)

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.log("test_loss", 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(
    folder: Path,
    *callbacks: pl.Callback,
    logger: Logger | None = None,
    max_epochs: int = 1,
    limit_val_batches: float = 1.0,
    precision: Literal["32-true", "bf16-true"] = "32-true",
) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=logger or TensorBoardLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        limit_val_batches=limit_val_batches,
        precision=precision,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def loader(length: int = 3, classes: int = 2) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Squares(length, classes), batch_size=2)


def pictures(folder: Path) -> dict[str, dict[int, np.ndarray[Any, Any]]]:
    """All pictures in the event files: tag -> step -> pixels."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: {
            event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(tag)
        }
        for tag in events.Tags()["images"]
    }


def has(picture: np.ndarray[Any, Any], color: tuple[int, int, int]) -> bool:
    return bool((picture == color).all(-1).any())


def test_validation_pictures(tmp_path: Path) -> None:
    module = Sees()
    run = trainer(tmp_path, SegmentationGrid(every_n_epochs=2, num_images=2), DenoisingGrid(num_images=2), max_epochs=3)
    run.fit(module, loader(), loader())
    found = pictures(tmp_path)
    assert set(found) == {"val/segmentation", "val/denoising"}
    # Two steps an epoch; epoch 2 of 3, and the last one.
    assert list(found["val/segmentation"]) == [4, 6]
    assert list(found["val/denoising"]) == [2, 4, 6]
    picture = found["val/segmentation"][6]
    assert np.array_equal(picture, found["val/segmentation"][4])
    third = picture.shape[1] // 3
    assert not has(picture[:, :third], TRUTH)
    assert has(picture[:, third : 2 * third], TRUTH)
    assert not has(picture[:, third : 2 * third], PREDICTION)
    assert has(picture[:, 2 * third :], PREDICTION)
    # The prediction is exact, so its line hides that of the truth.
    assert not has(picture[:, 2 * third + 8 :], TRUTH)
    assert [level for level, _ in module.asked[:4]] == [0.25, 0.5, 0.75, 0.95]
    assert all(torch.equal(noise, module.asked[0][1]) for _, noise in module.asked)


def test_pictures_of_test_and_of_validate_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, SegmentationGrid(every_n_epochs=5), DenoisingGrid(levels=(0.5,)))
    run.validate(Sees(), loader(), verbose=False)
    run.test(Sees(), [loader()], verbose=False)
    assert set(pictures(tmp_path)) == {
        "val/segmentation",
        "val/denoising",
        "test/segmentation",
        "test/denoising",
    }


@pytest.mark.parametrize("how", ["no loader", "empty list", "limit"])
def test_training_pictures_where_nothing_validates(tmp_path: Path, how: str) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            return loader()

        def val_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
            return [loader()] if how == "limit" else []

    run = trainer(tmp_path, SegmentationGrid(), max_epochs=2, limit_val_batches=0 if how == "limit" else 1.0)
    if how == "no loader":
        run.fit(Sees(), loader())
    else:
        run.fit(Sees(), datamodule=Data())
    found = pictures(tmp_path)
    assert set(found) == {"train/segmentation"}
    assert list(found["train/segmentation"]) == [2, 4]
    assert has(found["train/segmentation"][2], TRUTH)


def test_many_classes_and_other_precision(tmp_path: Path) -> None:
    run = trainer(tmp_path, SegmentationGrid(), DenoisingGrid(), precision="bf16-true")
    run.validate(Sees(classes=5), loader(classes=5), verbose=False)
    found = pictures(tmp_path)
    picture = found["val/segmentation"][0]
    assert has(picture, PREDICTION)
    assert found["val/denoising"][0].ndim == 3


def test_objectives_that_cannot_show_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run = trainer(tmp_path / "s", SegmentationGrid(), DenoisingGrid(), max_epochs=2)
        run.fit(Sees("supervised"), loader(), loader())
        run = trainer(tmp_path / "g", SegmentationGrid(), DenoisingGrid(num_images=1), max_epochs=1)
        run.fit(Sees("generative"), loader(), loader())
        run = trainer(tmp_path / "h", DenoisingGrid(num_images=1), max_epochs=1)
        run.fit(Sees("hybrid"), loader(), loader())
    assert caplog.text.count("objective 'supervised' does not denoise") == 1
    assert caplog.text.count("objective 'generative' trains no masks") == 1
    assert set(pictures(tmp_path / "s")) == {"val/segmentation"}
    generative, hybrid = pictures(tmp_path / "g"), pictures(tmp_path / "h")
    assert set(generative) == {"val/denoising"}
    # Without masks, two rows instead of three.
    heights = [found["val/denoising"][2].shape[0] - 24 for found in (generative, hybrid)]
    assert heights[0] * 3 == heights[1] * 2


def test_loggers_and_data_that_have_no_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Bare(Squares):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"image": torch.zeros(3, 4, 4)}

    with caplog.at_level("INFO"):
        run = trainer(tmp_path, SegmentationGrid(), logger=CSVLogger(tmp_path), max_epochs=2)
        run.fit(Sees(), loader(), loader())
        run = trainer(tmp_path / "b", SegmentationGrid())
        run.validate(Sees(), DataLoader(Bare()), verbose=False)
    assert caplog.text.count("no logger takes images") == 1
    assert "the val data has no items with `image` and `mask`" in caplog.text
    assert pictures(tmp_path / "b") == {}


def test_modules_that_cannot(tmp_path: Path) -> None:
    class Blind(pl.LightningModule):
        def validation_step(self, batch: dict[str, Tensor]) -> None:
            return None

    with pytest.raises(TypeError, match=r"method segment\(image\), got Blind; .* SegmentationGrid out of"):
        trainer(tmp_path, SegmentationGrid()).validate(Blind(), loader())
    with pytest.raises(TypeError, match=r"method denoise\(image, level, generator\), got Blind"):
        trainer(tmp_path, DenoisingGrid()).validate(Blind(), loader())


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="`every_n_epochs` to be at least 1, got 0"):
        SegmentationGrid(every_n_epochs=0)
    with pytest.raises(ValueError, match="`num_images` to be at least 1, got 0"):
        DenoisingGrid(num_images=0)
    with pytest.raises(ValueError, match=r"noise levels in \[0, 1\], got \(0.5, 25\)"):
        DenoisingGrid(levels=(0.5, 25))
    with pytest.raises(ValueError, match=r"`levels` .* got \(\)"):
        DenoisingGrid(levels=())


def test_jaccard_of_one_picture() -> None:
    true = torch.tensor([[0, 1, 1], [2, 2, 255]])
    predicted = torch.tensor([[1, 1, 1], [0, 2, 2]])
    assert _jaccard(predicted, true) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert _jaccard(torch.zeros(2, 3), true * 0) == 1
    assert _jaccard(predicted, torch.full((2, 3), 255)) == 1
