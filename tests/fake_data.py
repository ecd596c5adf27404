"""Tiny data sets in the official folder layouts, drawn instead of stored."""

import pickle
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image


def draw_pair(seed: int, height: int = 24, width: int = 32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A dark ellipse on bright noise and its mask of zeros and ones."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    cy, cx = generator.uniform(0.35, 0.65, 2)
    ry, rx = generator.uniform(0.15, 0.3, 2)
    mask = ((y / height - cy) / ry) ** 2 + ((x / width - cx) / rx) ** 2 < 1
    image = generator.integers(150, 230, (height, width, 3))
    image[mask] //= 3
    return image.astype(np.uint8), mask.astype(np.uint8)


def write_isic2018(folder: Path, n: int = 6, part: str = "Training", first: int = 0) -> Path:
    """Write n ISIC 2018 pairs and the files of the archives that are no masks; returns the root."""
    images = folder / f"ISIC2018_Task1-2_{part}_Input"
    masks = folder / f"ISIC2018_Task1_{part}_GroundTruth"
    for path in (images, masks):
        path.mkdir(parents=True, exist_ok=True)
        (path / "LICENSE.txt").write_text("CC-0\n")
        (path / "ATTRIBUTION.txt").write_text("nobody\n")
    for number in range(first, first + n):
        image, mask = draw_pair(number)
        Image.fromarray(image).save(images / f"ISIC_{number:07d}.jpg", quality=95)
        Image.fromarray(image).save(images / f"ISIC_{number:07d}_superpixels.png")
        Image.fromarray(mask * 255).save(masks / f"ISIC_{number:07d}_segmentation.png")
    return folder


def write_ph2(folder: Path, n: int = 10) -> Path:
    """Write n PH2 cases, 2 : 2 : 1 over the diagnoses, with the official table; returns the root."""
    base = folder / "PH2Dataset"
    rows = []
    for position in range(n):
        name = f"IMD{position + 2:03d}"
        case = base / "PH2 Dataset images" / name
        image, mask = draw_pair(1000 + position)
        (case / f"{name}_Dermoscopic_Image").mkdir(parents=True)
        (case / f"{name}_lesion").mkdir()
        Image.fromarray(image).save(case / f"{name}_Dermoscopic_Image" / f"{name}.bmp")
        Image.fromarray(mask * 255).convert("1").save(case / f"{name}_lesion" / f"{name}_lesion.bmp")
        rows.append((name, (0, 0, 1, 1, 2)[position % 5]))
    (base / "PH2_dataset.txt").write_text(ph2_table(rows))
    return folder


def ph2_table(rows: list[tuple[str, int]]) -> str:
    """The table as the PH2 archive has it: bars between columns, a legend behind the rows."""
    lines = ["|| Name   || Histological Diagnosis | Clinical Diagnosis | Asymmetry | Colors ||"]
    lines += [
        f"|| {name} ||                        |        {code}           |     1     | 3  4   ||" for name, code in rows
    ]
    lines += [
        "",
        "Legends:",
        "  Clinical Diagnosis:",
        "    0 - Common Nevus",
        "    1 - Atypical Nevus",
        "    2 - Melanoma",
    ]
    return "\n".join(lines) + "\n"


def write_folder(folder: Path, n: int = 6, num_classes: int = 2, mask_suffix: str = "") -> Path:
    """Write n pairs into images/ and masks/, masks as class ids; returns the root."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(n):
        image, mask = draw_pair(2000 + number)
        ids = mask * (1 + number % (num_classes - 1))
        Image.fromarray(image).save(folder / "images" / f"photo{number}.png")
        Image.fromarray(ids.astype(np.uint8)).save(folder / "masks" / f"photo{number}{mask_suffix}.png")
    return folder


def write_classes(folder: Path, n: int = 6) -> Path:
    """Write n images a class into train/ and test/, each class in a folder of its name; returns the root."""
    for split in ("train", "test"):
        for position, name in enumerate(("benign", "malignant", "other")):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(n):
                image, _ = draw_pair(3000 + 100 * position + number)
                Image.fromarray(image).save(place / f"photo{number}.png")
    return folder


def write_listed(folder: Path, n: int = 4) -> Path:
    """Write n images of each of two classes and n of none, and labels.csv for the first ones; returns the root."""
    rows = ["path,label\n"]
    for position, name in enumerate(("benign", "malignant", "")):
        place = folder / f"ward{position}"
        place.mkdir(parents=True)
        for number in range(n):
            image, _ = draw_pair(5000 + 100 * position + number)
            Image.fromarray(image).save(place / f"{number}.png")
            rows += [f"ward{position}/{number}.png,{name}\n"] if name else []
    (folder / "labels.csv").write_text("".join(rows))
    return folder


def write_imagenet(root: Path, n: int = 4) -> Path:
    """Write n training images of each of three classes, one to test on, and a list of two a class; returns the root."""
    listed = []
    for position, name in enumerate(("n01440764", "n01443537", "n01484850")):
        for split, count in (("train", n), ("val", 1)):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                image, _ = draw_pair(4000 + 100 * position + number)
                Image.fromarray(image).save(place / f"{name}_{number}.JPEG", format="JPEG")
        listed += [f"{name}_{number}.JPEG\n" for number in range(2)]
    (root / "2imgs_class.txt").write_text("".join(listed))
    return root


def write_mnist(root: Path, train: int, test: int) -> Path:
    """Write images of 28 px in the files of MNIST, image i of class i % 10 and as bright as i; returns the root."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        images = np.zeros((count, 28, 28), dtype=np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return root


def write_cifar10(root: Path, n: int) -> Path:
    """Write n images of 32 px into each of the batches of CIFAR-10, image i of class i % 10; returns the root.

    torchvision compares their checksums with the real ones': `torchvision.datasets.cifar.check_integrity`.
    """
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        pixels = np.random.default_rng(seed).integers(0, 256, (n, 3 * 32 * 32), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number % 10 for number in range(n)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {number}" for number in range(10)]}))
    return root
