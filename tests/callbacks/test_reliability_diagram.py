"""Reliability diagrams: when they are drawn, from which numbers, and that the bars are where they should be."""

import io
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # publishes no types
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import ReliabilityDiagram
from callbacks.reliability_diagram import draw_reliability
from lightning_modules.metrics import CalibrationError

BLUE, RED, PURPLE, WHITE = (70, 130, 180), (237, 162, 162), (132, 91, 120), (255, 255, 255)


class Says(pl.LightningModule):
    """Says class 1 with the probability it is given, and measures its calibration like a real module."""

    def __init__(self, bins: Literal["metric", "none"] = "metric") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calibration = CalibrationError(2, num_bins=10)
        self.bins = bins
        self.asked: list[tuple[str, int]] = []

    def reliability(self, split: Literal["val", "test"]) -> tuple[Tensor, Tensor, Tensor] | None:
        found = self.calibration.bins()
        self.asked.append((split, int(found[2].sum())))
        return found if self.bins == "metric" else None

    def _measure(self, batch: list[Tensor]) -> None:
        p, mask = batch
        self.calibration.update(torch.stack([1 - p, p], 1), mask)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.weight.square()

    def validation_step(self, batch: list[Tensor]) -> None:
        self._measure(batch)

    def test_step(self, batch: list[Tensor]) -> None:
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        self.log("val_ece", self.calibration.compute())
        self.calibration.reset()

    def on_test_epoch_end(self) -> None:
        self.calibration.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(label: int = 1, images: int = 4) -> DataLoader[Any]:
    """Foreground of probability 0.55, 0.65, ... in turn, true or not."""
    p = (0.55 + 0.1 * (torch.arange(images * 12) % 4)).view(images, 3, 4)
    return DataLoader([(p[i], torch.full((3, 4), label)) for i in range(images)], batch_size=2)  # type: ignore[arg-type] # a list is enough


def trainer(folder: Path, callback: ReliabilityDiagram, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": TensorBoardLogger(folder, name="", version=""), **options},
    )


