"""Masks written by predict."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import MaskWriter
from callbacks.mask_writer import resized_labels


class Images(Dataset[dict[str, Tensor]]):
    """Images of 4 x 4 whose left half is dark, with the names and sizes they had on disk."""

    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        self.keys = list(sizes)
        self.sizes = list(sizes.values())

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image = torch.full((3, 4, 4), 0.9)
        image[:, :, :2] = 0.1
        return {"image": image, "index": torch.tensor(i)}

    def original_size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]


class Darkness(pl.LightningModule):
    """Predicts class 1 where it is dark; with more classes, class 2 there."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.classes = classes

    def predict_step(self, batch: dict[str, Tensor]) -> Any:  # noqa: ANN401 - stand-ins return what they like
        dark = (batch["image"].mean(1) < 0.5).long() * (1 if self.classes == 2 else 2)
        probabilities = torch.nn.functional.one_hot(dark, self.classes).movedim(-1, 1).float()
        return {"probabilities": probabilities, "mask": dark, "index": batch["index"]}


def predict(
    folder: Path,
    data: Dataset[Any] | list[Dataset[Any]],
    module: pl.LightningModule | None = None,
    **options: bool,
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[MaskWriter(str(folder), **options)],
    )
    data = data if isinstance(data, list) else [data]
    loaders = [DataLoader(d, batch_size=2) for d in data]
    trainer.predict(module or Darkness(), loaders, return_predictions=False)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def read(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_names_and_original_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Images({"a.jpg": (8, 12), "deep/er/b.b.JPEG": (3, 5), "c": (4, 4)})
    with caplog.at_level("INFO"):
        predict(tmp_path / "out", data)
    assert files(tmp_path / "out") == ["a.png", "c.png", "deep/er/b.b.png"]
    expected = np.zeros((8, 12), np.uint8)
    expected[:, :6] = 255
    assert np.array_equal(read(tmp_path / "out" / "a.png"), expected)
    assert read(tmp_path / "out" / "deep" / "er" / "b.b.png").shape == (3, 5)
    assert f"3 masks written to {tmp_path / 'out'}" in caplog.text


def test_padding_is_not_written(tmp_path: Path) -> None:
    class Padded(Images):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return super().__getitem__(i) | {"index": torch.tensor(i if i == 0 else -1)}

    predict(tmp_path, Padded({"a.jpg": (4, 4), "b.jpg": (4, 4)}))
    assert files(tmp_path) == ["a.png"]


def test_class_ids_probabilities_and_overlay(tmp_path: Path) -> None:
    predict(tmp_path, Images({"s/a.jpg": (8, 8)}), Darkness(classes=3), write_probabilities=True, overlay=True)
    assert files(tmp_path) == ["overlays/s/a.png", "probabilities/s/a.npy", "s/a.png"]
    mask = read(tmp_path / "s" / "a.png")
    assert np.unique(mask).tolist() == [0, 2]
    probabilities = np.load(tmp_path / "probabilities" / "s" / "a.npy", allow_pickle=False)
    assert probabilities.dtype == np.float16
    assert np.array_equal(probabilities.argmax(0), mask)
    overlay = np.asarray(Image.open(tmp_path / "overlays" / "s" / "a.png"))
    red = (overlay == (255, 40, 60)).all(-1)
    assert red[0, :4].all()
    assert not red[:, 4:].any()
    assert not red[2, 2]


def test_images_that_differ_in_their_suffix_keep_it(tmp_path: Path) -> None:
    predict(tmp_path, Images({"a.jpg": (4, 4), "A.png": (5, 5), "b.png": (4, 4)}))
    assert files(tmp_path) == ["A.png.png", "a.jpg.png", "b.png"]
    assert read(tmp_path / "A.png.png").shape == (5, 5)


@pytest.mark.parametrize(
    ("keys", "overlay", "message"),
    [
        (["a.jpg", "a.jpg"], False, r"several for a.jpg; rename"),
        (["overlays/a.jpg", "a.jpg"], True, "several for overlays/a"),
        (["../a.jpg"], False, r"paths within a folder, got ../a.jpg"),
        (["/etc/a.jpg"], False, r"paths within a folder, got /etc/a.jpg"),
    ],
)
def test_names_that_would_overwrite(tmp_path: Path, keys: list[str], overlay: bool, message: str) -> None:
    data = Images({})
    data.keys, data.sizes = keys, [(4, 4)] * len(keys)
    with pytest.raises(ValueError, match=message):
        predict(tmp_path / "out", data, overlay=overlay)
    assert not (tmp_path / "out").exists()


def test_several_loaders(tmp_path: Path) -> None:
    class Two(Darkness):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
            return super().predict_step(batch)

    predict(tmp_path, [Images({"x/a.jpg": (4, 4)}), Images({"y/a.jpg": (6, 6)})], Two())
    assert files(tmp_path) == ["x/a.png", "y/a.png"]
    assert read(tmp_path / "y" / "a.png").shape == (6, 6)


def test_existing_masks(tmp_path: Path) -> None:
    data = Images({f"{i}.jpg": (4, 4) for i in range(12)})
    predict(tmp_path, data)
    predict(tmp_path, data)
    (tmp_path / "0.png").unlink()
    with pytest.raises(FileExistsError, match=r"got 1, 2, .*, 10 and 1 more; set `overwrite`"):
        predict(tmp_path, data, overwrite=False)
    assert not (tmp_path / "0.png").exists()


def test_data_without_names(tmp_path: Path) -> None:
    class Nameless(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 1

    with pytest.raises(TypeError, match=r"`keys` and `original_size\(index\)`, got Nameless"):
        predict(tmp_path, Nameless())


def test_predictions_that_cannot_be_written(tmp_path: Path) -> None:
    class MaskOnly(Darkness):
        def predict_step(self, batch: dict[str, Tensor]) -> Any:  # noqa: ANN401 - see Darkness
            return {"mask": batch["image"][:, 0]}

    class Bare(Darkness):
        def predict_step(self, batch: dict[str, Tensor]) -> Any:  # noqa: ANN401 - see Darkness
            return batch["image"]

    data = Images({"a.jpg": (4, 4)})
    with pytest.raises(TypeError, match=r"`predict_step` of MaskOnly .* got \['mask'\]"):
        predict(tmp_path, data, MaskOnly())
    with pytest.raises(TypeError, match="got Tensor; return both"):
        predict(tmp_path, data, Bare())
    with pytest.raises(ValueError, match="at most 256 classes, got 300"):
        predict(tmp_path, data, Darkness(classes=300))
    writer = MaskWriter(str(tmp_path), overlay=True)
    prediction = {"probabilities": torch.zeros(1, 2, 4, 4), "index": torch.tensor([0])}
    with pytest.raises(TypeError, match="`image` for `overlay`"):
        writer.write_on_batch_end(pl.Trainer(logger=False), Darkness(), prediction, None, torch.zeros(1), 0, 0)
    assert files(tmp_path) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a\.png: No space left on device"):
        predict(tmp_path, Images({"a.jpg": (4, 4)}))
    assert files(tmp_path) == []


def test_resizing_class_by_class_is_argmax_of_all() -> None:
    probabilities = torch.rand(5, 7, 6, generator=torch.Generator().manual_seed(0)).softmax(0)
    for size in ((13, 20), (3, 4), (7, 6)):
        whole = torch.nn.functional.interpolate(probabilities[None], size=size, mode="bilinear")[0]
        assert torch.equal(resized_labels(probabilities.double(), size), whole.argmax(0))
    assert resized_labels(torch.full((2, 2, 2), 0.5), (4, 4)).max() == 0
