"""Images with the labels they were given, for generators that learn from them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.classification.arrays import DigitsSource
from datamodules.classification.base import ClassificationDataModule
from datamodules.classification.contents import UNKNOWN, Contents, ImageSource, Int64Array
from datamodules.classification.prepare import Reading, check_least, image_side, prepare
from datamodules.classification.pseudo import ImagesToLabel, labels_from
from datamodules.classification.splits import LabelPlan, LongTail, require_every_class
from datamodules.classification.store import PixelStore
from datamodules.classification.streams import BatchKey, Drawn, Pool, Quota, StreamName, StreamSampler, view_seed
from datamodules.label_noise import LabelNoise
from datamodules.loading import LateLoader, world
from datamodules.pseudo_labels import SPLITS
from datamodules.views.batch_ops import shift_images
from datamodules.views.policies import Shift

_STREAM: StreamName = "labeled"
_WHY_ONE = "noise on labels that are wrong already would be of no known kind"


class GenerationDataModule(ClassificationDataModule):
    """All training images that have a label, with the label they were given.

    A training batch is {"image", "label", "index"}, images float32 [B, C, H, W] in [0, 1]; with `flip` also "flip",
    bool [B]: which images are mirrored. `label` is the given label, noise included, when trained and validated on, and
    the true one when tested on. Images of one split are numbered from 0 (`index`); -1 in a batch to evaluate marks a
    filler. With pseudo-labels that kept those which people gave (`true_labels` of PseudoLabelWriter) a training batch
    also has "trusted", bool [B]: whose label people gave.

    What a source has hidden labels for (see ArraySource) is not trained on, and they are never looked at.

    The images are an endless series of seeded permutations, cut into batches of one size. Order and flips of a batch
    are functions of `seed`, epoch and rank, so that a fit that goes on from a checkpoint sees what it would have seen.

    Args:
        source: Where images and labels come from; None takes scikit-learn's digits.
        image_size: Side in pixels that images are resized to (the short side, then the middle is cut out); None takes
            the source's own.
        batch_size: Images a batch, on each device.
        val_share: Share of the labelled images to validate on, in [0, 1), in proportion to the classes. Without
            meaning for a source with validation images of its own.
        split_seed: Seed of that choice, and of the images that `imbalance` leaves.
        label_noise: Makes given labels wrong, those of validation images included: what is judged by them has learned
            from wrong ones. Never those of test images.
        pseudo_labels: Folder of a PseudoLabels artifact whose labels take the place of the source's, for training
            images; a relative folder is below the current directory.
        min_confidence: Leave out images whose pseudo-label is less sure than that, in [0, 1].
        min_per_class: Least images of a class to train on; with fewer of one nothing is trained. A class that is
            hardly seen is drawn as noise. Not asked of a part of a data set (see ImageSource): others have its classes.
        trusted_share: Share of each batch, in (0, 1), that are images whose label people gave, for a classifier of
            noisy images, which otherwise hardly sees them; None draws from all images alike. Only with
            `pseudo_labels`.
        flip: Mirror every second image, by chance. Digits do not survive it.
        shift: Largest shift of an image in pixels, rows and columns each by chance, edges reflected. It keeps a
            classifier of noisy images from learning wrong labels by heart; what a generator draws would be shifted as
            well.
        steps_per_epoch: Batches of an epoch; None takes as many whole ones as there are images for, at least one.
            Images that one epoch leaves out are the first of the next.
        imbalance: Makes the classes unequal (`gamma_labeled`).
        num_workers: Processes that fetch batches; 0 does it in the training process, which is enough while images
            are in memory.
        cache_megabytes: Memory for decoded images; if they need more they are decoded on every access.
        on_bad_file: Stop at unusable files, or skip and log each.
        max_bad_share: Share of unusable files above which skipping gives up, in [0, 1].
        eval_batch_size: Images of a batch to evaluate.
        seed: Seed of the order and the flips.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if images or labels cannot be used.
        FileNotFoundError: In `setup`, if the images or the pseudo-labels are missing.
    """

    def __init__(
        self,
        source: ImageSource | None = None,
        image_size: int | None = None,
        batch_size: int = 128,
        val_share: float = 0.0,
        split_seed: int = 0,
        label_noise: LabelNoise | None = None,
        pseudo_labels: str | None = None,
        min_confidence: float = 0.0,
        min_per_class: int = 1,
        trusted_share: float | None = None,
        flip: bool = False,
        shift: int = 0,
        steps_per_epoch: int | None = None,
        imbalance: LongTail | None = None,
        num_workers: int = 0,
        cache_megabytes: int = 4096,
        on_bad_file: Literal["error", "skip"] = "error",
        max_bad_share: float = 0.05,
        eval_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        """Check the arguments; no image is read before `setup`."""
        source = DigitsSource() if source is None else source
        reading = Reading(image_side(source, image_size), cache_megabytes, on_bad_file, max_bad_share)
        super().__init__(source, reading, num_workers, eval_batch_size, seed)
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        check_least("batch_size", batch_size, 1)
        if steps_per_epoch is not None:
            check_least("steps_per_epoch", steps_per_epoch, 1)
        check_least("split_seed", split_seed, 0)
        if imbalance is not None and imbalance.gamma_unlabeled is not None:
            msg = (
                "Expected argument `imbalance` without `gamma_unlabeled`, but got "
                f"{imbalance.gamma_unlabeled}: only labelled images are trained on here. Leave it out."
            )
            raise ValueError(msg)
        self.plan = LabelPlan(seed=split_seed, val_share=val_share, imbalance=imbalance)
        self.label_noise = label_noise
        self.pseudo_labels = pseudo_labels
        self.min_confidence = min_confidence
        self.min_per_class = min_per_class
        self.trusted_share = trusted_share
        self._check_pseudo_labels()
        check_least("min_per_class", min_per_class, 1)
        check_least("shift", shift, 0)
        if shift >= self.image_size:
            msg = f"Expected argument `shift` below `image_size` {self.image_size}, but got {shift}."
            raise ValueError(msg)
        self.flip = flip
        self.shift = shift
        self._with_images = True
        self._train: _GivenImages | None = None
        # By row of the data: whose label people gave; None without pseudo-labels.
        self._by_people: npt.NDArray[np.bool_] | None = None

    def _check_pseudo_labels(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            msg = f"Expected argument `min_confidence` to be in [0, 1], but got {self.min_confidence}."
            raise ValueError(msg)
        if self.pseudo_labels is None and self.min_confidence > 0:
            msg = (
                f"Expected argument `pseudo_labels` with `min_confidence` {self.min_confidence}, but got none: labels "
                "of a source have no confidence. Leave `min_confidence` out."
            )
            raise ValueError(msg)
        if self.trusted_share is not None:
            few = round(self.trusted_share * self.batch_size)
            if self.pseudo_labels is None or not 0 < few < self.batch_size:
                msg = (
                    f"Expected argument `trusted_share` only with `pseudo_labels`, and to leave each batch of "
                    f"{self.batch_size} some images of both kinds, but got {self.trusted_share} with "
                    f"{self.pseudo_labels}; leave it out, or choose another share."
                )
                raise ValueError(msg)
        if self.pseudo_labels is not None and self.label_noise is not None:
            msg = (
                f"Expected only one of the arguments `label_noise` and `pseudo_labels`, but got both; {_WHY_ONE}. "
                "Leave one out."
            )
            raise ValueError(msg)

    # ---------------------------------------------------------------- what a module may ask

    @property
    def num_images(self) -> int:
        """Images to train on, after `setup`."""
        return len(self._ready().split.labeled)

    @property
    def class_counts(self) -> Tensor:
        """Training images of each given label, int64 [K], after `setup`."""
        return torch.bincount(self._given(self._ready().split.labeled), minlength=self.num_classes)

    @property
    def transition_matrix(self) -> Tensor | None:
        """T[i, j] = p(given label j | true class i), float64 [K, K]; None where nobody knows it.

        It is that of `label_noise` (the identity without), so it tells of labels that were made wrong here, and takes
        those of the source for true. How wrong pseudo-labels are, nobody knows.
        """
        if self.pseudo_labels is not None:
            return None
        if self.label_noise is None:
            return torch.eye(self.num_classes, dtype=torch.float64)
        return self.label_noise.matrix(self.num_classes)

    def leave_out_images(self) -> None:
        """Leave "image" out of training batches, for a module that keeps what it needs of each image by its index.

        Call it before the first training batch is asked for.

        Raises:
            ValueError: Images are shifted: what is kept of them is not what they are.
        """
        if self.shift:
            msg = (
                f"Expected argument `shift` 0 for images that are encoded once (`latent_cache`), but got {self.shift}."
            )
            raise ValueError(msg)
        self._with_images = False
        if self._train is not None:
            self._train.with_images = False

    def sweep_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return all training images in order and as they are: "image", "label" and "index", shared among ranks."""
        return self._eval_loader(self._images(self._ready().split.labeled))

    # ---------------------------------------------------------------- reading

    def setup(self, stage: str = "fit") -> None:
        """Find, check and decode the images once, and choose those to validate on.

        Args:
            stage: fit, validate, test or predict; all need the same.

        Raises:
            FileNotFoundError: If the images or the pseudo-labels are missing.
            ValueError: If images or labels cannot be used, or a class has no training image.
        """
        if self._data is None:
            relabel = None if self.pseudo_labels is None else self._relabelled
            data = prepare(self.source, self.reading, self.plan, self.label_noise, relabel, noise_on_val=True)
            given = data.labels.numpy()[data.split.labeled]
            # A class that is never seen would be drawn as noise.
            remedy = "Lower the rate of `label_noise` or choose another seed of it, lower `val_share`, or add images"
            require_every_class(given, self.class_names, remedy, self._least)
            parts = {"train": data.split.labeled, "val": data.split.val, "test": data.split.test}
            self._settle(data, {name: len(rows) for name, rows in parts.items()})

    @property
    def _least(self) -> int:
        return 0 if self.source.is_part else self.min_per_class

    def _relabelled(self, contents: Contents, images: str) -> Contents:
        train = np.asarray(contents.roles) == "train"
        labels, self._by_people = labels_from(
            str(self.pseudo_labels), contents.keys, train, self.class_names, images, self.min_confidence
        )
        remedy = "Label the images with a better module, or leave fewer out"
        if self.min_confidence > 0:
            remedy = f"`min_confidence` is {self.min_confidence}: lower it, or label the images with a better module"
        require_every_class(labels[labels != UNKNOWN], self.class_names, remedy, self._least)
        # All of them may be used: what the source hides are its own labels.
        return replace(contents, labels=np.where(train, labels, contents.labels), given=None)

    # ---------------------------------------------------------------- loaders

    def label_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return every image to train on once, as ClassificationDataModule does; pseudo-labels are no given labels.

        Raises:
            ValueError: The labels are pseudo-labels, and nobody knows which of them people gave.
        """
        if self.pseudo_labels is not None and (self._by_people is None or not self._by_people.any()):
            msg = (
                f"Expected labels that people gave, to label the other images, but got `pseudo_labels` "
                f"{self.pseudo_labels}, written without `true_labels`; leave them out, or write them with these."
            )
            raise ValueError(msg)
        return super().label_dataloader()

    def _to_label(self) -> ImagesToLabel:
        found = super()._to_label()
        if self._by_people is not None:
            people = self._by_people[found.rows]
            found.labels = torch.where(torch.from_numpy(people), found.labels, UNKNOWN)
            found.splits = np.where(people, SPLITS.index("labeled"), SPLITS.index("unlabeled"))
        return found

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return training batches, whose order depends on `seed` and the epoch only.

        Raises:
            ValueError: A part of a data set has no labels.
        """
        data = self._ready()
        rows, size = data.split.labeled, self.batch_size
        if not len(rows):
            msg = (
                "Expected labelled images to train on, but this part of the data set has none. Train without it, or "
                "give it `pseudo_labels`."
            )
            raise ValueError(msg)
        # All ranks share an epoch: more of them take fewer steps.
        steps = self.steps_per_epoch or max(len(rows) // (size * world()[0]), 1)
        trusted = None if self._by_people is None else torch.from_numpy(self._by_people[rows])
        sampler = StreamSampler({_STREAM: Pool(len(rows), size, quota=self._quota(trusted))}, steps, self.seed)
        draws = _Draws(self.seed, self.flip, self.shift)
        self._train = _GivenImages(data.store, rows, self._given(rows), trusted, steps, draws, self._with_images)
        return LateLoader(self._train, batch_size=None, sampler=sampler, **self._settings())

    def _quota(self, trusted: Tensor | None) -> Quota | None:
        if self.trusted_share is None or trusted is None:
            return None
        one_kind = not bool(trusted.any()) or bool(trusted.all())
        if one_kind and self.source.is_part:
            return None
        if one_kind:
            msg = (
                f"Expected `pseudo_labels` of which people gave some, not all, for `trusted_share`, but they gave "
                f"{int(trusted.sum())} of the {len(trusted)} in {self.pseudo_labels}; write them with `true_labels`, "
                "or leave `trusted_share` out."
            )
            raise ValueError(msg)
        return Quota(trusted.nonzero().flatten().numpy(), round(self.trusted_share * self.batch_size))

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the training images in order, as `sweep_dataloader` does but without fillers."""
        return self._eval_loader(self._images(self._ready().split.labeled), pad=False)


@dataclass
class _GivenImages(Dataset[dict[str, Any]]):
    """Fetches the whole batch that a key of StreamSampler asks for."""

    store: PixelStore
    rows: Int64Array
    labels: Tensor
    trusted: Tensor | None
    steps: int
    draws: "_Draws"
    with_images: bool

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, key: BatchKey) -> dict[str, Tensor]:
        drawn = key[_STREAM]
        index = torch.from_numpy(drawn.index)
        batch = {"label": self.labels[index], "index": index}
        if self.trusted is not None:
            batch["trusted"] = self.trusted[index]
        shift = self.draws.shifts(drawn)
        if self.draws.flip:
            batch["flip"] = shift.flip
        if self.with_images:
            image = self.store.fetch(self.rows[drawn.index])
            if self.draws.flip or self.draws.shift:
                image = shift_images(image, shift, self.draws.shift)
            batch["image"] = image.float().div_(255)
        return batch


@dataclass(frozen=True)
class _Draws:
    """What chance decides of a batch beside its order: every rank takes its own of the whole batch's."""

    seed: int
    flip: bool
    shift: int

    def shifts(self, drawn: Drawn) -> Shift:
        rank = drawn.draw % drawn.stride
        generator = np.random.default_rng(view_seed(self.seed, _STREAM, drawn.draw - rank))
        whole = len(drawn.index) * drawn.stride
        flip = generator.random(whole) < (0.5 if self.flip else 0.0)
        offsets = generator.integers(0, 2 * self.shift + 1, (2, whole))
        own = slice(rank, None, drawn.stride)
        top, left = (torch.from_numpy(part[own].copy()) for part in offsets)
        return Shift(torch.from_numpy(flip[own].copy()), top, left)
