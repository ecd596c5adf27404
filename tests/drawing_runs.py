"""A module that draws, data to train it on, and runs of both."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from tiny_nets import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import SyntheticImageWriter
from datamodules import DrawRequest, SamplingDataModule

# A fork starts at once, but not where this process has used a GPU before.
START: Literal["fork", "spawn"] = "spawn" if torch.cuda.is_available() else "fork"
REQUEST = DrawRequest(num_images=11, image_size=6, first_seed=3, batch_size=2, num_steps=4)
# Eleven as well: seven of class 0 from the seeds 3, 5, ..., and four of class 1 from 4, 6, ...
CLASSES = DrawRequest(
    None, image_size=6, first_seed=3, batch_size=2, num_steps=4, images_per_class=[7, 4], num_classes=2, guidance=1.5
)


class Painter(pl.LightningModule):
    """Draws a bright square at a place that the seed decides, on a ground as dark as its one weight says.

    Args:
        ground: What the weight starts from; a step of training adds 1/8.
        seconds: How long a draw takes.
    """

    def __init__(self, ground: float = 0.25, seconds: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(ground))
        self.body = nn.Sequential(nn.Dropout(0.5))
        self.body.eval()  # as StageTransition leaves frozen layers
        self.seconds = seconds
        self.asked: list[dict[str, Any]] = []
        self.modes: set[bool] = set()

    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        self.note(request)
        seed, size = request["seed"], request["image_size"]
        mask = torch.zeros(len(seed), size, size, dtype=torch.int64)
        for one, s in zip(mask, seed.tolist(), strict=True):
            one[s % (size - 2) :, s % 3 : s % 3 + 2] = 1
        image = (self.weight + 0.5 * mask[:, None]).expand(-1, 3, -1, -1)
        return {"image": image, "mask": mask, "confidence": (seed % 7) / 7, "seed": seed}

    def note(self, request: Mapping[str, Any]) -> None:
        """Take the time, and remember what was asked."""
        time.sleep(self.seconds)
        self.asked.append({k: v.tolist() if isinstance(v, Tensor) else v for k, v in request.items()})
        self.modes.add(self.training)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.weight * batch.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125)

    def predict_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.draw(batch)


class ClassPainter(Painter):
    """Draws grey images of classes: a ramp that seed and class decide."""

    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        self.note(request)
        seed, label, size = request["seed"], request["label"], request["image_size"]
        return {"image": ramps(seed, label, size)[:, None] / 255, "label": label, "seed": seed}


def ramps(seed: Tensor, label: Tensor, size: int) -> Tensor:
    """What ClassPainter draws, in bytes [B, size, size]."""
    return (torch.arange(size * size) * (seed[:, None] + 1) + 60 * label[:, None]).remainder(256).view(-1, size, size)


def painter(request: DrawRequest, ground: float = 0.25, seconds: float = 0.0) -> Painter:
    """A module for a request."""
    return (ClassPainter if request.has_classes else Painter)(ground, seconds)


class Ones(pl.LightningDataModule):
    """One step an epoch whose gradient is -1, and what a segmentation datamodule tells of its data."""

    num_classes = 2
    class_names: tuple[str, ...] = ("background", "square")

    def __init__(self, fingerprint: str = "f" * 64) -> None:
        super().__init__()
        self.fingerprint = fingerprint

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader([-torch.ones(1)] * 2, batch_size=2)  # type: ignore[arg-type]  # a list is a data set too


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A silent trainer of one epoch that writes nothing itself."""
    return tiny_trainer(Path(), callbacks=list(callbacks), **options)


def fit(
    folder: Path,
    module: pl.LightningModule | None = None,
    request: DrawRequest = REQUEST,
    shards_above: int | None = None,
    **options: Any,
) -> None:
    """Train for a step, then draw."""
    writer = SyntheticImageWriter(str(folder), request, shards_above)
    trainer(writer, **options).fit(module or painter(request), Ones())


def predict(
    folder: Path,
    module: pl.LightningModule | None = None,
    request: DrawRequest = REQUEST,
    shards_above: int | None = None,
    **options: Any,
) -> SyntheticImageWriter:
    """Draw for requests; without a checkpoint nothing is known of the training."""
    writer = SyntheticImageWriter(str(folder), shards_above=shards_above)
    data = SamplingDataModule(
        request.num_images,
        2,
        request.image_size,
        request.first_seed,
        request.batch_size,
        request.sampler,
        request.num_steps,
        ["background", "square"],
        request.images_per_class,
        request.guidance,
    )
    trainer(writer, **options).predict(module or painter(request, 0.375), data, return_predictions=False)
    return writer


def killed(folder: Path, num_blocks: int, run: Callable[..., object], *arguments: object) -> int:
    """Run a function that draws into a folder in a process of its own, and kill that between two blocks.

    Returns:
        How many blocks it had drawn; fewer than all of them.
    """
    context: Any = multiprocessing.get_context(START)
    process = context.Process(target=run, args=arguments)
    process.start()
    end = time.monotonic() + 60
    while len(list(folder.glob("parts/*.json"))) < 2:
        assert process.is_alive(), "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = len(list(folder.glob("parts/*.json")))
    assert done < num_blocks, "killed too late to show anything"
    assert not (folder / "manifest.json").exists()
    return done


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
