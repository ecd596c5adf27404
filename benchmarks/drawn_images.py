"""What it takes to write and read what stages hand on: `python benchmarks/drawn_images.py [--images 128000]`.

Drawn images of classes as loose files and as tar shards, then pseudo-labels. Nothing is trained: the images are noise,
and encoding them is part of writing. "one at random" is an image of any place in the folder, not decoded. Memory is the
most that a process of its own had beyond what it began with; it is told on Linux only. `--labels 1281167` are the
images of ImageNet.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Found from a checkout that is not installed too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from datamodules import DrawRequest, pseudo_labels, synthetic_images
from datamodules.synthetic_images import Drawing

_RANDOM = 2000


@dataclass
class Options:
    """Command line of this benchmark; the help texts say what each one means."""

    images: int
    loose: int
    labels: int
    image_size: int
    batch_size: int
    classes: int
    folder: str | None


def parse() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="images to write as shards; whole classes are written")
    parser.add_argument("--loose", type=int, default=1000, help="images to write as files of their own")
    parser.add_argument("--labels", type=int, default=50_000, help="pseudo-labels to write")
    parser.add_argument("--image_size", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=128, help="images of a block, and so of a shard")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--folder", help="where to write and remove; the folder for temporary files if left out")
    return Options(**vars(parser.parse_args()))


def request_of(options: Options, count: int) -> DrawRequest:
    """Ask for so many images, the same number of each class.

    Args:
        options: Command line.
        count: How many, rounded up to whole classes.
    """
    return DrawRequest(
        None,
        options.image_size,
        batch_size=options.batch_size,
        images_per_class=-(-count // options.classes),
        num_classes=options.classes,
    )


def write_images(folder: Path, options: Options, count: int, shards_above: int | None) -> None:
    """Write noise as an artifact of images of classes.

    Args:
        folder: Where to.
        options: Command line.
        count: Number of images.
        shards_above: 0 for shards, None for loose files.
    """
    request = request_of(options, count)
    size = options.image_size
    noise = torch.rand(options.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    drawing = Drawing(folder, request, shards_above)
    drawing.begin(synthetic_images.Origin(request, "w" * 64, options.classes))
    for block in drawing.missing():
        asked = request.batch(block)
        drawing.write(block, {"image": noise[: len(asked["seed"])], "label": asked["label"], "seed": asked["seed"]})
    drawing.finish()


def read_images(folder: Path) -> float:
    """Read table and manifest, then some images at random.

    Args:
        folder: A finished artifact.

    Returns:
        Microseconds of an image.
    """
    artifact = synthetic_images.read(folder, "classes")
    chosen = np.random.default_rng(0).integers(0, len(artifact.rows), _RANDOM)
    begun = time.perf_counter()
    for number in chosen:
        artifact.bytes_of(artifact.rows[number])
    return 1e6 * (time.perf_counter() - begun) / _RANDOM


def only_read(folder: Path) -> None:
    """Read table and manifest."""
    synthetic_images.read(folder, "classes")


def write_labels(folder: Path, options: Options) -> None:
    """Write pseudo-labels of images that are named as ImageNet's are.

    Args:
        folder: Where to.
        options: Command line.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, options.classes, options.labels)
    keys = [f"n{label:08d}/n{label:08d}_{row}.JPEG" for row, label in enumerate(labels)]
    confidence = rng.random(options.labels, np.float32)
    table = pseudo_labels.LabelTable(keys, labels, confidence, np.ones(options.labels, np.int64))
    names = [f"n{label:08d}" for label in range(options.classes)]
    pseudo_labels.write(folder, table, pseudo_labels.Origin(names, "f" * 64))


def only_read_labels(folder: Path) -> None:
    """Read a table of pseudo-labels."""
    pseudo_labels.read(folder)


def memory(name: str) -> float | None:
    """Megabytes of this process as Linux tells them, VmRSS now or VmHWM at most; None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


def alone(task: Callable[..., object], *arguments: object) -> tuple[float, str, object]:
    """Do something in a process of its own.

    Args:
        task: A function of this file.
        arguments: What it takes.

    Returns:
        Seconds, megabytes, and what it returned.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (task, *arguments))


def measured(task: Callable[..., object], *arguments: object) -> tuple[float, str, object]:
    """Do something and measure it, see `alone`."""
    before, begun = memory("VmRSS"), time.perf_counter()
    result = task(*arguments)
    seconds, most = time.perf_counter() - begun, memory("VmHWM")
    return seconds, "" if before is None or most is None else f"{most - before:.0f}", result


def main() -> None:
    """Measure and print one table."""
    options = parse()
    table = Table(title=f"images of {options.image_size} px in blocks of {options.batch_size}")
    for name in ("what", "number", "write s", "MB", "read s", "MB", "one at random", "files", "MB on disk"):
        table.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for what, count, above in (("loose files", options.loose, None), ("shards", options.images, 0)):
            folder = Path(place) / what
            add(table, what, request_of(options, count).total, folder, (write_images, options, count, above), only_read)
        add(table, "pseudo-labels", options.labels, Path(place) / "labels", (write_labels, options), only_read_labels)
    Console().print(table)


def add(
    table: Table,
    what: str,
    count: int,
    folder: Path,
    writing: tuple[Callable[..., None], *tuple[object, ...]],
    reading: Callable[[Path], None],
) -> None:
    """Measure one kind of artifact.

    Args:
        table: Gets the row.
        what: Its name.
        count: How many things are written.
        folder: Where to.
        writing: Writes it into a folder; what it takes besides.
        reading: Reads it.
    """
    write, *arguments = writing
    written, write_memory, _ = alone(write, folder, *arguments)
    read, read_memory, _ = alone(reading, folder)
    at_random = f"{alone(read_images, folder)[2]:.0f} µs" if reading is only_read else ""
    files = [path for path in folder.rglob("*") if path.is_file()]
    on_disk = sum(512 * path.stat().st_blocks for path in files) / 1e6
    cells = (f"{written:.2f}", write_memory, f"{read:.2f}", read_memory, at_random, str(len(files)), f"{on_disk:.1f}")
    table.add_row(what, str(count), *cells)


if __name__ == "__main__":
    main()
