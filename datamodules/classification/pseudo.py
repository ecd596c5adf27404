"""Images that a module gives pseudo-labels to, and pseudo-labels in place of the labels of a source."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from datamodules.classification.contents import UNKNOWN, Int64Array
from datamodules.classification.store import PixelStore
from datamodules.classification.streams import EvalImages
from datamodules.pseudo_labels import PseudoLabels, read


class ImagesToLabel(EvalImages):
    """Images to train on, for who gives them labels.

    Args:
        store: Where the images are.
        rows: Rows of this dataset, in its order.
        labels: Class ids that people gave, -1 for none.
        keys: Names of the images.
        splits: What each is to the fit, places in `pseudo_labels.SPLITS`.
        left_out: How many more images the source has to train on, which are no part of the data.
        fingerprint: Identifies them, their uses and given labels, whatever joins them in a fit.
    """

    def __init__(
        self,
        store: PixelStore,
        rows: Int64Array,
        labels: Tensor,
        keys: Sequence[str],
        splits: Int64Array,
        left_out: int = 0,
        fingerprint: str | None = None,
    ) -> None:
        """Remember which rows are whose."""
        super().__init__(store, rows, labels, keys)
        self.splits = splits
        self.left_out = left_out
        self.fingerprint = fingerprint


class PseudoLabelled(NamedTuple):
    """Labels of images.

    Attributes:
        labels: Class ids int64 [N], -1 for none.
        by_people: Which of them people gave, bool [N].
    """

    labels: Int64Array
    by_people: npt.NDArray[np.bool_]


def labels_from(
    folder: str,
    keys: Sequence[str],
    train: npt.NDArray[np.bool_],
    class_names: Sequence[str],
    images_fingerprint: str,
    min_confidence: float = 0.0,
) -> "PseudoLabelled":
    """Look up the pseudo-labels of the training images of a source.

    Args:
        folder: Folder of a PseudoLabels artifact; a relative one is below the current directory.
        keys: Names of all images.
        train: Which of them are to train on [N]; test images, and validation images of the source's own, are not.
        class_names: The classes of the source.
        images_fingerprint: Identifies its images.
        min_confidence: Leave out pseudo-labels that are less sure than that, in [0, 1].

    Returns:
        Class ids, -1 for images that are not trained on, and for those without a pseudo-label (which only an
        artifact that left images out may have) or with one that is not sure enough; and which people gave.

    Raises:
        FileNotFoundError: The folder is missing or not finished.
        ValueError: It is damaged, or it has labels of other images or classes.
    """
    found = read(folder)
    rows = _matched(found, keys, train)
    found.require(class_names, images_fingerprint)
    sure = train & (rows >= 0) & (found.table.confidence[rows] >= min_confidence)
    labels: Int64Array = np.where(sure, found.table.labels[rows], UNKNOWN)
    return PseudoLabelled(labels, sure & found.by_people[rows])


def _matched(found: PseudoLabels, keys: Sequence[str], train: npt.NDArray[np.bool_]) -> Int64Array:
    """Rows of pseudo-labels for images, -1 for those that have none."""
    rows = found.rows_of(keys)
    lost = np.flatnonzero(train & (rows < 0) & (not found.is_selection))
    strangers = len(found.table) - int((rows >= 0).sum())
    if not len(lost) and not strangers:
        return rows
    shown = [f"{len(lost)} of {int(train.sum())} training images have none"] if len(lost) else []
    shown += [f"for example {keys[lost[0]]}"] if len(lost) else []
    if strangers:
        shown.append(f"{strangers} of {len(found.table)} are for images that are not there")
        shown.append(f"for example {found.strangers(keys)[0]}")
    msg = (
        f"Expected `pseudo_labels` for every training image of the source and for no others, but of those in "
        f"{found.folder} {', '.join(shown)}. Label the images anew with the `source` that is trained on here."
    )
    raise ValueError(msg)
