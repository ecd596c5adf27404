"""Photographs that are stored turned, with masks that are too: each picture as a mask of itself."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from datamodules import ChestXrayDataModule, FolderSegmentationDataModule, SegmentationDataModule, SegmentationDataset

SHAPES = [(30, 30), (24, 36)]


def draw_corner(shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """No turn or mirror image of this is itself."""
    picture: npt.NDArray[np.uint8] = np.zeros(shape, np.uint8)
    picture[: shape[0] // 2, : shape[1] // 6] = 255
    picture[: shape[0] // 6, : shape[1] // 3] = 255
    return picture


def save(path: Path, picture: npt.NDArray[np.uint8], orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(picture).save(path, exif=exif)


def overlaps(data: SegmentationDataModule) -> list[float]:
    """IoU of each thresholded image with its mask."""
    data.setup()
    dataset = data.train_dataloader().dataset
    assert isinstance(dataset, SegmentationDataset)
    found = []
    for index in range(len(dataset)):
        sample = dataset[index]
        bright, mask = sample["image"][0] > 0.5, sample["mask"] > 0
        found.append(((bright & mask).sum() / (bright | mask).sum()).item())
    return found


@pytest.mark.parametrize("cache_megabytes", [0, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_image_and_mask_are_both_turned(tmp_path: Path, shape: tuple[int, int], cache_megabytes: int) -> None:
    for orientation in range(1, 9):
        for folder in ("images", "masks"):
            save(tmp_path / folder / f"{orientation}.png", draw_corner(shape), orientation)
    data = FolderSegmentationDataModule(
        str(tmp_path), image_size=shape[0], val_share=0, cache_megabytes=cache_megabytes
    )
    if shape[0] == shape[1]:
        assert overlaps(data) == [1.0] * 8
    else:
        # Bilinear and nearest resizing differ by a pixel on the edges.
        assert min(overlaps(data)) > 0.85


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_mask_is_turned_or_only_the_image(tmp_path: Path, shape: tuple[int, int], said: bool) -> None:
    # The mask is stored a quarter turned, or the image is and the mask says that it is upright.
    upright, turned = draw_corner(shape), np.ascontiguousarray(np.rot90(draw_corner(shape)))
    save(tmp_path / "images" / "a.png", turned if said else upright, 6 if said else None)
    save(tmp_path / "masks" / "a.png", upright if said else turned, 1 if said else 6)
    data = FolderSegmentationDataModule(str(tmp_path), image_size=shape[0], val_share=0)
    assert min(overlaps(data)) > (0.85 if shape[0] != shape[1] else 0.999)


@pytest.mark.parametrize("cache_megabytes", [0, 10])
def test_what_cannot_be_decided_is_listed(tmp_path: Path, cache_megabytes: int) -> None:
    for shape in SHAPES:
        for orientation in range(1, 9):
            name = f"{shape[1]}_{orientation}.png"
            save(tmp_path / "images" / name, draw_corner(shape), orientation)
            save(tmp_path / "masks" / name, draw_corner(shape))
    data = FolderSegmentationDataModule(
        str(tmp_path), image_size=24, val_share=0, cache_megabytes=cache_megabytes, on_bad_file="skip", max_bad_share=1
    )
    # Left are the upright ones, and the quarter turns of the oblong image, whose masks turn with it.
    assert min(overlaps(data)) > 0.85
    assert data.counts["train"] == 6
    fresh = FolderSegmentationDataModule(str(tmp_path), image_size=24, cache_megabytes=cache_megabytes)
    with pytest.raises(ValueError, match=r"10 of 16 entries.*\n.*ambiguous: image has EXIF orientation 2"):
        fresh.setup()


@pytest.mark.parametrize("cache_megabytes", [0, 10])
def test_masks_of_several_files(tmp_path: Path, cache_megabytes: int) -> None:
    left, right = draw_corner((24, 24)), np.ascontiguousarray(draw_corner((24, 24)).T)
    save(tmp_path / "CXR_png" / "a.png", np.maximum(left, right), 3)
    save(tmp_path / "ManualMask" / "leftMask" / "a.png", left, 3)
    save(tmp_path / "ManualMask" / "rightMask" / "a.png", right, 3)

    def read() -> list[float]:
        return overlaps(
            ChestXrayDataModule(
                str(tmp_path), "montgomery", image_size=24, val_share=0, cache_megabytes=cache_megabytes
            )
        )

    assert read() == [1.0]
    save(tmp_path / "ManualMask" / "rightMask" / "a.png", right)
    with pytest.raises(ValueError, match="some masks of a turned image have an EXIF orientation and others none"):
        read()
