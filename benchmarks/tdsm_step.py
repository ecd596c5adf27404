"""What does a training step of TDSM cost over one of plain denoising score matching (DSM)?

    python benchmarks/tdsm_step.py
    python benchmarks/tdsm_step.py --network unet --classes 10 100 --rounds 5 --batch-size 32

A step is the loss of TDSMDiffusion, backward and AdamW on images of 32 px, at 40 % symmetric label noise. The ways:

- `DSM`: `weighting: none`, the labels as they are;
- `sampled`: one other class for each image, drawn by its weight;
- `exact`: all other classes, in one pass without gradient; with a threshold only those of more weight (renormalised);
- `loop`: as `exact`, but with a pass for each class over the images for which it counts, as the code released with the
  paper (arXiv 2402.17517) has it. Its threshold is 0.01, not renormalised. Written here only.

How many passes a threshold leaves depends on the posterior of the classes, which says little in a classifier that is
not trained. So the images are made of classes that are normal distributions, whose posterior is known. Their means
and spreads fall off from direction to direction so that noise hides the classes as slowly as it hides those of real
images: with ten classes the most likely class is right for 96 % of the images without noise, and for 87, 68 and 46 % at
sigma = 0.5, 1 and 2 (the classifiers of noisy CIFAR-10 in Cohen et al., arXiv 1902.02918, are right for 77, 66 and 47 %
there). Noise levels are drawn as in training by EDMProcess. The time of a NoisyResNet is part of the step all the same:
a ResNet-18 with an eighth of its channels, 12 % of a UViT's multiplications in a forward pass and 10 % of a ClassUNet's
(2.5 % in the released pair of ResNet-18 and DDPM++), and so is that of the known posterior (1 %).

One process and one thread; the ways take turns with the same images and noise, in an order that moves on by one with
each round. Shown are the medians of the rounds in CPU time of the process and on the wall clock, and the medians of the
ratio to DSM in the same round. Memory is measured in a process of its own for each way: how far the resident set rises
in a step over what is resident before it (weights, averages, optimiser, batch; see ledm_memory.py).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from gaussian_classes import GaussianClasses, KnownPosterior
from ledm_memory import peak_of
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

from lightning_modules.diffusion.denoisers import ClassDenoiser
from lightning_modules.diffusion.noise import EDMProcess
from lightning_modules.diffusion.transition import SymmetricTransition
from lightning_modules.networks.class_unet import ClassUNet
from lightning_modules.networks.noisy_resnet import NoisyResNet
from lightning_modules.networks.uvit import UViT
from lightning_modules.tdsm_diffusion import TDSMDiffusion

SIDE, CHANNELS, RATE = 32, 3, 0.4
DIRECTIONS, SCALE, SPREAD = 256, 1.5, 4.5
"""Directions in which classes differ, size of the first class means, and spread of a class over that of the means."""
RELEASED = 0.01

OPTIONS: dict[str, dict[str, Any]] = {
    "DSM": {"weighting": "none"},
    "sampled": {"others": "sampled"},
    "exact": {"others": "exact"},
    "loop": {"others": "exact"},
    "exact, threshold 0.01": {"others": "exact", "threshold": RELEASED},
    "loop, threshold 0.01": {"others": "exact", "threshold": RELEASED},
}
"""The ways and their arguments of TDSMDiffusion."""


class Batch(NamedTuple):
    """What a step sees."""

    x: Tensor
    sigma: Tensor
    eps: Tensor
    label: Tensor


class Seconds(NamedTuple):
    """Of a step."""

    cpu: float
    wall: float


class Images:
    """Images [3, 32, 32] of `GaussianClasses`."""

    def __init__(self, num_classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        scale = SCALE * torch.arange(1, DIRECTIONS + 1) ** -0.5
        mean = scale * torch.randn(num_classes, DIRECTIONS, generator=generator)
        pixels = torch.randn(CHANNELS * SIDE**2, DIRECTIONS, generator=generator)
        self.classes = GaussianClasses(mean, SPREAD * scale)
        self.basis: Tensor = torch.linalg.qr(pixels).Q
        self.transition = SymmetricTransition(RATE).matrix(num_classes)

    def batch(self, size: int, process: EDMProcess) -> Batch:
        """A batch with noisy labels, from torch's global generator."""
        clean = torch.randint(len(self.classes.mean), (size,))
        x = (self.classes.draw(clean) @ self.basis.T).view(size, CHANNELS, SIDE, SIDE)
        given = torch.multinomial(self.transition[clean], 1).squeeze(1)
        return Batch(x, process.sample_sigma(size), torch.randn_like(x), given)


def loop_losses(
    module: TDSMDiffusion, network: nn.Module, batch: Batch, threshold: float, renormalize: bool = False
) -> Tensor:
    """The loss of each image [B] with a pass for each class."""
    x, sigma, eps, label = batch
    noisy = x + sigma.view(-1, 1, 1, 1) * eps
    weights = module.weighting.weights(module.process, noisy, sigma, label)
    if weights is None:
        msg = "Expected a module with `weighting` posterior."
        raise ValueError(msg)
    own = F.one_hot(label, module.num_classes).bool()
    weights = torch.where(own | (weights > threshold), weights, 0.0)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    denoiser = ClassDenoiser(network, module.process)
    estimate = weights[own].view(-1, 1, 1, 1) * denoiser(noisy, sigma, label)
    for number in range(module.num_classes):
        counts = (weights[:, number] > 0) & ~own[:, number]
        if not bool(counts.any()):
            continue
        with torch.no_grad():
            part = denoiser(noisy[counts], sigma[counts], torch.full_like(label[counts], number))
            rest = torch.zeros_like(estimate)
            rest[counts] = weights[counts, number].view(-1, 1, 1, 1) * part
        estimate = estimate + rest
    losses: Tensor = module.process.image_weight(sigma) * (estimate - x).square().mean((1, 2, 3))
    return losses


