"""The data sets that torchvision knows."""

from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
from torchvision import datasets

from datamodules.classification.arrays import as_uint8
from datamodules.classification.contents import Contents, ImageSource, Int64Array, Role, UInt8Array
from datamodules.loading import DATA_VARIABLE, resolve_root

Name = Literal["CIFAR10", "CIFAR100", "SVHN", "STL10", "MNIST", "FashionMNIST"]

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_NO_FOLDER = "it is not a folder"
_SIDES = {"CIFAR10": 32, "CIFAR100": 32, "SVHN": 32, "STL10": 96, "MNIST": 28, "FashionMNIST": 28}


class TorchvisionSource(ImageSource):
    """A data set of torchvision with its official splits; STL-10's 100 000 unlabelled images are unlabelled ones.

    Args:
        name: Which.
        root: Folder as torchvision expects it; a relative one is looked for under $FEWLIGHT_DATA when that is set.
        download: Download what is missing.
    """

    def __init__(self, name: Name, root: str, download: bool = False) -> None:
        """Look at nothing yet."""
        if name not in _SIDES:
            msg = f"Expected argument `name` to be one of {sorted(_SIDES)}, but got {name!r}."
            raise ValueError(msg)
        self.name = name
        self.root = root
        self.download = download
        self.native_size = _SIDES[name]
        self.image_channels = 1 if name in ("MNIST", "FashionMNIST") else 3
        self.layout = f"what torchvision.datasets.{name} keeps in its root"

    @property
    def place(self) -> Path:
        """The folder."""
        return resolve_root(self.root)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; those of CIFAR-100 come with the data."""
        if self.name == "CIFAR100":
            return tuple(vars(self._open("train", self.download))["classes"])
        if self.name in ("MNIST", "SVHN"):
            return tuple("0123456789")
        if self.name == "FashionMNIST":
            return tuple(datasets.FashionMNIST.classes)
        return _CIFAR10 if self.name == "CIFAR10" else _STL10

    def check(self) -> None:
        """Look whether the folder is there, unless it may be downloaded.

        Raises:
            FileNotFoundError: If it is not.
        """
        if not self.download and not self.place.is_dir():
            raise self._missing(_NO_FOLDER)

    def prepare(self) -> None:
        """Download what is missing, if that is wanted."""
        if self.download:
            for split in ("train", "test"):
                self._open(split, download=True)

    def read(self) -> Contents:
        """Load both splits."""
        images, labels = zip(*(_pixels(self._open(split)) for split in ("train", "test")), strict=True)
        roles: list[Role] = ["train"] * len(labels[0])
        roles += ["test"] * len(labels[1])
        keys = [f"train/{row:06d}" for row in range(len(labels[0]))]
        keys += [f"test/{row:06d}" for row in range(len(labels[1]))]
        return Contents(keys, np.concatenate(labels), roles, images=np.concatenate(images))

    def _open(self, split: str, download: bool = False) -> object:
        kind = getattr(datasets, self.name)
        if self.name == "STL10" and split == "train":
            split = "train+unlabeled"
        options = {"split": split} if self.name in ("SVHN", "STL10") else {"train": split == "train"}
        try:
            return cast("object", kind(self.place, download=download, **options))
        except (RuntimeError, FileNotFoundError) as error:
            raise self._missing(str(error)) from error

    def _missing(self, reason: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"Expected argument `root` to hold {self.name} as torchvision keeps it, but got {self.place.absolute()} "
            f"({reason}). A relative one is looked for under ${DATA_VARIABLE} when that is set; `download: true` "
            "fetches what is missing."
        )


def _pixels(data: object) -> tuple[UInt8Array, Int64Array]:
    # torchvision's data sets have no common type that tells of pixels and labels.
    held = vars(data)
    images = np.asarray(held["data"])
    if images.ndim == 4 and images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(held["targets"] if "targets" in held else held["labels"], dtype=np.int64)
    return as_uint8("data", images), labels
