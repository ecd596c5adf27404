"""Asking a module to draw."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from torch import Tensor

from callbacks import fit_end
from callbacks.picture import lacks_method


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
    with fit_end.working(trainer, pl_module) as device:

        def draw(request: dict[str, Any]) -> Mapping[str, Tensor]:
            moved = {name: value.to(device) for name, value in request.items() if isinstance(value, Tensor)}
            return pl_module.draw(request | moved)

        yield draw
