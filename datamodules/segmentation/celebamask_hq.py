"""CelebAMask-HQ: 30 000 faces with masks of 18 parts."""

from pathlib import Path
from typing import Any, Literal

from datamodules.segmentation.base import SegmentationDataModule
from datamodules.segmentation.decoding import UInt8Array
from datamodules.segmentation.pairs import Pair, list_files, relative_key
from datamodules.segmentation.parts import read_parts

# Class ids in the order of the authors' script g_mask.py, in which later parts are painted over earlier
# ones.
CLASSES = (
    "background",
    "skin",
    "nose",
    "eye_g",
    "l_eye",
    "r_eye",
    "l_brow",
    "r_brow",
    "l_ear",
    "r_ear",
    "mouth",
    "u_lip",
    "l_lip",
    "hair",
    "hat",
    "ear_r",
    "neck_l",
    "neck",
    "cloth",
)
_IMAGES = "CelebA-HQ-img"
_MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
_FOLDERS = {"parts": "CelebAMask-HQ-mask-anno", "palette": "CelebAMaskHQ-mask"}
# Where CelebA's validation and test images begin, as the authors' script g_partition.py has it: with these
# the 30 000 images become 24 183, 2 993 and 2 824.
_FIRST_VAL, _FIRST_TEST = 162_771, 182_638


class CelebAMaskHQDataModule(SegmentationDataModule):
    """CelebAMask-HQ (Lee et al., CVPR 2020, arXiv 1907.11922) with its 19 classes, background included.

    Images are 1024 pixels wide and masks 512, so the two may differ in size here. Mirroring exchanges left
    and right eyes, brows and ears; images are never turned upside down.

    Args:
        root: Folder `CelebAMask-HQ`, or the one that holds it; a relative one is looked for under
            $FEWLIGHT_DATA when that is set.
        masks: How the masks are stored: "parts" is the archive as it is, one black and white PNG for each
            part; "palette" one PNG of class ids for each image, as the authors' script g_mask.py writes
            them.
        mask_folder: Folder of the masks beside the images; None takes CelebAMask-HQ-mask-anno for "parts"
            and CelebAMaskHQ-mask for "palette".
        official_split: Divide into training, validation and test images by CelebA's own partition, which
            takes the file CelebA-HQ-to-CelebA-mapping.txt of the archive.
        kwargs: Passed on to SegmentationDataModule.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if files cannot be used.
        FileNotFoundError: In `setup`, if the root, the images or the mapping file are missing.
    """

    num_classes = len(CLASSES)
    class_names = CLASSES
    mask_size_may_differ = True
    flip_pairs = ((4, 5), (6, 7), (8, 9))
    vertical_flip = False

    def __init__(
        self,
        root: str,
        masks: Literal["parts", "palette"] = "parts",
        mask_folder: str | None = None,
        official_split: bool = False,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; no file is touched before `setup`."""
        super().__init__(root, **kwargs)
        if masks not in _FOLDERS:
            msg = f'Expected argument `masks` to be "parts" or "palette", but got {masks!r}.'
            raise ValueError(msg)
        self.masks = masks
        self.mask_folder = _FOLDERS[masks] if mask_folder is None else mask_folder
        self.official_split = official_split
        mask = "0/00000_skin.png (folder = number // 2000)" if masks == "parts" else "0.png (class ids 0 to 18)"
        self.layout = f"CelebAMask-HQ/{_IMAGES}/0.jpg\nCelebAMask-HQ/{self.mask_folder}/{mask}"
        if official_split:
            self.layout += f"\nCelebAMask-HQ/{_MAPPING}"

    def find_pairs(self, root: Path) -> list[Pair]:
        """Match images and masks by their number.

        Args:
            root: Folder `CelebAMask-HQ`, or the one that holds it.

        Returns:
            All pairs in the order of their numbers, then the masks that have no image.

        Raises:
            FileNotFoundError: If the official split is asked for and the mapping file is missing.
            ValueError: If the mapping file cannot be read.
        """
        base = root / "CelebAMask-HQ" if (root / "CelebAMask-HQ").is_dir() else root
        images = list_files(base / _IMAGES, {".jpg", ".jpeg", ".png"})
        splits = self._splits(base) if self.official_split and images else None
        masks, strays = self._masks(base / self.mask_folder)
        pairs = []
        for image in sorted(images, key=lambda path: (len(path.stem), path.stem)):
            number = int(image.stem) if image.stem.isdecimal() else -1
            found = masks.pop(number, [])
            problem = "" if found else "image without mask"
            if number < 0:
                problem = "the name of an image is its number"
            elif splits is not None and number not in splits:
                problem = f"no row in {_MAPPING}"
            split = None if splits is None else splits.get(number)
            pairs.append(Pair(relative_key(root, image), image, tuple(found), split=split, problem=problem))
        strays += [(mask, "mask without image") for found in masks.values() for mask in found]
        return pairs + [Pair(relative_key(root, mask), mask, problem=problem) for mask, problem in strays]

    def _masks(self, folder: Path) -> tuple[dict[int, list[Path]], list[tuple[Path, str]]]:
        """Group mask files by image number, parts in painting order; and list files of unknown name."""
        masks: dict[int, list[Path]] = {}
        strays = []
        for path in list_files(folder, {".png"}):
            number, _, part = path.stem.partition("_")
            if not number.isdecimal():
                strays.append((path, "the name of a mask begins with the number of its image"))
            elif self.masks == "parts" and part not in CLASSES[1:]:
                strays.append((path, f"unknown part {part!r}"))
            elif self.masks == "palette" and (part or int(number) in masks):
                strays.append((path, "a second mask of its image" if not part else f"is a mask of one part ({part})"))
            else:
                masks.setdefault(int(number), []).append(path)
        if self.masks == "parts":
            for found in masks.values():
                found.sort(key=_class_of)
        return masks, strays

    def _splits(self, base: Path) -> dict[int, Literal["train", "val", "test"]]:
        table = base / _MAPPING
        if not table.is_file():
            msg = (
                f"Expected the mapping file {table}, by which `official_split` divides, but it is missing. "
                "Copy it from the CelebAMask-HQ archive, or set `official_split: false`."
            )
            raise FileNotFoundError(msg)
        splits: dict[int, Literal["train", "val", "test"]] = {}
        for line in table.read_text(encoding="utf-8").splitlines()[1:]:
            cells = line.split()
            if not cells:
                continue
            if len(cells) < 2 or not (cells[0].isdecimal() and cells[1].isdecimal()):
                msg = f"Expected rows of `idx orig_idx orig_file` in {table}, but got {line!r}. Take the official file."
                raise ValueError(msg)
            original = int(cells[1])
            later: Literal["val", "test"] = "test" if original >= _FIRST_TEST else "val"
            splits[int(cells[0])] = "train" if original < _FIRST_VAL else later
        return splits

    def read_mask(self, pair: Pair) -> UInt8Array:
        """Paint the parts over each other in the official order, or read the class ids.

        Args:
            pair: A pair with at least one mask file.

        Returns:
            uint8 array [H, W] of class ids.

        Raises:
            OSError: If a file cannot be decoded.
            ValueError: If it holds other numbers than it may.
        """
        if self.masks == "palette":
            return super().read_mask(pair)
        return read_parts([(_class_of(path), path) for path in pair.masks])


def _class_of(mask: Path) -> int:
    return CLASSES.index(mask.stem.partition("_")[2])
