"""Masks written by predict."""

import csv
import errno
import math
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


class Voting(Darkness):
    """Most members say the contrary of the mean probability."""

    def predict_step(self, batch: dict[str, Tensor]) -> Any:  # noqa: ANN401 - as above
        said = super().predict_step(batch)
        return said | {"votes": 2 + said["probabilities"].flip(1)}


def test_where_members_vote_the_votes_are_written(tmp_path: Path) -> None:
    predict(tmp_path / "likeliest", Images({"a.png": (8, 8)}))
    predict(tmp_path / "voted", Images({"a.png": (8, 8)}), Voting())
    likeliest, voted = read(tmp_path / "likeliest/a.png"), read(tmp_path / "voted/a.png")
    assert set(np.unique(likeliest)) == {0, 255}
    assert (voted == 255 - likeliest).mean() > 0.9  # they tie where the border was interpolated


class Unsure(Darkness):
    """Tells a confidence that grows with the index, and uncertainties of which one pixel in ten stands out."""

    def predict_step(self, batch: dict[str, Tensor]) -> Any:  # noqa: ANN401 - see Darkness
        index = batch["index"]
        uncertainty = torch.zeros(len(index), 4, 4)
        uncertainty[:, 0, :2] = math.log(self.classes) * (index[:, None] + 1) / 10
        return super().predict_step(batch) | {"confidence": 0.5 + index / 100, "uncertainty": uncertainty}


def table(folder: Path) -> list[list[str]]:
    with (folder / "confidence.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_confidences_are_listed_by_name(tmp_path: Path) -> None:
    odd = ["z/a, b.jpg", 'say "so".png', "ä ö.jpg", "b.jpg", "_.jpg"]
    predict(tmp_path, Images(dict.fromkeys(odd, (4, 4))), Unsure())
    header, *rows = table(tmp_path)
    assert header == ["image", "confidence", "uncertainty"]
    # Of 16 pixels two are the most uncertain tenth.
    expected = {key: [0.5 + i / 100, math.log(2) * (i + 1) / 10] for i, key in enumerate(odd)}
    assert [row[0] for row in rows] == sorted(odd)
    for key, *numbers in rows:
        assert [float(n) for n in numbers] == pytest.approx(expected[key], abs=1e-6)
    assert not (tmp_path / "uncertainty").exists()


def test_confidences_of_some_images_only(tmp_path: Path) -> None:
    class Now(Unsure):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
            batch["index"] = torch.where(batch["index"] == 1, -1, batch["index"])  # padding
            prediction = super().predict_step(batch)
            if dataloader_idx == 0:
                del prediction["uncertainty"]
            return prediction

    data: list[Dataset[Any]] = [Images({"y/a.jpg": (4, 4), "y/b.jpg": (4, 4)}), Images({"x/a.jpg": (4, 4)})]
    predict(tmp_path, data, Now())
    assert table(tmp_path) == [
        ["image", "confidence", "uncertainty"],
        ["x/a.jpg", "0.500000", f"{math.log(2) / 10:.6g}"],
        ["y/a.jpg", "0.500000", ""],
    ]


def test_no_confidences_no_table(tmp_path: Path) -> None:
    class Uncertain(Unsure):
        def predict_step(self, batch: dict[str, Tensor]) -> Any:  # noqa: ANN401 - see Darkness
            prediction = super().predict_step(batch)
            del prediction["confidence"]
            return prediction

    class Confident(Unsure):
        def predict_step(self, batch: dict[str, Tensor]) -> Any:  # noqa: ANN401 - see Darkness
            prediction = super().predict_step(batch)
            del prediction["uncertainty"]
            return prediction

    predict(tmp_path / "none", Images({"a.jpg": (4, 4)}), Uncertain())
    assert files(tmp_path / "none") == ["a.png"]
    predict(tmp_path / "some", Images({"a.jpg": (4, 4)}), Confident())
    assert table(tmp_path / "some") == [["image", "confidence"], ["a.jpg", "0.500000"]]
    with pytest.raises(
        TypeError, match=r"to return `uncertainty` for `write_uncertainty`, got \['confidence', 'index'"
    ):
        predict(tmp_path / "map", Images({"a.jpg": (4, 4)}), Confident(), write_uncertainty=True)


def test_uncertainty_maps(tmp_path: Path) -> None:
    data = Images({"s/a.jpg": (8, 12), "b.jpg": (4, 4)})
    predict(tmp_path, data, Unsure(classes=3), write_uncertainty=True)
    assert files(tmp_path) == ["b.png", "confidence.csv", "s/a.png", "uncertainty/b.png", "uncertainty/s/a.png"]
    small, large = read(tmp_path / "uncertainty" / "b.png"), read(tmp_path / "uncertainty" / "s" / "a.png")
    assert small[0].tolist() == [51, 51, 0, 0]  # 2 / 10 of log 3
    assert not small[1:].any()
    assert large.shape == (8, 12)
    assert large[0, 0] in (25, 26)  # 25.5, rounded
    data.keys = ["uncertainty/b.jpg", "b.jpg"]
    with pytest.raises(ValueError, match="several for uncertainty/b; rename"):
        predict(tmp_path, data, Unsure(), write_uncertainty=True)


def test_a_table_that_exists(tmp_path: Path) -> None:
    predict(tmp_path, Images({"a.jpg": (4, 4)}), Unsure())
    with pytest.raises(FileExistsError, match=r"without these files, .* got confidence.csv; set `overwrite`"):
        predict(tmp_path, Images({"b.jpg": (4, 4)}), Unsure(), overwrite=False)
    predict(tmp_path, Images({"b.jpg": (4, 4)}), Unsure())
    assert [row[0] for row in table(tmp_path)] == ["image", "b.jpg"]


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    class Wrong(Unsure):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def predict_step(self, batch: dict[str, Tensor]) -> Any:  # noqa: ANN401 - see Darkness
            return super().predict_step(batch) | {self.name: torch.zeros(1, 2, 2)}

    for name, shape in (("confidence", r"\[1\]"), ("uncertainty", r"\[1, 4, 4\]")):
        with pytest.raises(ValueError, match=rf"`{name}` .* of Wrong returns to have shape {shape}, got \[1, 2, 2\]"):
            predict(tmp_path, Images({"a.jpg": (4, 4)}), Wrong(name))
    assert files(tmp_path) == []


def test_two_processes_write_one_table(tmp_path: Path) -> None:
    data = Images({f"{i}.jpg": (4, 4) for i in range(5)})
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[MaskWriter(str(tmp_path / "two"))],
    )
    trainer.predict(Unsure(), DataLoader(data, batch_size=2), return_predictions=False)
    predict(tmp_path / "one", data, Unsure())
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert len(table(tmp_path / "two")) == 6
    assert (tmp_path / "two" / "confidence.csv").read_bytes() == (tmp_path / "one" / "confidence.csv").read_bytes()
