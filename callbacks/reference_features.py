"""Features of the real images that drawn ones are compared with, computed once and kept in a file."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import pytorch_lightning as pl
import safetensors.torch
import torch
from pytorch_lightning.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datamodules.atomic import write_atomically

ReferenceSplit = Literal["train", "test"]
_HIDDEN = ".fewlight"


@runtime_checkable
class Extracts(Protocol):
    """A network that turns images into what metrics compare."""

    name: str
    num_features: int

    @property
    def fingerprint(self) -> str:
        """Identifies its weights; asking for it finds out whether they are there."""
        ...

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and probabilities [B, K'] of images [B, C, H, W] in [0, 1]."""
        ...


class Reference(NamedTuple):
    """Real images as metrics see them, on the CPU.

    Attributes:
        features: [N, D] float32.
        labels: [N] int64.
        probabilities: [N, K'] float32.
    """

    features: Tensor
    labels: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class RealImages:
    """The real images of a datamodule, read by all processes together.

    Args:
        trainer: The trainer with its data: a datamodule with `test_dataloader` and, to compare with training images,
            `sweep_dataloader`, whose batches have image, label and index (-1 marks a filler), equally many in every
            process.
        split: Which images.
    """

    trainer: pl.Trainer
    split: ReferenceSplit

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images in [0, 1], labels and indices of this process's share, on its device; fillers have index -1.

        Raises:
            TypeError: The datamodule has no such images to give.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        method = "test_dataloader" if self.split == "test" else "sweep_dataloader"
        if not callable(getattr(data, method, None)):
            msg = (
                f"Expected a datamodule with {method}() for GenerationMetrics with `reference` {self.split!r}, got "
                f"{type(data).__name__}; use GenerationDataModule."
            )
            raise TypeError(msg)
        device = self.trainer.strategy.root_device
        for batch in getattr(data, method)():
            moved = self.trainer.strategy.batch_to_device(batch, device)
            if not isinstance(moved, dict) or not {"image", "label", "index"} <= moved.keys():
                found = sorted(moved) if isinstance(moved, dict) else type(moved).__name__
                msg = f"Expected real images in batches with image, label and index, got {found}; see RealImages."
                raise TypeError(msg)
            yield moved["image"].float(), moved["label"], moved["index"]

    def features(self, extractor: Extracts) -> Reference:
        """Turn all images into features; the same on every process."""
        found: list[list[Tensor]] = []
        for image, label, index in self.batches():
            features, probabilities = extractor(image)
            parts = [features.float(), label, probabilities.float(), index]
            if self.trainer.world_size > 1:
                parts = [self.trainer.strategy.all_gather(part).flatten(0, 1) for part in parts]
            # Batch by batch: features of a million images are too many for the device.
            found.append([part.cpu() for part in parts])
        features, label, probabilities, index = (torch.cat(part) for part in zip(*found, strict=True))
        order = index.argsort(stable=True)
        # Not fillers, not images that nobody knows the class of, and once what several processes have read.
        again = index[order].diff(prepend=index.new_tensor([-1])) == 0
        order = order[(index[order] >= 0) & (label[order] >= 0) & ~again]
        return Reference(features[order], label[order], probabilities[order])


def reference_features(images: RealImages, extractor: Extracts, cache_dir: str | None) -> Reference:
    """Features of the real images: from the file where they were kept, or computed and kept.

    Args:
        images: The real images.
        extractor: What turns them into features.
        cache_dir: Folder of the files; None takes a hidden one beside the data, where these have a folder.

    Raises:
        OSError: The folder was given and cannot be written to.
    """
    trainer = images.trainer
    identity = _identity(images, extractor)
    folder = _beside_data(trainer) if cache_dir is None else Path(cache_dir).expanduser()
    file = None
    if folder is not None and identity is not None:
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        file = folder / f"{extractor.name}_{images.split}_{name}.safetensors"
    found = None if file is None else _read(file, identity)
    # Together or not at all: to compute them takes every process.
    everywhere = trainer.strategy.reduce_boolean_decision(found is not None, all=True)
    if found is not None and everywhere:
        return found
    rank_zero_info(f"GenerationMetrics: features of the real {images.split} images by {extractor.name}.")
    computed = images.features(extractor)
    if file is not None and trainer.is_global_zero:
        try:
            write_atomically(file, safetensors.torch.save(computed._asdict(), {"identity": str(identity)}))
        except OSError:
            if cache_dir is not None:
                raise
            rank_zero_info(f"GenerationMetrics: {folder} cannot be written to, features of real images are not kept.")
    return computed


def _identity(images: RealImages, extractor: Extracts) -> str | None:
    """What has to be the same for the same features; None where the data do not say what they are."""
    data = getattr(images.trainer, "datamodule", None)
    # Test images have their true labels, whatever noise those of training images have.
    names = ["test_fingerprint", "fingerprint"] if images.split == "test" else ["fingerprint"]
    found = [value for name in names if (value := getattr(data, name, None))]
    if not found:
        return None
    known = {"data": str(found[0]), "split": images.split, "extractor": extractor.name}
    known |= {"weights": extractor.fingerprint}
    known |= {name: str(getattr(data, name, None)) for name in ("image_size", "image_channels")}
    return json.dumps(known, sort_keys=True)


def _beside_data(trainer: pl.Trainer) -> Path | None:
    """A hidden folder, which no reader of folders takes for a class."""
    place = getattr(getattr(getattr(trainer, "datamodule", None), "source", None), "place", None)
    return Path(place) / _HIDDEN if place is not None and Path(place).is_dir() else None


def _read(file: Path, identity: str | None) -> Reference | None:
    """What a file holds, if it is there, may be read, is whole and of these images."""
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("identity") != identity:
                return None
            return Reference(*(opened.get_tensor(name) for name in Reference._fields))
    except (SafetensorError, OSError):
        return None
