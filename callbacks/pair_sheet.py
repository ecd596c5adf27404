"""A contact sheet of drawn (image, mask) pairs."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from callbacks.drawing import PREDICTION, Pixels, captioned, draw_contours, enlarge, sheet, tint, to_pixels
from datamodules.synthetic_images import read

_SHOWN = 16
_PAIRS_A_ROW = 4


def pair_sheet(folder: Path) -> Pixels:
    """Draw the first pairs of a finished artifact, each image beside its mask's outline.

    Args:
        folder: Folder of a SyntheticImages artifact.

    Returns:
        [height, width, 3].
    """
    artifact = read(folder)
    first = artifact.rows[:_SHOWN]
    masks = [_values(folder / row.mask_file_name)[0] for row in first]
    classes = artifact.manifest.get("num_classes") or max(2, *(int(mask.max()) + 1 for mask in masks))
    cells = []
    for row, mask in zip(first, masks, strict=True):
        plain, scale = to_pixels(_values(folder / row.file_name) / 255, 128)
        labels = enlarge(mask, scale)
        outlined = draw_contours(tint(plain, labels, classes), labels, PREDICTION, 2 if classes == 2 else 1)
        cells += [plain, captioned(outlined, f"confidence {row.confidence:.3f}")]
    width = 2 * min(_PAIRS_A_ROW, len(first))
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return sheet(["image", "mask (red)"] * (width // 2), rows)


def _values(path: Path) -> Tensor:
    """[C, H, W] int64 of a picture."""
    with Image.open(path) as image:
        values = np.atleast_3d(np.asarray(image))
    return torch.from_numpy(values.astype(np.int64)).movedim(-1, 0)
