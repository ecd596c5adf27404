"""CelebAMask-HQ: painting order, flips, official split, and what is wrong with a tree."""

from pathlib import Path
from typing import Literal

import albumentations as A
import numpy as np
import pytest
import torch
from fake_layouts import write_celebamask_hq
from PIL import Image
from torch import Tensor

from datamodules.loading import SampleKey
from datamodules.segmentation.celebamask_hq import CelebAMaskHQDataModule
from datamodules.segmentation.dataset import SegmentationDataset
from datamodules.transforms import SwapHorizontalFlip


def test_classes_are_the_official_nineteen() -> None:
    names = (
        "background skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck"
    )
    assert (*names.split(), "cloth") == CelebAMaskHQDataModule.class_names
    assert CelebAMaskHQDataModule.num_classes == 19


def _masks(module: CelebAMaskHQDataModule) -> dict[str, Tensor]:
    module.setup("fit")
    dataset = module.train_dataloader().dataset
    assert isinstance(dataset, SegmentationDataset)
    return {dataset.keys[i]: dataset[i]["mask"] for i in range(len(dataset))}


@pytest.mark.parametrize("masks", ["parts", "palette"])
def test_later_parts_cover_earlier_ones(tmp_path: Path, masks: Literal["parts", "palette"]) -> None:
    write_celebamask_hq(tmp_path, masks=masks)
    found = _masks(CelebAMaskHQDataModule(str(tmp_path), masks, image_size=16, val_share=0.0, batch_size=2))
    assert sorted(found) == [f"CelebAMask-HQ/CelebA-HQ-img/{i}.jpg" for i in (0, 1, 2, 2000, 3)]
    expected = torch.zeros(16, 16, dtype=torch.int64)
    # Painted by hand in the order skin 1, nose 2, eyes 4 and 5, hair 13.
    expected[2:14, 2:14] = 1
    expected[7:10, 7:9] = 2
    expected[4:6, 3:6] = 4
    expected[4:6, 10:13] = 5
    bald = expected.clone()
    expected[0:4, 1:15] = 13
    assert torch.equal(found["CelebAMask-HQ/CelebA-HQ-img/2000.jpg"], expected)
    assert torch.equal(found["CelebAMask-HQ/CelebA-HQ-img/1.jpg"], bald)


def test_a_mirrored_face_keeps_its_left_eye_left(tmp_path: Path) -> None:
    module = CelebAMaskHQDataModule(
        str(write_celebamask_hq(tmp_path, numbers=(0, 1))),
        image_size=16,
        val_share=0.0,
        train_transform=A.Compose([SwapHorizontalFlip(CelebAMaskHQDataModule.flip_pairs, p=1.0)]),
    )
    module.setup("fit")
    dataset = module.train_dataloader().dataset
    plain, mirrored = dataset[0], dataset[SampleKey(0, 0)]
    # The boxes of both eyes mirror onto each other (columns 3-5 and 10-12 of 16), so nothing may move at
    # all.
    assert torch.equal(mirrored["mask"], plain["mask"])
    assert torch.equal(mirrored["image"], plain["image"].flip(-1))


def test_default_transform_swaps_sides_and_never_turns_faces_over() -> None:
    module = CelebAMaskHQDataModule("nowhere")
    names = module.class_names
    for left, right in module.flip_pairs:
        assert names[left].startswith("l_")
        assert names[right] == f"r_{names[left][2:]}"
    assert {names[left] for left, _ in module.flip_pairs} == {"l_eye", "l_brow", "l_ear"}
    assert not module.vertical_flip


def test_official_split_follows_celeba(tmp_path: Path) -> None:
    mapping = {0: 5, 1: 162_770, 2: 162_771, 3: 182_637, 2000: 182_638}
    root = str(write_celebamask_hq(tmp_path, mapping=mapping))
    module = CelebAMaskHQDataModule(root, official_split=True, image_size=16)
    module.setup("fit")
    assert module.counts == {"train": 2, "val": 2, "test": 1}
    dataset = module.test_dataloader().dataset
    assert isinstance(dataset, SegmentationDataset)
    assert dataset.keys == ["CelebAMask-HQ/CelebA-HQ-img/2000.jpg"]


