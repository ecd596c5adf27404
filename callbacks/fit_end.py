"""What callbacks that work when a fit has ended, or in `predict`, have in common."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from callbacks.picture import evaluating


def is_dry(trainer: pl.Trainer) -> bool:
    """Whether this is a run that only tries things out (`fast_dev_run`)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def why_not(trainer: pl.Trainer) -> str | None:
    """Why the end of this fit is not the end of the training; None if it is."""
    if is_dry(trainer):
        return "a dry run"
    timers = [callback for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, Timer)]
    if any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers):
        return "max_time is over: go on with the fit first"
    return None


def config_hash(trainer: pl.Trainer) -> str | None:
    """Return the hash of the configuration of the run, where `lightning fit` has told a callback of it."""
    records = [getattr(callback, "record", None) for callback in getattr(trainer, "callbacks", ())]
    hashes = [r["config_hash"] for r in records if isinstance(r, Mapping) and "config_hash" in r]
    return hashes[0] if hashes else None


@contextmanager
def working(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[torch.device]:
    """Have a module as in predict: on the trainer's device, at its precision, in evaluation mode, without gradients.

    Args:
        trainer: The trainer.
        pl_module: The module.

    Yields:
        The device.
    """
    # When a fit has ended Lightning has moved the module to the CPU.
    device, home = trainer.strategy.root_device, pl_module.device
    pl_module.to(device)
    try:
        with evaluating(trainer, pl_module):
            yield device
    finally:
        pl_module.to(home)


class _Speed(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")


@contextmanager
def image_progress(trainer: pl.Trainer, what: str, count: int) -> Iterator[Callable[[int], None]]:
    """Show how far work on images is; on a terminal, in the first process, where progress is wanted at all.

    Args:
        trainer: The trainer.
        what: What is done, as "drawing pairs".
        count: To how many images this process does it.

    Yields:
        To be called with the number of images that were done since the last call.
    """
    console = Console(stderr=True)
    wanted = trainer.progress_bar_callback is not None and trainer.is_global_zero and count > 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
    share = f" (1 of {trainer.world_size} processes)" if trainer.world_size > 1 else ""
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task(f"{what}{share}", total=count)
        yield lambda images: bar.advance(task, images)
