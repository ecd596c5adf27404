"""The real data sets under $FEWLIGHT_DATA, where somebody has them: `pytest -m data`."""

import os
from collections import Counter
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from datamodules import ISIC2018DataModule, PH2DataModule, SegmentationDataset
from datamodules.segmentation.ph2 import read_diagnoses

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif("FEWLIGHT_DATA" not in os.environ, reason="set FEWLIGHT_DATA to the folder of the data sets"),
]


def test_isic2018() -> None:
    data = ISIC2018DataModule("isic2018", image_size=32)
    data.setup()
    assert data.counts == {"train": 2335, "val": 259, "test": 0}
    batch = next(iter(data.train_dataloader()))
    # Lesions fill between a tenth and a half of an ISIC image on average.
    assert 0.1 < batch["mask"].float().mean() < 0.5


def test_ph2() -> None:
    data = PH2DataModule("ph2", image_size=32, num_labels=20, val_share=0)
    data.setup()
    assert data.counts == {"train": 20, "val": 0, "test": 180}
    folder = Path(os.environ["FEWLIGHT_DATA"]) / "ph2" / "PH2Dataset"
    diagnoses = read_diagnoses(folder / "PH2_dataset.csv")
    assert diagnoses == read_diagnoses(folder / "PH2_dataset.txt")
    assert Counter(diagnoses.values()) == {"common nevus": 80, "atypical nevus": 80, "melanoma": 40}
    loader = data.train_dataloader()
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.dataset, SegmentationDataset)
    labelled = Counter(diagnoses[Path(key).stem] for key in loader.dataset.keys)
    assert labelled == {"common nevus": 8, "atypical nevus": 8, "melanoma": 4}
