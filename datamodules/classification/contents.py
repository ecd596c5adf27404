"""What a source of images hands over, and what every source must be able to do."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from datamodules.segmentation.pairs import Problem

Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]

Role = Literal["train", "val", "test"]

UNKNOWN = -1


@dataclass(frozen=True)
class Contents:
    """All images of a source, by row.

    Attributes:
        keys: One unique name an image: a path relative to the root, or written like one.
        labels: Class ids [N], -1 where nobody knows.
        roles: What each image is for.
        given: Whether the label of a training image may be used [N]; None where every known one may. A label that
            may not be used serves reports on pseudo-labels only.
        images: uint8 array [N, H, W, C] of images that come from memory.
        paths: Files of images that do not.
        problems: Entries that are unusable as it is; they are no rows, and reported with undecodable files.
    """

    keys: Sequence[str]
    labels: Int64Array
    roles: Sequence[Role]
    given: npt.NDArray[np.bool_] | None = None
    images: UInt8Array | None = None
    paths: Sequence[Path] | None = None
    problems: Sequence[Problem] = ()


class ImageSource(ABC):
    """Where images and labels come from; given to the datamodules of images with a class as a class_path.

    Attributes:
        image_channels: 1 for grey images, 3 for colour.
        native_size: Side in pixels that the images have anyway; None where that differs or is not known before they
            are read.
        layout: The expected folders, shown in errors.
        is_part: Whether this is a part of a data set, a client's for example: classes may be missing among its labels,
            it may have none at all, and images may be too few to train on.
    """

    image_channels: int = 3
    native_size: int | None = None
    layout: str = ""
    is_part: bool = False

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; their positions are the class ids."""

    @property
    def place(self) -> Path:
        """Where the images are, for messages."""
        return Path(type(self).__name__)

    def check(self) -> None:
        """Look whether there are images, without reading any.

        Raises:
            FileNotFoundError: If the root or the images in it are missing.
        """
        # Classes are where images are: a missing root shows here.
        _ = self.class_names

    def prepare(self) -> None:
        """Download what is missing, if that is wanted; called once a machine, before anything is read."""
        return

    @abstractmethod
    def read(self) -> Contents:
        """List all images, decoding none.

        Raises:
            FileNotFoundError: If the root or the images in it are missing.
            ValueError: If a label is no class id.
        """


def check_labels(labels: Int64Array, num_classes: int, keys: Sequence[str]) -> None:
    """Refuse labels that are no class ids.

    Args:
        labels: Class ids, -1 for none.
        num_classes: Number of classes.
        keys: Names of the images.

    Raises:
        ValueError: A label is outside the range, naming an image that has it.
    """
    wrong = np.flatnonzero((labels < UNKNOWN) | (labels >= num_classes))
    if len(wrong):
        row = int(wrong[0])
        msg = (
            f"Expected labels from 0 to {num_classes - 1} ({num_classes} classes), or {UNKNOWN} for none, but got "
            f"{int(labels[row])} for {keys[row]} and {len(wrong) - 1} more out of range. Number the classes from 0."
        )
        raise ValueError(msg)
