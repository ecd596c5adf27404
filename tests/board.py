"""Trainers that write to TensorBoard, and what is found there."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # publishes no types
from tiny_nets import tiny_trainer


def board_trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A silent trainer with a TensorBoard logger in the folder."""
    logger = TensorBoardLogger(folder, name="", version="")
    return tiny_trainer(folder, **{"logger": logger, "callbacks": list(callbacks), "log_every_n_steps": 1, **options})


def pictures(folder: Path) -> dict[str, dict[int, np.ndarray[Any, Any]]]:
    """All pictures in the event files: tag -> step -> pixels."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images(tag)}
        for tag in events.Tags()["images"]
    }
