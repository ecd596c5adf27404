"""ISIC 2018 Task 1: skin lesions in dermoscopic images."""

from pathlib import Path
from typing import Literal

from datamodules.segmentation.base import SegmentationDataModule
from datamodules.segmentation.pairs import Pair, list_files, pair_by_name

_MASK_SUFFIX = "_segmentation"
_PARTS: dict[Literal["train", "val", "test"], str] = {
    "train": "Training",
    "val": "Validation",
    "test": "Test",
}


class ISIC2018DataModule(SegmentationDataModule):
    """ISIC 2018 lesion boundary segmentation (Codella et al., arXiv 1902.03368).

    2594 labelled training images. The official validation (100) and test (1000) images are used as such
    when their folders are there and `num_labels` is left out; with `num_labels` all images that are not
    labelled are tested on. The superpixels, licence and attribution files of the archives are passed over.

    Args:
        root: Folder that holds the unpacked archives; a relative one is looked for under $FEWLIGHT_DATA when
            that is set.
        kwargs: Passed on to SegmentationDataModule.
    """

    num_classes = 2
    class_names = ("background", "lesion")
    layout = """
ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg
ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png
and, if wanted, the same with Validation and Test instead of Training"""

    def find_pairs(self, root: Path) -> list[Pair]:
        """Pair the images and masks of the official folders.

        Args:
            root: Folder that holds the unpacked archives.

        Returns:
            All pairs with their official split.
        """
        pairs = []
        for split, part in _PARTS.items():
            images = list_files(root / f"ISIC2018_Task1-2_{part}_Input", {".jpg", ".jpeg"})
            masks = list_files(root / f"ISIC2018_Task1_{part}_GroundTruth", {".png"})
            masks = [path for path in masks if path.stem.endswith(_MASK_SUFFIX)]
            if split != "train" and not masks:
                # The masks of these two were published later; images alone are no labelled data.
                continue
            pairs += pair_by_name(root, images, masks, lambda path: path.stem, _image_of, split)
        return pairs


def _image_of(mask: Path) -> str:
    return mask.stem.removesuffix(_MASK_SUFFIX)
