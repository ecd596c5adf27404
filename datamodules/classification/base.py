"""What the datamodules of images with a class share: they differ in what a training batch holds."""

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.classification.contents import UNKNOWN, ImageSource, Int64Array
from datamodules.classification.prepare import Prepared, Reading, check_least
from datamodules.classification.pseudo import ImagesToLabel
from datamodules.classification.streams import EvalImages
from datamodules.loading import EvalSampler
from datamodules.pseudo_labels import SPLITS

T = TypeVar("T")


class ClassificationDataModule(pl.LightningDataModule):
    """Images of a source that were read once, and loaders to evaluate on them.

    Args:
        source: Where images and labels come from.
        reading: How images are read.
        num_workers: Processes that fetch batches.
        eval_batch_size: Images of a batch to evaluate.
        seed: Seed of the order and the augmentations.

    Attributes:
        counts: Images per use, after `setup`.
        fingerprint: Identifies the data, their split and given labels, after `setup`.
        images_fingerprint: Identifies the images and what the source has them for, whatever their labels, after
            `setup`.
        test_fingerprint: Identifies the images and the labels of those to test on, whatever labels the others have,
            after `setup`.

    Raises:
        ValueError: If a number is out of range.
    """

    # What to do without test images, besides adding some.
    instead_of_test_images = ""

    def __init__(
        self, source: ImageSource, reading: Reading, num_workers: int, eval_batch_size: int, seed: int
    ) -> None:
        """Check the numbers; no image is read before `setup`."""
        super().__init__()
        self.source = source
        self.image_size = reading.image_size
        self.reading = reading
        self.num_workers = num_workers
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        for name, least in (("eval_batch_size", 1), ("num_workers", 0), ("seed", 0)):
            check_least(name, getattr(self, name), least)
        self._data: Prepared | None = None

    # ---------------------------------------------------------------- what a module may ask

    @property
    def num_classes(self) -> int:
        """Number of classes; known before `setup`, as the command line gives it to the model."""
        return len(self.source.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; their positions are the class ids."""
        return self.source.class_names

    @property
    def image_channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.source.image_channels

    def truth_of(self, keys: Sequence[str]) -> Int64Array:
        """Tell the true labels of images, FOR REPORTS ONLY: labels that a source hides from training are among them.

        Args:
            keys: Names of images, as the source has them.

        Returns:
            Class ids int64 [N], -1 where the label or the image is not known.
        """
        data = self._ready()
        found = pc.index_in(pa.array(keys, pa.string()), value_set=pa.array(data.keys, pa.string()))
        rows = np.asarray(found.fill_null(-1), dtype=np.int64)
        truth: Int64Array = data.truth.numpy()[rows]
        return np.where(rows < 0, UNKNOWN, truth)

    # ---------------------------------------------------------------- reading

    def check(self) -> None:
        """Look whether there are images, without reading any: the command line asks before the stages run.

        Raises:
            FileNotFoundError: If the root or the images in it are missing.
        """
        self.source.check()

    def prepare_data(self) -> None:
        """Download what the source lacks, if it is told to."""
        self.source.prepare()

    def _settle(self, data: Prepared, counts: dict[str, int]) -> None:
        self.counts = counts
        self.fingerprint = data.fingerprint
        self.images_fingerprint = data.images_fingerprint
        tested = data.labels[torch.from_numpy(data.split.test)].numpy().tobytes()
        self.test_fingerprint = hashlib.sha256(data.images_fingerprint.encode() + tested).hexdigest()
        self._data = data

    def _ready(self) -> Prepared:
        if self._data is None:
            msg = "Call `setup` before asking for images: they have not been read yet."
            raise RuntimeError(msg)
        return self._data

    def _given(self, rows: Int64Array) -> Tensor:
        return self._ready().labels[torch.from_numpy(rows)]

    def _images(self, rows: Int64Array) -> EvalImages:
        data = self._ready()
        return EvalImages(data.store, rows, self._given(rows), [data.keys[row] for row in rows])

    # ---------------------------------------------------------------- loaders

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        """Return validation batches; an empty list if there are no validation images."""
        rows = self._ready().split.val
        return self._eval_loader(self._images(rows)) if len(rows) else []

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return test batches.

        Raises:
            ValueError: If there are no test images.
        """
        return self._eval_loader(self._tested())

    def _tested(self) -> EvalImages:
        rows = self._ready().split.test
        if not len(rows):
            msg = (
                f"There are no test images in {self.source.place}. Add some (see its layout)"
                f"{self.instead_of_test_images}."
            )
            raise ValueError(msg)
        return self._images(rows)

    def label_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return every image to train on once, as it is and in the order of the data, for who gives them labels.

        Batches have "image", "label" and "index". "label" is the given label of labelled images, those held out to
        validate on included, and -1 of all others: labels that the source hides are not in it. Whole batches are shared
        among ranks, without fillers, so that any number of ranks sees the same batches.

        The images are those that GenerationDataModule trains on with `pseudo_labels`: all that the source has to train
        on, but for those that `imbalance` takes out of the data.

        Returns:
            The loader; its `dataset` is an ImagesToLabel, which names the images and tells what they are to the fit.
        """
        return self._eval_loader(self._to_label(), pad=False, block=self.eval_batch_size)

    def _to_label(self) -> ImagesToLabel:
        data = self._ready()
        splits = np.full(len(data.keys), UNKNOWN, dtype=np.int64)
        # Labelled images may be unlabelled ones, too.
        for name in ("unlabeled", "labeled", "val"):
            splits[getattr(data.split, name)] = SPLITS.index(name)
        train = np.asarray(data.roles) == "train"
        rows = np.flatnonzero(train & (splits != UNKNOWN))
        keys = [data.keys[row] for row in rows.tolist()]
        more = (int(train.sum()) - len(rows), data.fingerprint)
        return ImagesToLabel(data.store, rows, self._given(rows), keys, splits[rows], *more)

    def _eval_loader(self, images: EvalImages, pad: bool = True, block: int = 1) -> DataLoader[dict[str, Tensor]]:
        sampler = EvalSampler(len(images), pad, block=block)
        # A batch comes as one from `__getitems__`; there is nothing to put together.
        # By name: Lightning makes loaders to predict with anew, and gives the size of batches by its name, too.
        size = self.eval_batch_size
        return DataLoader(images, batch_size=size, sampler=sampler, collate_fn=_as_it_is, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            # Its own generator: the default would draw from the global one, and a resumed run would differ by it.
            "generator": torch.Generator().manual_seed(self.seed),
        }


def _as_it_is(batch: T) -> T:
    return batch
