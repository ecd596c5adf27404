"""Images of classes, or pairs of an image and its mask, drawn by a module and written for the next stage."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.seed import isolate_rng

from callbacks import fit_end, sampling
from callbacks.drawn_sheet import class_sheet, pair_sheet
from callbacks.picture import image_sink, lacks_method
from datamodules.synthetic_images import SHARDS_ABOVE, Drawing, DrawRequest, Origin, weights_sha256

# What is known of a training: from the data, or from its checkpoint.
_KNOWN = ("class_names", "fingerprint", "images_fingerprint", "config_hash")


@runtime_checkable
class AsksForImages(Protocol):
    """Data for `predict` that are requests instead of images."""

    request: DrawRequest

    def leave_out(self, blocks: Collection[int]) -> None:
        """Do not ask for these blocks of the request."""
        ...


class SyntheticImageWriter(BasePredictionWriter):
    """Draws images of classes or (image, mask) pairs when a fit ends, and writes them as a SyntheticImages artifact.

    In `predict` it writes what the module draws for a SamplingDataModule, whose request counts then; with other data
    it does nothing. Either way the folder is the same for any number of devices. When drawing was interrupted, the
    same command goes on with the blocks that are missing (a fit with `--ckpt_path last`), and the files end up as if
    nothing had happened. A folder that is finished is left alone; one that was drawn from other weights, or in another
    way, is an error.

    The first ones are shown in TensorBoard, with a row for each class (`drawn/classes`) or beside their masks
    (`drawn/pairs`).

    Args:
        output_dir: Folder of the artifact; a relative one is below the current directory. Made if missing.
        request: What to draw when a fit ends; None draws in `predict` only.
        shards_above: Number of images of classes above which they are not written as a file each, which torchvision's
            ImageFolder reads, but as tar files of WebDataset, one for each block of the request; 0 always does so,
            None never. The images are the same, and a folder that was begun goes on as it was begun.

    Attributes:
        artifacts: Folders that this run has finished, for the manifest of the run.

    Raises:
        ValueError: `shards_above` is negative.
    """

    def __init__(
        self, output_dir: str, request: DrawRequest | None = None, shards_above: int | None = SHARDS_ABOVE
    ) -> None:
        """Nothing is made or written before something is drawn."""
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir).expanduser()
        self.request = request
        if shards_above is not None and shards_above < 0:
            msg = f"Expected argument `shards_above` to be at least 0, or left empty (null), but got {shards_above}."
            raise ValueError(msg)
        self.shards_above = shards_above
        self.artifacts: list[str] = []
        self._trained: dict[str, Any] = {}
        self._asked: Drawing | None = None
        self._origin: Origin | None = None
        self._begun = False
        self._left = 0
        self._since = 0.0

    # ---------------------------------------------------------------- when a fit ends

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out now what would only show after the training.

        Args:
            trainer: The trainer.
            pl_module: The module; it has to offer `draw(request)`.

        Raises:
            TypeError: The module does not draw.
            ValueError: The folder holds other images, the classes cannot be folders, or the module refuses to draw.
        """
        if self.request is None:
            return
        if not isinstance(pl_module, sampling.Draws):
            raise TypeError(lacks_method(pl_module, "draw(request)", type(self)))
        if self.request.is_open:
            self.request = replace(self.request, num_classes=self._classes_of_data(trainer))
        if self.output_dir.resolve() == Path(trainer.default_root_dir).resolve():
            msg = (
                f"Expected `output_dir` to be a folder of its own, got the directory of the run, {self.output_dir}; "
                "both keep a manifest.json there. Give a folder below it."
            )
            raise ValueError(msg)
        if not fit_end.is_dry(trainer):
            # Not the weights: they are not what they are going to be, and hashing them takes a while.
            origin = self._origin_of(trainer, pl_module, self.request, weights="")
            known = origin.identity()
            del known["weights"]
            Drawing(self.output_dir, self.request).require(known)
            self._require_new(origin)
        trial = self.request.trial()
        with isolate_rng(), sampling.drawing(trainer, pl_module, type(self)) as draw:
            Drawing(self.output_dir, trial).check(0, draw(trial.batch(0)), self._num_classes(trainer))

    def _require_new(self, origin: Origin) -> None:
        """A fit that starts anew ends with new weights, unless it repeats the one that drew what is there."""
        header = Drawing(self.output_dir, origin.request).header()
        if header is None or self._trained or header.get("config_hash") == origin.config_hash:
            return
        msg = (
            f"Expected `output_dir` {self.output_dir} to be empty, or to hold {origin.request.noun} drawn by this fit, "
            "got those of another one; give another folder, move this one away, or go on with that fit (--ckpt_path "
            "last)."
        )
        raise ValueError(msg)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what is missing.

        Args:
            trainer: The trainer.
            pl_module: The module that draws.

        Raises:
            ValueError: The folder holds images of another origin, or what was drawn cannot be written.
            OSError: A file could not be written.
        """
        self._trained = self._known_to_data(trainer)
        if self.request is None or not isinstance(pl_module, sampling.Draws):
            return
        if (why := fit_end.why_not(trainer)) is not None:
            rank_zero_info(f"{self._name}: nothing is drawn ({why}).")
            return
        drawing = Drawing(self.output_dir, self.request, self.shards_above)
        origin = self._origin_of(trainer, pl_module, self.request, weights_sha256(pl_module))
        self._left = _count(drawing, drawing.missing())
        self._begin(drawing, origin)
        own = drawing.missing(trainer.global_rank, trainer.world_size)
        progress = fit_end.image_progress(trainer, f"drawing {self.request.noun}", _count(drawing, own))
        with sampling.drawing(trainer, pl_module, type(self)) as draw, progress as advance:
            for block in own:
                drawing.write(block, draw(self.request.batch(block)), origin.num_classes)
                advance(len(self.request.seeds(block)))
        self._finish(drawing, trainer)

    # ---------------------------------------------------------------- in predict

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave out of a prediction what has been drawn before.

        Args:
            trainer: The trainer with its data.
            pl_module: Not looked at.
            stage: Only "predict" matters.

        Raises:
            ValueError: The folder holds the images of another request.
        """
        super().setup(trainer, pl_module, stage)
        self._asked, self._origin, self._begun = None, None, False
        data = getattr(trainer, "datamodule", None)
        if stage != "predict" or fit_end.is_dry(trainer) or not isinstance(data, AsksForImages):
            return
        self._asked = Drawing(self.output_dir, data.request, self.shards_above)
        self._asked.require({"request": data.request.description()})
        missing = self._asked.missing()
        self._left = _count(self._asked, missing)
        data.leave_out(set(range(data.request.num_blocks)) - set(missing))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember what a checkpoint says of its training.

        Args:
            trainer: The trainer.
            pl_module: The module.
            checkpoint: The whole checkpoint; `lightning fit` has written `fingerprint`, `images_fingerprint` and
                `config_hash` into it.
        """
        self._trained = {name: checkpoint.get(name) or None for name in _KNOWN}

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write down what the images are drawn from, before the first.

        Args:
            trainer: The trainer.
            pl_module: The module that draws.

        Raises:
            ValueError: The folder holds images of another origin, or the classes cannot be folders.
        """
        if self._asked is not None:
            self._asked.require(self._predicted_origin(self._asked, trainer, pl_module).identity())

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,  # noqa: ANN401 - whatever a predict_step returns; checked below
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401 - whatever a loader yields
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the images of one block.

        Args:
            trainer: The trainer.
            pl_module: The module that drew.
            prediction: What `predict_step` returned.
            batch_indices: Not used.
            batch: The request.
            batch_idx: Not used.
            dataloader_idx: Not used.

        Raises:
            TypeError: The prediction is no drawn images, or the requests do not come from a SamplingDataModule.
            ValueError: It cannot be written.
            OSError: A file could not be written.
        """
        if self._asked is not None:
            # Not before: a drawing that fails at once must leave no trace.
            self._begin_predicted(self._asked, trainer, pl_module)
            request = self._asked.request
            block = request.block_of(int(batch["seed"][0]))
            self._asked.write(block, prediction, self._num_classes(trainer))
        elif isinstance(batch, Mapping) and "seed" in batch and not fit_end.is_dry(trainer):
            msg = (
                f"Expected requests for images to come from a datamodule with `request` and `leave_out(blocks)`, got "
                f"{type(getattr(trainer, 'datamodule', None)).__name__}; use SamplingDataModule."
            )
            raise TypeError(msg)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish the folder of a prediction.

        Args:
            trainer: The trainer.
            pl_module: The module that drew.
            stage: Only "predict" matters.

        Raises:
            ValueError: The folder holds images of another origin.
            OSError: A file could not be written.
        """
        # Not at the end of the prediction: a process without requests is not told of that.
        if stage == "predict" and self._asked is not None:
            self._begin_predicted(self._asked, trainer, pl_module)
            self._finish(self._asked, trainer)
            self._asked = None

    # ---------------------------------------------------------------- both

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _num_classes(self, trainer: pl.Trainer) -> int | None:
        return getattr(getattr(trainer, "datamodule", None), "num_classes", None)

    def _classes_of_data(self, trainer: pl.Trainer) -> int:
        found = self._num_classes(trainer)
        if found is None:
            msg = (
                "Expected `request` with `num_classes`, or data that know how many classes there are, got neither; say "
                "how many."
            )
            raise ValueError(msg)
        return found

    def _known_to_data(self, trainer: pl.Trainer) -> dict[str, Any]:
        data = getattr(trainer, "datamodule", None)
        return {
            "class_names": getattr(data, "class_names", None) or None,
            "fingerprint": getattr(data, "fingerprint", None) or None,
            "images_fingerprint": getattr(data, "images_fingerprint", None) or None,
            "config_hash": fit_end.config_hash(trainer),
        }

    def _origin_of(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, request: DrawRequest, weights: str
    ) -> Origin:
        """What images are drawn from: in a fit the data say so, in predict the checkpoint."""
        known = self._known_to_data(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            known = self._trained | {"class_names": known["class_names"] or self._trained.get("class_names")}
        # Images of classes are trained on with other labels than those that their generator had: pseudo-labels.
        images = known.get("images_fingerprint") if request.has_classes else None
        fingerprint = images or known.get("fingerprint")
        meaning: dict[str, Any] = getattr(pl_module, "meaning", dict)()
        drawn_with = {"precision": str(trainer.precision), **meaning}
        names, hash_ = known.get("class_names"), known.get("config_hash")
        return Origin(request, weights, self._num_classes(trainer), names, fingerprint, hash_, drawn_with)

    def _predicted_origin(self, drawing: Drawing, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Origin:
        """What the images of this prediction are drawn from; the weights are hashed once."""
        if self._origin is None:
            self._origin = self._origin_of(trainer, pl_module, drawing.request, weights_sha256(pl_module))
        return self._origin

    def _begin_predicted(self, drawing: Drawing, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._begun:
            self._begin(drawing, self._predicted_origin(drawing, trainer, pl_module))
            self._begun = True

    def _begin(self, drawing: Drawing, origin: Origin) -> None:
        drawing.begin(origin)
        self._since = time.monotonic()
        if self._left:
            request = drawing.request
            rank_zero_info(
                f"{self._name}: drawing {self._left} of {request.total} {request.noun} of "
                f"{request.image_size} px "
                f"({request.sampler}, {request.num_steps} steps) into {drawing.folder}."
            )

    def _finish(self, drawing: Drawing, trainer: pl.Trainer) -> None:
        """Rank 0 finishes once all have written, and nobody goes on before it has."""
        trainer.strategy.barrier("SyntheticImageWriter: drawn")
        if trainer.is_global_zero:
            request, folder = drawing.request, drawing.folder
            if drawing.finish():
                self.artifacts = [str(folder)]
                took = f"drawn in {time.monotonic() - self._since:.0f} s" if self._left else "nothing was left to draw"
                rank_zero_info(f"{self._name}: {request.total} {request.noun} in {folder}, {took}.")
                if self._left:
                    self._show(trainer, drawing)
            else:
                rank_zero_info(
                    f"{self._name}: {folder} is not finished, {len(drawing.missing())} of {request.num_blocks} blocks "
                    "are missing; the same command goes on."
                )
        trainer.strategy.barrier("SyntheticImageWriter: finished")

    def _show(self, trainer: pl.Trainer, drawing: Drawing) -> None:
        add_image = image_sink(trainer)
        if add_image is not None:
            tag, picture = (
                ("drawn/classes", class_sheet) if drawing.request.has_classes else ("drawn/pairs", pair_sheet)
            )
            add_image(tag, picture(drawing.folder), trainer.global_step, dataformats="HWC")


def _count(drawing: Drawing, blocks: Collection[int]) -> int:
    return sum(len(drawing.request.seeds(block)) for block in blocks)
