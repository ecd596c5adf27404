"""From a source to decoded images with their uses and labels."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamodules.classification.contents import UNKNOWN, Contents, ImageSource, Int64Array, Role, check_labels
from datamodules.classification.splits import LabelPlan, Split, split_rows
from datamodules.classification.store import PixelStore, build_pixels
from datamodules.classification.streams import EvalImages
from datamodules.label_noise import LabelNoise
from datamodules.loading import resolve_root
from datamodules.segmentation.pairs import list_files, relative_key, settle_problems

# Enough to tell data sets apart, and quick for the largest that fit into memory.
_HASHED = 1000


@dataclass(frozen=True)
class Reading:
    """How images are read; the arguments of SemiSupervisedDataModule of these names.

    Attributes:
        image_size: Side in pixels.
        cache_megabytes: Memory for decoded images.
        on_bad_file: Stop at unusable files, or skip and log each.
        max_bad_share: Share of unusable files above which skipping gives up.
    """

    image_size: int
    cache_megabytes: int
    on_bad_file: Literal["error", "skip"]
    max_bad_share: float

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        if self.cache_megabytes < 0:
            msg = f"Expected argument `cache_megabytes` to be at least 0, but got {self.cache_megabytes}."
            raise ValueError(msg)
        if self.on_bad_file not in ("error", "skip"):
            msg = f'Expected argument `on_bad_file` to be "error" or "skip", but got {self.on_bad_file!r}.'
            raise ValueError(msg)
        if not 0 <= self.max_bad_share <= 1:
            msg = f"Expected argument `max_bad_share` to be in [0, 1], but got {self.max_bad_share}."
            raise ValueError(msg)


@dataclass(frozen=True)
class Prepared:
    """A data set, ready to be trained on.

    Attributes:
        store: The images.
        keys: Their names.
        roles: What the source has them for: train, val or test.
        split: What they are used for.
        labels: Given class ids by row, noise included, -1 for images without; true ones for test images.
        truth: True class ids by row, -1 where unknown; for reports only.
        fingerprint: Identifies the images, their uses and given labels.
        images_fingerprint: Identifies the images and what the source has them for, whatever their labels.
        is_part: Whether they are a part of a data set, see ImageSource.
    """

    store: PixelStore
    keys: Sequence[str]
    roles: Sequence[Role]
    split: Split
    labels: Tensor
    truth: Tensor
    fingerprint: str
    images_fingerprint: str
    is_part: bool = False


def image_side(source: ImageSource, image_size: int | None) -> int:
    """Side in pixels that images are resized to.

    Args:
        source: Where the images are.
        image_size: What was asked for; None for the source's own.

    Raises:
        ValueError: It is below 1, or nobody says.
    """
    size = source.native_size if image_size is None else image_size
    if size is None:
        msg = f"Expected argument `image_size` for {type(source).__name__}, whose images differ in size, but got none."
        raise ValueError(msg)
    check_least("image_size", size, 1)
    return size


def check_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Args:
        name: Name of the argument.
        value: What was given.
        least: What is needed.

    Raises:
        ValueError: It is below.
    """
    if value < least:
        msg = f"Expected argument `{name}` to be at least {least}, but got {value}."
        raise ValueError(msg)


def prepare(
    source: ImageSource,
    reading: Reading,
    plan: LabelPlan,
    noise: LabelNoise | None,
    relabel: Callable[[Contents, str], Contents] | None = None,
    noise_on_val: bool = False,
) -> Prepared:
    """List, check and decode the images of a source, choose the labelled ones and make labels wrong where asked to.

    Args:
        source: Where the images are.
        reading: How they are read.
        plan: Which labels are used.
        noise: Which of those become wrong; None for none.
        relabel: Gives the usable images, identified by their `images_fingerprint`, other labels than the source's;
            None leaves those.
        noise_on_val: Whether labels of validation images of the source's own become wrong as well, as those of images
            held out by the plan do anyway.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: If the images are missing.
        ValueError: If images or labels cannot be used.
    """
    store, contents = _decode(source, source.read(), reading)
    images = _images_fingerprint(contents)
    hidden = contents.labels
    if relabel is not None:
        contents = relabel(contents, images)
    names, truth = source.class_names, contents.labels
    roles = np.asarray(contents.roles)
    _require_classes(names)
    check_labels(truth, len(names), contents.keys)
    known = truth != UNKNOWN
    _require_labels(roles, known, contents.keys)
    given = known if contents.given is None else known & contents.given
    trained = np.flatnonzero(given & (roles == "train"))
    split = split_rows(truth, trained, contents.roles, names, plan, source.is_part)
    labels = np.full_like(truth, UNKNOWN)
    held_out = split.val if noise_on_val else split.val[roles[split.val] == "train"]
    own = np.concatenate([split.labeled, held_out])
    for rows in (split.labeled, split.val, split.test):
        labels[rows] = truth[rows]
    if noise is not None:
        # In the order of the data: which labels are wrong must not depend on how they are split for validation.
        own = np.sort(own)
        wrong = noise.apply(torch.from_numpy(truth[own]), len(names), lambda places: store.fetch(own[places]))
        labels[own] = wrong.numpy()
    print_of = _fingerprint(contents, split, labels)
    tensors = (torch.from_numpy(labels), torch.from_numpy(hidden))
    return Prepared(store, contents.keys, contents.roles, split, *tensors, print_of, images, source.is_part)


