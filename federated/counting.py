"""Counts of one client, which the server is told only the sum of over all clients."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamodules import pseudo_labels
from datamodules.artifact_files import MANIFEST
from datamodules.classification.contents import UNKNOWN, Contents
from federated.selection import THRESHOLDS, count_confidences

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predicted:
    """Classes of images.

    Attributes:
        truth: True ones [N].
        label: Predicted ones [N].
        confidence: How sure the module is of these [N].
    """

    truth: Int64Array
    label: Int64Array
    confidence: npt.NDArray[np.float64]


def count_labels(contents: Contents, num_classes: int) -> Int64Array:
    """Count the labelled images to train on.

    Args:
        contents: The images of a client.
        num_classes: Classes K.

    Returns:
        Images of each class [K].
    """
    usable = (np.asarray(contents.roles) == "train") & (contents.labels != UNKNOWN)
    if contents.given is not None:
        usable &= contents.given
    return np.bincount(contents.labels[usable], minlength=num_classes).astype(np.int64)


def count_confusion(found: Predicted, num_classes: int, min_confidence: float = 0.0) -> Int64Array:
    """Count pairs of true and predicted class.

    Args:
        found: The classes.
        num_classes: Classes K.
        min_confidence: Count images that the module is at least that sure of.

    Returns:
        Counts [K, K], row = true class, column = predicted class.
    """
    pairs = (found.truth * num_classes + found.label)[found.confidence >= min_confidence]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def count_by_confidence(found: Predicted, num_classes: int) -> Int64Array:
    """Count pairs of true and predicted class from each of THRESHOLDS on.

    Args:
        found: The classes.
        num_classes: Classes K.

    Returns:
        Counts [T, K, K], see `count_confusion`.
    """
    return np.stack([count_confusion(found, num_classes, threshold) for threshold in THRESHOLDS])


def count_guesses(labelled: Path, num_classes: int) -> Int64Array:
    """Count how sure the pseudo-labels of images without label are.

    Args:
        labelled: Folder of all pseudo-labels of a client.
        num_classes: Classes K.

    Returns:
        Counts [E, K], see `count_confidences`.

    Raises:
        FileNotFoundError: Nothing was labelled yet.
        ValueError: The folder is damaged.
    """
    found = pseudo_labels.read(labelled)
    guessed = ~found.by_people
    return count_confidences(found.table.labels[guessed], found.table.confidence[guessed], num_classes)


def count_selection(labelled: Path, selected: Path, contents: Contents, num_classes: int) -> Int64Array:
    """Count pseudo-labels, kept ones, and, FOR REPORTS ONLY, right ones as far as hidden labels tell.

    Args:
        labelled: Folder of all pseudo-labels of a client.
        selected: Folder of those kept; without one none is.
        contents: The images of the client.
        num_classes: Classes K.

    Returns:
        For each class that images were taken for [K, 5]: all, kept ones, those whose truth is known, the right ones of
        all, the right ones of the kept.

    Raises:
        FileNotFoundError: Nothing was labelled yet.
        ValueError: A folder is damaged.
    """
    found = pseudo_labels.read(labelled)
    keys, labels, guessed = found.table.keys.to_pylist(), found.table.labels, ~found.by_people
    kept = np.zeros(len(keys), dtype=bool)
    if (selected / MANIFEST).is_file():
        kept = pseudo_labels.read(selected).rows_of(keys) >= 0
    truth_of = dict(zip(contents.keys, contents.labels.tolist(), strict=True))
    truth = np.array([truth_of.get(key, UNKNOWN) for key in keys], dtype=np.int64)
    right = labels == truth
    columns = (guessed, guessed & kept, guessed & (truth != UNKNOWN), guessed & right, guessed & right & kept)
    return np.stack([np.bincount(labels[rows], minlength=num_classes) for rows in columns], axis=1).astype(np.int64)