def test_missing_or_broken_mapping(tmp_path: Path) -> None:
    root = str(write_celebamask_hq(tmp_path, numbers=(0, 1)))
    module = CelebAMaskHQDataModule(root, official_split=True, image_size=16)
    with pytest.raises(FileNotFoundError, match="`official_split` divides, but it is missing"):
        module.setup("fit")
    table = tmp_path / "CelebAMask-HQ" / "CelebA-HQ-to-CelebA-mapping.txt"
    table.write_text("idx orig_idx orig_file\n0 seven 8.jpg\n")
    with pytest.raises(ValueError, match=r"rows of `idx orig_idx orig_file`.*seven"):
        module.setup("fit")
    table.write_text("idx orig_idx orig_file\n\n0 7 000008.jpg\n")
    with pytest.raises(ValueError, match=r"1\.jpg: no row in CelebA-HQ-to-CelebA-mapping\.txt"):
        module.setup("fit")


def test_every_fault_of_a_tree_is_named_at_once(tmp_path: Path) -> None:
    base = write_celebamask_hq(tmp_path) / "CelebAMask-HQ"
    anno = base / "CelebAMask-HQ-mask-anno"
    for path in (anno / "0").glob("00003_*.png"):
        path.unlink()
    (base / "CelebA-HQ-img" / "2.jpg").unlink()
    (base / "CelebA-HQ-img" / "0.jpg").rename(base / "CelebA-HQ-img" / "zero.jpg")
    (anno / "0" / "00001_skin.png").rename(anno / "0" / "00001_skinn.png")
    Image.fromarray(np.full((16, 16), 7, dtype=np.uint8)).save(anno / "0" / "00001_nose.png")
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(anno / "0" / "someone.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(anno / "1" / "02000_hair.png")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        CelebAMaskHQDataModule(str(tmp_path), image_size=16).setup("fit")
    text = str(caught.value)
    assert "3.jpg: image without mask" in text
    assert "00002_skin.png: mask without image" in text
    assert "zero.jpg: the name of an image is its number" in text
    assert "00001_skinn.png: unknown part 'skinn'" in text
    assert "someone.png: the name of a mask begins with the number" in text
    assert "CelebA-HQ-img/0.jpg" in text  # the expected layout
    for stray in (anno / "0").glob("*.png"):
        if not stray.name.startswith("00001_") or stray.name == "00001_skinn.png":
            stray.unlink()
    for name in ("3.jpg", "zero.jpg"):
        (base / "CelebA-HQ-img" / name).unlink()
    with pytest.raises(ValueError, match="2 of 2 entries") as caught:
        CelebAMaskHQDataModule(str(tmp_path), image_size=16).setup("fit")
    assert "00001_nose.png: ids out of range: 7" in str(caught.value)
    assert "02000_hair.png: is 8x8, but 02000_skin.png of the same image is 16x16" in str(caught.value)


def test_palette_folder_with_parts_in_it(tmp_path: Path) -> None:
    root = str(write_celebamask_hq(tmp_path, numbers=(0,)))
    module = CelebAMaskHQDataModule(root, "palette", mask_folder="CelebAMask-HQ-mask-anno", image_size=16)
    with pytest.raises(ValueError, match=r"00000_skin\.png: is a mask of one part"):
        module.setup("fit")


def test_palette_ids_and_doubles(tmp_path: Path) -> None:
    folder = write_celebamask_hq(tmp_path, numbers=(0, 1), masks="palette") / "CelebAMask-HQ" / "CelebAMaskHQ-mask"
    Image.fromarray(np.full((16, 16), 19, dtype=np.uint8)).save(folder / "1.png")
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(folder / "00000.png")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        CelebAMaskHQDataModule(str(tmp_path), "palette", image_size=16).setup("fit")
    assert "a second mask of its image" in str(caught.value)
    assert "ids out of range: 19" in str(caught.value)


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r'`masks` to be "parts" or "palette", but got \'colour\''):
        CelebAMaskHQDataModule("x", masks="colour")  # type: ignore[arg-type]  # what a user may write
