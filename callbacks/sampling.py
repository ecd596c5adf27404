"""Asking a module to draw, and showing how far it is."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text
from torch import Tensor

from callbacks.picture import evaluating, lacks_method


@runtime_checkable
class Draws(Protocol):
    """A module that draws images of classes, or images and their masks."""

    def draw(self, request: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Images for `seed` [B], `image_size`, `sampler` and `num_steps`; each a function of its own seed.

        Pairs: returns `image` [B, 3, H, W] in [0, 1], `mask` [B, H, W] of class ids, `confidence` [B] and `seed` [B].
        Classes: takes `label` [B] and `guidance` as well; returns `image` (of one or three channels), `label`, `seed`.
        """
        ...


@contextmanager
def drawing(
    trainer: pl.Trainer, pl_module: pl.LightningModule, callback: type
) -> Iterator[Callable[[dict[str, Any]], Mapping[str, Tensor]]]:
    """Give what draws a batch as predict would: on the trainer's device, at its precision, in evaluation mode.

    Args:
        trainer: The trainer.
        pl_module: The module that draws.
        callback: Who asks, for the error.

    Yields:
        Request -> what `draw` returns.

    Raises:
        TypeError: The module does not draw.
    """
    if not isinstance(pl_module, Draws):
        raise TypeError(lacks_method(pl_module, "draw(request)", callback))
    # When a fit has ended Lightning has moved the module to the CPU.
    device, home = trainer.strategy.root_device, pl_module.device

    def draw(request: dict[str, Any]) -> Mapping[str, Tensor]:
        moved = {name: value.to(device) for name, value in request.items() if isinstance(value, Tensor)}
        return pl_module.draw(request | moved)

    pl_module.to(device)
    try:
        with evaluating(trainer, pl_module):
            yield draw
    finally:
        pl_module.to(home)


class _Speed(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")


@contextmanager
def drawing_progress(trainer: pl.Trainer, noun: str, count: int) -> Iterator[Callable[[int], None]]:
    """Show how far drawing is; on a terminal, in the first process, where progress is wanted at all.

    Args:
        trainer: The trainer.
        noun: What is drawn.
        count: How many this process draws.

    Yields:
        To be called with the number of images that were drawn since the last call.
    """
    console = Console(stderr=True)
    wanted = trainer.progress_bar_callback is not None and trainer.is_global_zero and count > 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
    share = f" (1 of {trainer.world_size} processes)" if trainer.world_size > 1 else ""
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task(f"drawing {noun}{share}", total=count)
        yield lambda images: bar.advance(task, images)
