"""Images a second that are augmented, in batches or one by one in workers: `python benchmarks/augmentation.py`.

The same operations are made by BatchViews, for whole batches in this process (on `--device`), and by WorkerViews, for
single images by Pillow in 0, 1 or 2 workers of a DataLoader. torchvision's RandAugment of Pillow images (operations
only: one strength for all images, no shift, no hole) is there to compare; timm's with uniform strengths asks Pillow for
0 bits now and then, which Pillow 13 refuses. "weak" makes one weak view of an image, "weak + strong" both. The images
are random colours in memory, so nothing is read or decoded. Set OMP_NUM_THREADS=1 to compare cores with cores.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Found from a checkout that is not installed too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import RandAugment

from datamodules import BatchViews, WorkerViews

_NAMES = {"weak": ("weak",), "weak + strong": ("weak", "strong")}


@dataclass
class Options:
    """Command line of this benchmark; the help texts say what each one means."""

    sides: list[int]
    workers: list[int]
    channels: int
    batch_size: int
    strong: Literal["randaugment", "ctaugment", "trivial"]
    seconds: float
    device: str


def parse() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 32, 224], help="sides of the images in pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--strong", choices=("randaugment", "ctaugment", "trivial"), default="randaugment")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to measure for, of each number of the table")
    parser.add_argument("--device", default="cpu", help="where batches are augmented")
    return Options(**vars(parser.parse_args()))


class SingleImages(Dataset[dict[str, Tensor]]):
    """Views of single images, as a worker makes them.

    Args:
        images: uint8 images [N, C, S, S].
        views: What makes the views.
        names: Which views.
        length: Number of items, which repeat the images.
    """

    def __init__(self, images: Tensor, views: WorkerViews, names: tuple[str, ...], length: int) -> None:
        """Remember them."""
        self.images = images
        self.views = views
        self.names = names
        self.length = length

    def __len__(self) -> int:
        """Return the number of items."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Make the views of one image."""
        return self.views(self.images[index % len(self.images)], self.names, index)


def rate(stream: Iterator[object], batch_size: int, seconds: float, device: str) -> float:
    """Images a second, after two batches that are not counted.

    Args:
        stream: Endless batches.
        batch_size: Images of a batch.
        seconds: How long to measure.
        device: Whose queue to wait for.
    """
    for _ in range(2):
        next(stream)
    if device != "cpu":
        torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(stream)
        count += batch_size
        if device != "cpu":
            torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def in_batches(images: Tensor, names: tuple[str, ...], options: Options) -> Iterator[object]:
    """Augment whole batches."""
    views = BatchViews(images.shape[-1], strong=options.strong)
    generator = torch.Generator().manual_seed(0)
    while True:
        yield views(images.to(options.device).float().div_(255), names, generator)


def in_workers(images: Tensor, names: tuple[str, ...], workers: int, options: Options) -> Iterator[object]:
    """Augment single images in workers, and put them together."""
    data = SingleImages(images, WorkerViews(images.shape[-1], strong=options.strong), names, 10**7)
    yield from DataLoader(data, options.batch_size, num_workers=workers)


def by_torchvision(images: Tensor) -> Iterator[object]:
    """Apply torchvision's RandAugment to single images."""
    augment = RandAugment()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    while True:
        changed = [torch.from_numpy(np.array(augment(picture))).permute(2, 0, 1) for picture in pictures]
        yield torch.stack(changed).float() / 255


def streams(images: Tensor, names: tuple[str, ...], options: Options) -> Iterator[tuple[str, Iterator[object]]]:
    """Every way to make views, and what it is called."""
    yield f"batches on {options.device}", in_batches(images, names, options)
    for workers in options.workers:
        yield f"{workers} workers", in_workers(images, names, workers, options)
    if "strong" in names and options.channels == 3:
        yield "torchvision, operations only", by_torchvision(images)


def main() -> None:
    """Measure and print the table."""
    options = parse()
    table = Table("side", "by", *_NAMES, title=f"Images a second, {options.strong}, batches of {options.batch_size}")
    for side in options.sides:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(options.batch_size, options.channels, 5, 5, generator=generator)
        images = (F.interpolate(coarse, (side, side), mode="bilinear") * 255).to(torch.uint8)
        rows: dict[str, list[float]] = {}
        for names in _NAMES.values():
            for name, stream in streams(images, names, options):
                rows.setdefault(name, []).append(rate(stream, options.batch_size, options.seconds, options.device))
        for name, rates in rows.items():
            table.add_row(str(side), name, *[""] * (len(_NAMES) - len(rates)), *(f"{number:,.0f}" for number in rates))
        table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
