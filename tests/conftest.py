"""What all tests share: one thread, and tiny data in the official layouts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_data import (
    write_cifar10,
    write_classes,
    write_folder,
    write_imagenet,
    write_isic2018,
    write_listed,
    write_mnist,
    write_ph2,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, and sums depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fake_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder for $FEWLIGHT_DATA with a folder for each data set of the configs; not to be written to."""
    root = tmp_path_factory.mktemp("fake_data")
    write_isic2018(root / "isic2018", 8)
    write_ph2(root / "ph2", 10)
    write_folder(root / "folder", 6)
    write_classes(root / "classes", 6)
    write_mnist(root / "mnist", 200, 20)
    write_cifar10(root / "cifar10", 40)
    write_imagenet(root / "imagenet")
    write_listed(root / "images")
    return root
