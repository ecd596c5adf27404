"""Where classified images come from, and everything that can be wrong with them."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from fake_data import write_mnist
from PIL import Image

from datamodules import (
    ArraySource,
    DigitsSource,
    FolderSource,
    ImageNetSource,
    ImageSource,
    SemiSupervisedDataModule,
    TableSource,
    TorchvisionSource,
    TwoFolderSource,
)
from datamodules.classification.store import read_square, resize
from datamodules.loading import DATA_VARIABLE

GREY = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
LABELS = np.arange(12) % 3


def picture(path: Path, level: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 255 - level, 7)).save(path)


def write_classes(folder: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 3) -> Path:
    for number, name in enumerate(names):
        for image in range(count):
            picture(folder / name / f"{image}.png", 40 * number + image)
    return folder


def setup(source: ImageSource, **arguments: Any) -> SemiSupervisedDataModule:
    data = SemiSupervisedDataModule(source, **{"image_size": 8, "steps_per_epoch": 1, "batch_size": 2, **arguments})
    data.setup("fit")
    return data


def swept(data: SemiSupervisedDataModule) -> list[tuple[float, int]]:
    batch = next(iter(data.sweep_dataloader("unlabeled")))
    return [(round(float(image[0].mean()) * 255), int(label)) for image, label in zip(*_both(batch), strict=True)]


def _both(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["image"], batch["label"]


def test_digits() -> None:
    contents = DigitsSource().read()
    counts = np.bincount(contents.labels[np.asarray(contents.roles) == "test"])
    assert counts.sum() == 500
    assert counts.max() - counts.min() <= 3
    assert contents.images is not None
    assert len(np.unique(contents.images)) == 17
    assert contents.images.max() == 255


@pytest.mark.parametrize("cache_megabytes", [0, 10])
def test_folder_with_splits(tmp_path: Path, cache_megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path / "set" / "train")
    write_classes(tmp_path / "set" / "test", count=2)
    write_classes(tmp_path / "set" / "val", count=1)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    data = SemiSupervisedDataModule(FolderSource("set"), image_size=8, cache_megabytes=cache_megabytes)
    assert (data.num_classes, data.class_names, data.image_channels) == (2, ("cat", "dog"), 3)
    data.check()
    data.setup("fit")
    assert data.counts == {"labeled": 6, "unlabeled": 6, "val": 2, "test": 4}
    assert swept(data) == [(0, 0), (1, 0), (2, 0), (40, 1), (41, 1), (42, 1)]


def test_plain_folder_hides_labels(tmp_path: Path) -> None:
    data = setup(FolderSource(str(write_classes(tmp_path))), labels_per_class=1)
    assert data.counts == {"labeled": 2, "unlabeled": 6, "val": 0, "test": 0}
    assert sorted(label for _, label in swept(data)) == [-1, -1, -1, -1, 0, 1]
    data.declare_views(("plain",), ("plain",))
    batch = next(iter(data.train_dataloader()))["unlabeled"]
    assert (batch["true_label"] >= 0).all()
    with pytest.raises(ValueError, match="no test images"):
        data.test_dataloader()


def test_two_folders(tmp_path: Path) -> None:
    write_classes(tmp_path / "labelled", count=1)
    picture(tmp_path / "unlabelled" / "deep" / "a.png", 200)
    picture(tmp_path / "unlabelled" / "b.png", 210)
    data = setup(TwoFolderSource(str(tmp_path)))
    assert sorted(swept(data)) == [(0, 0), (40, 1), (200, -1), (210, -1)]
    data.declare_views(("plain",), ("plain",))
    batch = next(iter(data.train_dataloader()))["unlabeled"]
    assert set(batch["true_label"].tolist()) <= {0, 1, -1}
    with pytest.raises(FileNotFoundError, match="to hold a folder 'nothing'"):
        setup(TwoFolderSource(str(tmp_path), unlabelled="nothing"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    rows = [("1.png", "b", "train"), ("2.png", "a", ""), ("3.png", "", "train"), ("4.png", "a", "test")]
    for number in range(1, 5):
        picture(tmp_path / f"{number}.png", number)
    table = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        table.write_text("path,label,split\n" + "".join(",".join(row) + "\n" for row in rows))
    else:
        columns = zip(*((path, label or None, split or None) for path, label, split in rows), strict=True)
        pa.parquet.write_table(pa.table(dict(zip(("path", "label", "split"), map(list, columns), strict=True))), table)
    data = setup(TableSource(str(table)))
    assert data.class_names == ("a", "b")
    assert swept(data) == [(1, 1), (2, 0), (3, -1)]
    assert data.counts["test"] == 1


def test_a_list_of_labels_beside_images_that_it_does_not_name(tmp_path: Path) -> None:
    for number in range(1, 6):
        picture(tmp_path / ("1.png" if number == 1 else f"deep/{number}.png"), number)
    (tmp_path / "labels.csv").write_text("path,label,split\n./deep/3.png,b,\n1.png,a,\ndeep/5.png,a,test\n")
    data = setup(TableSource(str(tmp_path / "labels.csv"), unlisted=True))
    assert swept(data) == [(3, 1), (1, 0), (2, -1), (4, -1)]
    assert data.counts["test"] == 1
    listed = setup(TableSource(str(tmp_path / "labels.csv")))
    assert swept(listed) == [(3, 1), (1, 0)]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("path,class\n1.png,a\n", {}, "Expected columns `path` and `label`"),
        ("path,label\n1.png,c\n", {"class_names": ["a", "b"]}, "Expected labels out of .*'c'"),
        ("path,label\n1.png,2\n", {"class_names": ["a", "b"]}, "labels from 0 to 1 .*got 2 for 1.png"),
        ("path,label\n1.png,-1\n", {"class_names": ["a", "b"]}, "labels from 0 to 1"),
        ("path,label,split\n1.png,a,later\n", {}, "`split` to be one of .*'later' in row 1"),
        ("path,label\n1.png,a\n1.png,a\n", {}, "1 of 2 entries.*\n.*row 2: named twice"),
        ("path,label\n1.png,a\n2.png,b\n", {}, "1 of 2 entries.*\n.*2.png: cannot be decoded"),
        ("path,label,split\n1.png,a,\n1.png,,test\n", {}, "named twice"),
        ("path,label,split\n1.png,a,\n./1.png,b,test\n", {}, "row 2: named twice"),
        ("path,label\n1.png,\n", {"class_names": ["a", "b"]}, "class 'a' .* has none"),
        ("path,label\n1.png,\n", {}, "column `label` is empty; label some images"),
        ("path,label\n1.png,a\n", {}, r"at least two classes .* got only \['a'\]"),
        ("path,label\n1.png,a\n", {"class_names": ["a", "a"]}, "classes whose names differ, but got 'a' twice"),
        ('path,label\n"1.png\n', {}, "cannot be read|columns"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, arguments: dict[str, Any], message: str) -> None:
    picture(tmp_path / "1.png", 3)
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        setup(TableSource(str(tmp_path / "table.csv"), **arguments))


def test_whole_numbers_that_became_floats_are_class_ids(tmp_path: Path) -> None:
    # What spreadsheets and data frames make of whole numbers beside empty cells.
    for number in range(4):
        picture(tmp_path / f"{number}.png", number)
    paths = [f"{number}.png" for number in range(4)]
    (tmp_path / "a.csv").write_text("path,label\n0.png,1.0\n1.png,\n2.png,0.0\n3.png,1.0\n")
    pa.parquet.write_table(pa.table({"path": paths, "label": [1.0, float("nan"), 0.0, 1.0]}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        data = setup(TableSource(str(tmp_path / name), class_names=["cat", "dog"]))
        assert data.labels_of("unlabeled").tolist() == [1, -1, 0, 1]
    assert TableSource(str(tmp_path / "a.parquet")).class_names == ("0", "1")


@pytest.mark.parametrize("split", ["Train", "train_images"])
def test_splits_are_not_taken_for_classes(tmp_path: Path, split: str) -> None:
    write_classes(tmp_path / split)
    write_classes(tmp_path / "test")
    with pytest.raises(FileNotFoundError, match=r"a folder 'train' beside .*'test'"):
        setup(FolderSource(str(tmp_path)))


def test_no_image_is_listed_twice(tmp_path: Path) -> None:
    write_classes(tmp_path / "labelled")
    write_classes(tmp_path / "test")
    with pytest.raises(ValueError, match=r"listed once, but got labelled/cat/0\.png twice"):
        setup(TwoFolderSource(str(tmp_path), unlabelled="."))


def test_imagenet_with_a_list(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        for number in range(3):
            picture(tmp_path / "train" / name / f"{name}_{number}.png", 10 * number)
        picture(tmp_path / "val" / name / f"v_{name}.png", 99)
    (tmp_path / "list.txt").write_text("n01/n01_1.png\nn02_2.png\n\n")
    data = setup(ImageNetSource(str(tmp_path), str(tmp_path / "list.txt")))
    assert swept(data) == [(0, -1), (10, 0), (20, -1), (0, -1), (10, -1), (20, 1)]
    assert data.counts["test"] == 2
    (tmp_path / "list.txt").write_text("n01_7.png\n")
    with pytest.raises(ValueError, match=r"`label_list`.*1 of 1 are not there, for example n01/n01_7\.png"):
        setup(ImageNetSource(str(tmp_path), str(tmp_path / "list.txt")))
    with pytest.raises(FileNotFoundError, match="`label_list`"):
        setup(ImageNetSource(str(tmp_path), str(tmp_path / "none.txt")))


def test_torchvision(tmp_path: Path) -> None:
    write_mnist(tmp_path, 20, 4)
    data = setup(TorchvisionSource("MNIST", str(tmp_path)), image_size=None, labels_per_class=1)
    assert (data.image_size, data.image_channels, data.num_classes) == (28, 1, 10)
    assert data.counts == {"labeled": 10, "unlabeled": 20, "val": 0, "test": 4}
    assert [level for level, _ in swept(data)] == list(range(20))
    source = TorchvisionSource("CIFAR10", str(tmp_path / "nothing"))
    assert source.class_names[3] == "cat"
    with pytest.raises(FileNotFoundError, match=r"`root` to hold CIFAR10 .*`download: true`"):
        source.check()
    with pytest.raises(FileNotFoundError, match="to hold CIFAR10"):
        TorchvisionSource("CIFAR10", str(tmp_path)).read()
    name: Any = "ImageNet22k"
    with pytest.raises(ValueError, match="`name` to be one of"):
        TorchvisionSource(name, "x")


def test_unreadable_images_are_reported_together(tmp_path: Path) -> None:
    write_classes(tmp_path, count=10)
    for name in ("cat/0.png", "dog/3.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    (tmp_path / "dog" / "4.png").write_bytes(gzip.compress(b"no picture"))
    source = FolderSource(str(tmp_path))
    with pytest.raises(ValueError, match=r"3 of 20 entries(.|\n)*cat/0.png(.|\n)*dog/3.png(.|\n)*dog/4.png"):
        setup(source)
    with pytest.raises(ValueError, match="more than `max_bad_share`"):
        setup(source, on_bad_file="skip")
    data = setup(source, on_bad_file="skip", max_bad_share=0.2)
    assert data.num_labeled == 17
    levels = [level for level, _ in swept(data)]
    assert levels == [*range(1, 10), *(40 + number for number in (0, 1, 2, 5, 6, 7, 8, 9))]
    late = setup(source, on_bad_file="skip", max_bad_share=0.2, cache_megabytes=0)
    (tmp_path / "cat" / "1.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"1\.png: .*decoded on access"):
        swept(late)


def test_missing_folders(tmp_path: Path) -> None:
    data = SemiSupervisedDataModule(FolderSource(str(tmp_path / "nothing")), image_size=8)
    for ask in (data.check, data.setup, lambda: data.num_classes):
        with pytest.raises(FileNotFoundError, match=r"`root` to be a folder.*\nExpected layout:"):
            ask()
    with pytest.raises(FileNotFoundError, match="a folder for each class"):
        setup(FolderSource(str(tmp_path)))
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="to hold images"):
        setup(FolderSource(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="`table` to be a file"):
        setup(TableSource(str(tmp_path / "none.csv")))
    with pytest.raises(ValueError, match="`image_size` for FolderSource"):
        SemiSupervisedDataModule(FolderSource("x"))


def test_classes_that_do_not_fit(tmp_path: Path) -> None:
    write_classes(tmp_path / "train")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class 'empty' \(2 of 3 classes\) has none"):
        setup(FolderSource(str(tmp_path)))
    (tmp_path / "train" / "empty").rmdir()
    write_classes(tmp_path / "test", ("bird",))
    with pytest.raises(ValueError, match="'bird', which is none"):
        setup(FolderSource(str(tmp_path)))


@pytest.mark.parametrize(
    ("images", "labels", "arguments", "message"),
    [
        (GREY, LABELS, {"class_names": ["a", "b"]}, r"labels from 0 to 1 .*got 2 for train/0000002 and 3 more"),
        (GREY, LABELS - 2, {"class_names": ["a"]}, "labels from 0 to 0 .*got -2"),
        (GREY, LABELS, {"class_names": list("abcd")}, r"class 'd' \(3 of 4 classes\) has none"),
        (GREY, LABELS[:5], {}, "`labels` to be 12 whole numbers"),
        (GREY, LABELS / 2, {}, "`labels` to be 12 whole numbers, one an image, but got float64"),
        (GREY[0], LABELS, {}, "`images` to be an array"),
        (GREY.astype(np.float32), LABELS, {}, r"`images` to be uint8, or floats in \[0, 1\]"),
        (GREY.astype(np.int64), LABELS, {}, "`images` to be uint8"),
        (GREY, LABELS, {"test_images": GREY}, "`test_images` and `test_labels` together"),
        (GREY, LABELS, {"test_images": GREY[:, :4], "test_labels": LABELS}, "`test_images` to have the shape"),
        (GREY, LABELS, {"test_images": GREY, "test_labels": LABELS - 1}, "a label for every image to validate or test"),
    ],
)
def test_bad_arrays(
    images: npt.NDArray[Any], labels: npt.NDArray[Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        setup(ArraySource(images, labels, **arguments))


def test_arrays() -> None:
    source = ArraySource(GREY / np.float32(255), LABELS, GREY[:3], LABELS[:3], ["x", "y", "z"])
    data = setup(source, image_size=None)
    batch = next(iter(data.sweep_dataloader("labeled")))
    assert torch.equal(batch["image"], torch.from_numpy(GREY)[:, None].float() / 255)
    tested = next(iter(data.test_dataloader()))
    assert (tested["label"].tolist(), tested["index"].tolist()) == ([0, 1, 2], [0, 1, 2])
    assert torch.equal(tested["image"][1], torch.from_numpy(GREY[1])[None].float() / 255)


def test_pictures_are_cut_to_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels, size = read_square(tmp_path / "wide.png", 10, 3)
    assert size == (20, 60)
    assert (pixels[:, :, 1:-1] == 200).all()
    assert pixels.min() > 150  # antialiasing sees what lies beside the cut
    assert (resize(wide[None], 10) == 200).all()
    assert read_square(tmp_path / "wide.png", 10, 1)[0].shape == (1, 10, 10)
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None], 16, 0)
    halves = resize(ramp[None, :, :, None], 8)[0, 0, 0, 2:6].tolist()
    assert halves == pytest.approx([45, 65, 85, 105], abs=1)


def test_predicting_a_folder_needs_no_source(tmp_path: Path) -> None:
    picture(tmp_path / "b" / "2.png", 20)
    picture(tmp_path / "1.png", 10)
    missing = FolderSource(str(tmp_path / "nothing"))
    data = SemiSupervisedDataModule(missing, image_size=8, predict_images=str(tmp_path))
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["label"].tolist() == [-1, -1]
    assert (batch["image"][:, 0, 0, 0] * 255).round().tolist() == [10, 20]
    empty = SemiSupervisedDataModule(predict_images=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"`predict_images` to be a folder of images.*is not a folder"):
        empty.setup("predict")
