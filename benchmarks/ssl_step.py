"""What does the framework cost? A FixMatch step of SSLClassifier against plain loops on the same number of images.

    python -m benchmarks.ssl_step

Each way runs in a process of its own with one thread, on batches that are in memory already (64 labelled images, 7
times as many unlabelled ones in two views; 960 forward images): `plain supervised`, cross-entropy of a bare loop on 960
labelled images; `plain FixMatch`, the same loop with FixMatch's loss; `SSLClassifier`, Lightning's loop with module,
method, moving average and logging; `SSLClassifier + data`, with views made from digits by SemiSupervisedDataModule.
The clock is that of the process, which stands still while others have the core; rounds are interleaved and the fastest
of each way is printed. Memory is the largest resident size of
the process above what it had before the first step.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

WAYS = ("plain supervised", "plain FixMatch", "SSLClassifier", "SSLClassifier + data")
LABELED, RATIO = 64, 7


def measure(way: str, side: int, steps: int) -> dict[str, float]:
    """Seconds a step and megabytes of one way, in this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ways: dict[str, Callable[[int, int], tuple[float, float]]] = {
        "plain supervised": partial(_plain, False),
        "plain FixMatch": partial(_plain, True),
        "SSLClassifier": partial(_module, False),
        "SSLClassifier + data": partial(_module, True),
    }
    seconds, megabytes = ways[way](side, steps)
    return {"seconds": seconds, "megabytes": megabytes}


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _network() -> Any:  # noqa: ANN401 - torch is imported late
    from lightning_modules import WideResNet

    return WideResNet(10, 1, num_classes=10, in_channels=1)


def _batch(side: int) -> dict[str, Any]:
    import torch

    size = LABELED * RATIO
    return {
        "labeled": {"image": torch.rand(LABELED, 1, side, side), "label": torch.randint(0, 10, (LABELED,))},
        "unlabeled": {"weak": torch.rand(size, 1, side, side), "strong": torch.rand(size, 1, side, side)},
    }


def _plain(semi: bool, side: int, steps: int) -> tuple[float, float]:
    import torch
    import torch.nn.functional as F

    network, batch = _network(), _batch(side)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images = torch.cat([batch["labeled"]["image"], *batch["unlabeled"].values()])
    everyone = torch.randint(0, 10, (len(images),))
    before, begun = _resident(), 0.0
    for step in range(steps + 2):
        if step == 2:
            begun = time.process_time()
        optimizer.zero_grad()
        logits = network(images)
        if semi:
            labeled, weak, strong = logits.split([LABELED, LABELED * RATIO, LABELED * RATIO])
            confidence, guess = weak.detach().softmax(-1).max(-1)
            masked = F.cross_entropy(strong, guess, reduction="none") * (confidence >= 0.95)
            loss = F.cross_entropy(labeled, batch["labeled"]["label"]) + masked.mean()
        else:
            loss = F.cross_entropy(logits, everyone)
        loss.backward()
        optimizer.step()
    return (time.process_time() - begun) / steps, _resident() - before


def _module(with_data: bool, side: int, steps: int) -> tuple[float, float]:
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    from datamodules import SemiSupervisedDataModule
    from lightning_modules import FixMatch, SSLClassifier

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == 2:
                self.begun = time.process_time()

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seconds = (time.process_time() - self.begun) / steps

    sgd = partial(torch.optim.SGD, lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    module = SSLClassifier(_network(), FixMatch(), 10, optimizer=sgd)
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=steps + 2,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    before = _resident()
    if with_data:
        options: dict[str, Any] = {
            "image_size": side,
            "weak": "crop",
            "labels_per_class": 4,
            "steps_per_epoch": steps + 2,
        }
        trainer.fit(module, datamodule=SemiSupervisedDataModule(None, batch_size=LABELED, **options))
    else:
        batch = _batch(side)
        repeated: Any = [batch] * (steps + 2)
        trainer.fit(module, DataLoader(repeated, batch_size=None))
    return clock.seconds, _resident() - before


def main() -> None:
    """Measure in fresh processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8, help="side of the images")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.side, args.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            words = [sys.executable, "-m", "benchmarks.ssl_step", "--way", way]
            words += ["--side", str(args.side), "--steps", str(args.steps)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            run = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
            found[way].append(json.loads(run.stdout.splitlines()[-1]))
    base = min(run["seconds"] for run in found[WAYS[0]])
    print("| way | ms a step | against plain supervised | memory, MB |\n|---|---|---|---|")
    for way, runs in found.items():
        seconds = min(run["seconds"] for run in runs)
        megabytes = median(run["megabytes"] for run in runs)
        print(f"| {way} | {1000 * seconds:.1f} | {100 * (seconds / base - 1):+.1f} % | {megabytes:.0f} |")


if __name__ == "__main__":
    main()
