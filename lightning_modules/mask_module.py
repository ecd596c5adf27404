"""What every module that predicts masks shares: metrics, calibration, uncertainty, predictions."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_modules.base import BaseModule
from lightning_modules.mask_losses import IGNORE
from lightning_modules.mask_metrics import mask_metrics, reliability_bins
from lightning_modules.uncertainty import entropy, image_confidence

Split = Literal["val", "test"]


class MaskModule(BaseModule):
    """A module whose network is a segmenter, perhaps among other things.

    A subclass calls `build_mask_metrics` once, says how images are segmented (`segment`), what one batch of an
    evaluation adds to the metrics (`_eval_step`) and what is logged at its end (`_log_eval`).

    Attributes:
        loaded: Hyper-parameters of that checkpoint, until a fit goes on with it.
        num_classes: Classes, the background included.
        val_metrics: Overlap and calibration in validation.
        test_metrics: The same in test.
    """

    num_classes: int
    val_metrics: MetricCollection
    test_metrics: MetricCollection

    _seen: Tensor
    _looked_at_range = False

    def build_mask_metrics(self, num_classes: int) -> None:
        """Give the module its metrics on masks, one collection a split.

        Raises:
            ValueError: There is no class beside the background, or more classes than masks can hold.
        """
        if not 2 <= num_classes <= IGNORE:
            msg = (
                f"Expected `num_classes` from 2 to {IGNORE} (background included), got {num_classes}; one lesion class "
                f"makes 2, and masks hold the ids 0 to {IGNORE - 1}, as {IGNORE} marks what is not labelled."
            )
            raise ValueError(msg)
        self.num_classes = num_classes
        self.loaded: dict[str, Any] = {}
        metrics = mask_metrics(num_classes)
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")
        self.register_buffer("_seen", torch.zeros(num_classes, dtype=torch.bool), persistent=False)

    def setup(self, stage: str) -> None:
        """Compare the classes with the data's, where a datamodule knows them.

        Raises:
            ValueError: They differ.
        """
        self.require_classes_of_data(self.num_classes)

    def checked(self, batch: object, *names: str) -> dict[str, Tensor]:
        """Return a batch if it is one: a dict of `image`, `mask` and `index`, as far as they are named.

        Args:
            batch: What the loader gave.
            names: Which of them are needed. `index` is counted from 0 where it is missing, unless it is named.

        Raises:
            ValueError: Something is missing, or of another type or shape.
        """
        wanted = {"image": (4, "[B, C, H, W] floating, in [0, 1]"), "mask": (3, "[B, H, W] int64, 255 = unlabelled")}
        wanted["index"] = (1, "[B] int64, the image's number in the data")
        found = dict(batch) if isinstance(batch, Mapping) else {}
        if "image" in found and "index" not in names:
            found.setdefault("index", torch.arange(len(found["image"]), device=self.device))
        wrong = []
        for name in names:
            value = found.get(name)
            if not isinstance(value, Tensor) or value.ndim != wanted[name][0]:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                wrong.append(f"`{name}` {wanted[name][1]}, got {got if name in found else 'none'}")
            elif value.is_floating_point() != (name == "image"):
                wrong.append(f"`{name}` {wanted[name][1]}, got {value.dtype}")
        if wrong:
            msg = f"Expected batches to be dicts with {'; '.join(wrong)}; let the data set return such items."
            raise ValueError(msg)
        if not self._looked_at_range:
            self._looked_at_range = True
            low, high = (float(x) for x in found["image"].aminmax())
            if low < -0.01 or high > 1.01:
                rank_zero_warn(
                    f"Expected `image` in [0, 1], got {low:.4g} to {high:.4g} in the first batch; modules normalise "
                    "themselves, so divide by 255 and leave other normalisation out."
                )
        return found

    def on_train_epoch_end(self) -> None:
        """Say once which classes there is nothing to learn about."""
        if self.current_epoch > 0:
            return
        seen = self.trainer.strategy.reduce(self._seen.float(), reduce_op="sum") > 0
        if not bool(seen.all()):
            rank_zero_warn(
                f"Of the `num_classes` = {self.num_classes} classes, {(~seen).nonzero().flatten().tolist()} did not "
                "occur in the first epoch's masks and will not be learnt; give labelled images that show them."
            )

    def known(self, mask: Tensor) -> Tensor:
        """Return a mask [B, H, W] if all of its ids are classes, or 255.

        Raises:
            ValueError: It holds another id.
        """
        wrong = mask[(mask != IGNORE) & ((mask < 0) | (mask >= self.num_classes))]
        if len(wrong):
            msg = (
                f"Expected masks with class ids below `num_classes` = {self.num_classes}, or {IGNORE} to ignore a "
                f"pixel, got id {int(wrong[0])}; set `num_classes` to that of the data, or map the ids."
            )
            raise ValueError(msg)
        if self.training and self.current_epoch == 0:
            self._seen |= torch.bincount(mask.flatten(), minlength=IGNORE + 1)[: self.num_classes] > 0
        return mask

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with other classes before torch reports shapes."""
        theirs = checkpoint.get("hyper_parameters", {}).get("num_classes", self.num_classes)
        if theirs != self.num_classes:
            msg = (
                f"Expected a checkpoint with `num_classes` = {self.num_classes}, got one with {theirs}; to start from "
                "it with other classes, pass it as model.init_args.init_from, which needs no last layer of that size."
            )
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        self.loaded = dict(checkpoint.get("hyper_parameters", {}))

    @abstractmethod
    def segment(self, image: Tensor) -> Tensor:
        """Class probabilities [B, K, H, W] of images [B, C, H, W] in [0, 1]."""

    def masks(self, image: Tensor) -> Tensor:
        """Class ids [B, H, W] of images [B, C, H, W] in [0, 1]."""
        return self.segment(image).argmax(1)

    @abstractmethod
    def _eval_step(self, batch: dict[str, Tensor], split: Split) -> None:
        """Update what is measured; padding (index -1) counts nowhere."""

    @abstractmethod
    def _log_eval(self, split: Split) -> None:
        """Log what was measured, and start again."""

    def uncertainty(self, image: Tensor) -> Tensor:
        """Uncertainty of each pixel of images [B, C, H, W], in nats: [B, H, W], the entropy of its probabilities."""
        return entropy(self.segment(image))

    def reliability(self, split: Split) -> tuple[Tensor, Tensor, Tensor] | None:
        """Confidence, accuracy and count of each calibration bin so far; None where no masks are trained."""
        return reliability_bins(self.metrics_of(split))

    def metrics_of(self, split: Split) -> MetricCollection:
        """The metrics of a split."""
        return self.val_metrics if split == "val" else self.test_metrics

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._eval_step(self.checked(batch, "image", "mask"), "val")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_eval("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the test metrics."""
        self._eval_step(self.checked(batch, "image", "mask"), "test")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_eval("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Segment a batch of images.

        Returns:
            probabilities [B, K, H, W], mask [B, H, W] of class ids, uncertainty [B, H, W] in nats, confidence [B] in
            [0, 1], index [B].
        """
        batch = self.checked(batch, "image")
        probabilities = self.segment(batch["image"])
        return {
            "probabilities": probabilities,
            "mask": probabilities.argmax(1),
            "uncertainty": entropy(probabilities),
            "confidence": image_confidence(probabilities),
            "index": batch["index"],
        }
