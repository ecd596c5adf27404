"""The grid of wrong pseudo-labels: which images are in it, in which order, and when there is none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from board import board_trainer, pictures
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks import PseudoLabelGrid
from callbacks.pseudo_label_grid import draw_wrong

WIDTH, HEIGHT, GAP, HEADER = 192, 192 + 32, 4, 24
K = 3


@dataclass
class Guess:
    label: Tensor
    confidence: Tensor
    weight: Tensor


class Guesses(pl.LightningModule):
    """Returns the pseudo-labels that come with the batch, as a real module returns its own.

    Args:
        true_labels: Whether it returns `true_label`.
        guesses: Whether it returns `guess`.
    """

    def __init__(self, true_labels: bool = True, guesses: bool = True) -> None:
        super().__init__()
        self.true_labels, self.guesses = true_labels, guesses
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        guess = Guess(*(batch[name] for name in ("label", "confidence", "weight")))
        return {
            "loss": self.weight.square(),
            "guess": guess if self.guesses else None,
            "true_label": batch["unlabeled"]["true_label"] if self.true_labels else None,
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(count: int = 3, size: int = 20, images: int = 40, index: bool = True) -> list[dict[str, Any]]:
    """Batches in which images come again; the grey of an image tells its number."""
    generator = torch.Generator().manual_seed(0)

    def some(high: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=generator)

    found = []
    for _ in range(count):
        number = some(images)
        part = {
            "weak": (number / 255.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone(),
            "strong": torch.ones(size, 3, 8, 8),
            "true_label": number % (K + 1) - 1,  # -1 for every fourth
        }
        found.append(
            {
                "unlabeled": part | ({"index": number} if index else {}),
                "label": some(K),
                "confidence": torch.rand(size, generator=generator),
                "weight": some(2).float(),
            }
        )
    return found


def surest(given: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """Confidence and number of each image that was wrong, the surest first, by a loop over all."""
    best: dict[int, float] = {}
    for batch in given:
        for i in range(len(batch["label"])):
            number = int((batch["unlabeled"]["weak"][i, 0, 0, 0] * 255).round())
            true_label = int(batch["unlabeled"]["true_label"][i])
            if true_label >= 0 and batch["weight"][i] > 0 and batch["label"][i] != true_label:
                best[number] = max(best.get(number, 0.0), float(batch["confidence"][i]))
    return sorted(((confidence, number) for number, confidence in best.items()), reverse=True)


def shown(picture: np.ndarray[Any, Any]) -> list[int]:
    """The numbers of the images in a picture, row by row; an empty cell is left out."""
    rows = (picture.shape[0] - HEADER) // (HEIGHT + GAP)
    tops = [HEADER + i * (HEIGHT + GAP) + 90 for i in range(rows)]
    cells = [picture[top, GAP + j * (WIDTH + GAP) + 90] for top in tops for j in range(4)]
    written = [
        (picture[top + 102 : top + 134, GAP + j * (WIDTH + GAP) :][:, :WIDTH] == 255).any()
        for top in tops
        for j in range(4)
    ]
    return [int(cell[0]) for cell, there in zip(cells, written, strict=True) if there]


def fit(folder: Path, given: list[dict[str, Any]], grid: PseudoLabelGrid, module: Guesses, **options: Any) -> None:
    loader = DataLoader(cast("Dataset[Any]", given), batch_size=None)
    board_trainer(folder, grid, **options).fit(module, loader)


@pytest.mark.parametrize("num_images", [5, 100])
def test_the_surest_wrong_ones_of_an_epoch_are_drawn_in_order(num_images: int, tmp_path: Path) -> None:
    given = batches()
    expected = [number for _, number in surest(given)][: num_images + 1]
    assert len(expected) > 4

    class Drops(pl.Callback):
        """After the first epoch the surest image is no longer used."""

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for batch in given:
                batch["weight"][batch["unlabeled"]["index"] == expected[0]] = 0

    grid = PseudoLabelGrid(num_images=num_images)
    loader = DataLoader(cast("Dataset[Any]", given), batch_size=None)
    board_trainer(tmp_path, grid, Drops(), max_epochs=2).fit(Guesses(), loader)
    found = pictures(tmp_path)
    assert set(found) == {"train/wrong_pseudo_labels"}
    steps = {step: shown(picture) for step, picture in found["train/wrong_pseudo_labels"].items()}
    assert steps == {3: expected[:num_images], 6: expected[1:]}


def test_without_an_index_every_image_is_another_one(tmp_path: Path) -> None:
    given = batches(images=6, index=False)
    fit(tmp_path / "a", given, PseudoLabelGrid(num_images=12), Guesses())
    numbers = shown(pictures(tmp_path / "a")["train/wrong_pseudo_labels"][3])
    assert len(numbers) == 12
    fit(tmp_path / "b", batches(images=6), PseudoLabelGrid(num_images=12), Guesses())
    numbers = shown(pictures(tmp_path / "b")["train/wrong_pseudo_labels"][3])
    assert len(numbers) == len(set(numbers)) <= 6


def test_no_more_than_the_picture_is_kept(tmp_path: Path) -> None:
    class Watches(PseudoLabelGrid):
        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
        ) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            kept.append((trainer.current_epoch, *(len(x) for x in self._surest.values())))

    kept: list[tuple[int, ...]] = []
    fit(tmp_path, batches(2), Watches(every_n_epochs=2, num_images=4), Guesses(), max_epochs=3)
    # Epochs without a picture collect nothing.
    assert kept == [(0,)] * 2 + [(1, *[4] * 5)] * 2 + [(2, *[4] * 5)] * 2


def test_nothing_to_draw_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unknown, unused = batches(), batches()
    for batch in unknown:
        batch["unlabeled"]["true_label"][:] = -1
    for batch in unused:
        batch["weight"][:] = 0
    runs = {
        "none returned": (batches(), Guesses(true_labels=False)),
        "all unknown": (unknown, Guesses()),
        "no guesses": (batches(), Guesses(guesses=False)),
        "none used": (unused, Guesses()),
    }
    said = {}
    for name, (given, module) in runs.items():
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(tmp_path / name, given, PseudoLabelGrid(), module, max_epochs=2)
        assert pictures(tmp_path / name) == {}
        said[name] = [r.message for r in caplog.records if r.message.startswith("PseudoLabelGrid")]
    untold = ["PseudoLabelGrid: the data do not know the true labels of unlabelled images, nothing is drawn."]
    assert said == {
        "none returned": untold,
        "all unknown": untold,
        "no guesses": ["PseudoLabelGrid: the method has no pseudo-labels, nothing is drawn."],
        "none used": [],
    }


def test_captions_have_guess_confidence_and_truth() -> None:
    wrong = {
        "image": torch.zeros(1, 1, 8, 8),
        "label": torch.tensor([0]),
        "true_label": torch.tensor([1]),
        "score": torch.tensor([0.9]),
    }
    names = {0: "ant", 1: "bee"}
    picture = draw_wrong(wrong, names)
    assert picture.shape == (HEADER + HEIGHT + GAP, 4 * (WIDTH + GAP) + GAP, 3)
    assert (picture[HEADER : HEADER + 192, GAP : GAP + WIDTH] == 0).all()  # the image stays whole
    first, second = slice(HEADER + 192, HEADER + 208), slice(HEADER + 208, HEADER + 224)
    changes = {
        "label": ({"label": torch.tensor([1])}, True, False),
        "score": ({"score": torch.tensor([0.8])}, True, False),
        "true_label": ({"true_label": torch.tensor([0])}, False, True),
    }
    for change, *lines in changes.values():
        other = draw_wrong(wrong | change, names)
        assert [not np.array_equal(picture[part], other[part]) for part in (first, second)] == lines


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="`num_images` to be at least 1, got 0"):
        PseudoLabelGrid(num_images=0)
    with pytest.raises(ValueError, match="`every_n_epochs` to be at least 1, got -1"):
        PseudoLabelGrid(every_n_epochs=-1)
