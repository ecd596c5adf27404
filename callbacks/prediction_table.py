"""Classes of `predict` as a table: what each image is taken for, and how surely."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from callbacks.gathering import gathered_rows
from callbacks.mask_writer import flat_loaders
from callbacks.picture import class_name
from datamodules.atomic import write_atomically

_FILE = "predictions.csv"
_NEEDED = ("label", "confidence", "index")


class PredictionTable(BasePredictionWriter):
    """Writes what a classifier takes every image of `predict` for, as `<output_dir>/predictions.csv`.

    A row is an image, in the order of the data: `image`, its name as the data set's `keys` has it, or its number where
    there are none; `label`, the number of the class; `class`, its name as the datamodule's `class_names` has it; and
    `confidence`, the probability of that class. The table is written at the end, whole or not at all, with the images
    of all processes.

    `predict_step` has to return {"label": [B], "confidence": [B], "index": [B]}; an index of -1 is padding.

    Args:
        output_dir: Folder of the table; made if missing.
        write_probabilities: Add a column `probability_<class>` for each class, from `probabilities` [B, K].
        overwrite: Replace a table that exists. If not, it is an error before anything is predicted.
    """

    def __init__(self, output_dir: str, write_probabilities: bool = False, overwrite: bool = True) -> None:
        """Nothing is made or written before a prediction."""
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)
        self.write_probabilities = write_probabilities
        self.overwrite = overwrite
        self._names: list[Sequence[str]] = []
        self._found: list[Tensor] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look up the names of the images, and refuse what may not be replaced, before anything is computed.

        Args:
            trainer: The trainer, with its loaders.
            pl_module: Not looked at.

        Raises:
            TypeError: A data set has no length.
            FileExistsError: The table exists and `overwrite` is off.
        """
        self._names = [_names(loader) for loader in flat_loaders(trainer.predict_dataloaders)]
        self._found = []
        if not self.overwrite:
            if (self.output_dir / _FILE).exists():
                msg = (
                    f"Expected `output_dir` {self.output_dir} without {_FILE}, as `overwrite` is off; set `overwrite` "
                    "or choose another folder."
                )
                raise FileExistsError(msg)
            # No process may write before the slowest has looked.
            trainer.strategy.barrier("PredictionTable")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,  # noqa: ANN401 - whatever a predict_step returns; checked below
        batch_indices: Sequence[int] | None,
        batch: object,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep what is predicted of a batch.

        Args:
            trainer: Not looked at.
            pl_module: The module that predicted.
            prediction: What `predict_step` returned.
            batch_indices: Not used: the prediction carries its own.
            batch: Not used.
            batch_idx: Not used.
            dataloader_idx: Which loader the batch came from.

        Raises:
            TypeError: The prediction lacks something to write.
        """
        needed = (*_NEEDED, "probabilities") if self.write_probabilities else _NEEDED
        given = sorted(prediction) if isinstance(prediction, Mapping) else []
        if not set(needed) <= set(given):
            msg = (
                f"Expected `predict_step` of {type(pl_module).__name__} to return a dict of {', '.join(needed)}, got "
                f"{given or type(prediction).__name__}; return them, or take PredictionTable out of "
                "`trainer.callbacks`."
            )
            raise TypeError(msg)
        index = prediction["index"].cpu()
        first = sum(len(names) for names in self._names[:dataloader_idx])
        columns = [(index + first)[:, None], prediction["label"][:, None], prediction["confidence"][:, None]]
        if self.write_probabilities:
            columns.append(prediction["probabilities"])
        # Doubles, as numbers of rows are no floats.
        rows = torch.cat([column.detach().cpu().double() for column in columns], 1)
        self._found.append(rows[index >= 0])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put together what all processes predicted, and write it.

        Args:
            trainer: The trainer.
            pl_module: The module that predicted.
        """
        found, self._found = gathered_rows(trainer, self._found, pl_module.device), []
        if not trainer.is_global_zero:
            return
        names = [name for group in self._names for name in group]
        classes = [class_name(trainer, k) for k in range(max(_most(found), found.shape[1] - 3))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = [f"probability_{name}" for name in classes] if self.write_probabilities else []
        writer.writerow(["image", "label", "class", "confidence", *columns])
        for row, label, confidence, *probabilities in found.tolist():
            told = [names[int(row)], int(label), classes[int(label)]]
            writer.writerow([*told, *(f"{value:.6f}" for value in (confidence, *probabilities))])
        write_atomically(self.output_dir / _FILE, text.getvalue().encode())
        rank_zero_info(f"PredictionTable: {len(found)} predictions written to {self.output_dir / _FILE}")


def _names(loader: object) -> Sequence[str]:
    """Names of the images of a loader, or their numbers."""
    data: Any = getattr(loader, "dataset", None)
    keys = getattr(data, "keys", None)
    # A dict has `keys` as well, as a method.
    if isinstance(keys, Sequence):
        return keys
    if not hasattr(data, "__len__"):
        msg = (
            f"Expected the data set of `predict_dataloader` to have `keys` or a length, got {type(data).__name__}; "
            "use a datamodule of `datamodules`, or give the data set one of them."
        )
        raise TypeError(msg)
    return [str(number) for number in range(len(data))]


def _most(found: Tensor) -> int:
    return int(found[:, 1].max()) + 1 if len(found) else 0
