"""What does leaving out classes of little weight do to what a network learns from 100 classes?

    python benchmarks/threshold_bias.py

A small network is trained with TDSMDiffusion's loss on points in 16 dimensions, at 40 % symmetric label noise: 100
normal distributions whose means lie around a common one, so posterior and clean denoisers D* are known exactly, and the
weights with them. The network sees all noise levels equally often (the logarithm of sigma is uniform). The rows:

- `clean labels` and `noisy labels`: plain denoising score matching (DSM);
- `exact` with threshold 0, and with 0.01 as in the code released with the paper (arXiv 2402.17517), where the weights
  that are left are not renormalised; with much noise each other class weighs 0.4 / 99, so all are dropped;
- `sampled`.

For each bin of the noise level, the error of the learned D relative to D*, both of noisy points of a class and asked
for this class: sqrt(E |D - D*|^2 / E |D*|^2). The last column is the length of the mean estimate over that of the right
one in the last bin: 1 / 0.6 = 1.67 is expected where only the given label is left, with 0.6 of the weight.
"""

import argparse
import math
import time
from itertools import pairwise
from typing import Any

import torch
from gaussian_classes import GaussianClasses, KnownPosterior
from torch import Tensor, nn

from lightning_modules.diffusion.denoisers import ClassDenoiser
from lightning_modules.diffusion.noise import EDMProcess
from lightning_modules.diffusion.transition import SymmetricTransition
from lightning_modules.tdsm_diffusion import TDSMDiffusion

CLASSES, DIMENSIONS, RATE = 100, 16, 0.4
COMMON, SPREAD_OF_MEANS, STD = 0.3, 0.35, 0.357
"""Mean of the class means in each dimension, their standard deviation, and that of a class."""
EDGES = (0.05, 0.2, 0.8, 3.0, 20.0)
"""Edges of the bins of sigma; training covers all of them."""
RELEASED = 0.01

ROWS: dict[str, tuple[bool, dict[str, Any]]] = {
    "clean labels": (False, {"weighting": "none"}),
    "noisy labels": (True, {"weighting": "none"}),
    "exact, threshold 0.01, as released": (True, {"others": "exact", "threshold": RELEASED, "renormalize": False}),
    "exact, threshold 0.01, renormalised": (True, {"others": "exact", "threshold": RELEASED}),
    "exact": (True, {"others": "exact"}),
    "sampled": (True, {"others": "sampled"}),
}
"""Whether labels are noisy, and arguments of TDSMDiffusion."""


class PointNetwork(nn.Module):
    """A perceptron of points [B, D, 1, 1]; the class joins at every layer."""

    num_classes: int | None = None
    null_label: int | None = None
    in_channels, image_size = DIMENSIONS, 1

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.first, self.second = nn.Linear(DIMENSIONS + 4, width), nn.Linear(width, width)
        self.last = nn.Linear(width, DIMENSIONS)

    def reset_classes(self, num_classes: int) -> None:
        """Start with new classes."""
        self.num_classes = num_classes
        self.classes = nn.Embedding(num_classes, 2 * self.width + DIMENSIONS)
        nn.init.zeros_(self.classes.weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Map c_in x, t and labels to an output like x."""
        level = torch.stack([t, t**2, torch.sin(4 * t), torch.cos(4 * t)], 1)
        one, two, three = self.classes(label).split([self.width, self.width, DIMENSIONS], 1)
        hidden = torch.tanh(self.first(torch.cat([x.flatten(1), level], 1)) + one)
        hidden = torch.tanh(self.second(hidden) + two)
        # Towards much noise an estimate is the mean of the class; the other way round it is the point.
        out: Tensor = self.last(hidden) + three * torch.sigmoid(4 * t)[:, None]
        return out[:, :, None, None]


def points() -> GaussianClasses:
    """The classes."""
    generator = torch.Generator().manual_seed(0)
    mean = COMMON + SPREAD_OF_MEANS * torch.randn(CLASSES, DIMENSIONS, generator=generator)
    return GaussianClasses(mean, torch.full((DIMENSIONS,), STD))


def between(low: float, high: float, size: int) -> Tensor:
    """Noise levels whose logarithm is uniform."""
    return torch.empty(size).uniform_(math.log(low), math.log(high)).exp()


def fit(noisy: bool, options: dict[str, Any], steps: int, size: int) -> TDSMDiffusion:
    """Train a network."""
    torch.manual_seed(1)
    classes, process = points(), EDMProcess()
    transition = SymmetricTransition(RATE).matrix(CLASSES)
    classifier = None if "weighting" in options else KnownPosterior(classes, process, None)
    module = TDSMDiffusion(PointNetwork(), CLASSES, process, classifier=classifier, **options)
    module.weighting.transition.copy_(transition)
    optimizer = torch.optim.Adam(module.network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        label = torch.randint(CLASSES, (size,))
        x = classes.draw(label)[:, :, None, None]
        given = torch.multinomial(transition[label], 1).squeeze(1) if noisy else label
        sigma = between(EDGES[0], EDGES[-1], size)
        loss = module.loss_per_image(module.network, x, sigma, torch.randn_like(x), given).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return module


@torch.no_grad()
def errors(module: TDSMDiffusion, size: int = 20_000) -> tuple[list[float], float]:
    """Relative error in each bin, and the length of the mean estimate over that of the right one in the last."""
    torch.manual_seed(2)
    classes, denoiser, found, inflation = points(), ClassDenoiser(module.network, module.process), [], 0.0
    for low, high in pairwise(EDGES):
        label, sigma = torch.randint(CLASSES, (size,)), between(low, high, size)
        z = classes.draw(label)
        z = z + sigma[:, None] * torch.randn_like(z)
        ours, right = denoiser(z[:, :, None, None], sigma, label).flatten(1), classes.denoised(z, sigma, label)
        found.append(float(((ours - right).square().sum() / right.square().sum()).sqrt()))
        inflation = float(ours.mean(0).norm() / right.mean(0).norm())
    return found, inflation


def main() -> None:
    """Train each row's network and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [f"sigma {low:g} to {high:g}" for low, high in pairwise(EDGES)]
    print(f"| trained with | {' | '.join(names)} | length | CPU s |\n|---|{'---|' * (len(names) + 2)}")
    for row, (noisy, options) in ROWS.items():
        begun = time.process_time()
        found, inflation = errors(fit(noisy, options, args.steps, args.batch_size))
        cells = [*(f"{100 * error:.1f} %" for error in found), f"{inflation:.2f}", f"{time.process_time() - begun:.0f}"]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
