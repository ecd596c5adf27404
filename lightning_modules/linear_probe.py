"""LinearProbe: multinomial logistic regression on frozen features."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_modules.checkpoints import load_network, state_sha256
from lightning_modules.class_module import ClassModule
from lightning_modules.feature_cache import FeatureCache
from lightning_modules.logistic_regression import LogisticRegression, Minimum, lbfgs, left_out, minimise, out_of_fold
from lightning_modules.networks.probe import ProbeNetwork
from lightning_modules.networks.vit_encoder import ViTEncoder, load_encoder
from lightning_modules.ssl.base import Split
from lightning_modules.ssl_data import require_labels

# Relative tolerance of fits that only have to tell a class; on digits 1e-10 tells the same ones.
_HELD_OUT_TOL = 1e-4
_BY_PEOPLE = 0  # the origin of an image whose label is one that was given


@runtime_checkable
class GivesLabelled(Protocol):
    """A datamodule that shows all labelled images (SemiSupervisedDataModule)."""

    def sweep_dataloader(self, split: Split) -> Iterable[dict[str, Tensor]]:
        """The training images of a split, unaugmented: image, label, index; perhaps weight and origin."""
        ...


@runtime_checkable
class GivesAll(Protocol):
    """A datamodule that shows all training images, labelled or not (SemiSupervisedDataModule)."""

    image_size: int
    images_fingerprint: str

    def label_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """All of them, unaugmented, in the order of the data."""
        ...


class LinearProbe(ClassModule):
    r"""Multinomial logistic regression on the features of a frozen encoder, without intercepts.

    With x_i the features of labelled image i, minus their own mean and then divided by their norm, it minimises

        sum_i w_i CE(W x_i, y_i) + (l2 / 2) ||W||^2.

    That is the low-shot evaluation of Assran et al. (arXiv 2204.07141) and the classifier of dual pseudo training (You
    et al., arXiv 2302.10586), where l2 = 0.0025 in all, however many images there are: scikit-learn's
    LogisticRegression(C=400, fit_intercept=False). The objective has one minimum, so the result depends on the data
    alone: not on a seed, the order of the images or the number of processes (but for the last bits of rounding).

    The fit is one step of L-BFGS in float64, from W = 0, over all labelled images (`sweep_dataloader("labeled")` of the
    datamodule, gathered over the processes): give `trainer.max_steps: 1` and `data.steps_per_epoch: 1`. It ends when
    f - f* <= `tol` f is certain, and warns if that was not within `max_iter` iterations. Logged are `train_objective`,
    `train_gap` (what f - f* is at most, relative to f), `train_iterations`, `train_converged` (1 or 0) and, if there is
    a `label_confusion`, `train_held_out_accuracy`.

    Unlike the released code of dual pseudo training, features are preprocessed for predictions as for the fit: the
    class is the same, the probabilities would not be.

    Evaluation and predictions are those of SSLClassifier.

    Args:
        num_classes: Classes K; the CLI takes it from the data.
        encoder: Image [B, C, H, W] in [0, 1] -> features [B, D]; it is not trained. ViTEncoder, or TimmClassifier with
            num_classes 0; of a classifier with `embed` the pooled features are taken. None takes the pixels.
        encoder_from: File of the encoder's weights, read when a fit begins: of MaskedSiamese or a public one for a
            ViTEncoder, else the checkpoint of the fit that trained the network.
        l2: Total weight decay, positive; 1 / C of scikit-learn.
        centre_rows: Subtract from each feature vector its own mean.
        normalize_rows: Divide each feature vector by its norm.
        tol: Relative tolerance of the objective, positive.
        max_iter: Most iterations of L-BFGS.
        folds: Folds of `label_confusion` with more than 200 labelled images, at least 2; 0 does without.
        feature_cache: Folder for the features of all training images, which later fits with that encoder on those
            images share, whatever the labels; None encodes anew. Drawn images are encoded anew in any case.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from lightning_modules import LinearProbe, TimmClassifier
        >>> probe = LinearProbe(num_classes=10, encoder=TimmClassifier("resnet18", num_classes=0))
        >>> probe.network.embed(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 512])
    """

    network: ProbeNetwork
    held_out: Tensor

    def __init__(
        self,
        num_classes: int,
        encoder: nn.Module | None = None,
        encoder_from: str | None = None,
        l2: float = 0.0025,
        centre_rows: bool = True,
        normalize_rows: bool = True,
        tol: float = 1e-6,
        max_iter: int = 10_000,
        folds: int = 10,
        feature_cache: str | None = None,
    ) -> None:
        for name, number in (("l2", l2), ("tol", tol), ("max_iter", max_iter)):
            if number <= 0:
                msg = f"Expected a positive `{name}`, got {number}; the default will do."
                raise ValueError(msg)
        if folds < 0 or folds == 1:
            msg = f"Expected `folds` >= 2, or 0 for no `label_confusion`, got {folds}."
            raise ValueError(msg)
        for name, needs in (("encoder_from", encoder_from), ("feature_cache", feature_cache)):
            if needs is not None and encoder is None:
                msg = f"Expected `encoder` with `{name}`, got None and {needs!r}; pixels need neither."
                raise ValueError(msg)
        super().__init__(ProbeNetwork(num_classes, encoder, centre_rows, normalize_rows), ema_decay=0.0)
        self.save_hyperparameters(ignore=["encoder"])
        self.build_class_metrics(num_classes)
        self.automatic_optimization = False
        self.encoder_from = encoder_from
        self.l2 = l2
        self.tol = tol
        self.max_iter = max_iter
        self.folds = folds
        self._cache = None if feature_cache is None else FeatureCache(Path(feature_cache))
        self._uses_cache = False
        # With the weights in checkpoints: what predicts from one can still say how sure its labels are.
        self.register_buffer("held_out", torch.zeros(num_classes, num_classes, dtype=torch.int64))

    # ---------------------------------------------------------------- predictions

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [0, 1], without gradient."""
        return self.network.classify(self._features(image)).float()

    def _features(self, image: Tensor) -> Tensor:
        if self._cache is None or not self._uses_cache:
            return self.network.embed(image)
        known, features = self._cache.look_up(image)
        if bool(known.all()):
            return features
        found = features.new_empty(len(image), self.network.num_features)
        found[known], found[~known] = features, self.network.embed(image[~known])
        return found

    def label_confusion(self) -> Tensor | None:
        """How often the probe errs on labelled images that it has not learned from.

        Each labelled image is classified by a fit without it (up to 200 images; more are left out in `folds` folds that
        classes are spread over), all drawn and pseudo-labelled ones included. The single image of a class cannot be
        left out, unless there are drawn ones of it, and is not counted. Drawn images and pseudo-labels were made with
        the help of the label that is left out: with them the counts flatter.

        Returns:
            Counts int64 [K, K], row = label, column = predicted class, on the CPU; None where nothing was counted.
        """
        return self.held_out.cpu().clone() if bool(self.held_out.any()) else None

    def meaning(self) -> dict[str, Any]:
        """How features are preprocessed decides the outputs and is in no tensor."""
        return {"centre_rows": self.network.centre_rows, "normalize_rows": self.network.normalize_rows}

    # ---------------------------------------------------------------- before the fit

    def setup(self, stage: str) -> None:
        """Compare the classes with the data's, and make W as wide as the features are.

        Raises:
            ValueError: The classes differ.
            TypeError: The datamodule cannot show its labelled images.
        """
        self.require_classes_of_data(self.num_classes)
        if stage != "fit":
            return
        loader = self._labelled_images()
        declare = getattr(self._data(), "declare_views", None)
        if callable(declare):
            declare(("plain",), ())  # no unlabelled ones: there may be none
        if self.network.num_features == 0:
            of_encoder = getattr(self.network.encoder, "num_features", None)
            if not isinstance(of_encoder, int):
                of_encoder = self.network.embed(next(iter(loader))["image"][:1]).shape[1]
            self.network.resize(of_encoder)

    def configure_optimizers(self) -> Optimizer:
        """Build L-BFGS for W; the encoder is not trained."""
        return lbfgs(self.network.weight)

    def on_fit_start(self) -> None:
        """Read the encoder's weights, and encode all training images if they are to be kept."""
        super().on_fit_start()
        encoder = self.network.encoder
        if encoder is None:
            return
        if self.encoder_from is not None and not self.goes_on:
            _load(encoder, self.encoder_from)
        # A dry run leaves the cache alone.
        if self._cache is None or getattr(self.trainer, "fast_dev_run", False):
            return
        data = self._data()
        if not isinstance(data, GivesAll):
            msg = (
                f"Expected data with label_dataloader, image_size and images_fingerprint for `feature_cache`, got "
                f"{type(data).__name__}; use SemiSupervisedDataModule, or leave the cache out."
            )
            raise TypeError(msg)
        loader = data.label_dataloader()
        self._cache.ensure(
            self.network.embed,
            state_sha256(encoder.state_dict(), f"{type(encoder).__qualname__} {encoder}"),
            self.network.num_features,
            loader,
            len(loader.dataset),  # type: ignore[arg-type]  # all of ours have a length
            data.image_size,
            data.images_fingerprint,
            self.device,
        )
        self._uses_cache = True

    def _data(self) -> object:
        return getattr(self.trainer, "datamodule", None)

    def _labelled_images(self) -> Iterable[dict[str, Tensor]]:
        data = self._data()
        if not isinstance(data, GivesLabelled):
            msg = (
                f"Expected a datamodule with sweep_dataloader for LinearProbe, got {type(data).__name__}; use "
                "SemiSupervisedDataModule, or give yours the method."
            )
            raise TypeError(msg)
        return data.sweep_dataloader("labeled")

    # ---------------------------------------------------------------- the fit

    def training_step(self, batch: object, batch_idx: int) -> dict[str, Tensor]:
        """Fit W.

        Args:
            batch: Not looked at: the objective is a sum over each labelled image once and as it is, and a batch is a
                random choice of some, augmented.
            batch_idx: Not looked at; the fit ends after the first.

        Returns:
            `loss`, the objective at its minimum.
        """
        problem, origin = self._problem()
        weight = self.network.weight
        with torch.no_grad():
            weight.zero_()
        wrapped = self.optimizers()
        if not isinstance(wrapped, LightningOptimizer) or not isinstance(wrapped.optimizer, torch.optim.LBFGS):
            msg = f"Expected the optimiser of `configure_optimizers`, got {type(wrapped).__name__}; leave it as it is."
            raise TypeError(msg)
        fitted = minimise(problem, weight, wrapped.optimizer, self.tol, self.max_iter, wrapped.step)
        self.require_finite(torch.tensor(fitted.value))
        held_out = self._count_held_out(problem, origin)
        self._report(fitted, problem, held_out)
        self.trainer.should_stop = True
        return {"loss": torch.tensor(fitted.value)}

    def _problem(self) -> tuple[LogisticRegression, Tensor]:
        """The objective, and where each image's label came from."""

        def of_batch(batch: dict[str, Tensor]) -> list[Tensor]:
            image, label = self.checked(batch)
            weight = batch.get("weight", torch.ones(len(image), device=image.device))
            return [self._features(image), label, weight, batch.get("origin", torch.zeros_like(label))]

        features, label, weight, origin = self.swept(self._labelled_images(), of_batch, "labelled images")
        require_labels(label, self.num_classes)
        for name, values in (("features", features), ("weights", weight)):
            if not bool(torch.isfinite(values).all()):
                msg = f"Expected finite {name} of labelled images, got NaN or infinity; check images and encoder."
                raise ValueError(msg)
        if bool((weight < 0).any()):
            msg = f"Expected labelled images with `weight` >= 0, got {float(weight.min())}; 0 leaves one out."
            raise ValueError(msg)
        self._require_every_class(label[weight > 0])
        return LogisticRegression(self.network.rows(features), label, weight.double(), self.l2), origin

    def _require_every_class(self, label: Tensor) -> None:
        counts = torch.bincount(label, minlength=self.num_classes).tolist()
        missing = [number for number, count in enumerate(counts) if count == 0]
        if missing:
            names = getattr(self._data(), "class_names", None) or range(self.num_classes)
            shown = ", ".join(str(names[number]) for number in missing[:5])
            msg = (
                f"Expected a labelled image of every class, got none of {shown}{', ...' if missing[5:] else ''}; "
                f"images of each class: {counts}. Raise `num_labels`, use `labels_per_class`, or label some."
            )
            raise ValueError(msg)

    def _count_held_out(self, problem: LogisticRegression, origin: Tensor) -> Tensor:
        self.held_out.zero_()
        if self.folds:
            group = left_out(problem, origin == _BY_PEOPLE, self.num_classes, self.folds)
            # The processes take turns.
            turns = slice(self.global_rank, None, self.trainer.world_size)
            matrix = self.network.weight.detach()
            tol = max(self.tol, _HELD_OUT_TOL)
            counts, unfinished = out_of_fold(problem, matrix, group, tol, self.max_iter, turns)
            both = self.gather(torch.cat([counts.flatten(), counts.new_tensor([unfinished])])[None])[0].sum(0)
            self.held_out.copy_(both[:-1].view_as(self.held_out))
            if int(both[-1]):
                rank_zero_warn(
                    f"{int(both[-1])} of {int(group.max()) + 1} fits without some labelled images did not converge in "
                    f"`max_iter` = {self.max_iter} iterations: `label_confusion` is less than exact; raise it."
                )
        return self.held_out

    def _report(self, fitted: Minimum, problem: LogisticRegression, held_out: Tensor) -> None:
        gap = fitted.gap / fitted.value if fitted.value > 0 else 0.0
        values = {
            "train_objective": fitted.value,
            "train_gap": gap,
            "train_iterations": float(fitted.iterations),
            "train_converged": float(fitted.converged),
        }
        if bool(held_out.any()):
            values["train_held_out_accuracy"] = float(held_out.diagonal().sum() / held_out.sum())
        size = len(problem.label)
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self.say(
            f"linear probe: {size:,} labelled images, {problem.rows.shape[1]:,} features; objective {fitted.value:.6g} "
            f"after {fitted.iterations} iterations, at most {gap:.1e} of it above the minimum"
        )
        if not fitted.converged:
            why = f"`max_iter` = {self.max_iter}" if fitted.iterations >= self.max_iter else "the precision of float64"
            rank_zero_warn(
                f"LinearProbe stopped at {why} with an objective that may be {gap:.1e} of it above the minimum, more "
                f"than `tol` = {self.tol:g}: its result is not that of the data alone; raise `max_iter` or `tol`."
            )

    # ---------------------------------------------------------------- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make W as wide as the checkpoint's before it is filled."""
        theirs = checkpoint["state_dict"].get("network.weight")
        if self.network.num_features == 0 and isinstance(theirs, Tensor) and theirs.ndim == 2:
            self.network.resize(theirs.shape[1])
        super().on_load_checkpoint(checkpoint)


def _load(encoder: nn.Module, path: str) -> None:
    """Read an encoder's weights from the file of whatever trained it."""
    if isinstance(encoder, ViTEncoder):
        load_encoder(encoder, path)
    else:
        load_network(encoder, path, "encoder_from")