class Step:
    """A training step of one way; it knows how many images went through the network without gradient."""

    def __init__(self, way: str, network: str, images: Images) -> None:
        torch.manual_seed(1)
        num_classes, process = len(images.classes.mean), EDMProcess()
        beside = NoisyResNet(CHANNELS, (8, 16, 32, 64), embed_dim=64, num_classes=num_classes, time_scale=1000.0)
        options = dict(OPTIONS[way])
        if way != "DSM":
            options["classifier"] = KnownPosterior(images.classes, process, images.basis, beside)
        self.module = TDSMDiffusion(NETWORKS[network](), num_classes, process, **options)
        self.module.weighting.transition.copy_(images.transition)
        self.way = way
        self.optimizer = torch.optim.AdamW(self.module.network.parameters(), 2e-4)
        self.others = 0
        self.module.network.register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.others += 0 if torch.is_grad_enabled() else len(inputs[0])

    def _losses(self, batch: Batch) -> Tensor:
        if self.way.startswith("loop"):
            return loop_losses(self.module, self.module.network, batch, OPTIONS[self.way].get("threshold", 0.0))
        return self.module.loss_per_image(self.module.network, *batch)

    def __call__(self, batch: Batch) -> Seconds:
        """Train on a batch."""
        self.others = 0
        cpu, wall = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        torch.autograd.backward(self._losses(batch).mean())
        self.optimizer.step()
        return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "uvit": partial(UViT, SIDE, 4, CHANNELS, 128, 4, 4, time_scale=1000.0),
    "unet": partial(ClassUNet, CHANNELS, SIDE, 16, (1, 2, 2), 1, time_scale=1000.0),
}


def times(network: str, num_classes: int, size: int, rounds: int) -> tuple[dict[str, list[Seconds]], dict[str, float]]:
    """Seconds of each way in each round, and mean number of passes without gradient an image."""
    images, process = Images(num_classes), EDMProcess()
    steps = {way: Step(way, network, images) for way in OPTIONS}
    for step in steps.values():
        step(images.batch(2, process))
    found: dict[str, list[Seconds]] = {way: [] for way in OPTIONS}
    others = dict.fromkeys(OPTIONS, 0.0)
    for number in range(rounds):
        batch = images.batch(size, process)
        first = number % len(steps)
        for way in (*list(steps)[first:], *list(steps)[:first]):
            found[way].append(steps[way](batch))
            others[way] += steps[way].others / (size * rounds)
    return found, others


def peak(way: str, network: str, num_classes: int, size: int) -> float:
    """Megabytes that a step of one way adds to this process."""
    images, process = Images(num_classes), EDMProcess()
    step, batch = Step(way, network, images), images.batch(size, process)
    step(images.batch(2, process))
    return peak_of(partial(step, batch))


def table(
    found: Mapping[str, Sequence[Seconds]], others: Mapping[str, float], peaks: Mapping[str, float], base: str = "DSM"
) -> str:
    """The rows of one number of classes."""
    lines = []
    for way, rounds in found.items():
        cells = [way, f"{others[way]:.2f}"]
        for field in ("cpu", "wall"):
            own, of_base = ([getattr(seconds, field) for seconds in runs] for runs in (rounds, found[base]))
            ratio = median(a / b for a, b in zip(own, of_base, strict=True))
            cells += [f"{1000 * median(own):.0f}", f"{ratio:.2f}"]
        cells += [f"{peaks[way]:.0f}", f"{peaks[way] / peaks[base]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


HEAD = (
    "| way | other passes an image | CPU ms a step | over DSM | wall ms a step | over DSM | peak MB | over DSM |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _peaks(args: argparse.Namespace, num_classes: int) -> dict[str, float]:
    found = {}
    for way in OPTIONS:
        words = [sys.executable, __file__, "--way", way, "--classes", str(num_classes), "--network", args.network]
        words += ["--batch-size", str(args.batch_size)]
        run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = cast("float", json.loads(run.stdout.splitlines()[-1]))
    return found


def main() -> None:
    """Measure and print a table for each number of classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--network", choices=list(NETWORKS), default="uvit")
    parser.add_argument("--way", choices=list(OPTIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.way:
        print(json.dumps(peak(args.way, args.network, args.classes[0], args.batch_size)))
        return
    for num_classes in args.classes:
        found, others = times(args.network, num_classes, args.batch_size, args.rounds)
        print(f"\n{num_classes} classes, {args.network}, {args.batch_size} images, {args.rounds} rounds\n\n{HEAD}")
        print(table(found, others, _peaks(args, num_classes)), flush=True)


if __name__ == "__main__":
    main()
