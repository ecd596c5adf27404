"""What is sent to worker processes: own images, no trainer."""

import multiprocessing
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import write_folder
from torch.utils.data import DataLoader

from datamodules import ChestXrayDataModule, FolderSegmentationDataModule, SegmentationDataset
from datamodules.segmentation.celebamask_hq import CelebAMaskHQDataModule


class Unpicklable:
    """Stands for a trainer, which holds locks, sockets and the whole model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def make(root: Path, cache_megabytes: int, **arguments: Any) -> FolderSegmentationDataModule:
    data = FolderSegmentationDataModule(str(root), image_size=16, cache_megabytes=cache_megabytes, **arguments)
    data.__dict__["trainer"] = Unpicklable()
    data.setup()
    return data


def dataset_of(loader: object) -> SegmentationDataset:
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.dataset, SegmentationDataset)
    return loader.dataset


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("forty"), 40)


@pytest.mark.parametrize("cache_megabytes", [0, 10])
def test_a_dataset_travels_with_its_own_images(forty: Path, cache_megabytes: int) -> None:
    data = make(forty, cache_megabytes, num_labels=8, val_share=0.5)
    validation, test = dataset_of(data.val_dataloader()), dataset_of(data.test_dataloader())
    assert (len(validation), len(test)) == (4, 32)
    sent = pickle.dumps(validation)
    store = validation.store
    for pair in store.pairs:
        assert (pair.image.name.encode() in sent) is (pair.key in validation.keys)
    if store.images is not None:
        assert len(sent) < len(pickle.dumps((store.images, store.masks))) / 5
    copy = pickle.loads(sent)
    assert copy.keys == validation.keys
    assert len(copy.store.pairs) == 4
    for index in range(4):
        assert copy.original_size(index) == validation.original_size(index)
        for name, tensor in validation[index].items():
            assert torch.equal(copy[index][name], tensor)
    # The original keeps everything.
    assert len(validation.store.pairs) == 40
    assert data.trainer is not None


@pytest.mark.parametrize("cache_megabytes", [0, 10])
def test_images_to_predict_travel(forty: Path, cache_megabytes: int) -> None:
    data = FolderSegmentationDataModule(
        "nowhere", image_size=16, cache_megabytes=cache_megabytes, predict_images=str(forty / "images")
    )
    data.__dict__["trainer"] = Unpicklable()
    dataset = dataset_of(data.predict_dataloader())
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == 40
    assert torch.equal(copy[3]["image"], dataset[3]["image"])


@pytest.mark.parametrize("kind", [ChestXrayDataModule, CelebAMaskHQDataModule])
def test_readers_of_other_data_sets_travel(kind: type[ChestXrayDataModule | CelebAMaskHQDataModule]) -> None:
    data = kind("x")
    data.__dict__["trainer"] = Unpicklable()
    copy = pickle.loads(pickle.dumps(data._reader().decode))
    assert type(copy.__self__.read_mask.__self__) is kind


@pytest.mark.parametrize("cache_megabytes", [0, 10])
@pytest.mark.slow
def test_spawned_worker(tmp_path: Path, cache_megabytes: int) -> None:
    dataset = dataset_of(make(write_folder(tmp_path, 4), cache_megabytes, num_labels=1).test_dataloader())
    spawn = multiprocessing.get_context("spawn")
    spawned = DataLoader(dataset, batch_size=3, num_workers=1, multiprocessing_context=spawn)
    for here, there in zip(DataLoader(dataset, batch_size=3), spawned, strict=True):
        assert here.keys() == there.keys() == {"image", "mask", "index"}
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_the_epoch_is_asked_for_when_the_first_batch_is(tmp_path: Path) -> None:
    # Lightning makes the iterator first and then says which epoch it is; workers must not have begun by then.
    write_folder(tmp_path, 12)

    def indices(late: bool) -> list[int]:
        data = make(tmp_path, 64, num_workers=1, batch_size=4, val_share=0.0)
        data.setup()
        loader = data.train_dataloader()
        sampler: Any = loader.sampler
        if not late:
            sampler.set_epoch(3)
        batches = iter(loader)
        sampler.set_epoch(3)
        return [int(i) for batch in batches for i in batch["index"]]

    assert indices(late=True) == indices(late=False)
