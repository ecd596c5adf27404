"""True labels for reports: known by the names of images, whatever labels are trained with."""

from pathlib import Path

import numpy as np
import pytest

from datamodules import ArraySource, GenerationDataModule, LabelNoise, SemiSupervisedDataModule, pseudo_labels
from datamodules.pseudo_labels import LabelTable, Origin

_TRUTH = np.arange(12) % 2
_IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)


def source() -> ArraySource:
    """Four labels to train with, six that are hidden, two that nobody knows."""
    given = np.where(np.arange(12) < 4, _TRUTH, -1)
    hidden = np.where(np.arange(12) < 10, _TRUTH, -1)
    return ArraySource(_IMAGES, given, _IMAGES[:2], [1, 0], class_names=["cat", "dog"], hidden_labels=hidden)


def test_hidden_and_test_labels_by_key_in_any_order() -> None:
    data = SemiSupervisedDataModule(source(), label_noise=LabelNoise("symmetric", 1.0))
    with pytest.raises(RuntimeError, match="Call `setup`"):
        data.truth_of(["a"])
    data.setup("test")
    contents = source().read()
    keys = [*contents.keys][::-1]
    expected = [*np.where(np.arange(12) < 10, _TRUTH, -1), 1, 0][::-1]
    found = data.truth_of([*keys, "a stranger"])
    assert found.dtype == np.int64
    assert found.tolist() == [*expected, -1]
    assert data.truth_of([]).tolist() == []


def test_pseudo_labels_are_not_taken_for_the_truth(tmp_path: Path) -> None:
    plain = GenerationDataModule(source())
    plain.setup("fit")
    keys = [key for key in source().read().keys if "test" not in key]
    wrong = LabelTable(keys, 1 - _TRUTH, np.ones(12, np.float32), np.ones(12, np.int64))
    pseudo_labels.write(tmp_path, wrong, Origin(["cat", "dog"], plain.images_fingerprint))
    data = GenerationDataModule(source(), pseudo_labels=str(tmp_path))
    data.setup("fit")
    assert data.class_counts.tolist() == [6, 6]
    assert data.truth_of(keys).tolist() == np.where(np.arange(12) < 10, _TRUTH, -1).tolist()
