"""Drawn images of classes: the request, the folder, and who reads it."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from drawing_runs import files, ramps
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from datamodules import DrawRequest, FolderSegmentationDataModule, SamplingDataModule
from datamodules.synthetic_images import Drawing, Origin, read

NAMES = ("zebra", "ant", "Ünicorn 2")
SOLVER: dict[str, Any] = {"sampler": "dpmpp_2m", "guidance": 1.0}


def request(counts: int | list[int], **changes: Any) -> DrawRequest:
    settings: dict[str, Any] = {"image_size": 4, "first_seed": 5, "batch_size": 3, "num_classes": 3}
    return DrawRequest(None, images_per_class=counts, **settings | changes)


def images(request: DrawRequest, block: int, channels: int = 3) -> dict[str, Tensor]:
    """Ramps in all channels."""
    asked = request.batch(block)
    bytes_ = ramps(asked["seed"], asked["label"], request.image_size)
    image = (bytes_ / 255)[:, None].expand(-1, channels, -1, -1)
    return {"image": image, "label": asked["label"], "seed": asked["seed"]}


def write(folder: Path, request: DrawRequest, channels: int = 3, **origin: Any) -> Path:
    known: dict[str, Any] = {"num_classes": 3, "class_names": NAMES, "fingerprint": "f" * 64} | origin
    drawing = Drawing(folder, request)
    drawing.begin(Origin(request, "w" * 64, **known))
    for block in range(request.num_blocks):
        drawing.write(block, images(request, block, channels))
    assert drawing.finish()
    return folder


@pytest.mark.parametrize("counts", [2, [2, 2, 2], [3, 0, 1], [0, 0, 4], [0, 1, 7]])
def test_seeds_and_labels(counts: int | list[int]) -> None:
    asked = request(counts, guidance=2.0)
    per_class = [counts] * 3 if isinstance(counts, int) else counts
    expected = sorted((5 + 3 * j + c, c) for c, count in enumerate(per_class) for j in range(count))
    batches = [asked.batch(block) for block in range(asked.num_blocks)]
    drawn = [pair for b in batches for pair in zip(b["seed"].tolist(), b["label"].tolist(), strict=True)]
    assert drawn == expected
    assert asked.total == len(expected)
    assert asked.counts == tuple(per_class)
    for block, batch in enumerate(batches):
        assert batch["label"].dtype == torch.int64
        assert (batch["image_size"], batch["guidance"], batch["sampler"]) == (4, 2.0, "heun")
        assert {asked.block_of(seed) for seed in batch["seed"].tolist()} == {block}
        assert len(batch["seed"]) == 3 or block == asked.num_blocks - 1
    trial = asked.trial()
    assert (trial.total, trial.num_steps) == (1, 1)
    seed, label = (int(trial.batch(0)[name]) for name in ("seed", "label"))
    assert (seed, label) in expected


def test_the_same_request_said_otherwise_is_the_same() -> None:
    assert request(2).description() == request([2, 2, 2]).description()
    assert "guidance" not in DrawRequest(3, 8).description()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": None}, "either argument `num_images` .* or argument `images_per_class` .*, but got neither"),
        ({"num_images": 3, "images_per_class": 3, "num_classes": 3}, "`images_per_class` .*, but got both"),
        ({"num_images": 3, "num_classes": 3}, "`num_classes` only with `images_per_class`, but got 3"),
        ({"num_images": 3, "guidance": 1.0}, r"`guidance` only with `images_per_class`, but got 1\.0"),
        ({"images_per_class": 3, "num_classes": 1}, "`num_classes` to be at least 2"),
        ({"images_per_class": [3, 1], "num_classes": 3}, r"one number for each of 3 classes .*, but got 2"),
        ({"images_per_class": [3, -1], "num_classes": 2}, r"at least 0, .* but got \[3, -1\]"),
        ({"images_per_class": [0, 0], "num_classes": 2}, r"above 0 for some class, but got \[0, 0\]"),
        ({"images_per_class": 0, "num_classes": 2}, "above 0 for some class, but got 0"),
        ({"images_per_class": 1, "num_classes": 2, "guidance": -0.5}, r"`guidance` .* at least 0, but got -0\.5"),
        ({"images_per_class": 1, "num_classes": 2, "guidance": float("nan")}, "`guidance` to be finite"),
        ({"images_per_class": [1, 0, 2], "num_classes": 3, "first_seed": 2**32 - 5}, r"seeds of 3 images below 2\^32"),
    ],
)
def test_request_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrawRequest(**{"num_images": None, "image_size": 8} | arguments)


def test_a_request_whose_number_of_classes_is_to_be_told_is_open() -> None:
    request = DrawRequest(None, 8, images_per_class=3)
    assert request.is_open
    assert not replace(request, num_classes=2).is_open
    assert replace(request, num_classes=2) == DrawRequest(None, 8, images_per_class=3, num_classes=2)
    assert not DrawRequest(3, 8).is_open


def test_sampling() -> None:
    data = SamplingDataModule(None, 300, 8, batch_size=4, images_per_class=2, guidance=0.5)
    batches = list(data.predict_dataloader())
    assert Counter(label for b in batches for label in b["label"].tolist()) == dict.fromkeys(range(300), 2)
    assert {b["guidance"] for b in batches} == {0.5}
    with pytest.raises(ValueError, match=r"`class_names` to name 3 classes \(`num_classes`\), but got 1"):
        SamplingDataModule(None, 3, 8, class_names=["a"], images_per_class=2)
    with pytest.raises(ValueError, match="but got both"):
        SamplingDataModule(3, 3, 8, images_per_class=2)
    with pytest.raises(ValueError, match="but got neither"):
        SamplingDataModule(None, 3, 8)


def test_from_yaml_without_the_number_of_pairs() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--request", type=DrawRequest | None)
    parser.add_subclass_arguments(SamplingDataModule, "data")
    arguments = {"image_size": 8, "images_per_class": [1, 2], "num_classes": 2, "sampler": "dpmpp_2m", "guidance": 1}
    data = {"class_path": "datamodules.SamplingDataModule", "init_args": arguments | {"images_per_class": 3}}
    made = parser.instantiate(parser.parse_object({"request": arguments, "data": data}))
    assert made.request == request([1, 2], num_classes=2, first_seed=0, batch_size=32, image_size=8, **SOLVER)
    assert made.data.request == request(3, num_classes=2, first_seed=0, batch_size=32, image_size=8, **SOLVER)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_reads_it(tmp_path: Path, channels: int) -> None:
    folder = write(tmp_path / "drawn", request([2, 3, 4], guidance=1.5), channels)
    data = ImageFolder(str(folder))
    # Sorted by torchvision, not as our classes are.
    assert data.classes == ["ant", "zebra", "Ünicorn 2"]
    assert Counter(data.classes[label] for label in data.targets) == {"zebra": 2, "ant": 3, "Ünicorn 2": 4}
    for (path, _), (image, label) in zip(data.samples, data, strict=True):
        seed, ours = int(Path(path).stem), NAMES.index(data.classes[label])
        assert (seed - 5) % 3 == ours
        expected = ramps(torch.tensor([seed]), torch.tensor([ours]), 4)[0].numpy()
        assert np.array_equal(np.asarray(image), np.stack([expected] * 3, -1))
    with Image.open(data.samples[0][0]) as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[channels]


def test_table_and_manifest(tmp_path: Path) -> None:
    artifact = read(write(tmp_path, request([1, 0, 2], guidance=0.3)), "classes")
    columns = [row[:5] for row in artifact.rows]
    assert columns == [
        (f"{name}/{seed:09d}.png", label, name, seed, 0.3)
        for name, label, seed in [("zebra", 0, 5), ("Ünicorn 2", 2, 7), ("Ünicorn 2", 2, 10)]
    ]
    assert pq.read_table(tmp_path / "metadata.parquet").to_pylist() == [
        dict(zip(["file_name", "label", "class_name", "seed", "guidance"], row, strict=True)) for row in columns
    ]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["kind"], manifest["layout"]) == ("synthetic_images", "classes")
    assert manifest["counts"] == {"images": 3, "classes": {"zebra": 1, "ant": 0, "Ünicorn 2": 2}}
    assert manifest["request"]["images_per_class"] == [1, 0, 2]
    assert (manifest["request"]["num_images"], manifest["request"]["guidance"]) == (3, 0.3)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"zebra", "Ünicorn 2"}
    assert [artifact.bytes_of(row) for row in artifact.rows] == [
        (tmp_path / r.file_name).read_bytes() for r in artifact.rows
    ]
    artifact.require(NAMES, "f" * 64)
    with pytest.raises(ValueError, match="zebra, ant"):
        artifact.require(("ant", "zebra", "Ünicorn 2"), "f" * 64)


def test_what_a_kill_may_leave_is_tidied_up(tmp_path: Path) -> None:
    write(tmp_path / "whole", request(2))
    drawing = Drawing(tmp_path / "drawn", request(2))
    drawing.begin(Origin(request(2), "w" * 64, 3, NAMES, "f" * 64))
    drawing.write(1, images(request(2), 1))
    (tmp_path / "drawn/ant" / f".{'0' * 32}.tmp").write_bytes(b"half")
    (tmp_path / "drawn/zebra/000000005.png").write_bytes(b"without its part")
    assert Drawing(tmp_path / "drawn", request(2)).missing() == [0]
    drawing.write(0, images(request(2), 0))
    (tmp_path / "drawn/ant/000000009.png").unlink()
    assert drawing.missing() == [1]
    drawing.write(1, images(request(2), 1))
    assert drawing.finish()
    assert files(tmp_path / "drawn") == files(tmp_path / "whole")
    assert not (tmp_path / "drawn" / "parts").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "b/c", "d"), "'b/c' holds a character"),
        (("a", "b\\c", "d"), "holds a character"),
        (("a", "b\0", "d"), "holds a character"),
        (("a", "", "d"), "'' is empty"),
        (("a", " b", "d"), "begins or ends with a space"),
        (("a", "..", "d"), r"'\.\.' begins or ends with a dot"),
        (("a", ".b", "d"), "begins or ends with a dot"),
        (("a", "Images", "d"), "'Images' is kept for something else"),
        (("a", "masks", "d"), "is kept"),
        (("a", "parts", "d"), "is kept"),
        (("a", "manifest.json", "d"), "is kept"),
        (("Cat", "dog", "cat"), "'cat' is the same folder as 'Cat'"),
        (("\u00e9", "e\u0301", "d"), "is the same folder"),
        (("a", "ü" * 128, "d"), "is longer than 255 bytes"),
        (("a", "b"), r"`class_names` to name the 3 classes of the request, but got 2 \(a, b\)"),
    ],
)
def test_names_that_are_no_folders(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Drawing(tmp_path, request(1)).begin(Origin(request(1), "w" * 64, 3, names))
    assert not list(tmp_path.iterdir())


def test_classes_without_names_have_numbers(tmp_path: Path) -> None:
    asked = request([1] * 11, num_classes=11)
    write(tmp_path, asked, num_classes=11, class_names=None)
    assert ImageFolder(str(tmp_path)).classes == [f"{c:02d}" for c in range(11)]
    assert [row.class_name for row in read(tmp_path, "classes").rows] == [f"{c:02d}" for c in range(11)]


def test_segmentation_refuses_images_without_masks(tmp_path: Path, fake_data: Path) -> None:
    folder = write(tmp_path / "drawn", request(1))
    reason = r"to be \(image, mask\) pairs, but .* holds images of classes, .*: segmentation needs a mask"
    with pytest.raises(ValueError, match=reason):
        read(folder)
    data = FolderSegmentationDataModule(str(fake_data / "folder"), image_size=4, synthetic_images=str(folder))
    with pytest.raises(ValueError, match=reason):
        data.setup("fit")


def _drop(folder: Path) -> None:
    (folder / "ant/000000006.png").unlink()


def _as_pairs(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["layout"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_drop, FileNotFoundError, "lacks ant/000000006.png"),
        (_as_pairs, ValueError, r"to be images of classes, .* holds \(image, mask\) pairs: masks tell no class"),
        (lambda f: (f / "metadata.parquet").write_text("no"), ValueError, "table of file_name, label, class_name"),
        (lambda f: (f / "manifest.json").rename(f / "drawing.json"), FileNotFoundError, "finished folder of drawn im"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], object], kind: type[Exception], message: str) -> None:
    damage(write(tmp_path, request(1)))
    with pytest.raises(kind, match=f"`synthetic_images`.*{message}"):
        read(tmp_path, "classes")
