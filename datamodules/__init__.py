"""What is trained on: images, masks and the order they are read in.

Names are imported on first use, because albumentations alone takes seconds and a command line's `--help`
needs none.
"""

import importlib
import os
from typing import TYPE_CHECKING

# albumentations asks PyPI for a newer version when it is imported; nothing here may phone home.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

if TYPE_CHECKING:
    from datamodules.classification.arrays import ArraySource, DigitsSource
    from datamodules.classification.client_part import ClientPart
    from datamodules.classification.contents import Contents, ImageSource
    from datamodules.classification.folders import FolderSource, ImageNetSource, TwoFolderSource
    from datamodules.classification.hard_digits import HardDigitsSource
    from datamodules.classification.splits import LongTail
    from datamodules.classification.table import TableSource, write_table
    from datamodules.classification.torchvision_sets import TorchvisionSource
    from datamodules.draw_request import DrawRequest
    from datamodules.generated import GeneratedLesionsDataModule, draw_lesions
    from datamodules.generation import GenerationDataModule
    from datamodules.label_noise import LabelNoise, transition_matrix
    from datamodules.loading import EvalSampler, MixedTrainSampler, SampleKey, TrainSampler
    from datamodules.partition import ClientSplit, labelled_subset, stratified_order
    from datamodules.sampling import SamplingDataModule
    from datamodules.segmentation.base import SegmentationDataModule
    from datamodules.segmentation.celebamask_hq import CelebAMaskHQDataModule
    from datamodules.segmentation.chest_xray import ChestXrayDataModule
    from datamodules.segmentation.dataset import SegmentationDataset
    from datamodules.segmentation.folder import FolderSegmentationDataModule
    from datamodules.segmentation.isic2018 import ISIC2018DataModule
    from datamodules.segmentation.pairs import LabelledArrays, Pair
    from datamodules.segmentation.ph2 import PH2DataModule
    from datamodules.selection import embed, in_domain, retrieve
    from datamodules.semi_supervised import SemiSupervisedDataModule
    from datamodules.synthetic_images import SyntheticImages
    from datamodules.transforms import SwapHorizontalFlip, default_train_transform
    from datamodules.views.crops import MultiCrop
    from datamodules.views.views import BatchViews, WorkerViews

__all__ = [
    "ArraySource",
    "BatchViews",
    "CelebAMaskHQDataModule",
    "ChestXrayDataModule",
    "ClientPart",
    "ClientSplit",
    "Contents",
    "DigitsSource",
    "DrawRequest",
    "EvalSampler",
    "FolderSegmentationDataModule",
    "FolderSource",
    "GeneratedLesionsDataModule",
    "GenerationDataModule",
    "HardDigitsSource",
    "ISIC2018DataModule",
    "ImageNetSource",
    "ImageSource",
    "LabelNoise",
    "LabelledArrays",
    "LongTail",
    "MixedTrainSampler",
    "MultiCrop",
    "PH2DataModule",
    "Pair",
    "SampleKey",
    "SamplingDataModule",
    "SegmentationDataModule",
    "SegmentationDataset",
    "SemiSupervisedDataModule",
    "SwapHorizontalFlip",
    "SyntheticImages",
    "TableSource",
    "TorchvisionSource",
    "TrainSampler",
    "TwoFolderSource",
    "WorkerViews",
    "default_train_transform",
    "draw_lesions",
    "embed",
    "in_domain",
    "labelled_subset",
    "retrieve",
    "stratified_order",
    "transition_matrix",
    "write_table",
]

_MODULES = {
    "datamodules.classification.arrays": ("ArraySource", "DigitsSource"),
    "datamodules.classification.client_part": ("ClientPart",),
    "datamodules.classification.contents": ("Contents", "ImageSource"),
    "datamodules.classification.folders": ("FolderSource", "ImageNetSource", "TwoFolderSource"),
    "datamodules.classification.hard_digits": ("HardDigitsSource",),
    "datamodules.classification.splits": ("LongTail",),
    "datamodules.classification.table": ("TableSource", "write_table"),
    "datamodules.classification.torchvision_sets": ("TorchvisionSource",),
    "datamodules.draw_request": ("DrawRequest",),
    "datamodules.generated": ("GeneratedLesionsDataModule", "draw_lesions"),
    "datamodules.generation": ("GenerationDataModule",),
    "datamodules.label_noise": ("LabelNoise", "transition_matrix"),
    "datamodules.loading": ("EvalSampler", "MixedTrainSampler", "SampleKey", "TrainSampler"),
    "datamodules.partition": ("ClientSplit", "labelled_subset", "stratified_order"),
    "datamodules.sampling": ("SamplingDataModule",),
    "datamodules.segmentation.base": ("SegmentationDataModule",),
    "datamodules.segmentation.celebamask_hq": ("CelebAMaskHQDataModule",),
    "datamodules.segmentation.chest_xray": ("ChestXrayDataModule",),
    "datamodules.segmentation.dataset": ("SegmentationDataset",),
    "datamodules.segmentation.folder": ("FolderSegmentationDataModule",),
    "datamodules.segmentation.isic2018": ("ISIC2018DataModule",),
    "datamodules.segmentation.pairs": ("LabelledArrays", "Pair"),
    "datamodules.segmentation.ph2": ("PH2DataModule",),
    "datamodules.selection": ("embed", "in_domain", "retrieve"),
    "datamodules.semi_supervised": ("SemiSupervisedDataModule",),
    "datamodules.synthetic_images": ("SyntheticImages",),
    "datamodules.transforms": ("SwapHorizontalFlip", "default_train_transform"),
    "datamodules.views.crops": ("MultiCrop",),
    "datamodules.views.views": ("BatchViews", "WorkerViews"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, imported or not."""
    return sorted({*globals(), *__all__})
