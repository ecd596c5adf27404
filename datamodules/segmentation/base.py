"""What all image/mask datamodules share: splits, checks, cache and loaders."""

import copy
from pathlib import Path
from typing import Literal

import albumentations as A
import cv2
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loading import DATA_VARIABLE, EvalSampler, LateLoader, TrainSampler, resolve_root
from datamodules.partition import carve_validation, labelled_subset
from datamodules.segmentation.dataset import SegmentationDataset
from datamodules.segmentation.decoding import UInt8Array, read_raw_mask, to_class_ids
from datamodules.segmentation.pairs import (
    LabelledArrays,
    Pair,
    Problem,
    indent,
    list_files,
    relative_key,
    settle_problems,
)
from datamodules.segmentation.reading import PairReader
from datamodules.segmentation.store import Decode, ImageStore, build_store, fingerprint, store_arrays
from datamodules.segmentation.synthetic import cached_megabytes, load_drawn, training_data
from datamodules.synthetic_images import read
from datamodules.transforms import default_train_transform

Batch = dict[str, Tensor]


class SegmentationDataModule(pl.LightningDataModule):
    """Images with masks, from files or from memory.

    A subclass says where its pairs are (`find_pairs`), and if need be how a mask is read (`read_mask`) or
    that the images come from memory (`make_arrays`). Everything else happens here.

    Without `num_labels` all labelled images are trained on, and the official test set, where there is one, is
    tested on. With `num_labels` that many images keep their masks, in the proportions of their groups, and
    all others are tested on. Validation images are taken from the labelled ones only.

    Args:
        root: Folder of the data set; a relative one is looked for under $FEWLIGHT_DATA when that is set.
        image_size: Side in pixels that images (bilinear) and masks (nearest) are resized to.
        batch_size: Images a batch, on each device.
        num_workers: Processes that prepare batches; 0 prepares them in the training process, which is enough
            while the images are in memory.
        num_labels: Number of images whose masks may be used; None for all.
        labels_seed: Seed that chooses them; the subsets of one seed are nested.
        val_share: Share of the labelled images to validate on, in [0, 1); 0 for no validation.
        samples_per_epoch: Length of a training epoch; None takes the number of training images. It is rounded
            down to whole batches, and the next epoch goes on where this one ends.
        train_transform: Augmentation of training samples; None takes `default_train_transform`, an empty
            `albumentations.Compose` switches it off.
        cache_megabytes: Memory for decoded images; if they need more they are decoded on every access.
        on_bad_file: Stop at unusable files, or skip and log each.
        max_bad_share: Share of unusable files above which skipping gives up, in [0, 1].
        predict_images: Folder of images to predict, nested folders included; None predicts the test images. A
            relative one is looked for under the current directory, then under $FEWLIGHT_DATA.
        synthetic_images: Folder of drawn pairs (see SyntheticImageWriter) to train on as well, augmented like all
            others and never validated or tested on; read when a fit begins. A relative one is below the current
            directory: it is the product of a run, no data set under $FEWLIGHT_DATA.
        synthetic_share: Share of training samples that are drawn, in (0, 1), evenly spread; None takes labelled
            and drawn images equally often.
        synthetic_from_other_data: Accept pairs that were drawn by a module trained on other data, or on another
            split: then it is up to you that its training images are not tested on here.
        seed: Seed of the training order and the augmentations.

    Attributes:
        num_classes: Number of classes, background (0) included.
        class_names: Their names.
        layout: The expected folders, shown in errors.
        mask_size_may_differ: True where a data set stores masks at another resolution than images.
        flip_pairs: Class ids that change sides when an image is mirrored.
        vertical_flip: False where an image upside down is no image of its kind.
        counts: Images per split, after `setup`; drawn ones under "synthetic".
        fingerprint: Identifies the data and its split, after `setup`.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if files cannot be used.
        FileNotFoundError: In `setup`, if the root or the images in it are missing.
    """

    num_classes: int = 2
    class_names: tuple[str, ...] = ("background", "foreground")
    layout: str = ""
    mask_size_may_differ: bool = False
    flip_pairs: tuple[tuple[int, int], ...] = ()
    vertical_flip: bool = True

    def __init__(
        self,
        root: str,
        image_size: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
        num_labels: int | None = None,
        labels_seed: int = 0,
        val_share: float = 0.1,
        samples_per_epoch: int | None = None,
        train_transform: A.Compose | None = None,
        cache_megabytes: int = 2048,
        on_bad_file: Literal["error", "skip"] = "error",
        max_bad_share: float = 0.05,
        predict_images: str | None = None,
        synthetic_images: str | None = None,
        synthetic_share: float | None = None,
        synthetic_from_other_data: bool = False,
        seed: int = 0,
    ) -> None:
        """Check the arguments; no file is touched before `setup`."""
        super().__init__()
        self.root = root
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_labels = num_labels
        self.labels_seed = labels_seed
        self.val_share = val_share
        self.samples_per_epoch = samples_per_epoch
        self.train_transform = train_transform
        self.cache_megabytes = cache_megabytes
        self.on_bad_file = on_bad_file
        self.max_bad_share = max_bad_share
        self.predict_images = predict_images
        self.synthetic_images = synthetic_images
        self.synthetic_share = synthetic_share
        self.synthetic_from_other_data = synthetic_from_other_data
        self.seed = seed
        self.counts: dict[str, int] = {}
        self.fingerprint = ""
        self._store: ImageStore | None = None
        self._predict_store: ImageStore | None = None
        self._drawn: ImageStore | None = None
        self._rows: dict[str, list[int]] = {}
        self._check_arguments()

    def _check_arguments(self) -> None:
        least = {"image_size": 1, "batch_size": 1, "num_workers": 0, "cache_megabytes": 0, "labels_seed": 0, "seed": 0}
        for name, minimum in least.items():
            _check_range(name, getattr(self, name), getattr(self, name) >= minimum, f"at least {minimum}")
        for name in ("num_labels", "samples_per_epoch"):
            count = getattr(self, name)
            _check_range(name, count, count is None or count >= 1, "at least 1, or left out")
        _check_range("val_share", self.val_share, 0 <= self.val_share < 1, "in [0, 1)")
        _check_range("max_bad_share", self.max_bad_share, 0 <= self.max_bad_share <= 1, "in [0, 1]")
        _check_range("on_bad_file", self.on_bad_file, self.on_bad_file in ("error", "skip"), '"error" or "skip"')
        share = self.synthetic_share
        _check_range("synthetic_share", share, share is None or 0 < share < 1, "in (0, 1), or left out")
        if share is not None and self.synthetic_images is None:
            msg = f"Expected `synthetic_images` with `synthetic_share` {share}, but got none; give both or neither."
            raise ValueError(msg)

    # What subclasses say.

    def find_pairs(self, root: Path) -> list[Pair]:
        """List the pairs below a folder that exists.

        Args:
            root: Folder of the data set.

        Returns:
            All pairs; entries that cannot be used carry a `problem` and are reported together with files that
            cannot be decoded.
        """
        raise NotImplementedError

    def make_arrays(self) -> LabelledArrays | None:
        """Return the images if they come from memory, None (the default) if `find_pairs` finds them."""
        return None

    def read_mask(self, pair: Pair) -> UInt8Array:
        """Read the mask of a pair at the resolution it is stored in.

        Args:
            pair: A pair with at least one mask file.

        Returns:
            uint8 array [H, W] of class ids, 255 for pixels to ignore; upright if the file has an EXIF
            orientation (`read_raw_mask` and `open_upright` see to it).

        Raises:
            OSError: If a file cannot be decoded.
            ValueError: If it holds other numbers than class ids.
        """
        return to_class_ids(read_raw_mask(pair.masks[0]), self.num_classes)

    # Reading.

    def setup(self, stage: str = "fit") -> None:
        """Find, check and decode the images once, and split them.

        Args:
            stage: fit, validate, test or predict; predicting a folder does not need `root`.
        """
        if stage == "predict" and self.predict_images is not None:
            self._setup_predict_folder(self.predict_images)
        elif self._store is None:
            store = self._load()
            self._rows = self._split(store)
            self.counts = {name: len(rows) for name, rows in self._rows.items()}
            self.fingerprint = fingerprint(store, self._rows)
            self._store = store
        if stage == "fit" and self.synthetic_images is not None and self._store is not None and self._drawn is None:
            artifact = read(self.synthetic_images)
            artifact.require(self.class_names, self.fingerprint, self.synthetic_from_other_data)
            memory = max(0, self.cache_megabytes - cached_megabytes(self._store))
            self._drawn = load_drawn(artifact, self.num_classes, self.image_size, memory)
            self.counts["synthetic"] = len(artifact.rows)

    def check(self) -> None:
        """Look whether there are images, without reading any: the command line asks before the stages run.

        Raises:
            FileNotFoundError: If the root or the images in it are missing.
        """
        self._find()

    def _load(self) -> ImageStore:
        arrays = self.make_arrays()
        if arrays is not None:
            return store_arrays(arrays, self.image_size)
        root, pairs = self._find()
        reader = self._reader()
        return self._read(pairs, reader, reader.decode, root, "image/mask pairs", self.layout)

    def _find(self) -> tuple[Path, list[Pair]]:
        root = resolve_root(self.root)
        if not root.is_dir():
            relative = not Path(self.root).expanduser().is_absolute()
            hint = f" A relative `root` is looked for under ${DATA_VARIABLE} when that is set." if relative else ""
            msg = f"Expected argument `root` to be a folder, but got {root.absolute()}.{hint}{self._layout()}"
            raise FileNotFoundError(msg)
        pairs = self.find_pairs(root)
        if not pairs:
            msg = f"Expected argument `root` to hold images with masks, but {root} has none.{self._layout()}"
            raise FileNotFoundError(msg)
        return root, pairs

    def _layout(self) -> str:
        return f"\nExpected layout:\n{indent(self.layout)}"

    def _setup_predict_folder(self, folder: str) -> None:
        if self._predict_store is not None:
            return
        root = Path(folder).expanduser()
        if not root.is_dir():
            root = resolve_root(folder)
        files = list_files(root)
        if not files:
            what = "holds no images" if root.is_dir() else "is not a folder"
            msg = f"Expected argument `predict_images` to be a folder of images, but {root.absolute()} {what}."
            raise FileNotFoundError(msg)
        pairs = [Pair(relative_key(root, path), path) for path in files]
        reader = self._reader()
        self._predict_store = self._read(
            pairs, reader, reader.decode_image, root, "images", "any images, nested or not"
        )

    def _reader(self) -> PairReader:
        # Spawned workers receive the reader pickled, and with it what `read_mask` is bound to: a copy that
        # knows neither the trainer (and so the model) nor the images of all splits.
        source = copy.copy(self)
        source.trainer = None
        source._store = source._predict_store = source._drawn = None
        source._rows = {}
        return PairReader(self.image_size, self.mask_size_may_differ, source.read_mask)

    def _read(
        self, pairs: list[Pair], reader: PairReader, decode: Decode, root: Path, what: str, layout: str
    ) -> ImageStore:
        problems = [Problem(pair.image, pair.problem) for pair in pairs if pair.problem]
        usable = [pair for pair in pairs if not pair.problem]
        store, undecodable = build_store(usable, decode, reader.probe, self.image_size, self.cache_megabytes, what)
        problems += undecodable
        if not problems:
            return store
        total, limit = len(pairs), self.max_bad_share if store.pairs else 0.0
        settle_problems(problems, total, root, layout, self.on_bad_file, limit)
        return store

    def _split(self, store: ImageStore) -> dict[str, list[int]]:
        pairs = store.pairs
        pool = [row for row, pair in enumerate(pairs) if pair.split in (None, "train")]
        official = {name: [row for row, pair in enumerate(pairs) if pair.split == name] for name in ("val", "test")}
        if not pool:
            msg = f"Expected images to train on in `root` ({self.root}), but got none of them."
            raise ValueError(msg)
        labelled, test = pool, official["test"]
        if self.num_labels is not None:
            chosen = labelled_subset([pairs[row].stratum for row in pool], self.num_labels, self.labels_seed)
            labelled = sorted(pool[position] for position in chosen)
            test = sorted(set(range(len(pairs))) - set(labelled))
        elif official["val"]:
            return {"train": pool, "val": official["val"] if self.val_share > 0 else [], "test": test}
        train, val = carve_validation([pairs[row].stratum for row in labelled], self.val_share, self.labels_seed)
        return {"train": [labelled[i] for i in train], "val": [labelled[i] for i in val], "test": test}

    # Loaders.

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return augmented training batches, in an order that depends on `seed` and the epoch only."""
        transform = self.train_transform
        if transform is None:
            transform = default_train_transform(self.flip_pairs, self.vertical_flip)
        dataset, share = self._dataset("train", transform), self.synthetic_share
        order = (self.samples_per_epoch, self.seed, self.batch_size)
        store, rows, sampler = training_data(dataset.store, dataset.rows, self._drawn, share, *order)
        return self._loader(SegmentationDataset(store, rows, transform, self.seed), sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return validation batches; an empty list if `val_share` is 0."""
        dataset = self._dataset("val")
        return self._loader(dataset, EvalSampler(len(dataset))) if len(dataset) else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches.

        Raises:
            ValueError: If there are no test images.
        """
        dataset = self._dataset("test")
        self._require_test(dataset)
        return self._loader(dataset, EvalSampler(len(dataset)))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return batches without masks.

        Raises:
            ValueError: If no `predict_images` are given and there are no test images either.
        """
        if self.predict_images is not None:
            self.setup("predict")
        if self.predict_images is not None and self._predict_store is not None:
            store = self._predict_store
            dataset = SegmentationDataset(store, range(len(store.pairs)), with_masks=False)
        else:
            dataset = self._dataset("test", with_masks=False)
            self._require_test(dataset)
        return self._loader(dataset, EvalSampler(len(dataset), pad=False))

    def _require_test(self, dataset: SegmentationDataset) -> None:
        if not len(dataset):
            msg = (
                f"There are no test images: {type(self).__name__} at {self.root!r} has no official test set "
                "and all images are labelled. Set `num_labels`, so that the others are tested on, or "
                "`predict_images` to predict a folder."
            )
            raise ValueError(msg)

    def _dataset(self, split: str, transform: A.Compose | None = None, with_masks: bool = True) -> SegmentationDataset:
        if self._store is None:
            msg = f"Call `setup` before asking for the {split} images."
            raise RuntimeError(msg)
        return SegmentationDataset(self._store, self._rows[split], transform, self.seed, with_masks)

    def _loader(self, dataset: SegmentationDataset, sampler: TrainSampler | EvalSampler) -> DataLoader[Batch]:
        return LateLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_init_worker if self.num_workers > 0 else None,
            # Its own generator: the default would draw from the global one, and a resumed run would differ by
            # it.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _check_range(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        msg = f"Expected argument `{name}` to be {expected}, but got {value!r}."
        raise ValueError(msg)


def _init_worker(_worker: int) -> None:
    # Every worker is one of many: OpenCV's own threads would only get in their way.
    cv2.setNumThreads(0)
