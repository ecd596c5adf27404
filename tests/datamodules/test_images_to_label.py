"""All images to train on, for who gives them labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import ArraySource, GenerationDataModule, LabelNoise, LongTail, SemiSupervisedDataModule
from datamodules.classification.base import ClassificationDataModule
from datamodules.classification.contents import Contents
from datamodules.classification.pseudo import ImagesToLabel
from datamodules.loading import EvalSampler, SampleKey
from datamodules.pseudo_labels import SPLITS, LabelTable, Origin, write

_IMAGES = np.random.default_rng(1).integers(0, 256, (36, 5, 5), dtype=np.uint8)
_GIVEN = np.where(np.arange(30) % 2 == 0, np.arange(30) // 2 % 3, -1)
_TESTED = np.arange(6) % 3


def source(hidden: int = 0) -> ArraySource:
    """Thirty images, every second of which has a label; six to test on."""
    return ArraySource(_IMAGES[:30], _GIVEN, _IMAGES[30:], _TESTED, hidden_labels=np.full(30, hidden))


class OwnValidation(ArraySource):
    """Has the last four training images to validate on, which all have a label."""

    def read(self) -> Contents:
        contents = super().read()
        roles = ["val" if 26 <= row < 30 else role for row, role in enumerate(contents.roles)]
        return Contents(contents.keys, contents.labels, roles, contents.given, contents.images)


def swept(data: ClassificationDataModule) -> tuple[ImagesToLabel, dict[str, Tensor]]:
    data.setup("fit")
    loader = data.label_dataloader()
    batches = list(loader)
    assert isinstance(loader.dataset, ImagesToLabel)
    return loader.dataset, {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("options", [{}, {"val_share": 0.3}, {"include_labeled": False}, {"labels_per_class": 2}])
def test_every_image_to_train_on_once(options: dict[str, Any]) -> None:
    data = SemiSupervisedDataModule(source(), eval_batch_size=8, **options)
    images, found = swept(data)
    keys = list(source().read().keys[:30])
    assert images.keys == keys
    assert found["index"].tolist() == list(range(30))
    assert torch.equal(found["image"], torch.from_numpy(_IMAGES[:30])[:, None].float() / 255)
    split = data._ready().split
    expected = []
    for row in range(30):
        uses = [name for name in ("labeled", "val", "unlabeled") if row in getattr(split, name)]
        expected.append(SPLITS.index(uses[0]))
    assert images.splits.tolist() == expected
    assert set(expected) == ({0, 1, 2} if "val_share" in options else {0, 1})
    labelled = np.isin(expected, (0, 2))
    assert found["label"].tolist() == np.where(labelled, _GIVEN, -1).tolist()
    assert images.left_out == 0


def test_labels_that_were_made_wrong_are_the_given_ones() -> None:
    data = SemiSupervisedDataModule(source(), label_noise=LabelNoise(rate=0.5), val_share=0.2)
    images, found = swept(data)
    known = torch.from_numpy(_GIVEN)
    given = data._ready().labels[:30]
    assert torch.equal(found["label"], torch.where(known < 0, -1, given))
    assert not torch.equal(found["label"], known)
    assert torch.equal(images.labels, found["label"])


@pytest.mark.parametrize("kind", [SemiSupervisedDataModule, GenerationDataModule])
def test_hidden_labels_change_nothing(kind: type[SemiSupervisedDataModule | GenerationDataModule]) -> None:
    (_, first), (_, second) = (swept(kind(source(hidden), val_share=0.2)) for hidden in (0, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_of_a_validation_set_are_not_labelled() -> None:
    every = np.where(_GIVEN < 0, 0, _GIVEN)
    data = SemiSupervisedDataModule(OwnValidation(_IMAGES[:30], every), labels_per_class=3)
    images, found = swept(data)
    assert images.keys == [f"train/{row:07d}" for row in range(26)]
    assert set(images.splits.tolist()) == {0, 1}
    assert len(found["label"]) == 26


def test_what_a_long_tail_takes_out_is_not_labelled() -> None:
    full = ArraySource(_IMAGES[:30], np.arange(30) % 3)
    data = SemiSupervisedDataModule(full, labels_per_class=2, imbalance=LongTail(gamma_unlabeled=4.0))
    images, found = swept(data)
    split = data._ready().split
    kept = np.union1d(split.labeled, split.unlabeled)
    assert images.keys == [f"train/{row:07d}" for row in kept]
    assert images.left_out == 30 - len(kept) > 0
    assert len(found["index"]) == len(kept)


def _label(folder: Path, true_labels: bool) -> GenerationDataModule:
    """Generation from pseudo-labels 0, 1, 2, 0, ..., where images with a given label keep it."""
    keys = list(source().read().keys[:30])
    labels = np.where(_GIVEN < 0, np.arange(30) % 3, _GIVEN)
    splits = np.where(_GIVEN < 0, SPLITS.index("unlabeled"), SPLITS.index("labeled"))
    data = SemiSupervisedDataModule(source())
    data.setup("fit")
    origin = Origin(data.class_names, data.images_fingerprint, made_with={"true_labels": true_labels})
    write(folder, LabelTable(keys, labels, np.ones(30, np.float32), splits), origin)
    return GenerationDataModule(source(), pseudo_labels=str(folder))


def test_of_pseudo_labels_only_those_that_people_gave_are_given(tmp_path: Path) -> None:
    images, found = swept(_label(tmp_path, true_labels=True))
    assert found["label"].tolist() == _GIVEN.tolist()
    assert images.splits.tolist() == [SPLITS.index("unlabeled" if label < 0 else "labeled") for label in _GIVEN]
    without = _label(tmp_path, true_labels=False)
    without.setup("fit")
    with pytest.raises(ValueError, match=r"labels that people gave, .* written without `true_labels`; leave them"):
        without.label_dataloader()


def test_predicting_the_images_to_train_on() -> None:
    data = SemiSupervisedDataModule(source(), predict_split="train")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert len(batch["index"]) == 30
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"predict_split": "val"}, 'to be "test" or "train", but got \'val\''),
        ({"predict_split": "train", "predict_images": "x"}, 'only one of `predict_images` and `predict_split` "train"'),
    )
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            SemiSupervisedDataModule(source(), **options)


@pytest.mark.parametrize(("size", "block", "ranks"), [(10, 3, 2), (10, 5, 2), (7, 3, 3), (2, 8, 2), (5, 1, 2)])
def test_ranks_share_whole_batches(size: int, block: int, ranks: int) -> None:
    blocks = [list(range(start, min(start + block, size))) for start in range(0, size, block)]
    for rank in range(ranks):
        own = [row for part in blocks[rank::ranks] for row in part]
        sampler = EvalSampler(size, False, ranks, rank, block)
        assert list(sampler) == own
        assert len(sampler) == len(own)
        most = max(sum(map(len, blocks[other::ranks])) for other in range(ranks))
        padded = EvalSampler(size, True, ranks, rank, block)
        assert list(padded) == own + [SampleKey(-1, 0)] * (most - len(own))
    with pytest.raises(ValueError, match="`block` to be at least 1, but got 0"):
        EvalSampler(size, block=0)
