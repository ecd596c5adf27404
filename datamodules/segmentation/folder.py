"""Any folder of images beside any folder of masks."""

from pathlib import Path
from typing import Any

from datamodules.segmentation.base import SegmentationDataModule
from datamodules.segmentation.pairs import Pair, list_files, pair_by_name


class FolderSegmentationDataModule(SegmentationDataModule):
    """Images and masks of one's own: two folders in which files of the same name belong together.

    Args:
        root: Folder that holds both; a relative one is looked for under $FEWLIGHT_DATA when that is set.
        image_folder: Folder of the images below `root`; folders inside it are searched too.
        mask_folder: Folder of the masks below `root`, with the same inner folders.
        mask_suffix: What mask names have behind the name of their image: "_segmentation" pairs `a.jpg` with
            `a_segmentation.png`. File endings do not matter.
        num_classes: Number of classes, background (0) included.
        class_names: Their names; None numbers them.
        kwargs: Passed on to SegmentationDataModule.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if files cannot be used.
        FileNotFoundError: In `setup`, if the root or the images in it are missing.
    """

    def __init__(
        self,
        root: str,
        image_folder: str = "images",
        mask_folder: str = "masks",
        mask_suffix: str = "",
        num_classes: int = 2,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; no file is touched before `setup`."""
        super().__init__(root, **kwargs)
        if not 2 <= num_classes <= 255:
            msg = (
                f"Expected argument `num_classes` to be from 2 to 255, background included, "
                f"but got {num_classes}. Masks are kept in 8 bits, and 255 marks pixels to ignore."
            )
            raise ValueError(msg)
        if class_names is not None and len(class_names) != num_classes:
            msg = (
                f"Expected argument `class_names` to name {num_classes} classes (`num_classes`, background "
                f"first), but got {len(class_names)}: {class_names}."
            )
            raise ValueError(msg)
        if image_folder == mask_folder and not mask_suffix:
            msg = (
                f"Expected argument `mask_suffix` when `image_folder` and `mask_folder` are the same "
                f"({image_folder}), but got none. Say what mask names have behind the name of their image."
            )
            raise ValueError(msg)
        self.num_classes = num_classes
        default = ["background", "foreground"] if num_classes == 2 else [f"class {i}" for i in range(num_classes)]
        self.class_names = tuple(default if class_names is None else class_names)
        self.image_folder = image_folder
        self.mask_folder = mask_folder
        self.mask_suffix = mask_suffix
        self.layout = f"{self.root}/{image_folder}/NAME.jpg\n{self.root}/{mask_folder}/NAME{mask_suffix}.png"

    def find_pairs(self, root: Path) -> list[Pair]:
        """Pair the files of both folders by their path without ending.

        Args:
            root: Folder that holds both.

        Returns:
            All pairs, sorted by key.
        """
        image_root, mask_root = root / self.image_folder, root / self.mask_folder
        images, masks = list_files(image_root), list_files(mask_root)
        if self.mask_suffix:
            masks = [path for path in masks if path.stem.endswith(self.mask_suffix)]
            taken = set(masks)
            images = [path for path in images if path not in taken]

        def image_name(path: Path) -> str:
            return path.relative_to(image_root).with_suffix("").as_posix()

        def mask_name(path: Path) -> str:
            return path.relative_to(mask_root).with_suffix("").as_posix().removesuffix(self.mask_suffix)

        return pair_by_name(root, images, masks, image_name, mask_name)
