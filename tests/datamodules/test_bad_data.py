"""Everything that can be wrong with a folder gets its clear error, and all of it at once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from fake_data import draw_pair, ph2_table, write_folder, write_isic2018, write_ph2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import (
    FolderSegmentationDataModule,
    ISIC2018DataModule,
    PH2DataModule,
    SegmentationDataModule,
    SegmentationDataset,
)
from datamodules.segmentation.ph2 import read_diagnoses


def dataset_of(loader: DataLoader[dict[str, Tensor]]) -> SegmentationDataset:
    assert isinstance(loader.dataset, SegmentationDataset)
    return loader.dataset


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "`image_size` to be at least 1, but got 0"),
        ({"batch_size": 0}, "`batch_size` to be at least 1"),
        ({"num_workers": -1}, "`num_workers` to be at least 0"),
        ({"num_labels": 0}, "`num_labels` to be at least 1"),
        ({"labels_seed": -1}, "`labels_seed` to be at least 0"),
        ({"seed": -1}, "`seed` to be at least 0"),
        ({"val_share": 1.0}, r"`val_share` to be in \[0, 1\), but got 1.0"),
        ({"val_share": -0.1}, "`val_share`"),
        ({"samples_per_epoch": 0}, "`samples_per_epoch` to be at least 1"),
        ({"cache_megabytes": -1}, "`cache_megabytes` to be at least 0"),
        ({"max_bad_share": 2}, r"`max_bad_share` to be in \[0, 1\]"),
        ({"on_bad_file": "ignore"}, '`on_bad_file`.*"error" or "skip".*\'ignore\''),
        ({"num_classes": 1}, "`num_classes` to be from 2 to 255"),
        ({"num_classes": 300}, "`num_classes`.*300"),
        ({"class_names": ["a", "b", "c"]}, "`class_names` to name 2 classes.*got 3"),
        ({"mask_folder": "images"}, "`mask_suffix`"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FolderSegmentationDataModule("x", **arguments)


KINDS = [
    (ISIC2018DataModule, "ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg"),
    (PH2DataModule, "IMD002_lesion.bmp"),
    (FolderSegmentationDataModule, "images/NAME.jpg"),
]


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_wrong_root(kind: type[SegmentationDataModule], layout: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"(?s)`root` to be a folder.*Expected layout:.*{layout}"):
        kind(str(tmp_path / "nowhere")).setup()
    with pytest.raises(FileNotFoundError, match=r"FEWLIGHT_DATA"):
        kind("nowhere/relative").setup()


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_empty_root(kind: type[SegmentationDataModule], layout: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"(?s)`root` to hold images.*has none.*Expected layout:.*{layout}"):
        kind(str(tmp_path)).setup()


def test_num_labels_above_what_exists(fake_data: Path) -> None:
    with pytest.raises(ValueError, match=r"`num_labels` to be from 1 to 10.*but got 11"):
        PH2DataModule(str(fake_data / "ph2"), image_size=8, num_labels=11).setup()


def break_decode(root: Path) -> str:
    truncate(root / "images" / "photo1.png")
    return r"images/photo1\.png: cannot be decoded"


def break_not_an_image(root: Path) -> str:
    (root / "images" / "photo1.png").write_text("hello")
    return r"images/photo1\.png: cannot be decoded"


def break_mask_decode(root: Path) -> str:
    (root / "masks" / "photo1.png").write_bytes(b"\x89PNG")
    return r"images/photo1\.png: mask photo1\.png: cannot be decoded"


def break_no_mask(root: Path) -> str:
    (root / "masks" / "photo1.png").unlink()
    return r"images/photo1\.png: image without mask"


def break_no_image(root: Path) -> str:
    (root / "images" / "photo1.png").unlink()
    return r"masks/photo1\.png: mask without image"


def break_size(root: Path) -> str:
    Image.fromarray(draw_pair(1, 12, 13)[1]).save(root / "masks" / "photo1.png")
    return r"images/photo1\.png: mask photo1\.png: size mismatch: image 32x24, mask 13x12"


def break_ids(root: Path) -> str:
    Image.fromarray(draw_pair(1)[1] * 7).save(root / "masks" / "photo1.png")
    return r"images/photo1\.png: mask photo1\.png: ids out of range: 7 \(expected \{0, 1\} or \{0, 255\}\)"


def break_twice(root: Path) -> str:
    shutil.copy(root / "masks" / "photo1.png", root / "masks" / "photo1.bmp")
    return r"images/photo1\.png: 2 masks \(photo1\.bmp, photo1\.png\)"


def break_same_name(root: Path) -> str:
    shutil.copy(root / "images" / "photo1.png", root / "images" / "photo1.bmp")
    return r"images/photo1\.png: same name as photo1\.bmp"


BREAKS = [
    break_decode,
    break_not_an_image,
    break_mask_decode,
    break_no_mask,
    break_no_image,
    break_size,
    break_ids,
    break_twice,
    break_same_name,
]


@pytest.mark.parametrize("damage", BREAKS)
def test_each_kind_of_damage(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    message = damage(write_folder(tmp_path, 4))
    with pytest.raises(ValueError, match=rf"(?s)1 of \d entries.*{message}.*Expected layout.*`on_bad_file: skip`"):
        FolderSegmentationDataModule(str(tmp_path), image_size=8).setup()


@pytest.mark.parametrize("damage", BREAKS)
def test_damage_can_be_skipped(tmp_path: Path, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture) -> None:
    damage(write_folder(tmp_path, 4))
    data = FolderSegmentationDataModule(
        str(tmp_path), image_size=8, val_share=0, on_bad_file="skip", max_bad_share=0.25
    )
    data.setup()
    assert data.counts["train"] == (4 if damage is break_same_name else 3)
    assert "photo1" in caplog.text
    assert "skipped 1 of" in caplog.text


def test_the_good_rows_keep_their_masks(tmp_path: Path) -> None:
    write_folder(tmp_path, 6)
    truncate(tmp_path / "images" / "photo2.png")
    data = FolderSegmentationDataModule(
        str(tmp_path), image_size=16, val_share=0, on_bad_file="skip", max_bad_share=0.5, num_labels=1
    )
    data.setup()
    whole = FolderSegmentationDataModule(str(write_folder(tmp_path / "whole", 6)), image_size=16, num_labels=1)
    whole.setup()
    store, reference = (dataset_of(module.test_dataloader()).store for module in (data, whole))
    assert store.images is not None
    assert store.masks is not None
    assert reference.images is not None
    assert reference.masks is not None
    names = [Path(pair.key).name for pair in reference.pairs]
    for row, pair in enumerate(store.pairs):
        other = names.index(Path(pair.key).name)
        np.testing.assert_array_equal(store.masks[row], reference.masks[other])
        np.testing.assert_array_equal(store.images[row], reference.images[other])


def test_too_many_to_skip(tmp_path: Path) -> None:
    write_folder(tmp_path, 4)
    for name in ("photo0", "photo1"):
        truncate(tmp_path / "images" / f"{name}.png")
    with pytest.raises(ValueError, match=r"(?s)2 of 4.*50.0%, more than `max_bad_share` \(25.0%\)"):
        FolderSegmentationDataModule(str(tmp_path), image_size=8, on_bad_file="skip", max_bad_share=0.25).setup()
    for name in ("photo2", "photo3"):
        truncate(tmp_path / "images" / f"{name}.png")
    with pytest.raises(ValueError, match="4 of 4"):
        FolderSegmentationDataModule(str(tmp_path), image_size=8, on_bad_file="skip", max_bad_share=1.0).setup()


def test_all_problems_come_together_ten_are_shown(tmp_path: Path) -> None:
    write_isic2018(tmp_path, 14)
    images = tmp_path / "ISIC2018_Task1-2_Training_Input"
    masks = tmp_path / "ISIC2018_Task1_Training_GroundTruth"
    for number in range(9):
        (masks / f"ISIC_{number:07d}_segmentation.png").unlink()
    (images / "ISIC_0000010.jpg").unlink()
    truncate(images / "ISIC_0000011.jpg")
    Image.fromarray(draw_pair(12)[1] * 9).save(masks / "ISIC_0000012_segmentation.png")
    with pytest.raises(ValueError, match="12 of 14 entries") as caught:
        ISIC2018DataModule(str(tmp_path), image_size=8).setup()
    text = str(caught.value)
    assert text.count("\n  " + str(tmp_path)) == 10
    assert "... and 2 more" in text
    assert "ISIC_0000000.jpg: image without mask" in text
    assert "ISIC_0000010_segmentation.png: mask without image" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_size, "size mismatch"),
        (break_no_mask, "without mask"),
        (break_not_an_image, "cannot be decoded"),
    ],
)
def test_heads_are_checked_without_cache(tmp_path: Path, damage: Callable[[Path], str], message: str) -> None:
    damage(write_folder(tmp_path, 4))
    with pytest.raises(ValueError, match=rf"1 of \d entries[^$]*photo1\.png: .*{message}"):
        FolderSegmentationDataModule(str(tmp_path), image_size=8, cache_megabytes=0).setup()


@pytest.mark.parametrize("cache_megabytes", [0, 10])
def test_images_of_absurd_size_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache_megabytes: int
) -> None:
    write_folder(tmp_path, 4)
    image, mask = draw_pair(1, 64, 64)
    Image.fromarray(image).save(tmp_path / "images" / "photo1.png")
    Image.fromarray(mask).save(tmp_path / "masks" / "photo1.png")
    # Pillow refuses more than twice this; the others have 24 x 32 pixels.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)

    def read(on_bad_file: Literal["error", "skip"]) -> dict[str, int]:
        data = FolderSegmentationDataModule(
            str(tmp_path),
            image_size=8,
            val_share=0,
            cache_megabytes=cache_megabytes,
            on_bad_file=on_bad_file,
            max_bad_share=0.25,
        )
        data.setup()
        return data.counts

    with pytest.raises(ValueError, match=r"1 of 4 entries.*\n.*photo1\.png: cannot be decoded \(DecompressionBomb"):
        read("error")
    assert read("skip")["train"] == 3
    assert "skipped 1 of 4" in caplog.text


def test_file_that_breaks_on_access_is_named(tmp_path: Path) -> None:
    break_ids(write_folder(tmp_path, 4))
    data = FolderSegmentationDataModule(str(tmp_path), image_size=8, cache_megabytes=0, val_share=0)
    data.setup()
    with pytest.raises(ValueError, match=r"photo1\.png: mask photo1\.png: ids out of range: 7.*`cache_megabytes`"):
        list(data.train_dataloader())


def test_nested_folders_with_mask_suffix(tmp_path: Path) -> None:
    for name in ("a/x", "b/x"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True)
        image, mask = draw_pair(len(name))
        Image.fromarray(image).save(path.with_suffix(".jpg"))
        Image.fromarray(mask * 2).save(path.with_name("x_mask.png"))
    data = FolderSegmentationDataModule(
        str(tmp_path), "pictures", "pictures", "_mask", num_classes=3, image_size=8, val_share=0
    )
    data.setup()
    assert data.class_names == ("class 0", "class 1", "class 2")
    assert dataset_of(data.train_dataloader()).keys == ["pictures/a/x.jpg", "pictures/b/x.jpg"]


def test_predict_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`predict_images` to be a folder of images.*holds no images"):
        ISIC2018DataModule("x", predict_images=str(tmp_path)).setup("predict")
    with pytest.raises(FileNotFoundError, match=r"is not a folder"):
        ISIC2018DataModule("x", predict_images=str(tmp_path / "none")).setup("predict")
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded"):
        ISIC2018DataModule("x", predict_images=str(tmp_path)).setup("predict")


def test_loaders_before_setup() -> None:
    with pytest.raises(RuntimeError, match="Call `setup` before"):
        ISIC2018DataModule("x").train_dataloader()


def test_ph2_without_a_part(tmp_path: Path) -> None:
    cases = write_ph2(tmp_path, 5) / "PH2Dataset" / "PH2 Dataset images"
    shutil.rmtree(cases / "IMD002" / "IMD002_lesion")
    shutil.rmtree(cases / "IMD003" / "IMD003_Dermoscopic_Image")
    (cases / "IMD009").mkdir()
    with pytest.raises(ValueError, match="3 of 6") as caught:
        PH2DataModule(str(tmp_path), image_size=8).setup()
    for reason in ("IMD002.bmp: image without mask", "IMD003.bmp: mask without image", "IMD009.bmp: neither"):
        assert reason in str(caught.value)


def test_ph2_table_is_needed_for_labels_only(tmp_path: Path) -> None:
    table = write_ph2(tmp_path, 5) / "PH2Dataset" / "PH2_dataset.txt"
    table.write_text(ph2_table([("IMD002", 0)]))
    with pytest.raises(ValueError, match=r"4 of 5.*\n.*IMD003\.bmp: no row in the table of diagnoses"):
        PH2DataModule(str(tmp_path), image_size=8, num_labels=2).setup()
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"PH2_dataset\.txt.*`num_labels`.*Copy it"):
        PH2DataModule(str(tmp_path), image_size=8, num_labels=2).setup()
    data = PH2DataModule(str(tmp_path), image_size=8)
    data.setup()
    assert data.counts["train"] + data.counts["val"] == 5


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("txt", ph2_table([("IMD003", 0), ("IMD009", 1), ("IMD016", 2)])),
        ("txt", "Name\tClinical Diagnosis\tAsymmetry\r\nIMD003\t0\t0\r\nIMD009\t1\t0\r\nIMD016\t2\t1\r\n"),
        (
            "csv",
            "\ufeffName,Clinical Diagnosis,Asymmetry\r\nIMD003,0,0\r\nIMD009,1,0\r\nIMD016,2,1\r\n4 - Da,,\n",
        ),
        ("csv", "Asymmetry,clinical diagnosis,name\n0,0,IMD003\n1,1,IMD009\n1,2,IMD016\n"),
    ],
)
def test_ph2_tables(tmp_path: Path, suffix: str, text: str) -> None:
    table = tmp_path / f"PH2_dataset.{suffix}"
    table.write_text(text, encoding="utf-8", newline="")
    expected = {"IMD003": "common nevus", "IMD009": "atypical nevus", "IMD016": "melanoma"}
    assert read_diagnoses(table) == expected


def test_ph2_table_that_is_none(tmp_path: Path) -> None:
    table = tmp_path / "PH2_dataset.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="`Name` and `Clinical Diagnosis`"):
        read_diagnoses(table)
    table.write_text("Name,Clinical Diagnosis\nIMD003,7\n")
    with pytest.raises(ValueError, match=r"IMD003.*got '7'"):
        read_diagnoses(table)
