"""Labelled and unlabelled images for semi-supervised classification."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.classification.arrays import DigitsSource
from datamodules.classification.base import ClassificationDataModule
from datamodules.classification.contents import ImageSource, Int64Array
from datamodules.classification.mixture import MixPlan, Mixture, mix
from datamodules.classification.prepare import Reading, check_least, image_side, images_of_folder, prepare
from datamodules.classification.splits import LabelPlan, LongTail
from datamodules.classification.streams import (
    EvalImages,
    Pool,
    StreamName,
    StreamSampler,
    TrainBatch,
    TrainBatches,
    keyed,
    view_seed,
)
from datamodules.label_noise import LabelNoise
from datamodules.loading import LateLoader, world
from datamodules.views.crops import MultiCrop
from datamodules.views.policies import StrongName, WeakName
from datamodules.views.views import BatchViews, WorkerViews

# What is wrong when a stream that a method wants is empty.
_NOTHING: dict[StreamName, str] = {
    "labeled": (
        "Expected labelled images to train on, but this part of the data set has none. Train without it, or let images "
        "join by `pseudo_labels` or `synthetic_images`."
    ),
    "unlabeled": (
        "Expected images without a label, which the method wants views of, but all are labelled. Set "
        "`include_labeled: true`, `num_labels` or `labels_per_class`."
    ),
}


class SemiSupervisedDataModule(ClassificationDataModule):
    """A few images with labels and many without, in two training streams.

    A training batch is {"labeled": {"image", further views, "label", "index", "true_label"}, "unlabeled": {views,
    "index", "true_label"}}, images float32 [B, C, H, W] in [0, 1]. Which views there are is up to the method
    (`declare_views`); one that wants none of unlabelled images gets no "unlabeled". Both streams have batches of fixed
    size, however few images there are. `label` is the given label, noise included; `true_label` is for reports on
    pseudo-labels only, -1 where it is not known. Images of one split are numbered from 0 (`index`). Batches to
    evaluate have "image", "label" and "index"; -1 there marks a filler.

    Drawn images and pseudo-labelled ones may join the labelled images: their indices follow, drawn ones first, and
    methods see no difference. `counts` has them under "synthetic" and "pseudo_labeled".

    Order and augmentation of a training batch are functions of `seed`, epoch and rank, so that a fit that goes on from
    a checkpoint sees what it would have seen.

    Args:
        source: Where images and labels come from; None takes scikit-learn's digits.
        image_size: Side in pixels that images are resized to (the short side, then the middle is cut out); None takes
            the source's own.
        batch_size: Labelled images a batch, on each device.
        unlabeled_ratio: Unlabelled images for each labelled one of a batch.
        num_labels: Labelled images in all; None for all that have a label.
        labels_per_class: Labelled images of each class; give this or `num_labels`.
        labels_seed: Seed of the choice; the choices of one seed are nested.
        labels_balanced: Spread `num_labels` over the classes as equally as possible; else in their proportions.
        val_share: Share of the labelled images to validate on, in [0, 1); every class keeps one to train on. Without
            meaning for a source with validation images of its own.
        steps_per_epoch: Batches of an epoch; None takes as many whole ones as there are labelled images for (unlabelled
            ones, for a method that wants no others), at least one.
        include_labeled: Let the labelled images be among the unlabelled ones, too. Validation images never are.
        weak: What a weak view is, see BatchViews. Digits do not survive a flip.
        strong: What a strong view is, see BatchViews.
        num_ops: Operations of a strong view with "randaugment".
        cutout: Largest side of the hole in a strong view, as a share of the image's side.
        crop_padding: Largest shift of a weak view, in pixels, or as a share of the side if a float.
        fill: Grey level, in [0, 1], of holes and of what is drawn in from outside.
        crops: Random and focal views, for MaskedSiamese; None has none.
        augment: Make the views of a whole batch on the device, or of each image in the loader's workers.
        label_noise: Makes given labels wrong, those validated on included; never those of test images.
        imbalance: Makes the classes unequal.
        synthetic_images: Folder of drawn images of the classes (see SyntheticImageWriter) that join the labelled ones,
            with the classes that they were asked for; they are trained on only, never validated or tested on, and not
            among the unlabelled images. A relative one is below the current directory: it is the product of a run.
        synthetic_per_class: Take the first so many of each class, by seed; None takes them all.
        synthetic_share: Share of each labelled batch that is drawn, in (0, 1): round(share * batch_size) images on
            each device. None takes all labelled images equally often, drawn or not.
        synthetic_weight: Weight of a drawn image's loss, at least 0, for modules that fit all labelled images at once
            by `sweep_dataloader` (LinearProbe). Training batches have no weights, and methods do not use it.
        synthetic_from_other_data: Accept images that were drawn by a module trained on other data: then it is up to
            you that its training images are not tested on here.
        pseudo_labels: Folder of a PseudoLabels artifact: unlabelled images join the labelled ones with their
            pseudo-labels (plain self-training), and stay among the unlabelled ones. Images that people labelled keep
            their label. A relative one is below the current directory.
        min_confidence: Let images join whose pseudo-label is at least that sure, in [0, 1].
        num_workers: Processes that fetch batches; 0 does it in the training process, which is enough while images
            are in memory and augmented on the device.
        cache_megabytes: Memory for decoded images; if they need more they are decoded on every access.
        on_bad_file: Stop at unusable files, or skip and log each.
        max_bad_share: Share of unusable files above which skipping gives up, in [0, 1].
        predict_images: Folder of images to predict, nested folders included; None predicts those of `predict_split`.
        predict_split: Predict the test images, or all images to train on, labelled or not: PseudoLabelWriter writes
            what they are taken for.
        eval_batch_size: Images of a batch to evaluate.
        seed: Seed of the order and the augmentations.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if images or labels cannot be used.
        FileNotFoundError: In `setup`, if the images, drawn ones or pseudo-labels are missing.
    """

    instead_of_test_images = ", or set `predict_images` to predict a folder"
    _views: BatchViews | WorkerViews
    _mixture: Mixture | None = None
    _predict: EvalImages | None = None

    def __init__(
        self,
        source: ImageSource | None = None,
        image_size: int | None = None,
        batch_size: int = 64,
        unlabeled_ratio: int = 7,
        num_labels: int | None = None,
        labels_per_class: int | None = None,
        labels_seed: int = 0,
        labels_balanced: bool = True,
        val_share: float = 0.0,
        steps_per_epoch: int | None = 1024,
        include_labeled: bool = True,
        weak: WeakName = "flip_crop",
        strong: StrongName = "randaugment",
        num_ops: int = 2,
        cutout: float = 0.5,
        crop_padding: float = 0.125,
        fill: float = 0.5,
        crops: MultiCrop | None = None,
        augment: Literal["batch", "workers"] = "batch",
        label_noise: LabelNoise | None = None,
        imbalance: LongTail | None = None,
        synthetic_images: str | None = None,
        synthetic_per_class: int | None = None,
        synthetic_share: float | None = None,
        synthetic_weight: float = 1.0,
        synthetic_from_other_data: bool = False,
        pseudo_labels: str | None = None,
        min_confidence: float = 0.0,
        num_workers: int = 0,
        cache_megabytes: int = 4096,
        on_bad_file: Literal["error", "skip"] = "error",
        max_bad_share: float = 0.05,
        predict_images: str | None = None,
        predict_split: Literal["test", "train"] = "test",
        eval_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        """Check the arguments; no image is read before `setup`."""
        source = DigitsSource() if source is None else source
        reading = Reading(image_side(source, image_size), cache_megabytes, on_bad_file, max_bad_share)
        super().__init__(source, reading, num_workers, eval_batch_size, seed)
        self.batch_size, self.unlabeled_ratio, self.steps_per_epoch = batch_size, unlabeled_ratio, steps_per_epoch
        self.plan = LabelPlan(
            num_labels, labels_per_class, labels_seed, labels_balanced, val_share, include_labeled, imbalance
        )
        drawn = (synthetic_images, synthetic_per_class, synthetic_share, synthetic_weight, synthetic_from_other_data)
        self.mix = MixPlan(*drawn, pseudo_labels, min_confidence)
        self.label_noise = label_noise
        self.predict_images, self.predict_split = predict_images, predict_split
        self._check_arguments(augment)
        look = (self.image_size, weak, strong, num_ops, cutout, crop_padding, fill, crops)
        self._views = WorkerViews(*look) if augment == "workers" else BatchViews(*look)
        self._names: dict[StreamName, tuple[str, ...]] = {"labeled": ("weak",), "unlabeled": ("weak", "strong")}
        self._selected: dict[StreamName, Int64Array | None] = {}
        self._pools: dict[StreamName, Pool] = {}

    def _check_arguments(self, augment: str) -> None:
        for name in ("batch_size", "unlabeled_ratio", "steps_per_epoch"):
            value = getattr(self, name)
            check_least(name, 1 if value is None else value, 1)
        if augment not in ("batch", "workers"):
            msg = f'Expected argument `augment` to be "batch" or "workers", but got {augment!r}.'
            raise ValueError(msg)
        if self.predict_split not in ("test", "train"):
            msg = f'Expected argument `predict_split` to be "test" or "train", but got {self.predict_split!r}.'
            raise ValueError(msg)
        if self.predict_split == "train" and self.predict_images is not None:
            both = f"but got both, {self.predict_images}"
            msg = f'Expected only one of `predict_images` and `predict_split` "train", {both}.'
            raise ValueError(msg)
        _ = self.drawn_per_batch

    # ---------------------------------------------------------------- what a module may ask

    @property
    def num_labeled(self) -> int:
        """Labelled images to train on, drawn and pseudo-labelled ones included, after `setup`."""
        return len(self._streams().labeled.rows)

    @property
    def drawn_per_batch(self) -> int | None:
        """Drawn images of each labelled batch on each device, with `synthetic_share`; else None."""
        return self.mix.drawn_of(self.batch_size)

    @property
    def num_unlabeled(self) -> int:
        """Images to train on without their labels, after `setup`."""
        return len(self._ready().split.unlabeled)

    def declare_views(self, labeled: tuple[str, ...], unlabeled: tuple[str, ...]) -> None:
        """Say which views a training batch has; without a word labelled images are weak, others weak and strong.

        Args:
            labeled: Names of the views of labelled images; the first is called `image` in a batch, the n-th repeat of a
                name `name_n`. Without any there are no labelled images in a batch.
            unlabeled: Those of unlabelled images, likewise.

        Raises:
            ValueError: A name is unknown here, or there is none at all.
        """
        if not labeled and not unlabeled:
            msg = (
                "Expected argument `labeled` or `unlabeled` to name a view, but both are empty; give at least `plain`."
            )
            raise ValueError(msg)
        known = self._views.names
        # A probe is compared with the label of its image.
        without = tuple(name for name in known if name != "probe")
        for stream, names, possible in (("labeled", labeled, known), ("unlabeled", unlabeled, without)):
            for name in names:
                if name not in possible:
                    msg = (
                        f"Expected argument `{stream}` to name views out of {possible}, but got {name!r}. "
                        "Labelled images have a probe with `strong: ctaugment`; `crops` has random and focal views."
                    )
                    raise ValueError(msg)
        self._names = {"labeled": tuple(labeled), "unlabeled": tuple(unlabeled)}

    def share_rates(self, rates: Tensor) -> None:
        """Take CTAugment's table, which the views read anew for every batch.

        Args:
            rates: Table [19, 2, 17] in shared memory, given before the training loader is made.
        """
        self._views.share_rates(rates)

    def select(self, split: StreamName, indices: Tensor | None) -> None:
        """Choose the images that the training stream of a split draws from, from the next epoch on.

        Args:
            split: Labelled or unlabelled images.
            indices: Their indices, repeats count; None for all.

        Raises:
            ValueError: There are none, or one is out of range.
        """
        chosen = None if indices is None else indices.detach().cpu().to(torch.int64).numpy().copy()
        size = self.num_labeled if split == "labeled" else self.num_unlabeled
        if chosen is not None and (chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= size):
            msg = (
                f"Expected argument `indices` to be at least one index from 0 to {size - 1} ({size} {split} images), "
                f"but got {chosen.size} of shape {list(chosen.shape)}, or some out of range; None takes all."
            )
            raise ValueError(msg)
        quota = self._streams().quota(split, self.drawn_per_batch)
        if quota is not None and chosen is not None and len(np.unique(np.isin(chosen, quota.indices))) < 2:
            msg = "Expected argument `indices` to have drawn and other images with `synthetic_share`, but got one kind."
            raise ValueError(msg)
        self._selected[split] = chosen
        if split in self._pools:
            self._pools[split].selected = chosen

    def labels_of(self, split: StreamName) -> Tensor:
        """Given labels of all training images of a split, by index.

        Args:
            split: Labelled or unlabelled images.

        Returns:
            Class ids int64 [N], pseudo-labels included; -1 for unlabelled images that are no labelled ones, too.
        """
        return self._streams().part(split).labels

    def sweep_dataloader(self, split: StreamName) -> DataLoader[dict[str, Tensor]]:
        """Return all training images of a split as they are, with "image", "label" and "index", shared among ranks.

        Labelled images are those that people labelled, then drawn, then pseudo-labelled ones; they have "origin" as
        well, int64 [B], 0, 1 or 2 in this order, and "weight", float32 [B], that of their loss.

        Args:
            split: Labelled or unlabelled images.
        """
        return self._eval_loader(self._streams().sweep(split, self.reading))

    # ---------------------------------------------------------------- reading

    def setup(self, stage: str = "fit") -> None:
        """Find, check and decode the images once, and choose the labelled ones.

        Args:
            stage: fit, validate, test or predict; predicting a folder does not need the source, and predicting at all
                none of what joins the labelled images.
        """
        if stage == "predict" and self.predict_images is not None:
            if self._predict is None:
                self._predict = images_of_folder(self.predict_images, self.reading, self.image_channels)
        elif self._data is None:
            data = prepare(self.source, self.reading, self.plan, self.label_noise)
            uses = ("labeled", "unlabeled", "val", "test")
            self._settle(data, {name: len(getattr(data.split, name)) for name in uses})
        if stage != "predict":
            # Tests compare the fingerprint with that of the fit, but look at no drawn picture.
            streams = self._streams()
            if stage == "fit":
                streams.store(self.reading)

    def _streams(self) -> Mixture:
        if self._mixture is None:
            self._mixture = mix(self._ready(), self.mix, self.class_names)
            self.fingerprint = self._mixture.fingerprint
            if not self.mix.is_plain:
                self.counts |= self._mixture.counts
                rank_zero_info(self._mixture.describe(self.drawn_per_batch))
        return self._mixture

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Return training batches, whose order depends on `seed` and the epoch only.

        With `augment: batch` they hold 8-bit images, and `on_after_batch_transfer` makes their views.

        Raises:
            ValueError: A method wants unlabelled images, and there are none; or a part of a data set has no labels.
        """
        sizes = {"labeled": self.batch_size, "unlabeled": self.batch_size * self.unlabeled_ratio}
        streams, splits = self._streams(), {}
        self._pools = {}
        for stream, names in self._names.items():
            if names:
                split = replace(streams.part(stream), names=names)
                if not len(split.rows):
                    raise ValueError(_NOTHING[stream])
                quota = streams.quota(stream, self.drawn_per_batch)
                self._pools[stream] = Pool(len(split.rows), sizes[stream], self._selected.get(stream), quota)
                splits[stream] = split
        views = self._views if isinstance(self._views, WorkerViews) else None
        pool = self._pools.get("labeled", self._pools.get("unlabeled"))
        whole = 0 if pool is None else pool.size // (pool.batch_size * world()[0])
        steps = self.steps_per_epoch or max(whole, 1)
        batches = TrainBatches(streams.store(self.reading), splits, self.seed, views, steps)
        sampler = StreamSampler(self._pools, steps, self.seed)
        return LateLoader(batches, batch_size=None, sampler=sampler, **self._settings())

    def on_after_batch_transfer(self, batch: object, dataloader_idx: int) -> object:
        """Make the views of a training batch on its device; others pass as they are.

        Args:
            batch: What a loader of this datamodule gave, moved to the device.
            dataloader_idx: Number of the loader.
        """
        views = self._views
        if not isinstance(views, BatchViews) or not isinstance(batch, dict) or self._names.keys().isdisjoint(batch):
            return batch
        made = {}
        for stream, names in self._names.items():
            if stream in batch:
                part = dict(batch[stream])
                images = part.pop("image").to(torch.float32).div_(255)
                # Random numbers of the CPU: the same views on every kind of device.
                generator = torch.Generator().manual_seed(view_seed(self.seed, stream, part.pop("draw")))
                made[stream] = {**keyed(views(images, names, generator), names, stream), **part}
        return made

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the images of `predict_images`, or those of `predict_split`.

        Raises:
            ValueError: If there are neither.
        """
        if self.predict_images is not None:
            self.setup("predict")
        if self.predict_split == "train":
            return self.label_dataloader()
        return self._eval_loader(self._tested() if self._predict is None else self._predict, pad=False)
