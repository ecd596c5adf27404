"""Peak memory and time of LEDM's pixel classifiers on an image of 256 px: features at full resolution, and here.

    python -m benchmarks.ledm_memory

The features are random maps with the shapes that the network of base width 128 gives at 256 px: blocks 5, 6, 7, 8 and
12, at three noise levels, 4224 channels in all. Ten classifiers, two classes, float32, one thread. Compared are:

- `concatenate`: upsample every map, concatenate, run each classifier on all pixels (as the paper's code does);
- `in place`: the same, but every map is upsampled straight into its place in one tensor, so nothing is there twice;
- `low resolution`: PixelClassifiers.predict.

Each way runs in its own process. Memory is the peak of the resident set (VmHWM of /proc/self/status, which Linux resets
on request) minus what was resident before, without and with the maps themselves (50 MB in all three ways); every way
first runs on a tiny image, so that libraries are loaded. The time is that of the same run, or of the fastest where
`--rounds` asks for more. The differences are those of the mean probabilities and of the majority vote.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

from lightning_modules.networks.pixel_classifiers import PixelClassifiers

SIDE, LEVELS, MEMBERS, CLASSES = 256, 3, 10, 2
SHAPES = [(512, 32), (256, 32), (256, 32), (256, 64), (128, 128)]
"""Channels and side of the blocks 5, 6, 7, 8 and 12."""
MEGABYTE = 1e6


def ensemble() -> PixelClassifiers:
    """Ten classifiers whose outputs differ from pixel to pixel."""
    torch.manual_seed(0)
    classifiers = PixelClassifiers(LEVELS * sum(channels for channels, _ in SHAPES), CLASSES, MEMBERS).eval()
    for weight in classifiers.weights:
        nn.init.normal_(weight, std=2 * weight.shape[1] ** -0.5)
    return classifiers


def maps(side: int) -> list[Tensor]:
    """Random maps of the blocks, as for an image of `side` pixels."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(channels, size * side // SIDE) for channels, size in SHAPES]
    return [torch.randn(1, c, s, s, generator=generator) for _ in range(LEVELS) for c, s in shapes]


def separate(classifiers: PixelClassifiers) -> list[nn.Sequential]:
    """The classifiers as networks of their own."""
    networks = []
    for member in range(classifiers.num_members):
        layers: list[nn.Module] = []
        for weight, bias in zip(classifiers.weights, classifiers.biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[2])
            linear.load_state_dict({"weight": weight[member].t(), "bias": bias[member]})
            layers += [linear, nn.ReLU(), nn.BatchNorm1d(weight.shape[2])]
        networks.append(nn.Sequential(*layers[:-2]).eval())
    return networks


def vote(networks: list[nn.Sequential], vectors: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Mean probabilities [K, H, W] and share of votes [K, H, W], from feature vectors [pixels, D]."""
    p = vectors.new_zeros(len(vectors), CLASSES)
    votes = torch.zeros_like(p)
    for network in networks:
        logits = network(vectors)
        p += logits.softmax(1)
        votes += F.one_hot(logits.argmax(1), CLASSES)
    p, votes = ((t / len(networks)).t().reshape(CLASSES, side, side) for t in (p, votes))
    return p, votes


def upsampled(features: Tensor, side: int) -> Tensor:
    """A map at the image's resolution."""
    return F.interpolate(features, (side, side), mode="bilinear", align_corners=False)


def concatenate(networks: list[nn.Sequential], features: list[Tensor], side: int) -> tuple[Tensor, Tensor]:
    """Full resolution as it is usually written."""
    vectors = torch.cat([upsampled(f, side) for f in features], 1)
    return vote(networks, vectors[0].flatten(1).t(), side)


def in_place(networks: list[nn.Sequential], features: list[Tensor], side: int) -> tuple[Tensor, Tensor]:
    """Full resolution with as little as it needs."""
    vectors = torch.empty(sum(f.shape[1] for f in features), side, side)
    first = 0
    for f in features:
        vectors[first : first + f.shape[1]] = upsampled(f, side)[0]
        first += f.shape[1]
    return vote(networks, vectors.flatten(1).t(), side)


def low_resolution(classifiers: PixelClassifiers, features: list[Tensor], side: int) -> tuple[Tensor, Tensor]:
    """The way of this project."""
    said = classifiers.predict(features, (side, side))
    return said.probabilities[0], said.votes[0]


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MEGABYTE for line in lines if line.startswith(f"{field}:"))


def peak_of(work: Callable[[], object]) -> float:
    """How far the resident set of this process rises above where it is, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


@torch.no_grad()
def measure(way: str, rounds: int, result: str) -> None:
    """Run one way in this process, keep its result, print what was measured."""
    torch.set_num_threads(1)
    classifiers = ensemble()
    networks = separate(classifiers)

    def run(features: list[Tensor], side: int) -> tuple[Tensor, Tensor]:
        if way == "low resolution":
            return low_resolution(classifiers, features, side)
        return (concatenate if way == "concatenate" else in_place)(networks, features, side)

    run(maps(32), 32)
    seconds: list[float] = []
    said: list[tuple[Tensor, Tensor]] = []

    def timed() -> None:
        start = time.perf_counter()
        said[:] = [run(features, SIDE)]
        seconds.append(time.perf_counter() - start)

    features = maps(SIDE)
    own = sum(f.numel() * f.element_size() for f in features) / MEGABYTE
    peak = peak_of(timed)
    for _ in range(1, rounds):
        timed()
    torch.save(said[0], result)
    print(json.dumps({"peak": peak, "maps": own, "seconds": min(seconds)}))


def compare(rounds: int) -> None:
    """Print a row for each way, with the low resolution as the unit."""
    found, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("concatenate", "in place", "low resolution"):
            file = str(Path(folder, "result.pt"))
            command = [sys.executable, "-m", "benchmarks.ledm_memory", "--way", way, "--rounds", str(rounds)]
            done = subprocess.run([*command, "--result", file], check=True, capture_output=True, text=True)
            found[way] = json.loads(done.stdout)
            results[way] = torch.load(file, weights_only=True)
    own = found["low resolution"]
    print("| way | peak without maps | peak with maps | seconds an image | greatest difference | other votes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, row in found.items():
        total, least = row["peak"] + row["maps"], own["peak"] + own["maps"]
        difference = (results[way][0] - results["low resolution"][0]).abs().max()
        other = (results[way][1].argmax(0) != results["low resolution"][1].argmax(0)).sum()
        times = [row["peak"] / own["peak"], total / least, row["seconds"] / own["seconds"]]
        cells = [f"{row['peak']:.0f} MB", f"{total:.0f} MB", f"{row['seconds']:.2f}"]
        shown = " | ".join(f"{cell} ({ratio:.1f}x)" for cell, ratio in zip(cells, times, strict=True))
        print(f"| {way} | {shown} | {difference:.1e} | {other} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="timed runs")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments.way, arguments.rounds, arguments.result)
    else:
        compare(arguments.rounds)
