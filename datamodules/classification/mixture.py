"""What the training streams are made of: images labelled by people, drawn ones, pseudo-labelled and unlabelled ones."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.classification.contents import UNKNOWN, Int64Array
from datamodules.classification.drawn import DrawnImages, drawn_images
from datamodules.classification.prepare import Prepared, Reading, check_least
from datamodules.classification.pseudo import labels_from
from datamodules.classification.store import Pixels
from datamodules.classification.streams import EvalImages, Quota, SplitRows, StreamName

# Where the label of a labelled image is from: from people, from the request that it was drawn for, from a module.
_ORIGINS = ("labeled", "synthetic", "pseudo_labeled")


@dataclass(frozen=True)
class MixPlan:
    """What joins the labelled images; the arguments of SemiSupervisedDataModule of these names."""

    synthetic_images: str | None = None
    synthetic_per_class: int | None = None
    synthetic_share: float | None = None
    synthetic_weight: float = 1.0
    synthetic_from_other_data: bool = False
    pseudo_labels: str | None = None
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range, or needs another argument.
        """
        share, weight = self.synthetic_share, self.synthetic_weight
        if self.synthetic_per_class is not None:
            check_least("synthetic_per_class", self.synthetic_per_class, 1)
        if share is not None and not 0 < share < 1:
            msg = f"Expected argument `synthetic_share` to be in (0, 1), or left out, but got {share}."
            raise ValueError(msg)
        if not (math.isfinite(weight) and weight >= 0):
            msg = f"Expected argument `synthetic_weight` to be a finite number of at least 0, but got {weight}."
            raise ValueError(msg)
        if not 0 <= self.min_confidence <= 1:
            msg = f"Expected argument `min_confidence` to be in [0, 1], but got {self.min_confidence}."
            raise ValueError(msg)
        for name, value, default, folder in (
            ("synthetic_per_class", self.synthetic_per_class, None, "synthetic_images"),
            ("synthetic_share", share, None, "synthetic_images"),
            ("synthetic_weight", weight, 1.0, "synthetic_images"),
            ("synthetic_from_other_data", self.synthetic_from_other_data, False, "synthetic_images"),
            ("min_confidence", self.min_confidence, 0.0, "pseudo_labels"),
        ):
            if value != default and getattr(self, folder) is None:
                msg = f"Expected argument `{folder}` with `{name}` {value}, but got none; give both or neither."
                raise ValueError(msg)

    @property
    def is_plain(self) -> bool:
        """Whether nothing joins."""
        return self.synthetic_images is None and self.pseudo_labels is None

    def drawn_of(self, batch_size: int) -> int | None:
        """Return how many images of each batch are drawn; None where that is left to chance.

        Args:
            batch_size: Images of a batch on one rank.

        Raises:
            ValueError: The batch is too small to hold both kinds.
        """
        if self.synthetic_share is None:
            return None
        count = round(self.synthetic_share * batch_size)
        if not 0 < count < batch_size:
            msg = (
                f"Expected argument `synthetic_share` to leave drawn and other images in each batch, but "
                f"{self.synthetic_share} of `batch_size` {batch_size} rounds to {count} drawn ones; raise "
                "`batch_size`, or leave the share out."
            )
            raise ValueError(msg)
        return count


