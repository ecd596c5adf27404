"""The contract that every segmentation datamodule keeps: splits, batches, cache, prediction."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Literal

import albumentations as A
import numpy as np
import numpy.typing as npt
import pytest
import torch
from fake_data import draw_pair, write_folder, write_isic2018
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import (
    FolderSegmentationDataModule,
    ISIC2018DataModule,
    LabelledArrays,
    PH2DataModule,
    SampleKey,
    SegmentationDataModule,
    SegmentationDataset,
    TrainSampler,
)
from datamodules.segmentation.decoding import read_raw_mask

KINDS: list[tuple[type[SegmentationDataModule], str]] = [
    (ISIC2018DataModule, "isic2018"),
    (PH2DataModule, "ph2"),
    (FolderSegmentationDataModule, "folder"),
]


def dataset_of(loader: object) -> SegmentationDataset:
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.dataset, SegmentationDataset)
    return loader.dataset


def keys_of(data: SegmentationDataModule) -> dict[str, list[str]]:
    val = data.val_dataloader()
    return {
        "train": dataset_of(data.train_dataloader()).keys,
        "val": [] if isinstance(val, list) else dataset_of(val).keys,
        "test": dataset_of(data.test_dataloader()).keys if data.counts["test"] else [],
    }


@pytest.mark.parametrize(("kind", "folder"), KINDS)
def test_batch_contract(fake_data: Path, kind: type[SegmentationDataModule], folder: str) -> None:
    data = kind(str(fake_data / folder), image_size=16, batch_size=2, num_labels=4, val_share=0.25)
    data.setup("fit")
    val = data.val_dataloader()
    assert isinstance(val, DataLoader)
    assert len(data.class_names) == data.num_classes == 2
    for loader in (data.train_dataloader(), val, data.test_dataloader(), data.predict_dataloader()):
        for batch in loader:
            image, index = batch["image"], batch["index"]
            assert image.dtype == torch.float32
            assert image.shape[1:] == (3, 16, 16)
            assert 0 <= image.min() <= image.max() <= 1
            assert index.dtype == torch.int64
            assert index.shape == (len(image),)
            if "mask" in batch:
                assert batch["mask"].dtype == torch.int64
                assert batch["mask"].shape == (len(image), 16, 16)
                assert set(batch["mask"].unique().tolist()) <= {0, 1}
    assert "mask" not in next(iter(data.predict_dataloader()))


@pytest.mark.parametrize(("kind", "folder"), KINDS)
def test_splits_cover_and_nest(fake_data: Path, kind: type[SegmentationDataModule], folder: str) -> None:
    def labelled(count: int, seed: int = 0) -> set[str]:
        data = kind(str(fake_data / folder), image_size=8, num_labels=count, labels_seed=seed, val_share=0.3)
        data.setup()
        keys = keys_of(data)
        members = Counter(key for split in keys.values() for key in split)
        assert set(members.values()) == {1}
        assert data.counts == {split: len(names) for split, names in keys.items()}
        assert len(keys["train"]) + len(keys["val"]) == count
        return set(keys["train"]) | set(keys["val"])

    assert labelled(2) < labelled(4) < labelled(5)
    assert labelled(4) == labelled(4)
    assert len({frozenset(labelled(3, seed)) for seed in range(5)}) > 1


def test_ph2_subset_follows_the_diagnosis(fake_data: Path) -> None:
    data = PH2DataModule(str(fake_data / "ph2"), image_size=8, num_labels=5, val_share=0)
    data.setup()
    # write_ph2 gives case IMD(i + 2) diagnosis (0, 0, 1, 1, 2)[i % 5].
    codes = Counter((0, 0, 1, 1, 2)[(int(Path(key).stem[3:]) - 2) % 5] for key in keys_of(data)["train"])
    assert codes == {0: 2, 1: 2, 2: 1}


def test_without_num_labels_all_train(fake_data: Path) -> None:
    data = ISIC2018DataModule(str(fake_data / "isic2018"), image_size=8, val_share=0)
    data.setup()
    assert data.counts == {"train": 8, "val": 0, "test": 0}
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"no test images.*Set `num_labels`.*or `predict_images`"):
        data.test_dataloader()
    with pytest.raises(ValueError, match="no test images"):
        data.predict_dataloader()


def test_official_isic_splits(tmp_path: Path) -> None:
    write_isic2018(tmp_path, 4)
    write_isic2018(tmp_path, 2, "Validation", first=10)
    write_isic2018(tmp_path, 3, "Test", first=20)
    data = ISIC2018DataModule(str(tmp_path), image_size=8)
    data.setup()
    assert data.counts == {"train": 4, "val": 2, "test": 3}
    assert all("Task1-2_Test_Input" in key for key in keys_of(data)["test"])
    without = ISIC2018DataModule(str(tmp_path), image_size=8, val_share=0)
    without.setup()
    assert without.counts == {"train": 4, "val": 0, "test": 3}
    few = ISIC2018DataModule(str(tmp_path), image_size=8, num_labels=2, val_share=0)
    few.setup()
    assert few.counts == {"train": 2, "val": 0, "test": 7}
    assert all("Training" in key for key in keys_of(few)["train"])


def test_relative_root_under_the_variable(fake_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWLIGHT_DATA", str(fake_data))
    data = PH2DataModule("ph2", image_size=8, num_labels=5)
    data.setup()
    assert sum(data.counts.values()) == 10
    inner = PH2DataModule("ph2/PH2Dataset", image_size=8, num_labels=5)
    inner.setup()
    assert inner.counts == data.counts


def test_pixels_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    write_folder(tmp_path, 3)
    data = FolderSegmentationDataModule(str(tmp_path), image_size=24, num_labels=1, val_share=0)
    data.setup()
    dataset = dataset_of(data.test_dataloader())
    for index, key in enumerate(dataset.keys):
        _, mask = draw_pair(2000 + int(Path(key).stem[-1]))
        assert dataset.original_size(index) == (24, 32)
        sample = dataset[index]
        with Image.open(tmp_path / key) as image:
            pixels = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        torch.testing.assert_close(sample["image"], torch.from_numpy(pixels).permute(2, 0, 1))
        nearest = np.asarray(Image.fromarray(mask).resize((24, 24), Image.Resampling.NEAREST))
        assert sample["mask"].tolist() == nearest.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_and_draw_only(fake_data: Path, workers: int) -> None:
    def epoch(batch_size: int, num_workers: int, seed: int = 0) -> dict[int, list[Tensor]]:
        data = FolderSegmentationDataModule(
            str(fake_data / "folder"),
            image_size=16,
            batch_size=batch_size,
            num_workers=num_workers,
            val_share=0,
            samples_per_epoch=12,
            seed=seed,
        )
        data.setup()
        samples: dict[int, list[Tensor]] = {}
        for batch in data.train_dataloader():
            for position, index in enumerate(batch["index"].tolist()):
                samples.setdefault(index, []).append(batch["image"][position])
        return samples

    reference, other = epoch(3, 0), epoch(4, workers)
    assert sorted(reference) == sorted(other) == list(range(6))
    for index, views in reference.items():
        assert len(views) == 2
        assert not torch.equal(views[0], views[1])
        for view, same in zip(views, other[index], strict=True):
            assert torch.equal(view, same)
    assert any(not torch.equal(reference[index][0], views[0]) for index, views in epoch(3, 0, seed=1).items())


def test_loading_leaves_the_global_generator_alone(fake_data: Path) -> None:
    data = FolderSegmentationDataModule(str(fake_data / "folder"), image_size=8)
    before = torch.get_rng_state()
    data.setup()
    next(iter(data.train_dataloader()))
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_is_not_augmented_and_fillers_are_ignorable(fake_data: Path) -> None:
    data = FolderSegmentationDataModule(str(fake_data / "folder"), image_size=16, num_labels=3, val_share=0)
    data.setup()
    train, test = dataset_of(data.train_dataloader()), dataset_of(data.test_dataloader())
    assert test.transform is None
    assert torch.equal(train[0]["image"], train[0]["image"])
    assert any(not torch.equal(train[0]["image"], train[SampleKey(0, draw)]["image"]) for draw in range(5))
    filler = test[SampleKey(-1, 0)]
    assert filler["index"] == -1
    assert (filler["mask"] == 255).all()
    assert torch.equal(filler["image"], test[0]["image"])
    assert not (test[0]["mask"] == 255).any()


def test_last_batch_is_short_only_if_it_is_the_only_one(fake_data: Path) -> None:
    def sizes(batch_size: int) -> list[int]:
        data = FolderSegmentationDataModule(str(fake_data / "folder"), image_size=8, batch_size=batch_size, val_share=0)
        data.setup()
        return [len(batch["index"]) for batch in data.train_dataloader()]

    assert sizes(4) == [4]
    assert sizes(6) == [6]
    assert sizes(32) == [6]


def test_a_loader_shows_every_image_equally_often(fake_data: Path) -> None:
    data = FolderSegmentationDataModule(str(fake_data / "folder"), image_size=8, batch_size=4, val_share=0)
    data.setup()
    loader = data.train_dataloader()
    visits = Counter({index: 0 for index in range(6)})
    for number in range(20):
        assert isinstance(loader.sampler, TrainSampler)
        loader.sampler.set_epoch(number)
        for batch in loader:
            assert len(batch["index"]) == 4
            visits.update(batch["index"].tolist())
    assert set(visits.values()) == {13, 14}


def test_setup_decodes_once(fake_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(path: Path) -> npt.NDArray[np.int64]:
        calls.append(path.name)
        return read_raw_mask(path)

    monkeypatch.setattr("datamodules.segmentation.base.read_raw_mask", counted)
    data = FolderSegmentationDataModule(str(fake_data / "folder"), image_size=8, num_labels=3)
    for stage in ("fit", "validate", "test", "predict", "fit"):
        data.setup(stage)
        list(data.test_dataloader())
    assert len(calls) == len(set(calls)) == 6


def test_decoding_on_access_gives_the_same(fake_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="datamodules")
    cached, uncached = (
        PH2DataModule(str(fake_data / "ph2"), image_size=16, num_labels=5, cache_megabytes=budget) for budget in (1, 0)
    )
    cached.setup()
    uncached.setup()
    assert "10 image/mask pairs at 16x16: 0.0 MB, kept in memory" in caplog.text
    assert "more than cache_megabytes=0: decoded on access" in caplog.text
    assert cached.fingerprint == uncached.fingerprint
    kept, read = dataset_of(cached.test_dataloader()), dataset_of(uncached.test_dataloader())
    assert kept.store.images is not None
    assert read.store.images is None
    for index in range(5):
        one, other = kept[index], read[index]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["mask"], other["mask"])


def test_fingerprint_names_data_and_split(fake_data: Path) -> None:
    def fingerprint(num_labels: int = 5, labels_seed: int = 0, image_size: int = 8, seed: int = 0) -> str:
        data = PH2DataModule(
            str(fake_data / "ph2"),
            image_size=image_size,
            num_labels=num_labels,
            labels_seed=labels_seed,
            seed=seed,
        )
        data.setup()
        assert len(data.fingerprint) == 64
        return data.fingerprint

    assert fingerprint() == fingerprint(image_size=16, seed=4)
    assert len({fingerprint(), fingerprint(labels_seed=1), fingerprint(num_labels=6)}) == 3


def test_any_folder_can_be_predicted(tmp_path: Path) -> None:
    (tmp_path / "day" / "one").mkdir(parents=True)
    Image.fromarray(draw_pair(0, 20, 30)[0]).save(tmp_path / "day" / "one" / "b.JPG")
    Image.fromarray(draw_pair(1, 40, 10)[0]).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    data = ISIC2018DataModule("/no/such/root", image_size=16, predict_images=str(tmp_path))
    data.setup("predict")
    dataset = dataset_of(data.predict_dataloader())
    assert dataset.keys == ["a.png", "day/one/b.JPG"]
    assert [dataset.original_size(index) for index in range(2)] == [(40, 10), (20, 30)]
    batch = next(iter(data.predict_dataloader()))
    assert sorted(batch) == ["image", "index"]
    assert batch["index"].tolist() == [0, 1]


def test_predict_folder_is_found_here_or_under_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "data" / "mine", 2)
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("FEWLIGHT_DATA", str(tmp_path / "data" / "mine"))
    for name, count in (("mine/images", 2), ("images", 2)):
        data = ISIC2018DataModule("nowhere", image_size=8, predict_images=name)
        assert len(dataset_of(data.predict_dataloader())) == count


def test_images_from_memory() -> None:
    class Drawn(SegmentationDataModule):
        def make_arrays(self) -> LabelledArrays:
            pairs = [draw_pair(seed, 8, 8) for seed in range(6)]
            images, masks = (np.stack(part) for part in zip(*pairs, strict=True))
            keys = [f"{seed}.png" for seed in range(6)]
            splits: list[Literal["train", "val", "test"] | None] = [
                "train",
                None,
                None,
                "train",
                "test",
                "test",
            ]
            return LabelledArrays(images, masks, keys, splits=splits)

    data = Drawn("", image_size=8, val_share=0.25)
    data.setup()
    assert data.counts == {"train": 3, "val": 1, "test": 2}
    dataset = dataset_of(data.test_dataloader())
    assert dataset.keys == ["4.png", "5.png"]
    image, mask = draw_pair(5, 8, 8)
    torch.testing.assert_close(dataset[1]["image"], torch.from_numpy(image).permute(2, 0, 1) / 255)
    assert dataset[1]["mask"].tolist() == mask.tolist()
    with pytest.raises(ValueError, match=r"to hold images \[6, 16, 16, 3\].*but got \[6, 8, 8, 3\]"):
        Drawn("", image_size=16).setup()


def test_transform_from_yaml(fake_data: Path) -> None:
    flip = {"class_path": "datamodules.SwapHorizontalFlip", "init_args": {"swaps": [[0, 1]], "p": 1.0}}
    pipeline = {"class_path": "albumentations.Compose", "init_args": {"transforms": [flip]}}
    arguments = {
        "root": str(fake_data / "folder"),
        "image_size": 16,
        "val_share": 0,
        "train_transform": pipeline,
    }
    parser = ArgumentParser()
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    config = parser.parse_object({"data": {"class_path": "FolderSegmentationDataModule", "init_args": arguments}})
    data = parser.instantiate_classes(config).data
    assert isinstance(data, FolderSegmentationDataModule)
    data.setup()
    train = dataset_of(data.train_dataloader())
    plain, mirrored = train[2], train[SampleKey(2, 9)]
    assert torch.equal(mirrored["image"], plain["image"].flip(-1))
    assert torch.equal(mirrored["mask"], 1 - plain["mask"].flip(-1))


def test_transform_that_breaks_the_contract(fake_data: Path) -> None:
    def first(step: A.BasicTransform) -> None:
        data = FolderSegmentationDataModule(str(fake_data / "folder"), image_size=16, train_transform=A.Compose([step]))
        data.setup()
        next(iter(data.train_dataloader()))

    with pytest.raises(ValueError, match=r"`train_transform` to return a NumPy image of shape \[16, 16, 3\]"):
        first(A.CenterCrop(8, 8))
    with pytest.raises(ValueError, match=r"`train_transform` to keep images uint8, but got float32"):
        first(A.Normalize())


def test_datamodule_survives_pickling(fake_data: Path) -> None:
    # Processes started by spawn receive it this way.
    data = FolderSegmentationDataModule(str(fake_data / "folder"), image_size=8, num_labels=3)
    data.setup()
    copy = pickle.loads(pickle.dumps(data))
    assert keys_of(copy) == keys_of(data)
