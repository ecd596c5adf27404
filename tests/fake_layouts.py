"""Tiny CelebAMask-HQ and chest X-ray trees in the official layouts, drawn instead of stored.

Everything is a rectangle, so that a test can say what a mask must hold without reading it back.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Box = tuple[int, int, int, int]

# Rows and columns (top, bottom, left, right) in a mask 16 pixels wide, in painting order: "skin" below all
# others.
FACE_BOXES: dict[str, Box] = {
    "skin": (2, 14, 2, 14),
    "nose": (7, 10, 7, 9),
    "l_eye": (4, 6, 3, 6),
    "r_eye": (4, 6, 10, 13),
    "hair": (0, 4, 1, 15),
}
CHEST_BOXES: dict[str, Box] = {
    "left lung": (3, 13, 9, 14),
    "right lung": (3, 13, 2, 7),
    "heart": (8, 12, 6, 11),
    "left clavicle": (2, 4, 9, 14),
    "right clavicle": (2, 4, 2, 7),
}


def box_mask(box: Box, scale: int = 1) -> npt.NDArray[np.uint8]:
    """A mask of 0 and 255 that is `16 * scale` wide."""
    mask = np.zeros((16 * scale, 16 * scale), dtype=np.uint8)
    top, bottom, left, right = (scale * edge for edge in box)
    mask[top:bottom, left:right] = 255
    return mask


def _save(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_celebamask_hq(
    folder: Path,
    numbers: tuple[int, ...] = (0, 1, 2, 3, 2000),
    masks: Literal["parts", "palette"] = "parts",
    mapping: dict[int, int] | None = None,
) -> Path:
    """Write faces with these numbers, masks half as wide as images; returns the root.

    Images with an odd number have no hair. `mapping` gives CelebA's number of each image.
    """
    base = folder / "CelebAMask-HQ"
    ids = {"skin": 1, "nose": 2, "l_eye": 4, "r_eye": 5, "hair": 13}
    for number in numbers:
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        _save(pixels, base / "CelebA-HQ-img" / f"{number}.jpg")
        parts = {name: box for name, box in FACE_BOXES.items() if name != "hair" or number % 2 == 0}
        if masks == "parts":
            for name, box in parts.items():
                part = base / "CelebAMask-HQ-mask-anno" / str(number // 2000) / f"{number:05d}_{name}.png"
                # The official files have three equal channels.
                _save(np.repeat(box_mask(box)[..., None], 3, axis=2), part)
            continue
        whole = np.zeros((16, 16), dtype=np.uint8)
        for name, (top, bottom, left, right) in parts.items():
            whole[top:bottom, left:right] = ids[name]
        picture = Image.fromarray(whole).convert("P")
        picture.putdata(whole.ravel().tolist())
        picture.putpalette([value for index in range(256) for value in (index * 7 % 256, index * 13 % 256, 0)])
        target = base / "CelebAMaskHQ-mask" / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
    if mapping is not None:
        rows = [f"{number}\t{original}\t{original + 1:06d}.jpg" for number, original in mapping.items()]
        text = "\n".join(["idx\torig_idx\torig_file", *rows]) + "\n"
        (base / "CelebA-HQ-to-CelebA-mapping.txt").write_text(text)
    return folder


def write_chest_xray(
    folder: Path, layout: Literal["jsrt", "montgomery", "shenzhen"], n: int = 5, lacking: int = 1
) -> Path:
    """Write n radiographs; returns the root. Of Shenzhen the last `lacking` have no mask."""
    for number in range(1, n + 1):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32)).astype(np.uint8)
        if layout == "jsrt":
            name = f"JPCLN{number:03d}"
            _save(pixels, folder / "images" / f"{name}.png")
            for structure, box in CHEST_BOXES.items():
                _save(box_mask(box), folder / "masks" / structure / f"{name}.gif")
        elif layout == "montgomery":
            name = f"MCUCXR_{number:04d}_0.png"
            _save(pixels, folder / "CXR_png" / name)
            _save(box_mask(CHEST_BOXES["left lung"], 2), folder / "ManualMask" / "leftMask" / name)
            _save(box_mask(CHEST_BOXES["right lung"], 2), folder / "ManualMask" / "rightMask" / name)
        else:
            name = f"CHNCXR_{number:04d}_0"
            _save(pixels, folder / "CXR_png" / f"{name}.png")
            both = box_mask(CHEST_BOXES["left lung"], 2) | box_mask(CHEST_BOXES["right lung"], 2)
            if number <= n - lacking:
                _save(both, folder / "mask" / f"{name}_mask.png")
    return folder
