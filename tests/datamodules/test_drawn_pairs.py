"""Drawn pairs as additional training data of the segmentation datamodules."""

import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import DrawRequest, FolderSegmentationDataModule, SampleKey, SegmentationDataset
from datamodules.synthetic_images import Drawing, Origin

COUNT = 5


def data(root: Path, drawn: Path | None, **options: Any) -> FolderSegmentationDataModule:
    """Four images to train on, two to test on."""
    settings: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_labels": 4, "val_share": 0.0}
    folder = None if drawn is None else str(drawn)
    return FolderSegmentationDataModule(str(root / "folder"), synthetic_images=folder, **settings | options)


@pytest.fixture(scope="module")
def drawn(fake_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five grey images of 16 px, image i of level 10 i, that belong to the data above."""
    plain = data(fake_data, None)
    plain.setup()
    folder = tmp_path_factory.mktemp("drawn") / "pairs"
    request = DrawRequest(COUNT, 16, batch_size=COUNT)
    drawing = Drawing(folder, request)
    drawing.begin(Origin(request, "w" * 64, 2, plain.class_names, plain.fingerprint))
    seed = torch.arange(COUNT)
    image = (10 * seed / 255).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    mask = torch.zeros(COUNT, 16, 16, dtype=torch.int64)
    mask[:, :, 8:] = 1
    drawing.write(0, {"image": image, "mask": mask, "confidence": torch.ones(COUNT), "seed": seed})
    assert drawing.finish()
    return folder


def training_set(module: FolderSegmentationDataModule) -> SegmentationDataset:
    dataset = module.train_dataloader().dataset
    assert isinstance(dataset, SegmentationDataset)
    return dataset


def batches(loader: object, epochs: int = 1) -> list[dict[str, Tensor]]:
    assert isinstance(loader, DataLoader)
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined] # as Lightning does
        found += list(loader)
    return found


def test_they_are_trained_on_and_never_measured_on(fake_data: Path, drawn: Path) -> None:
    plain, mixed = data(fake_data, None), data(fake_data, drawn)
    for module in (plain, mixed):
        module.setup("fit")
    assert plain.counts == {"train": 4, "val": 0, "test": 2}
    assert mixed.counts == {"train": 4, "val": 0, "test": 2, "synthetic": COUNT}
    assert mixed.fingerprint == plain.fingerprint
    dataset = training_set(mixed)
    assert dataset.keys == [*training_set(plain).keys, *(f"images/{seed:09d}.png" for seed in range(COUNT))]
    for loader in (mixed.test_dataloader(), mixed.predict_dataloader()):
        assert len(loader.dataset) == 2  # type: ignore[arg-type]
    assert dataset.original_size(6) == (16, 16)
    # 16 px became 8.
    sample = dataset[6]
    assert sample["image"].tolist() == [[[pytest.approx(20 / 255)] * 8] * 8] * 3
    assert sample["mask"].tolist() == [[0] * 4 + [1] * 4] * 8
    assert sample["index"] == 6


def test_they_are_only_read_for_a_fit(fake_data: Path, tmp_path: Path) -> None:
    module = data(fake_data, tmp_path / "to come")
    module.check()
    module.setup("test")
    assert module.counts["test"] == 2
    with pytest.raises(FileNotFoundError, match=r"`synthetic_images`.*draw them first"):
        module.setup("fit")


def test_without_a_share_all_images_are_seen_equally_often(fake_data: Path, drawn: Path) -> None:
    module = data(fake_data, drawn, batch_size=3)
    module.setup()
    seen = Counter(i for batch in batches(module.train_dataloader(), 4) for i in batch["index"].tolist())
    assert seen == dict.fromkeys(range(9), 4)


@pytest.mark.parametrize(("share", "counts"), [(0.5, {4}), (0.3, {2, 3})])
def test_batches_hold_their_share(fake_data: Path, drawn: Path, share: float, counts: set[int]) -> None:
    module = data(fake_data, drawn, batch_size=8, samples_per_epoch=40, synthetic_share=share)
    module.setup()
    found = batches(module.train_dataloader(), 4)
    of_batch = [int((batch["index"] >= 4).sum()) for batch in found]
    assert set(of_batch) == counts
    assert sum(of_batch) == 160 * share
    seen = Counter(i for batch in found for i in batch["index"].tolist())
    for source in (range(4), range(4, 9)):
        visits = [seen[i] for i in source]
        assert max(visits) - min(visits) <= 1


def test_they_are_augmented_like_all_others(fake_data: Path, drawn: Path) -> None:
    module = data(fake_data, drawn, train_transform=A.Compose([A.HorizontalFlip(p=1)]))
    module.setup()
    sample = training_set(module)[SampleKey(6, 3)]
    assert sample["mask"].tolist() == [[1] * 4 + [0] * 4] * 8


@pytest.mark.parametrize("cache_megabytes", [2048, 0])
def test_workers_see_the_same(fake_data: Path, drawn: Path, cache_megabytes: int) -> None:
    module = data(fake_data, drawn, cache_megabytes=cache_megabytes, synthetic_share=0.5)
    module.setup()
    dataset = training_set(module)
    dataset.rows = [5, 0, 7, 1]  # any order
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy.store.pairs) == 4
    for i in range(4):
        for name, value in dataset[i].items():
            assert torch.equal(copy[i][name], value)
        assert copy.original_size(i) == dataset.original_size(i)


def test_an_epoch_can_be_had_without_those_before_it(fake_data: Path, drawn: Path) -> None:
    def epoch(number: int, epochs_before: bool) -> list[Tensor]:
        module = data(fake_data, drawn, samples_per_epoch=8, synthetic_share=0.25)
        module.setup()
        loader = module.train_dataloader()
        for before in range(number if epochs_before else 0):
            loader.sampler.set_epoch(before)  # type: ignore[attr-defined]
            list(loader)
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        return [batch["image"] for batch in loader]

    for alone, after in zip(epoch(3, False), epoch(3, True), strict=True):
        assert torch.equal(alone, after)


def test_refusals(fake_data: Path, drawn: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, folder: Path = drawn, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            data(fake_data, folder, **options).setup()

    refused(ValueError, "with the classes of the data", class_names=["skin", "mole"])
    refused(ValueError, "with the classes of the data", num_classes=3)
    refused(ValueError, "may show images that are validated or tested on", num_labels=3)
    data(fake_data, drawn, num_labels=3, synthetic_from_other_data=True).setup()

    unfinished = tmp_path / "unfinished"
    shutil.copytree(drawn, unfinished)
    (unfinished / "manifest.json").rename(unfinished / "drawing.json")
    refused(FileNotFoundError, "not finished", unfinished)

    other = tmp_path / "other"
    shutil.copytree(drawn, other)
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(other / "masks/000000003.png")
    (other / "images/000000001.png").write_bytes(b"none")
    refused(ValueError, r"(?s)2 of 5 entries.*000000001.png.*ids out of range: 7 .*take `synthetic_images` out", other)
    refused(ValueError, r"1 of 5 entries.*", other, cache_megabytes=0, on_bad_file="skip", max_bad_share=1.0)
    (other / "images/000000001.png").unlink()
    refused(FileNotFoundError, "lacks images/000000001.png", other)


def test_arguments(fake_data: Path, drawn: Path) -> None:
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=rf"`synthetic_share` to be in \(0, 1\), or left out, but got {share}"):
            data(fake_data, drawn, synthetic_share=share)
    with pytest.raises(ValueError, match=r"`synthetic_images` with `synthetic_share` 0\.5, but got none"):
        data(fake_data, None, synthetic_share=0.5)


def test_memory_is_shared_with_the_other_images(fake_data: Path, drawn: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 6 images of 256 px need 1.5 MB and 5 more 1.25 MB: together more than two.
    with caplog.at_level("INFO"):
        data(fake_data, drawn, image_size=256, cache_megabytes=2).setup()
    assert "6 image/mask pairs at 256x256: 1.5 MB, kept in memory" in caplog.text
    assert "5 drawn pairs at 256x256: 1.2 MB, more than cache_megabytes=0" in caplog.text