def images_of_folder(folder: str, reading: Reading, channels: int) -> EvalImages:
    """Read the images of a folder to predict.

    Args:
        folder: Nested folders included; a relative one is looked for under the current directory, then under
            $FEWLIGHT_DATA.
        reading: How they are read.
        channels: 1 or 3.

    Returns:
        The images, label -1.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If files cannot be decoded.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        root = resolve_root(folder)
    paths = list_files(root)
    if not paths:
        what = "holds no images" if root.is_dir() else "is not a folder"
        msg = f"Expected argument `predict_images` to be a folder of images, but {root.absolute()} {what}."
        raise FileNotFoundError(msg)
    keys = [relative_key(root, path) for path in paths]
    unknown = np.full(len(paths), UNKNOWN)
    contents = Contents(keys, unknown, ["test"] * len(paths), paths=paths)
    store, kept = _settle(contents, reading, channels, root, "any images, nested or not")
    return EvalImages(store, np.arange(len(store)), torch.from_numpy(kept.labels), kept.keys)


def _decode(source: ImageSource, contents: Contents, reading: Reading) -> tuple[PixelStore, Contents]:
    if len(set(contents.keys)) < len(contents.keys):
        twice = Counter(contents.keys).most_common(1)[0][0]
        msg = (
            f"Expected every image of {source.place} to be listed once, but got {twice} twice: it may be trained on "
            "and tested on. Let none of the folders lie in another one."
        )
        raise ValueError(msg)
    store, contents = _settle(contents, reading, source.image_channels, source.place, source.layout)
    if "train" not in contents.roles and not source.is_part:
        msg = f"Expected images to train on in {source.place}, but got none of them."
        raise ValueError(msg)
    return store, contents


def _settle(
    contents: Contents, reading: Reading, channels: int, root: Path, layout: str
) -> tuple[PixelStore, Contents]:
    """Decode, report everything unusable at once, and go on with the rest where that is allowed."""
    store, good, undecodable = build_pixels(contents, reading.image_size, channels, reading.cache_megabytes, "images")
    problems = [*contents.problems, *undecodable]
    if problems:
        total = len(contents.keys) + len(contents.problems)
        limit = reading.max_bad_share if good else 0.0
        settle_problems(problems, total, root, layout, reading.on_bad_file, limit)
    if len(good) == len(contents.keys):
        return store, contents
    return store, replace(
        contents,
        keys=[contents.keys[row] for row in good],
        labels=contents.labels[good],
        roles=[contents.roles[row] for row in good],
        given=None if contents.given is None else contents.given[good],
        paths=None if contents.paths is None else [contents.paths[row] for row in good],
        problems=(),
    )


def _require_classes(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or len(names) < 2:
        what = f"{twice[0]!r} twice" if twice else f"only {list(names)}"
        msg = f"Expected at least two classes whose names differ, but got {what}; rename classes, or label images."
        raise ValueError(msg)


def _require_labels(roles: npt.NDArray[np.str_], known: npt.NDArray[np.bool_], keys: Sequence[str]) -> None:
    missing = np.flatnonzero((roles != "train") & ~known)
    if len(missing):
        msg = (
            f"Expected a label for every image to validate or test on, but {len(missing)} have none, for example "
            f"{keys[missing[0]]}. Label them, or leave them out of these splits."
        )
        raise ValueError(msg)


def _images_fingerprint(contents: Contents) -> str:
    return _digest([f"{key}\t{role}" for key, role in zip(contents.keys, contents.roles, strict=True)], contents)


def _fingerprint(contents: Contents, split: Split, labels: Int64Array) -> str:
    uses = np.zeros(len(labels), dtype=np.int64)
    for bit, rows in enumerate((split.labeled, split.unlabeled, split.val, split.test)):
        uses[rows] |= 1 << bit
    rows_of = zip(contents.keys, uses, labels, strict=True)
    return _digest([f"{key}\t{use}\t{label}" for key, use, label in rows_of if use], contents)


def _digest(lines: list[str], contents: Contents) -> str:
    """SHA-256 over sorted lines; of images from memory, whose names say nothing, also over pixels."""
    digest = hashlib.sha256("\n".join(sorted(lines)).encode())
    if contents.images is not None:
        digest.update(np.ascontiguousarray(contents.images[:: max(len(contents.keys) // _HASHED, 1)]).tobytes())
    return digest.hexdigest()
