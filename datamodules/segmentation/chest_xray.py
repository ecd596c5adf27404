"""Chest radiographs with masks of lungs, heart or clavicles in one or several folders."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import cv2
from pytorch_lightning.utilities import rank_zero_only

from datamodules.segmentation.base import SegmentationDataModule
from datamodules.segmentation.decoding import UInt8Array
from datamodules.segmentation.pairs import Pair, list_files, relative_key
from datamodules.segmentation.parts import read_parts

log = logging.getLogger(__name__)

Layout = Literal["jsrt", "montgomery", "shenzhen"]


@dataclass(frozen=True)
class _Preset:
    """How one published data set is stored."""

    image_folder: str
    mask_folders: dict[str, list[str]]
    mask_suffix: str = ""
    mask_size_may_differ: bool = False
    masks_may_lack: bool = False


# Clavicles and heart lie over the lungs: what is painted later stays visible. ** finds fold1/ and fold2/
# of the SCR archive as well as one folder masks/.
_SCR_STRUCTURES = ("left lung", "right lung", "heart", "left clavicle", "right clavicle")
_PRESETS: dict[str, _Preset] = {
    "jsrt": _Preset("images", {name: [f"**/masks/{name}"] for name in _SCR_STRUCTURES}, mask_size_may_differ=True),
    "montgomery": _Preset("CXR_png", {"left lung": ["ManualMask/leftMask"], "right lung": ["ManualMask/rightMask"]}),
    "shenzhen": _Preset("CXR_png", {"lung": ["mask"]}, mask_suffix="_mask", masks_may_lack=True),
}


class ChestXrayDataModule(SegmentationDataModule):
    """Radiographs in one folder, and one or several folders of masks with the same file names.

    Presets: "jsrt" is JSRT (Shiraishi et al., 2000) with the SCR masks (van Ginneken et al., 2006), which
    have half the resolution of the images; JSRT's own .IMG files are headerless raw data and have to be
    converted to a format with a head first, for example 16-bit PNG; "montgomery" and "shenzhen" are the
    tuberculosis sets of Jaeger et al. (2014). Of Shenzhen only a part has masks: images without one are named in the
    log and left out.

    A mirrored radiograph shows a heart on the right, which hardly any patient has. The default
    augmentation therefore never flips; a pipeline of one's own that does should use
    `SwapHorizontalFlip(flip_pairs)`, because a left lung becomes a right one by it.

    Args:
        root: Folder of the data set; a relative one is looked for under $FEWLIGHT_DATA when that is set.
        layout: The published data set whose folders and file names are expected.
        mask_folders: Classes in the order in which they are painted (later ones over earlier ones), each
            with the folders whose masks are united into it, relative to `root`, `*` and `**` allowed.
            Every folder holds a mask of every image. None takes the classes of the preset.
        image_folder: Folder of the images; None takes that of the preset.
        mask_suffix: What mask names have behind the name of their image; None takes that of the preset.
        kwargs: Passed on to SegmentationDataModule.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if files cannot be used.
        FileNotFoundError: In `setup`, if the root or the images in it are missing.
    """

    vertical_flip = False

    def __init__(
        self,
        root: str,
        layout: Layout = "jsrt",
        mask_folders: dict[str, list[str]] | None = None,
        image_folder: str | None = None,
        mask_suffix: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; no file is touched before `setup`."""
        super().__init__(root, **kwargs)
        if layout not in _PRESETS:
            msg = f"Expected argument `layout` to be one of {', '.join(_PRESETS)}, but got {layout!r}."
            raise ValueError(msg)
        preset = _PRESETS[layout]
        folders = preset.mask_folders if mask_folders is None else mask_folders
        relative = all(not Path(folder).is_absolute() for names in folders.values() for folder in names)
        if not (folders and all(folders.values()) and relative) or "background" in folders:
            msg = (
                "Expected argument `mask_folders` to map each class but the background to folders below `root`, "
                f"for example {{'lung': ['ManualMask/leftMask', 'ManualMask/rightMask']}}, but got {folders}."
            )
            raise ValueError(msg)
        self.class_names = ("background", *folders)
        self.num_classes = len(self.class_names)
        self.flip_pairs = find_sides(self.class_names)
        self.mask_size_may_differ = preset.mask_size_may_differ
        self.image_folder = preset.image_folder if image_folder is None else image_folder
        self.mask_suffix = preset.mask_suffix if mask_suffix is None else mask_suffix
        self._masks_may_lack = preset.masks_may_lack
        self._folders = [(i, folder) for i, names in enumerate(folders.values(), start=1) for folder in names]
        lines = [f"{folder}/NAME{self.mask_suffix}.png (or .gif)" for _, folder in self._folders]
        self.layout = "\n".join([f"{self.image_folder}/NAME.png", *lines])
        if self.train_transform is None:
            self.train_transform = default_radiograph_transform()

    def find_pairs(self, root: Path) -> list[Pair]:
        """Match images and masks by name in every folder.

        Args:
            root: Folder of the data set.

        Returns:
            All pairs sorted by key, then the masks that have no image.
        """
        images = list_files(root / self.image_folder)
        folders = [self._by_name(root, folder) for _, folder in self._folders]
        pairs, lacking = [], []
        seen: dict[str, Path] = {}
        for image in images:
            found = [masks.get(image.stem, []) for masks in folders]
            empty = [folder for (_, folder), masks in zip(self._folders, found, strict=True) if not masks]
            problem = ""
            if image.stem in seen:
                problem = f"same name as {seen[image.stem].name}"
            elif empty and self._masks_may_lack and len(empty) == len(found):
                lacking.append(image)
                continue
            elif empty:
                problem = f"image without mask in {', '.join(empty)}"
            elif twice := [masks for masks in found if len(masks) > 1]:
                problem = f"{len(twice[0])} masks ({twice[0][0]}, {twice[0][1]})"
            seen[image.stem] = image
            masks = tuple(masks[0] for masks in found if masks)
            pairs.append(Pair(relative_key(root, image), image, masks, problem=problem))
        _log_lacking(lacking, len(images))
        names = {image.stem for image in images}
        strays = sorted(
            {path for masks in folders for name, paths in masks.items() if name not in names for path in paths}
        )
        return pairs + [Pair(relative_key(root, path), path, problem="mask without image") for path in strays]

    def _by_name(self, root: Path, pattern: str) -> dict[str, list[Path]]:
        masks: dict[str, list[Path]] = {}
        for folder in sorted(root.glob(pattern)):
            for path in list_files(folder):
                if path.stem.endswith(self.mask_suffix):
                    masks.setdefault(path.stem.removesuffix(self.mask_suffix), []).append(path)
        return masks

    def read_mask(self, pair: Pair) -> UInt8Array:
        """Paint the structures over each other in the order of the classes.

        Args:
            pair: A pair with one mask for each folder.

        Returns:
            uint8 array [H, W] of class ids.

        Raises:
            ValueError: If a file cannot be decoded or is no black and white mask, or the masks differ in size.
        """
        return read_parts([(i, path) for (i, _), path in zip(self._folders, pair.masks, strict=True)])


def find_sides(class_names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Find the classes that are each other's mirror image by their names.

    Args:
        class_names: Names of which some begin with "left" and "right".

    Returns:
        Pairs of class ids, left first.
    """
    opposite = {name: f"right{name.removeprefix('left')}" for name in class_names if name.startswith("left")}
    return tuple(
        (class_names.index(left), class_names.index(right)) for left, right in opposite.items() if right in class_names
    )


def default_radiograph_transform() -> A.Compose:
    """Build the augmentation that radiographs are trained with unless another one is given: no flips.

    Returns:
        A pipeline of small shifts, turns and changes of brightness for `image` (uint8) and `mask`.
    """
    return A.Compose(
        [
            A.Affine(
                scale=(0.9, 1.1),
                translate_percent=(-0.05, 0.05),
                rotate=(-7, 7),
                border_mode=cv2.BORDER_REFLECT_101,
                p=0.75,
            ),
            A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.5),
        ]
    )


@rank_zero_only
def _log_lacking(images: list[Path], total: int) -> None:
    if images:
        names = ", ".join(path.name for path in images)
        log.warning("left out %d of %d radiographs that have no mask: %s", len(images), total, names)
