"""Contact sheets of drawn images."""

import io
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
from datamodules.synthetic_images import ClassRow, read

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
    masks = [_values((folder / row.mask_file_name).read_bytes())[0] for row in first]
    classes = artifact.manifest.get("num_classes") or max(2, *(int(mask.max()) + 1 for mask in masks))
    cells = []
    for row, mask in zip(first, masks, strict=True):
        plain, scale = to_pixels(_values(artifact.bytes_of(row)) / 255, _LEAST)
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
    found: dict[int, list[ClassRow]] = {}
    artifact = read(folder, "classes")
    for row in artifact.rows:
        found.setdefault(row.label, []).append(row)
    chosen = [found[label][:_IMAGES_A_CLASS] for label in shown_classes(sorted(found))]
    return class_rows(
        [(rows[0].class_name, [_values(artifact.bytes_of(row)) / 255 for row in rows]) for rows in chosen]
    )


def class_rows(classes: Sequence[tuple[str, Sequence[Tensor]]]) -> Pixels:
    """Draw a row for each class, its name first.

    Args:
        classes: Name and images [C, H, W] in [0, 1] of each, at least one image.

    Returns:
        [height, width, 3].
    """
    rows = []
    for name, images in classes:
        cells = [to_pixels(image, _LEAST_OF_MANY)[0] for image in images]
        rows.append([captioned(np.full_like(cells[0], PAPER), name), *cells])
    return sheet(["class"] + [""] * max(len(row) - 1 for row in rows), rows)


def shown_classes(labels: Sequence[int]) -> list[int]:
    """Return the classes that a picture has room for: of more than 20, 20 that are evenly spread."""
    shown = min(_CLASSES, len(labels))
    return [labels[i * len(labels) // shown] for i in range(shown)]


def _values(encoded: bytes) -> Tensor:
    """[C, H, W] int64 of a picture."""
    with Image.open(io.BytesIO(encoded)) as image:
        values = np.atleast_3d(np.asarray(image))
    return torch.from_numpy(values.astype(np.int64)).movedim(-1, 0)
