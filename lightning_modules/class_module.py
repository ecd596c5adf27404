"""What the modules that classify images share: metrics, calibration, predictions, sweeps over the training images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.base import BaseModule
from lightning_modules.classification_metrics import ClassificationMetrics
from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl_data import require_labels

EvalSplit = Literal["val", "test"]


class ClassModule(BaseModule):
    """A module whose `forward` gives logits [B, K] of images [B, C, H, W] in [0, 1].

    A subclass calls `build_class_metrics` once.

    Attributes:
        num_classes: Classes K.
        val_metrics: What is measured in validation.
        test_metrics: The same in test.
    """

    counted = "images"  # what `confusion` and `reliability` count

    num_classes: int
    val_metrics: ClassificationMetrics
    test_metrics: ClassificationMetrics

    def build_class_metrics(self, num_classes: int) -> None:
        """Give the module its metrics, one collection a split.

        Raises:
            ValueError: There are fewer than two classes.
        """
        if num_classes < 2:
            msg = f"Expected `num_classes` >= 2, got {num_classes}; a yes/no question has two classes."
            raise ValueError(msg)
        self.num_classes = num_classes
        self.val_metrics = ClassificationMetrics(num_classes, "val")
        self.test_metrics = ClassificationMetrics(num_classes, "test")

    # ---------------------------------------------------------------- evaluation

    def _eval_step(self, batch: dict[str, Tensor], split: EvalSplit) -> None:
        image, label = self.checked(batch)
        self._metrics_of(split).update("", self(image), label)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._eval_step(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the test metrics."""
        self._eval_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_agreed(self.val_metrics.compute())
        self.val_metrics.reset()

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_agreed(self.test_metrics.compute())
        self.test_metrics.reset()

    def _metrics_of(self, split: EvalSplit) -> ClassificationMetrics:
        return self.val_metrics if split == "val" else self.test_metrics

    def confusion(self, split: EvalSplit) -> Tensor:
        """Counts [K, K] of the evaluation so far: row = true class, column = predicted class."""
        return self._metrics_of(split).confusion()

    def reliability(self, split: EvalSplit) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence, accuracy and count of each calibration bin of the evaluation so far."""
        return self._metrics_of(split).reliability()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Classify a batch of images.

        Returns:
            probabilities [B, K], label [B], confidence [B] in [0, 1], index [B].
        """
        image, _ = self.checked(batch, labelled=False)
        probabilities = self(image).softmax(-1)
        confidence, label = probabilities.max(-1)
        index = batch.get("index", torch.arange(len(image), device=self.device))
        return {"probabilities": probabilities, "label": label, "confidence": confidence, "index": index}

    def checked(self, batch: object, labelled: bool = True) -> tuple[Tensor, Tensor]:
        """Return images and labels of an evaluation batch, if it is one; padding and missing labels become -1.

        Raises:
            ValueError: Something is missing or out of range.
        """
        found = dict(batch) if isinstance(batch, Mapping) else {}
        missing = [name for name in (("image", "label") if labelled else ("image",)) if name not in found]
        if missing:
            msg = f"Expected batches to be dicts with {' and '.join(missing)}, got {sorted(found) or type(batch)}."
            raise ValueError(msg)
        image = found["image"]
        label = found.get("label", torch.full((len(image),), -1, device=image.device))
        if labelled:
            require_labels(label, self.num_classes, low=-1)
            label = torch.where(found["index"] < 0, -1, label) if "index" in found else label
        return image, label

    # ---------------------------------------------------------------- all training images

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of all processes, one after the other along the first axis; all must be of one size."""
        if self.trainer.world_size == 1:
            return list(tensors)
        return [self.all_gather(tensor).flatten(0, 1) for tensor in tensors]  # type: ignore[union-attr]

    @torch.no_grad()
    def swept(
        self,
        loader: Iterable[dict[str, Tensor]],
        function: Callable[[dict[str, Tensor]], Sequence[Tensor]],
        what: str,
        size: int | None = None,
    ) -> list[Tensor]:
        """Apply a function to all batches of a sweep, in evaluation mode.

        Args:
            loader: Gives every image once over all processes, with its "index"; -1 is a filler.
            function: Given a batch on the module's device, returns tensors [B, ...].
            what: The images, for the error.
            size: How many there are; None takes as many as come.

        Returns:
            The results [N, ...] in the order of the index, the same on every process.

        Raises:
            ValueError: An image came twice or not at all.
        """
        batches = []
        with evaluating(self):
            for batch in loader:
                moved = self.trainer.strategy.batch_to_device(batch, self.device)
                batches.append((*function(moved), moved["index"]))
        *values, index = self.gather(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        real = index >= 0
        index = index[real]
        size = len(index) if size is None else size
        if not torch.equal(index.sort().values, torch.arange(size, device=index.device)):
            msg = f"Expected `sweep_dataloader` to give each of {size} {what} once, got {len(index)}."
            raise ValueError(msg)
        order = index.argsort()
        return [value[real][order] for value in values]

    # ---------------------------------------------------------------- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with other classes."""
        self.require_own_classes(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def require_own_classes(self, checkpoint: dict[str, Any]) -> None:
        """Compare the number of classes with a checkpoint's.

        Raises:
            ValueError: They differ.
        """
        theirs = checkpoint.get("hyper_parameters", {}).get("num_classes", self.num_classes)
        if theirs != self.num_classes:
            msg = (
                f"Expected a checkpoint with `num_classes` = {self.num_classes}, got one with {theirs}; give the data "
                "that it was trained on."
            )
            raise ValueError(msg)
