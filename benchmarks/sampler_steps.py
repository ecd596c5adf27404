"""What few sampling steps cost: `python benchmarks/sampler_steps.py [--calls 10 20 ...]`.

No network: images are drawn from a mixture of Gaussians, whose denoiser is known, so that every error is the
sampler's. Each pixel is one sample of 4 numbers, and its mask tells which of them exceed a threshold. Columns, in
percent: how much narrower or wider the components come out (std), how far the share of a component is off
(share), how many mask values contradict the image (wrong), and how many are neither clearly 0 nor clearly 1
(soft). True pairs have 0 everywhere, but for the noise of a finite draw, which is printed under the table.
"""

import argparse
import math
import sys
import time
from pathlib import Path

# Found from a checkout that is not installed too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_modules.diffusion import (
    SAMPLERS,
    EDMProcess,
    NoiseProcess,
    SamplerName,
    VPProcess,
    sample,
    seeded_generators,
    seeded_noise,
)

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
MEANS = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0, 1.0, 1.0, 0.5], [-1.0, -1.0, -0.5, 1.5]])
STD = 0.4
THRESHOLD = 0.3
SIZE = 64


def denoiser(z: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """Return the mean of image and mask given the noisy image.

    Args:
        z: Noisy images and their masks, [B, 8, H, W]; the masks are not looked at.
        sigma: Noise level of each, [B].
        label: Not used.

    Returns:
        Posterior means, [B, 8, H, W].
    """
    variance = sigma[:, None, None, None, None] ** 2
    total = STD**2 + variance
    offset = z[:, None, :4] - MEANS[:, :, None, None]
    distance = offset.square().sum(2, keepdim=True)
    share = (WEIGHTS.log()[:, None, None, None] - distance / (2 * total)).softmax(1)
    mean = MEANS[:, :, None, None] + STD**2 / total * offset
    mask = torch.special.ndtr((mean - THRESHOLD) / (STD**2 * variance / total).sqrt())
    return torch.cat([(share * mean).sum(1), (share * mask).sum(1)], 1)


def measure(name: SamplerName, process: NoiseProcess, steps: int, images: int) -> list[float]:
    """Draw pairs and compare them with the mixture.

    Args:
        name: Sampler.
        process: Gives the noise levels.
        steps: Number of steps.
        images: Number of images of SIZE x SIZE samples.

    Returns:
        Relative error of the standard deviation within the components, signed, largest error of a share,
        share of mask values that contradict the image, and share of soft mask values.
    """
    generators, sigmas = seeded_generators(range(images)), process.sigmas(steps)
    z = sample(name, denoiser, sigmas[0] * seeded_noise(generators, (8, SIZE, SIZE)), sigmas, generators)
    rows = z.movedim(1, -1).flatten(0, -2)
    x, y = rows[:, :4], rows[:, 4:]
    component = torch.cdist(x, MEANS).argmin(1)
    spread = (x - MEANS[component]).square().mean().sqrt()
    share = component.bincount(minlength=len(MEANS)) / len(x)
    return [
        float(spread / STD - 1),
        float((share - WEIGHTS).abs().max()),
        float(((y > 0.5) != (x > THRESHOLD)).float().mean()),
        float(((y > 0.05) & (y < 0.95)).float().mean()),
    ]


def main() -> None:
    """Measure every sampler with every process at equal numbers of denoiser calls and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, nargs="+", default=[10, 20, 50, 100, 250, 500], help="denoiser calls")
    parser.add_argument("--images", type=int, default=5, help=f"images of {SIZE * SIZE} samples")
    options = parser.parse_args()
    table = Table("process", "sampler", "calls", "std", "share", "wrong", "soft", "seconds")
    processes: dict[str, NoiseProcess] = {"vp": VPProcess(), "edm": EDMProcess()}
    for label, process in processes.items():
        for name in SAMPLERS:
            for calls in options.calls:
                # Heun calls twice per step, once in the last one.
                steps = (calls + 1) // 2 if name == "heun" else calls
                begin = time.perf_counter()
                errors = measure(name, process, steps, options.images)
                seconds = f"{time.perf_counter() - begin:.1f}"
                table.add_row(label, name, str(calls), *(f"{100 * error:.2f}" for error in errors), seconds)
    Console().print(table)
    n = options.images * SIZE * SIZE
    print(f"Noise of the draw: std {100 / math.sqrt(8 * n):.2f} %, share {50 / math.sqrt(n):.2f} %.")


if __name__ == "__main__":
    main()
