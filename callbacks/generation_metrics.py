"""How good drawn images are, while a generator trains and when it is tested."""

from collections.abc import Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from callbacks.drawn_sheet import class_rows, shown_classes
from callbacks.fit_end import image_progress
from callbacks.picture import EvalSplit, Picture, class_name, lacks_method, require_positive
from callbacks.reference_features import Extracts, RealImages, Reference, ReferenceSplit, reference_features
from callbacks.sampling import Draws, drawing
from datamodules.synthetic_images import DrawRequest, SamplerName


@runtime_checkable
class Measures(Protocol):
    """A metric of drawn images."""

    name: str
    needs_images: bool

    def set_up(self, num_features: int, num_classes: int) -> object:
        """Tell the sizes."""
        ...

    def require_images(self, real: Tensor, drawn: Tensor) -> None:
        """Refuse these numbers [K] of images of each class."""
        ...

    def update(
        self, features: Tensor, labels: Tensor, probabilities: Tensor, real: bool, images: Tensor | None = None
    ) -> None:
        """Add a batch."""
        ...

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The value, or values by name, over all processes."""
        ...

    def reset(self) -> None:
        """Forget all batches."""
        ...


class GenerationMetrics(Picture):
    """Draws images of every class and compares them with real ones.

    Images are drawn as `predict` would, image j of class c with the seed `first_seed` + j * K + c, and turned into
    features once for all metrics. Values are logged as `<split>_<metric>_<extractor>`, such as
    `test_fid_classifier` or `val_precision_k3_inception`; metrics that look at the images themselves leave the
    extractor out (`test_cas_wideresnet`). The first images of each class are shown in TensorBoard (`drawn/<split>`).
    Nothing that draws random numbers elsewhere is disturbed.

    Within a fit, images are compared after validation, or after the epoch where there are no validation images.

    Args:
        extractor: ClassifierFeatures, InceptionFeatures, or a module with `name`, `num_features`, `fingerprint` and
            forward(image [B, C, H, W] in [0, 1]) -> (features, probabilities).
        metrics: FrechetDistance, ManifoldMetrics, ClassifierScore, LabelConsistency, ClassificationAccuracyScore.
        images_per_class: Images drawn of each class.
        sampler: How images are drawn, see DrawRequest.
        num_steps: Steps of the sampler.
        guidance: Weight of classifier-free guidance; 0 is none.
        first_seed: The smallest seed.
        batch_size: Images drawn at once, on each device.
        every_n_epochs: Epochs between comparisons in a fit; the last epoch always has one.
        when: Compare in validations, in the test, or in both.
        reference: Real images to compare with. Test images have true labels. Training images are what published
            values are about, but have the labels they were given: with noise on them, values of single classes
            (`per_class`) mean little. The classification accuracy score is always of test images.
        cache_dir: Folder for the features of real images, which are computed once for data, split and weights; None
            takes `.fewlight` in the folder of the data, and keeps them in memory only where there is none, or it cannot
            be written to. Remove it after files were replaced by others of the same names.
        shown: Images of each class in the picture; 0 draws no picture.

    Raises:
        ValueError: A number is out of range.
        TypeError: An extractor or metric cannot be used.
    """

    def __init__(
        self,
        extractor: nn.Module,
        metrics: list[Metric],
        images_per_class: int = 100,
        sampler: SamplerName = "heun",
        num_steps: int = 18,
        guidance: float = 0.0,
        first_seed: int = 0,
        batch_size: int = 256,
        every_n_epochs: int = 1,
        when: Literal["val", "test", "both"] = "both",
        reference: ReferenceSplit = "test",
        cache_dir: str | None = None,
        shown: int = 8,
    ) -> None:
        """Check the arguments; weights are read when a run begins."""
        super().__init__(every_n_epochs)
        require_positive(images_per_class=images_per_class, num_steps=num_steps, batch_size=batch_size)
        _require_choice("when", when, ("val", "test", "both"))
        _require_choice("reference", reference, ("train", "test"))
        self.extractor = extractor
        self.metrics = _require_metrics(metrics)
        self.images_per_class = images_per_class
        self.sampler: SamplerName = sampler
        self.num_steps = num_steps
        self.guidance = guidance
        self.first_seed = first_seed
        self.batch_size = batch_size
        self.when = when
        self.reference = reference
        self.cache_dir = cache_dir
        self.shown = shown
        self._known: Reference | None = None

    # ---------------------------------------------------------------- when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out now what would only show after the first epoch.

        Args:
            trainer: The trainer with its data.
            pl_module: The module; it has to offer `draw(request)`.
            stage: fit, validate or test; nothing is measured in predict.

        Raises:
            TypeError: The module does not draw, or the data or the extractor lack something.
            ValueError: A request is impossible, or the extractor's weights do not fit.
            FileNotFoundError: The extractor's weights are missing.
        """
        self._known = None
        split = {"fit": "val", "validate": "val", "test": "test"}.get(stage)
        if stage == "fit" and self.when == "test" and not getattr(trainer, "fast_dev_run", False):
            # The test comes after hours of training.
            _ = self._extracts().fingerprint
        if split is None or self.when not in (split, "both"):
            return
        if not isinstance(pl_module, Draws):
            raise TypeError(lacks_method(pl_module, "draw(request)", type(self)))
        data = getattr(trainer, "datamodule", None)
        missing = [name for name in ("num_classes", "image_size") if getattr(data, name, None) is None]
        if missing:
            msg = (
                f"Expected a datamodule with {' and '.join(missing)} for GenerationMetrics, got {type(data).__name__}; "
                "use GenerationDataModule."
            )
            raise TypeError(msg)
        extractor = self._extracts()
        _ = extractor.fingerprint
        request = self._request(trainer)
        for metric in self.metrics:
            metric.set_up(extractor.num_features, len(request.counts))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the real images, and draw one in a single step, before anything is trained.

        Args:
            trainer: The trainer.
            pl_module: The module that draws.

        Raises:
            ValueError: The module refuses to draw, or there are too few images.
        """
        if self.when == "test":
            return
        request = self._request(trainer)
        with isolate_rng(), torch.inference_mode(False), torch.no_grad():
            with drawing(trainer, pl_module, type(self)) as draw:
                draw(request.trial().batch(0))
            if not getattr(trainer, "fast_dev_run", False):
                self.extractor.to(trainer.strategy.root_device)
                self._require_images(trainer, self._extracts(), request)
                self.extractor.cpu()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare after validation.

        Args:
            trainer: The trainer.
            pl_module: The module that draws.
        """
        if self.when != "test" and self.is_due_after_validation(trainer):
            self._measure(trainer, pl_module, "val")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare after the epoch, where there is no validation.

        Args:
            trainer: The trainer.
            pl_module: The module that draws.
        """
        if self.when != "test" and not self.validates(trainer) and self.is_due(trainer):
            self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare after the test.

        Args:
            trainer: The trainer.
            pl_module: The module that draws.
        """
        if self.when != "val":
            self._measure(trainer, pl_module, "test")

    # ---------------------------------------------------------------- what

    def _extracts(self) -> Extracts:
        if not isinstance(self.extractor, Extracts):
            msg = (
                "Expected an `extractor` with name, num_features, fingerprint and forward(image), got "
                f"{type(self.extractor).__name__}; use ClassifierFeatures or InceptionFeatures."
            )
            raise TypeError(msg)
        return self.extractor

    def _request(self, trainer: pl.Trainer) -> DrawRequest:
        data = trainer.datamodule  # type: ignore[attr-defined]  # there since `setup`
        total = self.images_per_class * data.num_classes
        # Every process gets a block: one without images would have no states to bring to the others'.
        batch_size = max(1, min(self.batch_size, total // trainer.world_size))
        return DrawRequest(
            num_images=None,
            image_size=data.image_size,
            first_seed=self.first_seed,
            batch_size=batch_size,
            sampler=self.sampler,
            num_steps=self.num_steps,
            images_per_class=self.images_per_class,
            num_classes=data.num_classes,
            guidance=self.guidance,
        )

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: EvalSplit) -> None:
        """Every process draws its share; metrics add up what all have drawn."""
        if getattr(trainer, "fast_dev_run", False):
            self.say("nothing is drawn in a dry run.")
            return
        device, extractor = trainer.strategy.root_device, self._extracts()
        request = self._request(trainer)
        self.extractor.to(device)
        # Not in inference mode, in which an evaluation runs: a metric may train, and states outlive the evaluation.
        with isolate_rng(), torch.inference_mode(False), torch.no_grad():
            for metric in self.metrics:
                metric.reset()
                cast("Metric", metric).to(device)
            self._add_real(trainer, extractor, request)
            self._add_drawn(trainer, pl_module, extractor, request, split)
            values: dict[str, Tensor] = {}
            for metric in self.metrics:
                tail = "" if metric.needs_images else f"_{extractor.name}"
                found = metric.compute()
                named = found if isinstance(found, dict) else {metric.name: found}
                values |= {f"{split}_{name}{tail}": value.float() for name, value in named.items()}
                metric.reset()
                # Training needs the memory of the device.
                cast("Metric", metric).cpu()
        self.extractor.cpu()
        pl_module.log_dict(values, sync_dist=True)

    def _require_images(self, trainer: pl.Trainer, extractor: Extracts, request: DrawRequest) -> Reference:
        """The real images as metrics see them, if there are enough of these and of drawn ones."""
        if self._known is None:
            images = RealImages(trainer, self.reference)
            self._known = reference_features(images, extractor, self.cache_dir)
        real, drawn = torch.bincount(self._known.labels, minlength=len(request.counts)), torch.tensor(request.counts)
        for metric in self.metrics:
            metric.require_images(real, drawn)
        return self._known

    def _add_real(self, trainer: pl.Trainer, extractor: Extracts, request: DrawRequest) -> None:
        known = self._require_images(trainer, extractor, request)
        device, rank, world = trainer.strategy.root_device, trainer.global_rank, trainer.world_size
        own = Reference(*(part[rank::world] for part in known))
        by_features = [metric for metric in self.metrics if not metric.needs_images]
        for start in range(0, len(own.labels) if by_features else 0, self.batch_size):
            features, labels, probabilities = (part[start : start + self.batch_size].to(device) for part in own)
            for metric in by_features:
                metric.update(features, labels, probabilities, real=True)
        by_images = [metric for metric in self.metrics if metric.needs_images]
        for image, label, index in RealImages(trainer, "test").batches() if by_images else ():
            image, label = image[index >= 0], label[index >= 0]
            nothing = image.new_zeros(len(image), extractor.num_features)
            for metric in by_images:
                metric.update(nothing, label, nothing, real=True, images=image)

    def _add_drawn(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        extractor: Extracts,
        request: DrawRequest,
        split: EvalSplit,
    ) -> None:
        blocks = _share(request.num_blocks, trainer.global_rank, trainer.world_size)
        rank_zero_info(
            f"{type(self).__name__}: drawing {request.total} images of {len(request.counts)} classes "
            f"({request.sampler}, {request.num_steps} steps)."
        )
        first: list[tuple[Tensor, Tensor]] = []
        wanted = self.shown * len(request.counts)
        count = sum(len(request.seeds(block)) for block in blocks)
        progress = image_progress(trainer, "drawing images to measure", count)
        with drawing(trainer, pl_module, type(self)) as draw, progress as advance:
            for block in blocks:
                found = draw(request.batch(block))
                image, label = found["image"].float(), found["label"]
                features, probabilities = extractor(image)
                for metric in self.metrics:
                    metric.update(features, label, probabilities, real=False, images=image)
                if trainer.is_global_zero and sum(len(labels) for _, labels in first) < wanted:
                    first.append((image.cpu(), label.cpu()))
                advance(len(label))
        if first and (add_image := self.sink(trainer)) is not None:
            images, labels = (torch.cat(list(parts)) for parts in zip(*first, strict=True))
            some = shown_classes(range(len(request.counts)))
            rows = [(class_name(trainer, c), list(images[labels == c][: self.shown])) for c in some]
            picture = class_rows([row for row in rows if row[1]])
            add_image(f"drawn/{split}", picture, trainer.global_step, dataformats="HWC")


def _share(num_blocks: int, rank: int, world_size: int) -> range:
    """Neighbouring blocks: put one behind the other by rank, images are in the order of one process."""
    return range(rank * num_blocks // world_size, (rank + 1) * num_blocks // world_size)


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        msg = f"Expected `{name}` to be one of {', '.join(choices)}, got {value!r}."
        raise ValueError(msg)


def _require_metrics(metrics: Sequence[Metric]) -> list[Measures]:
    found: list[Measures] = []
    for metric in metrics:
        if not isinstance(metric, Measures):
            msg = (
                f"Expected `metrics` of generation, got {type(metric).__name__}; use those of "
                "lightning_modules.metrics.generation.GenerationMetric."
            )
            raise TypeError(msg)
        found.append(metric)
    names = [metric.name for metric in found]
    if not names or len(set(names)) < len(names):
        msg = (
            f"Expected `metrics` with different names, at least one, got {names or 'none'}; each is logged by its own."
        )
        raise ValueError(msg)
    return found
