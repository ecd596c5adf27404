"""How long a training step waits for its batch: `python benchmarks/data_wait.py [--root DIR]`.

The images are in memory (the default of every segmentation datamodule), decoded and augmented in the training
process unless `--num_workers` says otherwise. Without `--root` pairs are drawn into a temporary folder; with
it, an ISIC 2018 folder is measured. The share in the last column must stay below 10 %.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Found from a checkout that is not installed too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from datamodules import FolderSegmentationDataModule, ISIC2018DataModule, SegmentationDataModule

_WARM_UP = 3


@dataclass
class Options:
    """Command line of this benchmark; the help texts say what each one means."""

    root: str | None
    image_size: int
    batch_size: int
    num_workers: int
    steps: int
    step_ms: float | None
    width: int


def parse() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="ISIC 2018 folder to measure instead of generated files")
    parser.add_argument("--image_size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that prepare batches")
    parser.add_argument("--steps", type=int, default=60, help="training steps to time")
    parser.add_argument("--step_ms", type=float, help="pretend a step of this length instead of training a network")
    parser.add_argument("--width", type=int, default=32, help="channels of the network of the measured step")
    return Options(**vars(parser.parse_args()))


def write_pairs(folder: Path, count: int, size: int = 256) -> None:
    """Draw pairs of the size of the resized ISIC files: noise, and an ellipse as mask.

    Args:
        folder: Where `images/` and `masks/` are made.
        count: Number of pairs.
        size: Side of the files in pixels.
    """
    generator = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(count):
        radius = generator.uniform(0.2, 0.8, 2)
        mask = (x / radius[0]) ** 2 + (y / radius[1]) ** 2 < 1
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{number}.png")


class Step:
    """One optimiser step of a two-level network with two convolutions a level, or a sleep of given length."""

    def __init__(self, width: int, step_ms: float | None) -> None:
        """Build the network.

        Args:
            width: Channels of its first level.
            step_ms: Length of a pretended step in milliseconds; None trains the network.
        """
        self.step_ms = step_ms
        wide = 2 * width
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, wide, 3, stride=2, padding=1),
            nn.GroupNorm(8, wide),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(wide, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2, 1),
        )
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """Train on a batch.

        Args:
            batch: What the datamodule delivers.
        """
        if self.step_ms is not None:
            time.sleep(self.step_ms / 1000)
            return
        loss = nn.functional.cross_entropy(self.network(batch["image"]), batch["mask"], ignore_index=255)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()


def measure(data: SegmentationDataModule, step: Step, steps: int) -> tuple[list[float], list[float]]:
    """Time waiting and stepping.

    Args:
        data: Datamodule after `setup`.
        step: What is done with a batch.
        steps: How many steps to time.

    Returns:
        Milliseconds of each wait and of each step.
    """
    waits, lengths = [], []
    before = time.perf_counter()
    for number, batch in enumerate(data.train_dataloader()):
        arrived = time.perf_counter()
        step(batch)
        done = time.perf_counter()
        if number >= _WARM_UP:
            waits.append(1000 * (arrived - before))
            lengths.append(1000 * (done - arrived))
        before = time.perf_counter()
        if len(waits) == steps:
            break
    return waits, lengths


def main() -> None:
    """Measure and print one table."""
    options = parse()
    samples = (options.steps + _WARM_UP + 1) * options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        if options.root is None:
            write_pairs(Path(folder), 64)
        kind = FolderSegmentationDataModule if options.root is None else ISIC2018DataModule
        data = kind(
            options.root or folder,
            image_size=options.image_size,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            samples_per_epoch=samples,
        )
        begun = time.perf_counter()
        data.setup("fit")
        setup_seconds = time.perf_counter() - begun
        waits, lengths = measure(data, Step(options.width, options.step_ms), options.steps)
    wait, length = statistics.median(waits), statistics.median(lengths)
    table = Table(title=f"{len(waits)} steps, medians, {torch.get_num_threads()} thread(s)")
    for name in (
        "data",
        "images",
        "size",
        "batch",
        "jobs",
        "setup s",
        "wait ms",
        "step ms",
        "share",
    ):
        table.add_column(name, justify="left" if name == "data" else "right")
    table.add_row(
        options.root or "generated",
        str(sum(data.counts.values())),
        str(options.image_size),
        str(options.batch_size),
        str(options.num_workers),
        f"{setup_seconds:.2f}",
        f"{wait:.2f}",
        f"{length:.2f}",
        f"{wait / length:.1%}",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