@dataclass
class Mixture:
    """The images of both training streams; labelled ones are those of people, then drawn, then pseudo-labelled ones.

    Attributes:
        data: What the source has.
        labeled: The labelled images; rows beyond those of the source are drawn images.
        unlabeled: The unlabelled ones, with the labels of those that are labelled ones, too.
        origin: 0 labelled by people, 1 drawn, 2 pseudo-labelled, for labelled images [N].
        weight: Weight of a labelled image's loss [N].
        drawn: The drawn ones; None without.
        fingerprint: Identifies the data, their split and all labels.
    """

    data: Prepared
    labeled: SplitRows
    unlabeled: SplitRows
    origin: Tensor
    weight: Tensor
    drawn: DrawnImages | None
    fingerprint: str
    _store: Pixels | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Labelled images of each origin: labeled, synthetic, pseudo_labeled."""
        return dict(zip(_ORIGINS, torch.bincount(self.origin, minlength=3).tolist(), strict=True))

    def part(self, split: StreamName) -> SplitRows:
        """Return the images of a stream."""
        return self.labeled if split == "labeled" else self.unlabeled

    def quota(self, split: StreamName, drawn: int | None) -> Quota | None:
        """Reserve a part of each labelled batch for drawn images.

        Args:
            split: Which stream; unlabelled images are never drawn.
            drawn: How many images of a batch of one rank are; None takes all images equally often, as does a part of a
                data set that has one kind only.
        """
        if drawn is None or split == "unlabeled":
            return None
        first, count = self.counts["labeled"], self.counts["synthetic"]
        if self.data.is_part and count in (0, len(self.labeled.rows)):
            return None
        return Quota(np.arange(first, first + count), drawn)

    def store(self, reading: Reading) -> Pixels:
        """Return the images, drawn ones behind those of the source; decodes the drawn ones when first called.

        Args:
            reading: How images are read.

        Raises:
            ValueError: Drawn images cannot be decoded.
        """
        if self._store is None:
            own = self.data.store
            self._store = own if self.drawn is None else self.drawn.behind(own, reading)
        return self._store

    def sweep(self, split: StreamName, reading: Reading) -> EvalImages:
        """Return the images of a stream as they are, labelled ones with "weight" and "origin".

        Args:
            split: Which stream.
            reading: How images are read.
        """
        part, store = self.part(split), self.store(reading)
        known, made = self.data.keys, () if self.drawn is None else self.drawn.rows
        keys = [
            known[row] if row < len(known) else f"synthetic_images/{made[row - len(known)].file_name}"
            for row in part.rows.tolist()
        ]
        more = {"weight": self.weight, "origin": self.origin} if split == "labeled" else None
        return EvalImages(store, part.rows, part.labels, keys, more)

    def describe(self, drawn: int | None) -> str:
        """Say in a line what labelled images there are.

        Args:
            drawn: How many images of a batch of one rank are drawn, see `MixPlan.drawn_of`.
        """
        counts, shown = self.counts, ""
        if self.drawn is not None:
            per_class = np.bincount(self.drawn.labels)
            low, high = per_class.min(), per_class.max()
            shown = f" ({low if low == high else f'{low} to {high}'} a class)"
        line = (
            f"labelled stream: {counts['labeled']} real, {counts['synthetic']} drawn{shown}, "
            f"{counts['pseudo_labeled']} pseudo-labelled"
        )
        return line if drawn is None else f"{line}; {drawn} of each batch are drawn"


def mix(data: Prepared, plan: MixPlan, class_names: Sequence[str]) -> Mixture:
    """Put the training streams together; no drawn picture is decoded.

    Args:
        data: The images of the source.
        plan: What joins those that people labelled.
        class_names: The classes of the source.

    Raises:
        FileNotFoundError: A folder is missing or not finished.
        ValueError: It is damaged, or of other data or classes; or there are fewer drawn images of a class than asked
            for, or no pseudo-labelled image.
    """
    drawn = None
    if plan.synthetic_images is not None:
        chosen = (plan.synthetic_per_class, plan.synthetic_from_other_data)
        drawn = drawn_images(plan.synthetic_images, class_names, data.images_fingerprint, *chosen)
    own, free = data.split.labeled, data.split.unlabeled
    made = np.empty(0, dtype=np.int64) if drawn is None else drawn.labels
    guessed, guesses = _guessed(data, plan, class_names)
    # Drawn images have rows behind those of the source, and nobody has seen a true class of theirs.
    labels = torch.cat([data.labels, torch.from_numpy(made)])
    labels[torch.from_numpy(guessed)] = torch.from_numpy(guesses)
    truth = torch.cat([data.truth, torch.full((len(made),), UNKNOWN)])
    rows = np.concatenate([own, len(data.labels) + np.arange(len(made)), guessed])
    origin = torch.arange(3).repeat_interleave(torch.tensor([len(own), len(made), len(guessed)]))
    labeled, unlabeled = (
        SplitRows(part, labels[torch.from_numpy(part)], truth[torch.from_numpy(part)]) for part in (rows, free)
    )
    weight = torch.tensor([1.0, plan.synthetic_weight, 1.0])[origin]
    known = _fingerprint(data, plan, drawn, guessed, guesses)
    return Mixture(data, labeled, unlabeled, origin, weight, drawn, known)


def _guessed(data: Prepared, plan: MixPlan, class_names: Sequence[str]) -> tuple[Int64Array, Int64Array]:
    """Rows of the images that join with a pseudo-label, and these labels."""
    if plan.pseudo_labels is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    train = np.asarray(data.roles) == "train"
    labels = labels_from(
        plan.pseudo_labels, data.keys, train, class_names, data.images_fingerprint, plan.min_confidence
    ).labels
    rest = np.setdiff1d(data.split.unlabeled, data.split.labeled)
    rows = rest[labels[rest] != UNKNOWN]
    if not len(rows) and not data.is_part:
        msg = (
            f"Expected `pseudo_labels` of unlabelled images, at least as sure as `min_confidence` "
            f"{plan.min_confidence}, but {plan.pseudo_labels} has none of the {len(rest)} unlabelled images here; "
            "lower `min_confidence`, or leave `pseudo_labels` out."
        )
        raise ValueError(msg)
    return rows, labels[rows]


def _fingerprint(
    data: Prepared, plan: MixPlan, drawn: DrawnImages | None, guessed: Int64Array, guesses: Int64Array
) -> str:
    if plan.is_plain:
        return data.fingerprint
    lines = sorted(f"{data.keys[row]}\t{label}" for row, label in zip(guessed, guesses, strict=True))
    parts = [data.fingerprint, "" if drawn is None else drawn.identity(), *lines]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