def pictures(folder: Path) -> dict[str, dict[int, np.ndarray[Any, Any]]]:
    """All pictures in the event files: tag -> step -> pixels."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images(tag)}
        for tag in events.Tags()["images"]
    }


def at(picture: np.ndarray[Any, Any], x: float, y: float) -> tuple[int, ...]:
    """Colour at coordinates of the diagram."""
    return tuple(picture[round(388 - y * 348), round(64 + x * 400)].tolist())


def near(found: tuple[int, ...], color: tuple[int, int, int]) -> bool:
    return max(abs(a - b) for a, b in zip(found, color, strict=True)) <= 6


def diagram(confidence: list[float], accuracy: list[float], count: list[int]) -> np.ndarray[Any, Any]:
    return draw_reliability(torch.tensor(confidence), torch.tensor(accuracy), torch.tensor(count), "title")


def test_bars_and_gaps_are_where_the_numbers_say() -> None:
    nan = math.nan
    picture = diagram([nan, 0.35, 0.7, 0.95], [nan, 0.3, 0.3, 1.0], [0, 1, 100, 10000])
    assert picture.shape == (560, 480, 3)
    assert near(at(picture, 0.07, 0.05), WHITE)  # an empty bin
    assert near(at(picture, 0.45, 0.27), BLUE)
    assert near(at(picture, 0.45, 0.33), RED)
    assert near(at(picture, 0.45, 0.38), WHITE)
    # Too sure: blue up to the accuracy, red up to the confidence.
    assert near(at(picture, 0.7, 0.25), BLUE)
    assert near(at(picture, 0.7, 0.33), RED)
    assert near(at(picture, 0.62, 0.68), RED)
    assert near(at(picture, 0.7, 0.73), WHITE)
    # Not sure enough: the gap is within the bar.
    assert near(at(picture, 0.9, 0.88), BLUE)
    assert near(at(picture, 0.9, 0.98), PURPLE)
    # The histogram is logarithmic: of 10101 pixels 1, 100 and 10000 are 0, 1/2 and 1 of its height.
    columns = picture[409:499, [64 + 50, 64 + 150, 64 + 250, 64 + 350]]
    grey = (np.abs(columns.astype(int) - (150, 165, 180)).max(-1) <= 6).sum(0)
    assert grey[0] == 0
    assert 1 <= grey[1] <= 4
    assert grey[2] == pytest.approx(45, abs=3)
    assert grey[3] >= 86


def test_the_numbers_written_depend_on_the_bins() -> None:
    one = diagram([0.25, 0.75], [0.25, 0.75], [10, 10])
    other = diagram([0.25, 0.75], [0.25, 0.75], [10, 30])
    legend = (slice(50, 110), slice(74, 234))
    assert not np.array_equal(one[legend], other[legend])  # mean confidence 0.5 and 0.625


@pytest.mark.parametrize("bins", [1, 300, 1000])
def test_any_number_of_bins(bins: int) -> None:
    confidence = ((torch.arange(bins) + 0.5) / bins).tolist()
    picture = diagram(confidence, [0.3] * bins, [5] * bins)
    red, _, blue = picture[70 + 310, 100:460].mean(0)  # gaps between narrow bars make the blue paler
    assert red + 30 < blue


def test_what_was_counted_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bins = torch.tensor([0.2, 0.7]), torch.tensor([0.2, 0.7]), torch.tensor([3, 4])
    pixels, images = draw_reliability(*bins, "title"), draw_reliability(*bins, "title", "images")
    assert np.array_equal(pixels[:400], images[:400])
    assert not np.array_equal(pixels[400:, :30], images[400:, :30])
    module = Says()
    module.counted = "images"  # type: ignore[assignment] # as SSLClassifier has it
    with caplog.at_level("INFO"):
        trainer(tmp_path, ReliabilityDiagram()).validate(module, loader(label=255), verbose=False)
    assert "the val data has no labelled images" in caplog.text


def test_bins_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"got shapes \(2,\), \(2,\) and \(1,\) and 3 pixels"):
        diagram([0.2, 0.7], [0.2, 0.7], [3])
    with pytest.raises(ValueError, match=r"0 pixels; pass what CalibrationError.bins\(\) returns"):
        diagram([math.nan], [math.nan], [0])
    with pytest.raises(ValueError, match="`every_n_epochs` to be at least 1, got 0"):
        ReliabilityDiagram(every_n_epochs=0)


def test_drawn_before_the_module_forgets(tmp_path: Path) -> None:
    module = Says()
    run = trainer(tmp_path, ReliabilityDiagram(every_n_epochs=2), max_epochs=3)
    run.fit(module, loader(), loader())
    # Epoch 2 of 3, and the last one; not the sanity check.
    assert module.asked == [("val", 48)] * 2
    assert run.callback_metrics["val_ece"].item() == pytest.approx(0.3)  # right with 0.7 on average
    found = pictures(tmp_path)
    assert set(found) == {"val/reliability"}
    assert list(found["val/reliability"]) == [4, 6]
    picture = found["val/reliability"][6]
    assert near(at(picture, 0.65, 0.5), BLUE)
    assert near(at(picture, 0.65, 0.9), PURPLE)
    assert near(at(picture, 0.43, 0.25), WHITE)


def test_validate_alone_and_test(tmp_path: Path) -> None:
    module = Says()
    run = trainer(tmp_path, ReliabilityDiagram(every_n_epochs=7))
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(label=0, images=2), verbose=False)
    assert module.asked == [("val", 48), ("test", 24)]
    found = pictures(tmp_path)
    assert set(found) == {"val/reliability", "test/reliability"}
    # Never right: nothing is blue, all is gap.
    assert near(at(found["test/reliability"][0], 0.65, 0.3), RED)


def test_nothing_to_draw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run = trainer(tmp_path / "n", ReliabilityDiagram(), max_epochs=2)
        run.fit(Says("none"), loader(), loader())
        trainer(tmp_path / "i", ReliabilityDiagram()).validate(Says(), loader(label=255), verbose=False)
        run = trainer(tmp_path / "c", ReliabilityDiagram(), logger=CSVLogger(tmp_path))
        run.validate(Says(), loader(), verbose=False)
    assert caplog.text.count("ReliabilityDiagram: the module trains no masks, nothing is drawn") == 1
    assert "the val data has no labelled pixels" in caplog.text
    assert "no logger takes images" in caplog.text
    for folder in ("n", "i"):
        assert pictures(tmp_path / folder) == {}


def test_modules_that_cannot_tell(tmp_path: Path) -> None:
    class Silent(pl.LightningModule):
        def validation_step(self, batch: list[Tensor]) -> None:
            return None

    with pytest.raises(TypeError, match=r"method reliability\(split\), got Silent; .* ReliabilityDiagram out of"):
        trainer(tmp_path, ReliabilityDiagram()).validate(Silent(), loader())


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    # One image a batch, so that both processes have two of the four.
    data = DataLoader(loader().dataset)
    two = trainer(tmp_path / "two", ReliabilityDiagram(), devices=2, strategy="ddp_fork")
    two.validate(Says(), data, verbose=False)
    trainer(tmp_path / "one", ReliabilityDiagram()).validate(Says(), data, verbose=False)
    mine, theirs = (pictures(tmp_path / name)["val/reliability"][0] for name in ("one", "two"))
    assert np.array_equal(mine, theirs)
