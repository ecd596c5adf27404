"""Chest X-ray: three official layouts, own folders, and what is wrong with a tree."""

import logging
from pathlib import Path
from typing import Literal

import albumentations as A
import numpy as np
import pytest
import torch
from fake_layouts import CHEST_BOXES, box_mask, write_chest_xray
from PIL import Image

from datamodules.loading import SampleKey
from datamodules.segmentation.chest_xray import ChestXrayDataModule, find_sides
from datamodules.segmentation.dataset import SegmentationDataset
from datamodules.segmentation.parts import read_binary_mask, read_parts

SCR = ("left lung", "right lung", "heart", "left clavicle", "right clavicle")


def _train(module: ChestXrayDataModule) -> SegmentationDataset:
    module.setup("fit")
    dataset = module.train_dataloader().dataset
    assert isinstance(dataset, SegmentationDataset)
    return dataset


def test_jsrt_paints_heart_and_clavicles_over_lungs(tmp_path: Path) -> None:
    module = ChestXrayDataModule(str(write_chest_xray(tmp_path, "jsrt")), image_size=16, val_share=0.0)
    assert module.class_names == ("background", *SCR)
    assert module.num_classes == 6
    assert module.flip_pairs == ((1, 2), (4, 5))
    expected = np.zeros((16, 16), dtype=np.int64)
    for class_id, name in enumerate(SCR, start=1):
        expected[box_mask(CHEST_BOXES[name]) > 0] = class_id
    sample = _train(module)[0]
    assert torch.equal(sample["mask"], torch.from_numpy(expected))
    assert sample["image"].shape == (3, 16, 16)


def test_jsrt_in_the_two_folds_of_the_scr_archive(tmp_path: Path) -> None:
    write_chest_xray(tmp_path, "jsrt", n=4)
    before = _train(ChestXrayDataModule(str(tmp_path), image_size=16, val_share=0.0))[3]["mask"]
    for name in SCR:
        for number in range(1, 5):
            source = tmp_path / "masks" / name / f"JPCLN{number:03d}.gif"
            target = tmp_path / f"fold{1 + number % 2}" / "masks" / name / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
    assert torch.equal(_train(ChestXrayDataModule(str(tmp_path), image_size=16, val_share=0.0))[3]["mask"], before)


def test_montgomery_keeps_sides_apart_or_unites_them(tmp_path: Path) -> None:
    root = str(write_chest_xray(tmp_path, "montgomery"))
    apart = ChestXrayDataModule(root, "montgomery", image_size=32, val_share=0.0)
    assert apart.class_names == ("background", "left lung", "right lung")
    mask = _train(apart)[0]["mask"]
    assert torch.equal(mask == 1, torch.from_numpy(box_mask(CHEST_BOXES["left lung"], 2) > 0))
    assert torch.equal(mask == 2, torch.from_numpy(box_mask(CHEST_BOXES["right lung"], 2) > 0))
    folders = {"lung": ["ManualMask/leftMask", "ManualMask/rightMask"]}
    united = ChestXrayDataModule(root, "montgomery", mask_folders=folders, image_size=32, val_share=0.0)
    assert (united.num_classes, united.flip_pairs) == (2, ())
    assert torch.equal(_train(united)[0]["mask"], (mask > 0).long())


def test_shenzhen_leaves_out_and_logs_what_has_no_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_chest_xray(tmp_path, "shenzhen", n=6, lacking=2)
    module = ChestXrayDataModule(str(tmp_path), "shenzhen", image_size=32, val_share=0.0)
    with caplog.at_level(logging.WARNING):
        dataset = _train(module)
    assert dataset.keys == [f"CXR_png/CHNCXR_{number:04d}_0.png" for number in range(1, 5)]
    assert "left out 2 of 6 radiographs that have no mask" in caplog.text
    assert "CHNCXR_0005_0.png, CHNCXR_0006_0.png" in caplog.text
    lungs = box_mask(CHEST_BOXES["left lung"], 2) | box_mask(CHEST_BOXES["right lung"], 2)
    assert torch.equal(dataset[0]["mask"], torch.from_numpy(lungs > 0).long())


