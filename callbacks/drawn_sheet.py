"""Contact sheets of drawn images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from callbacks.drawing import (
    PAPER,
    PREDICTION,
    Pixels,
    captioned,
    draw_contours,
    enlarge,
    sheet,
    tint,
    to_pixels,
)
from datamodules.synthetic_images import ClassRow, SyntheticImages, read

_SHOWN = 16
_PAIRS_A_ROW = 4
_CLASSES = 20
_IMAGES_A_CLASS = 10
_LEAST = 128
_LEAST_OF_MANY = 64


def pair_sheet(folder: Path) -> Pixels:
    """Draw the first pairs of a finished artifact, each image beside its mask's outline.

    Args:
        folder: Folder of a SyntheticImages artifact of pairs.

    Returns:
        [height, width, 3].
    """
    artifact = read(folder)
    first = artifact.rows[:_SHOWN]
    masks = [_values(folder / row.mask_file_name)[0] for row in first]
    classes = artifact.manifest.get("num_classes") or max(2, *(int(mask.max()) + 1 for mask in masks))
    cells = []
    for row, mask in zip(first, masks, strict=True):
        plain, scale = to_pixels(_values(folder / row.file_name) / 255, _LEAST)
        labels = enlarge(mask, scale)
        outlined = draw_contours(tint(plain, labels, classes), labels, PREDICTION, 2 if classes == 2 else 1)
        cells += [plain, captioned(outlined, f"confidence {row.confidence:.3f}")]
    width = 2 * min(_PAIRS_A_ROW, len(first))
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return sheet(["image", "mask (red)"] * (width // 2), rows)


def class_sheet(folder: Path) -> Pixels:
    """Draw the first images of each class of a finished artifact, a row each after the name of the class.

    Args:
        folder: Folder of a SyntheticImages artifact of classes. Of more than 20 classes, 20 evenly spread ones are
            shown.

    Returns:
        [height, width, 3].
    """
    chosen = _first_of_each(read(folder, "classes"))
    rows = []
    for images in chosen:
        cells = [to_pixels(_values(folder / row.file_name) / 255, _LEAST_OF_MANY)[0] for row in images]
        rows.append([captioned(np.full_like(cells[0], PAPER), images[0].class_name), *cells])
    return sheet(["class"] + [""] * max(map(len, chosen)), rows)


def _first_of_each(artifact: SyntheticImages[ClassRow]) -> list[Sequence[ClassRow]]:
    """The first images of some classes, in the order of their numbers."""
    found: dict[int, list[ClassRow]] = {}
    for row in artifact.rows:
        found.setdefault(row.label, []).append(row)
    labels = sorted(found)
    shown = min(_CLASSES, len(labels))
    return [found[labels[i * len(labels) // shown]][:_IMAGES_A_CLASS] for i in range(shown)]


def _values(path: Path) -> Tensor:
    """[C, H, W] int64 of a picture."""
    with Image.open(path) as image:
        values = np.atleast_3d(np.asarray(image))
    return torch.from_numpy(values.astype(np.int64)).movedim(-1, 0)
