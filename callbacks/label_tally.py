"""What a module takes images for, kept batch by batch and put together over processes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.gathering import gathered_rows

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

_NEEDED = ("probabilities", "label", "confidence", "index")
# Sums of integers do not depend on their order: any number of processes finds the same ones.
_UNIT = 2.0**32
_DIGITS = 6


@runtime_checkable
class ImagesToLabel(Protocol):
    """The data set of all images to train on.

    Attributes:
        keys: Names of the images.
        labels: Class ids that people gave [N], -1 where none did.
        splits: What each is to the fit, places in `pseudo_labels.SPLITS` [N].
        left_out: How many more images the source has to train on, which are no part of the data.
        fingerprint: Identifies them, their uses and given labels.
    """

    keys: Any
    labels: Tensor
    splits: Int64Array
    left_out: int
    fingerprint: str | None


@dataclass(frozen=True, eq=False)
class Labelled:
    """What a module took all images for.

    Attributes:
        labels: Class ids int64 [N].
        confidence: How sure it is, float64 [N] in [0, 1], of 32 bits each.
        top_labels: The most likely classes, best first, int64 [N, k].
        top_confidence: Their probabilities, float64 [N, k].
        expected_confusion: Sum [K, K] over the images that count, of the probability of each class (row), in the column
            of the image's label.
    """

    labels: Int64Array
    confidence: Float64Array
    top_labels: Int64Array
    top_confidence: Float64Array
    expected_confusion: Float64Array


class LabelTally:
    """Keeps what a module takes images for.

    Args:
        counted: Which images count for the expected confusion [N].
        num_classes: Classes K.
        top_k: How many of the most likely classes to keep.
    """

    def __init__(self, counted: Tensor, num_classes: int, top_k: int) -> None:
        """Nothing has been seen yet."""
        self.counted = counted
        self.num_classes = num_classes
        self.top_k = top_k
        self._found: list[Tensor] = []
        # By rows of the label: those are next to each other in memory.
        self._expected = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, pl_module: pl.LightningModule, prediction: object) -> None:
        """Keep what is predicted of a batch.

        Args:
            pl_module: The module that predicted.
            prediction: What its `predict_step` returned; an index of -1 is padding.

        Raises:
            TypeError: The prediction lacks something.
            ValueError: Its shapes or labels do not fit the classes.
        """
        given = sorted(map(str, prediction)) if isinstance(prediction, Mapping) else []
        if not isinstance(prediction, Mapping) or not set(_NEEDED) <= set(given):
            msg = (
                f"Expected `predict_step` of {type(pl_module).__name__} to return a dict of {', '.join(_NEEDED)}, got "
                f"{given or type(prediction).__name__}; return them, or take PseudoLabelWriter out of "
                "`trainer.callbacks`."
            )
            raise TypeError(msg)
        values = {name: prediction[name].detach().cpu() for name in _NEEDED}
        own = values["index"] >= 0
        index, label = values["index"][own], values["label"][own]
        # Single precision: what the table holds.
        p, confidence = (values[name][own].float().clamp(0, 1) for name in ("probabilities", "confidence"))
        wrong = (label < 0) | (label >= self.num_classes)
        if p.shape != (len(label), self.num_classes) or bool(wrong.any()):
            msg = (
                f"Expected `predict_step` of {type(pl_module).__name__} to return labels from 0 to "
                f"{self.num_classes - 1} and `probabilities` [B, {self.num_classes}], got shape {list(p.shape)} and "
                f"{int(wrong.sum())} labels out of range; give the module the classes of the data."
            )
            raise ValueError(msg)
        counted = self.counted[index]
        units = p[counted].double().nan_to_num(0).mul(_UNIT).round().to(torch.int64)
        self._expected.index_add_(0, label[counted], units)
        columns = [index, label, confidence, *_best(p, self.top_k)]
        self._found.append(torch.stack([column.double() for column in columns], 1))

    def gathered(self, trainer: pl.Trainer, device: torch.device) -> Labelled | str:
        """Put together what all processes have seen; every process has to ask.

        Args:
            trainer: The trainer.
            device: Where processes exchange tensors.

        Returns:
            The images in the order of the data, or what is wrong with them.
        """
        rows = gathered_rows(trainer, self._found, device).numpy()
        expected = trainer.strategy.reduce(self._expected.to(device), reduce_op="sum")
        self._found = []
        index = rows[:, 0].astype(np.int64)
        if not np.array_equal(index, np.arange(len(self.counted))):
            return (
                f"Expected a prediction of each of {len(self.counted)} images, got {len(np.unique(index))} of them and "
                f"{len(index) - len(np.unique(index))} twice; take `limit_predict_batches` out of `trainer`, and let "
                "`predict_step` return the `index` of its batch."
            )
        bad = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(bad):
            return (
                f"Expected finite probabilities, got NaN for image {bad[0]} and {len(bad) - 1} more; look at what the "
                "module has learned, or train it at a higher precision."
            )
        k = self.top_k
        return Labelled(
            rows[:, 1].astype(np.int64),
            rows[:, 2],
            rows[:, 3 : 3 + k].astype(np.int64),
            rows[:, 3 + k : 3 + 2 * k],
            np.round(expected.cpu().T.double().numpy() / _UNIT, _DIGITS),
        )


def _best(p: Tensor, count: int) -> list[Tensor]:
    """The most likely classes of each image, best first, then their probabilities; of equal ones the first."""
    left, labels, values = p.clone(), [], []
    # A stable sort does the same, much slower; `topk` takes any of equal ones.
    for _ in range(count):
        value, label = left.max(1)
        left[torch.arange(len(left)), label] = -1
        labels.append(label)
        values.append(value)
    return labels + values
