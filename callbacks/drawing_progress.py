"""A progress bar over drawn images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


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
