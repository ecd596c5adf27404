"""Time of a training step of the small ADM UNet on a CPU: precision, memory format, number of threads.

Run it alone on the machine; two threads on a busy one wait for each other more than they compute:

    python -m benchmarks.unet_step
    python -m benchmarks.unet_step --sizes

A step is forward, mean squared error, backward and AdamW on 32 images of 32 px. The fastest of a few steps is
shown; the settings of one number of threads take turns, so that a busy neighbour slows all of them alike.
`--sizes` compares configurations of the network instead (float32, one thread), with the multiplications of a
forward pass, which do not depend on the machine.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.networks import ADMUNet

BATCH, SIDE, PATIENCE = 32, 32, 1.5

SIZES: dict[str, tuple[int, tuple[int, ...], int]] = {
    "16 x (1, 1, 2, 4), 1 block (small)": (16, (1, 1, 2, 4), 1),
    "16 x (1, 2, 2, 4), 1 block": (16, (1, 2, 2, 4), 1),
    "16 x (1, 2, 4, 4), 1 block": (16, (1, 2, 4, 4), 1),
    "16 x (1, 1, 2, 4), 2 blocks": (16, (1, 1, 2, 4), 2),
    "32 x (1, 1, 2), 1 block": (32, (1, 1, 2), 1),
    "32 x (1, 2, 2), 1 block": (32, (1, 2, 2), 1),
}
"""Base channels, channel multiples and blocks per level."""


def training_step(network: ADMUNet, *, bf16: bool = False, channels_last: bool = False) -> Callable[[], float]:
    """Prepare a step and return a function that takes it and returns its seconds."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, network.in_channels, SIDE, SIDE, generator=generator).to(memory_format=layout)
    target = torch.randn(BATCH, network.out_channels, SIDE, SIDE, generator=generator)
    t = torch.rand(BATCH, generator=generator) * 1000

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = network(x, t)
        torch.autograd.backward(mse_loss(output.float(), target))
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def fastest(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Take every step in turn, `rounds` times after a warm-up, and return the least seconds of each.

    A step above `PATIENCE` is timed once: nobody will train with that setting.
    """
    for step in steps.values():
        step()
    best = {name: step() for name, step in steps.items()}
    for _ in range(rounds - 1):
        for name, step in steps.items():
            if best[name] < PATIENCE:
                best[name] = min(best[name], step())
    return best


def compare_settings(rounds: int) -> None:
    """Print a row for each number of threads, precision and memory format."""
    print("threads  precision  channels_last   ms/step  images/s")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        steps = {}
        for bf16 in (False, True):
            for channels_last in (False, True):
                name = f"{threads:7}  {'bf16' if bf16 else 'fp32':9}  {'yes' if channels_last else 'no':13}"
                steps[name] = training_step(ADMUNet.small(), bf16=bf16, channels_last=channels_last)
        for name, seconds in fastest(steps, rounds).items():
            print(f"{name}  {1000 * seconds:8.0f}  {BATCH / seconds:8.0f}")


def compare_sizes(rounds: int) -> None:
    """Print a row for each configuration of the network."""
    torch.set_num_threads(1)
    steps, facts = {}, {}
    for name, (base_channels, channel_mult, layers_per_block) in SIZES.items():
        network = ADMUNet(
            image_size=SIDE,
            base_channels=base_channels,
            channel_mult=channel_mult,
            layers_per_block=layers_per_block,
            attention_resolutions=(8, 4)[: len(channel_mult) - 2],
            head_channels=32,
            norm_groups=8,
            dropout=0.0,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        facts[name] = f"{parameters / 1e6:9.2f} M  {counter.get_total_flops() / 2e6:11.0f} M"
        steps[name] = training_step(network)
    print(f"{'':36}  parameters  mult./image   ms/step  images/s")
    for name, seconds in fastest(steps, rounds).items():
        print(f"{name:36}  {facts[name]}  {1000 * seconds:8.0f}  {BATCH / seconds:8.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="compare networks instead of settings")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per row")
    arguments = parser.parse_args()
    (compare_sizes if arguments.sizes else compare_settings)(arguments.rounds)
