"""Labels that a classifier gives to all images to train on, written for the next stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from callbacks import fit_end
from callbacks.class_counts import draw_class_counts
from callbacks.label_tally import ImagesToLabel, Labelled, LabelTally
from callbacks.mask_writer import flat_loaders
from callbacks.picture import image_sink, lacks_method
from callbacks.pseudo_label_selection import (
    BoolArray,
    Float64Array,
    Int64Array,
    Selection,
    precision_of,
    require_every_class,
)
from datamodules import pseudo_labels
from datamodules.pseudo_labels import LabelTable, Origin
from datamodules.synthetic_images import weights_sha256

_FEW_CLASSES = 20


@runtime_checkable
class OffersImages(Protocol):
    """Data whose images to train on can be labelled."""

    class_names: Sequence[str]

    def label_dataloader(self) -> Any:  # noqa: ANN401 - a DataLoader, whose type Lightning does not tell
        """Return every image to train on once; its `dataset` is an ImagesToLabel."""
        ...


@runtime_checkable
class TellsLabelConfusion(Protocol):
    """A module that knows how often it labels images wrongly."""

    def label_confusion(self) -> Tensor | None:
        """Counts [K, K] of labelled images that it has not learned from: row = class, column = label that it gives."""
        ...


class PseudoLabelWriter(BasePredictionWriter):
    """Writes what a classifier takes every image to train on for, as a PseudoLabels artifact.

    It does so when a fit ends, and in `predict` for data that predict these images (`predict_split: train` of
    SemiSupervisedDataModule). With other data it does nothing there. The folder is the same for any number of devices,
    and whether it was made by a fit or from its checkpoint. When the end of a fit was interrupted, the same command
    with `--ckpt_path last` labels the images. A folder that holds these labels is left alone, earlier ones are
    replaced.

    An image has its most likely class, its probability, and what it was to the fit. Labels that a source hides are
    never looked at. Options leave images out, but never those that people labelled (with `true_labels`):
    `min_precision` comes first, then `min_confidence`, then `balance` and `max_per_class`. A class without any image
    is an error: a generator would draw noise for it.

    How many images each class has is shown in TensorBoard (`pseudo_labels/classes`).

    Args:
        output_dir: Folder of the artifact; a relative one is below the current directory. Made if missing.
        true_labels: Images that people labelled, those held out to validate on included, keep these labels, with
            confidence 1; a `label_noise` of the data is in them. If not, all images have the module's, as in You et
            al. 2023 (Diffusion Models and Semi-Supervised Learners Benefit Mutually with Few Labels).
        min_confidence: Leave out images whose label is less sure, in [0, 1].
        balance: Let each class keep as many of its surest images as the rarest one has.
        max_per_class: Let each class keep as many of its surest images at most; None keeps all.
        min_precision: Leave out the pseudo-labels of classes less precise than that, in [0, 1], as a confusion matrix
            of labelled images has it; see `precision_of`. It tells of classes as frequent as among these images.
        confusion: JSON file with that matrix, K rows (classes) of K counts (labels), or with an entry `confusion` as
            the manifest of pseudo-labels has; None asks the module (`label_confusion`).
        top_k: How many of the most likely classes to write, with their probabilities; 0 writes none.

    Attributes:
        artifacts: Folders that this run has finished, for the manifest of the run.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        output_dir: str,
        true_labels: bool = True,
        min_confidence: float = 0.0,
        balance: bool = False,
        max_per_class: int | None = None,
        min_precision: float = 0.0,
        confusion: str | None = None,
        top_k: int = 0,
    ) -> None:
        """Check the numbers; nothing is made or written before images are labelled."""
        super().__init__(write_interval="batch")
        if top_k < 0:
            msg = f"Expected `top_k` to be at least 0, got {top_k}; 0 writes no further classes."
            raise ValueError(msg)
        self.output_dir = Path(output_dir).expanduser()
        self.true_labels = true_labels
        self.selection = Selection(min_confidence, min_precision, balance, max_per_class)
        self.confusion = confusion
        self.top_k = top_k
        self.artifacts: list[str] = []
        self._trained_hash: str | None = None
        self._tally: LabelTally | None = None

    # ---------------------------------------------------------------- when a fit ends

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out now what would only show after the training.

        Args:
            trainer: The trainer.
            pl_module: The module; it has to offer `label_confusion()` where `min_precision` needs it.

        Raises:
            TypeError: The data have no images to label, or the module cannot tell its confusion.
            FileNotFoundError: The file of `confusion` is missing.
            ValueError: The folder holds something else, or an argument does not fit the classes.
        """
        self.artifacts = []
        data = self._data(trainer)
        if self.output_dir.resolve() == Path(trainer.default_root_dir).resolve():
            msg = (
                f"Expected `output_dir` to be a folder of its own, got the directory of the run, {self.output_dir}; "
                "both keep a manifest.json there. Give a folder below it."
            )
            raise ValueError(msg)
        pseudo_labels.require_free(self.output_dir)
        self._require_top_k(len(data.class_names))
        if self.confusion is not None:
            pseudo_labels.read_confusion(self.confusion, len(data.class_names))
        elif self.selection.min_precision > 0 and not isinstance(pl_module, TellsLabelConfusion):
            raise TypeError(lacks_method(pl_module, "label_confusion() for `min_precision`", type(self)))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Label the images.

        Args:
            trainer: The trainer.
            pl_module: The module that labels.

        Raises:
            TypeError: Its `predict_step` lacks something.
            ValueError: What it predicts cannot be used, or a class has no image.
            OSError: A file could not be written.
        """
        if (why := fit_end.why_not(trainer)) is not None:
            rank_zero_info(f"{self._name}: nothing is labelled ({why}).")
            return
        data = self._data(trainer)
        loader = data.label_dataloader()
        images: ImagesToLabel = loader.dataset
        origin = self._origin(trainer, pl_module, images)
        if trainer.strategy.broadcast(pseudo_labels.is_written(self.output_dir, origin)):
            self.artifacts = [str(self.output_dir)]
            rank_zero_info(f"{self._name}: the labels of this module are in {self.output_dir} already.")
            return
        self._precision(origin)  # raises
        tally = self._new_tally(images, len(data.class_names))
        progress = fit_end.image_progress(trainer, "labelling images", loader.sampler.num_samples)
        with fit_end.working(trainer, pl_module) as device, progress as advance:
            for number, batch in enumerate(loader):
                moved = trainer.strategy.batch_to_device(batch, device)
                tally.add(pl_module, pl_module.predict_step(moved, number))
                advance(len(batch["index"]))
            self._finish(trainer, tally, images, origin, device)

    # ---------------------------------------------------------------- in predict

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what an earlier prediction left.

        Args:
            trainer: Not looked at.
            pl_module: Not looked at.
            stage: Not looked at.
        """
        super().setup(trainer, pl_module, stage)
        self._tally = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember which configuration a checkpoint was trained by.

        Args:
            trainer: The trainer.
            pl_module: The module.
            checkpoint: The whole checkpoint; `lightning fit` has written `config_hash` into it.
        """
        self._trained_hash = checkpoint.get("config_hash") or None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether the images are those to label, before anything is computed.

        Args:
            trainer: The trainer, with its loaders.
            pl_module: Not looked at.

        Raises:
            ValueError: The folder holds something else, or `top_k` does not fit the classes.
        """
        images = self._predicted(trainer)
        if images is None:
            rank_zero_info(
                f"{self._name}: these are not the images to train on, nothing is written (`predict_split: train` of "
                "SemiSupervisedDataModule predicts them)."
            )
            return
        classes = len(self._data(trainer).class_names)
        self._require_top_k(classes)
        pseudo_labels.require_free(self.output_dir)
        self._tally = self._new_tally(images, classes)

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
            dataloader_idx: Not used.

        Raises:
            TypeError: The prediction lacks something.
            ValueError: It does not fit the classes.
        """
        if self._tally is not None:
            self._tally.add(pl_module, prediction)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write what all processes predicted.

        Args:
            trainer: The trainer.
            pl_module: The module that predicted.
            stage: Only "predict" matters.

        Raises:
            ValueError: What was predicted cannot be used, or a class has no image.
            OSError: A file could not be written.
        """
        images = self._predicted(trainer) if stage == "predict" else None
        if images is None:
            return
        # Not at the end of the prediction: a process without images is told neither of that nor of its start.
        tally = self._tally or self._new_tally(images, len(self._data(trainer).class_names))
        self._tally = None
        self._finish(trainer, tally, images, self._origin(trainer, pl_module, images), pl_module.device)

    # ---------------------------------------------------------------- both

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _data(self, trainer: pl.Trainer) -> OffersImages:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, OffersImages):
            msg = (
                f"Expected data with `class_names` and `label_dataloader()`, got {type(data).__name__}; use "
                f"SemiSupervisedDataModule, or take {self._name} out of `trainer.callbacks`."
            )
            raise TypeError(msg)
        return data

    def _predicted(self, trainer: pl.Trainer) -> ImagesToLabel | None:
        """The images of a prediction if they are those to label."""
        loaders = flat_loaders(trainer.predict_dataloaders) if trainer.predict_dataloaders is not None else []
        images = [getattr(loader, "dataset", None) for loader in loaders]
        if fit_end.is_dry(trainer) or len(images) != 1:
            return None
        return images[0] if isinstance(images[0], ImagesToLabel) else None

    def _require_top_k(self, num_classes: int) -> None:
        if self.top_k > num_classes:
            msg = f"Expected `top_k` to be at most {num_classes}, the number of classes, got {self.top_k}."
            raise ValueError(msg)

    def _new_tally(self, images: ImagesToLabel, num_classes: int) -> LabelTally:
        counted = images.labels < 0 if self.true_labels else torch.ones(len(images.labels), dtype=torch.bool)
        return LabelTally(counted, num_classes, self.top_k)

    def _origin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: ImagesToLabel) -> Origin:
        """What the labels are made from, but for what comes of the labels themselves; every process has to ask."""
        data = self._data(trainer)
        fits = trainer.state.fn == TrainerFn.FITTING
        meaning: dict[str, Any] = getattr(pl_module, "meaning", dict)()
        told = pl_module.label_confusion() if isinstance(pl_module, TellsLabelConfusion) else None
        confusion = None if told is None else told.detach().cpu().numpy()
        if self.confusion is not None:
            confusion = pseudo_labels.read_confusion(self.confusion, len(data.class_names))
        return Origin(
            tuple(data.class_names),
            getattr(data, "images_fingerprint", None),
            weights_sha256(pl_module),
            fit_end.config_hash(trainer) if fits else self._trained_hash,
            {
                "precision": str(trainer.precision),
                **meaning,
                "true_labels": self.true_labels,
                "top_k": self.top_k,
                "data": images.fingerprint,
            },
            self.selection.description(images.left_out),
            confusion,
        )

    def _finish(
        self, trainer: pl.Trainer, tally: LabelTally, images: ImagesToLabel, origin: Origin, device: torch.device
    ) -> None:
        """Rank 0 writes what all have found, and nobody goes on before it has."""
        found = tally.gathered(trainer, device)
        problem = ""
        if trainer.is_global_zero:
            try:
                self._write(trainer, found, images, origin)
            except (ValueError, OSError) as error:
                problem = str(error)
                if trainer.world_size == 1:
                    raise
        # All processes fail together: one alone would leave the others waiting.
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise ValueError(problem)
        self.artifacts = [str(self.output_dir)]

    def _write(self, trainer: pl.Trainer, found: Labelled | str, images: ImagesToLabel, origin: Origin) -> None:
        if isinstance(found, str):
            raise ValueError(found)  # noqa: TRY004 - a message instead of rows
        given = images.labels.cpu().numpy()
        fixed = (given >= 0) & self.true_labels
        labels = np.where(fixed, given, found.labels)
        confidence = np.where(fixed, 1.0, found.confidence)
        kept = np.flatnonzero(self.selection.keep(labels, confidence, fixed, self._precision(origin)))
        counts = require_every_class(labels[kept], origin.class_names, self.selection)
        table = LabelTable(
            [images.keys[row] for row in kept.tolist()],
            labels[kept],
            confidence[kept].astype(np.float32),
            images.splits[kept],
            found.top_labels[kept] if self.top_k else None,
            found.top_confidence[kept].astype(np.float32) if self.top_k else None,
        )
        pseudo_labels.write(self.output_dir, table, origin.with_expected(found.expected_confusion))
        guessed = int((~fixed).sum())
        stayed = len(kept) - int(fixed.sum())
        shown = f"{counts.min()} to {counts.max()}"
        if len(counts) <= _FEW_CLASSES:
            shown = pseudo_labels.histogram(origin.class_names, counts.tolist())
        rank_zero_info(
            f"{self._name}: {len(kept)} images with labels in {self.output_dir}, {int(fixed.sum())} labelled by people "
            f"and {stayed} of {guessed} pseudo-labels ({stayed / max(guessed, 1):.1%} kept); of each class {shown}."
        )
        self._show(trainer, labels[kept], fixed[kept], origin.class_names)

    def _precision(self, origin: Origin) -> Float64Array | None:
        if self.selection.min_precision == 0:
            return None
        if origin.confusion is None or not origin.confusion.any():
            msg = (
                "Expected a confusion matrix for `min_precision`, but the module has none; let it keep labelled images "
                "that it does not learn from, or give `confusion`."
            )
            raise ValueError(msg)
        return precision_of(origin.confusion.astype(np.float64))

    def _show(self, trainer: pl.Trainer, labels: Int64Array, fixed: BoolArray, class_names: Sequence[str]) -> None:
        add_image = image_sink(trainer)
        if add_image is not None:
            below, above = (np.bincount(labels[part], minlength=len(class_names)) for part in (fixed, ~fixed))
            headline = f"{len(labels):,} images with labels, by class"
            drawn = draw_class_counts(below, above, class_names, headline, ("labelled by people", "pseudo-labels"))
            add_image("pseudo_labels/classes", drawn, trainer.global_step, dataformats="HWC")