def test_default_augmentation_never_mirrors(tmp_path: Path) -> None:
    module = ChestXrayDataModule(str(write_chest_xray(tmp_path, "montgomery")), "montgomery", image_size=32)
    dataset = _train(module)
    columns = torch.arange(32.0)
    for draw in range(40):
        mask = dataset[SampleKey(0, draw)]["mask"]
        left, right = ((mask == side).float().sum(0) @ columns / (mask == side).sum() for side in (1, 2))
        assert left > right + 5  # the boxes are 14 columns apart, and shifts move both alike


def test_own_augmentation_is_kept() -> None:
    own = A.Compose([])
    assert ChestXrayDataModule("x", train_transform=own).train_transform is own


@pytest.mark.parametrize("layout", ["montgomery", "shenzhen"])
def test_size_mismatch_is_an_error_where_official_masks_fit(
    tmp_path: Path, layout: Literal["montgomery", "shenzhen"]
) -> None:
    write_chest_xray(tmp_path, layout, n=3)
    for path in tmp_path.rglob("*.png"):
        if "CXR_png" not in path.parts and "0002" in path.name:
            with Image.open(path) as mask:
                mask.resize((16, 16), Image.Resampling.NEAREST).save(path)
    with pytest.raises(ValueError, match=r"0002_0\.png: mask.*: size mismatch: image 32x32, mask 16x16"):
        ChestXrayDataModule(str(tmp_path), layout, image_size=16).setup("fit")


def test_every_fault_of_a_tree_is_named_at_once(tmp_path: Path) -> None:
    write_chest_xray(tmp_path, "jsrt", n=6)
    (tmp_path / "masks" / "heart" / "JPCLN001.gif").unlink()
    (tmp_path / "images" / "JPCLN002.png").unlink()
    (tmp_path / "masks" / "heart" / "JPCLN003.gif").write_bytes(b"GIF89a")
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(tmp_path / "masks" / "heart" / "JPCLN004.png")
    (tmp_path / "masks" / "heart" / "JPCLN004.gif").unlink()
    Image.fromarray(box_mask((0, 1, 0, 1))).save(tmp_path / "masks" / "heart" / "JPCLN005.png")
    Image.fromarray(box_mask((0, 1, 0, 1))).save(tmp_path / "images" / "JPCLN006.jpg")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        ChestXrayDataModule(str(tmp_path), image_size=16).setup("fit")
    text = str(caught.value)
    assert "JPCLN001.png: image without mask in **/masks/heart" in text
    assert "JPCLN002.gif: mask without image" in text
    assert "heart/JPCLN003.gif: " in text
    assert "heart/JPCLN004.png: ids out of range: 9" in text
    assert "JPCLN005.png: 2 masks" in text
    assert "JPCLN006.png: same name as JPCLN006.jpg" in text
    assert "images/NAME.png" in text  # the expected layout


def test_no_radiograph_with_a_mask(tmp_path: Path) -> None:
    write_chest_xray(tmp_path, "shenzhen", n=2, lacking=2)
    with pytest.raises(FileNotFoundError, match=r"mask/NAME_mask\.png"):
        ChestXrayDataModule(str(tmp_path), "shenzhen", image_size=16).setup("fit")


def test_arguments() -> None:
    with pytest.raises(ValueError, match="`layout` to be one of jsrt, montgomery, shenzhen, but got 'nih'"):
        ChestXrayDataModule("x", layout="nih")  # type: ignore[arg-type]  # what a user may write
    wrong: tuple[dict[str, list[str]], ...] = ({}, {"lung": []}, {"background": ["a"]}, {"lung": ["/masks"]})
    for folders in wrong:
        with pytest.raises(ValueError, match="`mask_folders` to map each class but the background"):
            ChestXrayDataModule("x", mask_folders=folders)


def test_sides_are_found_by_name() -> None:
    assert find_sides(("background", "right lung", "heart", "left lung", "left hand")) == ((3, 1),)


def test_palette_masks_are_read_by_colour(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8)).convert("P")
    picture.putdata([0, 1, 1, 0])
    picture.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is white: the structure
    picture.save(tmp_path / "mask.gif")
    assert read_binary_mask(tmp_path / "mask.gif").tolist() == [[True, False], [False, True]]


def test_no_parts() -> None:
    with pytest.raises(ValueError, match="`parts` to hold at least one"):
        read_parts([])
