"""The clean class of a noisy image, learned from noisy labels."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from lightning_modules.classification_metrics import ClassificationMetrics
from lightning_modules.diffusion.evaluation_noise import image_noise, levels_of_bin, training_bin, training_levels
from lightning_modules.diffusion.noise import NoiseProcess
from lightning_modules.diffusion.transition import (
    TransitionMatrix,
    condition_number,
    given_log_likelihood,
    given_log_posterior,
)
from lightning_modules.metrics.binned_mean import BinnedMean
from lightning_modules.noisy_posterior import NoisyPosterior
from lightning_modules.ssl_data import require_labels

EvalSplit = Literal["val", "test"]

_LOW_NOISE = 0.01


class NoisyLabelClassifier(NoisyPosterior):
    r"""q(x_t) = p(clean class | noisy image x_t), from images whose labels are wrong (forward correction).

    With T[i, j] = p(given label j | clean class i), the loss of an image x with given label y is

        -log sum_i q_i(x_t) T[i, y],    x_t = x + sigma eps,

    so that q itself is driven to the clean posterior (Patrini et al. 2017, arXiv 1609.03683, theorem 2). The noise
    levels are those that the diffusion model is trained with, all of one weight. With a `LearnedTransition`, T is
    trained as well (VolMinNet, arXiv 2102.02400). The weights of a transition-aware diffusion model follow from q and T
    (Na et al., "Label-Noise Robust Diffusion Models", arXiv 2402.17517).

    A classifier that has memorised the wrong labels gives q of one hot entry, the given label, and the diffusion model
    trained with it learns the noisy conditional without a sign of it. So, unlike the code released with the paper:

    - The moving average of the weights is what is evaluated and used. There: the last weights.
    - Held-out images with given labels, wrong ones included, are the judge: `val_nll`, the loss above, needs no clean
      label. The averaged weights with the lowest one are kept in the checkpoint and are those that `log_posterior`,
      tests and a diffusion model use. There: 200 million images (4000 epochs of CIFAR-10) and no held-out set. To stop
      as well, give pytorch_lightning's EarlyStopping(monitor="val_nll").
    - `val_nll_level_k` is the same by noise level, from little noise to much, in bins that hold equal shares of the
      training levels, every image once in each; `train_nll_level_k` beside it. Memorising begins at little noise: there
      the first rises while the second falls.
    - Weight decay is the optimiser's own matter (AdamW); there it is 0. T never decays.
    - No augmentation labels: the diffusion model asks without them, so they are not learned with either.
    - log q is computed from logits in log space and in float32: nothing is inverted, clipped or divided by 0.

    Adam at 1e-3 with a linear warm-up over 10 million images and batches of 1024 are the released settings.

    Tests (`test_accuracy` and the metrics beside it, at little noise; `test_accuracy_level_k`) compare q with true
    labels; validation has given ones, so `val_accuracy` and the metrics beside it are about predicting given labels.

    Args:
        network: Called as network(x, t) -> logits [B, K], x scaled by the process's c_in, t its c_noise. One with
            `reset_classes(num_classes)` is given a last layer of the right size.
        num_classes: Classes K; the CLI takes it from the data.
        process: Noise process; None is EDMProcess(). The diffusion model has to have the same.
        transition: T; None takes the datamodule's `transition_matrix`, which it knows if it made the labels wrong.
        optimizer: Called with parameters, returns the optimiser.
        lr_scheduler: Called with the optimiser; stepped after every optimiser step.
        ema_decay: Decay of the moving average of the weights per optimiser step; 0 switches it off.
        ema_half_life: Half-life of the moving average in images, instead of `ema_decay`.
        num_level_bins: Bins of the noise level in `val_nll_level_k` and its kin.
        latent: Autoencoder whose latents the noise is added to; None adds it to pixels. That of the diffusion model.
        latent_cache: Folder for the latents of the training images; None encodes every batch anew.

    Attributes:
        transition: T as it is now, float32 [K, K]; NaN until it is known.

    Raises:
        ValueError: An argument is out of range, or T is not a transition matrix of K classes that can be inverted.
    """

    counted = "images"  # what `confusion` and `reliability` count

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        process: NoiseProcess | None = None,
        transition: TransitionMatrix | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.999,
        ema_half_life: float | None = None,
        num_level_bins: int = 4,
        latent: nn.Module | None = None,
        latent_cache: str | None = None,
    ) -> None:
        if num_level_bins < 1:
            msg = f"Expected `num_level_bins` >= 1, got {num_level_bins}; 1 tells no levels apart."
            raise ValueError(msg)
        averages = (ema_decay, ema_half_life)
        latents = (latent, latent_cache)
        super().__init__(network, num_classes, process, transition, optimizer, lr_scheduler, *averages, *latents)
        self.save_hyperparameters(ignore=["network", "process", "transition", "optimizer", "lr_scheduler", "latent"])
        self.num_level_bins = num_level_bins
        self.register_buffer("_levels", training_levels(self.process), persistent=False)
        self._levels: Tensor
        self.val_metrics = ClassificationMetrics(num_classes, "val")
        self.test_metrics = ClassificationMetrics(num_classes, "test")
        self.val_nll = MeanMetric()
        self.train_nll_by_level = BinnedMean(num_level_bins)
        self.val_nll_by_level = BinnedMean(num_level_bins)
        self.test_accuracy_by_level = BinnedMean(num_level_bins)

    # ---------------------------------------------------------------- training

    def extend_optimizer(self, optimizer: Optimizer) -> None:
        """Let the optimiser train T, if it is learned."""
        if self.learned is None:
            return
        optimizer.add_param_group({"params": [self.learned.raw], "weight_decay": 0.0})
        optimizer.param_groups[-1]["lr"] *= self.learned.lr_scale

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the forward-corrected loss of a batch of image [B, C, H, W] and given label [B].

        With a cache of latents, index [B] does instead of the images.
        """
        found = self.checked(batch, needs_image=not self.images.is_cached)
        label = found["label"]
        self.count_images(len(label))
        x = self.images.of_training(found)
        sigma = self.process.sample_sigma(len(x), device=x.device)
        x = _noisy(x, sigma, torch.randn_like(x))
        log_q = self._log_posterior(self.network, x, sigma)
        log_t = self.transition.log() if self.learned is None else self.learned.log_matrix().float()
        nll = -given_log_likelihood(log_q, label, log_t, found.get("trusted"))
        loss, parts = nll.mean(), {"train_nll": nll.detach().mean()}
        if self.learned is not None:
            volume = self.learned.penalty()
            loss, parts["train_volume"] = loss + volume.float(), volume.detach().float()
        self.train_nll_by_level.update(nll.detach(), training_bin(self._levels, sigma, self.num_level_bins))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(x))
        self.log_dict(parts, batch_size=len(x))
        return self.require_finite(loss, **parts)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave a frozen T alone; by its gradient, as DDP wants every parameter to have taken part."""
        if self.learned is None or self.learned.freeze_after is None:
            return
        if self.current_epoch >= self.learned.freeze_after:
            self.learned.raw.grad = None

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then bring the buffer of T up to date."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.learned is not None:
            self.transition.copy_(self.learned.matrix(self.num_classes).detach())

    def on_train_epoch_end(self) -> None:
        """Log the training loss by noise level."""
        self._log_agreed(_levels_of("train_nll", self.train_nll_by_level))

    def on_train_end(self) -> None:
        """Say so if nothing has guarded against memorised labels."""
        if not self._best:
            self.say(
                "NoisyLabelClassifier: there were no held-out images, so the last averaged weights are used, and "
                "memorised labels would go unnoticed; give the data a validation split."
            )

    # ---------------------------------------------------------------- evaluation

    def _clean(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Of a batch to evaluate, without padding: what noise is added to, the noise, labels, index; None if empty."""
        found = self.checked(batch)
        if not len(found["label"]):
            return None
        x = self.images.of(found["image"])
        return x, image_noise(found["index"], x), found["label"], found["index"]

    def _low_noise(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Images at a level that only a hundredth of training is below, and that level."""
        sigma = self._levels[int(_LOW_NOISE * len(self._levels))].expand(len(x))
        return _noisy(x, sigma, eps), sigma

    def _in_bin(self, x: Tensor, eps: Tensor, index: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Images at levels of one bin, and these levels."""
        sigma = levels_of_bin(self._levels, index, number, self.num_level_bins)
        return _noisy(x, sigma, eps), sigma

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Judge the averaged network by the given labels of held-out images."""
        found = self._clean(batch)
        if found is None:
            return
        (x, eps, label, index), log_t = found, self.transition.log()
        for number in range(self.num_level_bins):
            log_q = self._evaluated(self.ema_network, *self._in_bin(x, eps, index, number))
            nll = -given_log_likelihood(log_q, label, log_t)
            self.val_nll.update(nll)
            self.val_nll_by_level.update(nll, torch.full_like(label, number))
        log_q = self._evaluated(self.ema_network, *self._low_noise(x, eps))
        self.val_metrics.update("", given_log_posterior(log_q, log_t), label)

    def on_validation_epoch_end(self) -> None:
        """Log what was found, and keep the averaged weights if they are the best so far."""
        found = self.val_metrics.compute()
        self.val_metrics.reset()
        levels = _levels_of("val_nll", self.val_nll_by_level)
        if not found:
            return  # padding only, on every process
        nll = self.val_nll.compute()
        self.val_nll.reset()
        self.log("val_nll", nll, prog_bar=True, sync_dist=True)
        self._log_agreed(found | levels | self._about_transition())
        # Within a fit, `trainer.training` is False while it validates.
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.keep_if_best(float(nll))

    def _about_transition(self) -> dict[str, Tensor]:
        """How invertible a learned T is, and, where the data knows the true one, sum |T - T*| / sum |T*|."""
        if self.learned is None:
            return {}
        found = {"val_transition_condition": torch.tensor(condition_number(self.transition))}
        true = getattr(getattr(self.trainer, "datamodule", None), "transition_matrix", None)
        if isinstance(true, Tensor) and true.shape == self.transition.shape:
            found["val_transition_error"] = (self.transition.cpu() - true.float().cpu()).abs().sum() / self.num_classes
        return found

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Compare what `predictor` finds with true labels."""
        found = self._clean(batch)
        if found is None:
            return
        x, eps, label, index = found
        for number in range(self.num_level_bins):
            right = self.log_posterior(*self._in_bin(x, eps, index, number)).argmax(1) == label
            self.test_accuracy_by_level.update(right.float(), torch.full_like(label, number))
        self.test_metrics.update("", self.log_posterior(*self._low_noise(x, eps)), label)

    def on_test_epoch_end(self) -> None:
        """Log what was found."""
        self._log_agreed(_levels_of("test_accuracy", self.test_accuracy_by_level))
        self._log_agreed(self.test_metrics.compute())
        self.test_metrics.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Find the clean class of a batch of images, at little noise.

        Returns:
            probabilities [B, K], label [B], confidence [B] in [0, 1], index [B].
        """
        x = self.images.of(batch["image"])
        index = batch.get("index", torch.arange(len(x), device=x.device))
        eps = image_noise(index.clamp(min=0), x)
        probabilities = self.log_posterior(*self._low_noise(x, eps)).exp()
        confidence, label = probabilities.max(-1)
        return {"probabilities": probabilities, "label": label, "confidence": confidence, "index": index}

    def confusion(self, split: EvalSplit) -> Tensor:
        """Counts [K, K] of the evaluation so far: row = given (val) or true (test) class, column = predicted class."""
        return (self.val_metrics if split == "val" else self.test_metrics).confusion()

    def reliability(self, split: EvalSplit) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence, accuracy and count of each calibration bin of the evaluation so far."""
        return (self.val_metrics if split == "val" else self.test_metrics).reliability()

    def checked(self, batch: object, needs_image: bool = True) -> dict[str, Tensor]:
        """Return the image, label, index and flip of a batch, if it is one, without padding.

        Args:
            batch: Whatever a loader gives.
            needs_image: Whether a batch without images is none.

        Raises:
            ValueError: Something is missing, out of range, or of another size than before.
        """
        found = dict(batch) if isinstance(batch, Mapping) else {}
        if not ({"image", "label"} if needs_image else {"label", "index"}) <= found.keys():
            msg = (
                f"Expected batches to be dicts with image and label, got {sorted(found) or type(batch).__name__}; use "
                "GenerationDataModule, with its images left in."
            )
            raise ValueError(msg)
        label = found["label"]
        found = {"index": torch.arange(len(label), device=label.device)} | found
        found = {name: found[name] for name in ("image", "label", "index", "flip", "trusted") if name in found}
        real = found["index"] >= 0
        if not bool(real.all()):
            found = {name: values[real] for name, values in found.items()}
        require_labels(found["label"], self.num_classes)
        if "image" in found:
            self._require_shape(found["image"])
        return found

    def _require_shape(self, image: Tensor) -> None:
        channels, size = int(image.shape[1]), int(image.shape[-1])
        self._image_shape = self._image_shape or (channels, size)
        if tuple(image.shape[1:]) != (self._image_shape[0], *[self._image_shape[1]] * 2):
            msg = (
                f"Expected square images of {self._image_shape[1]} pixels with {self._image_shape[0]} channels, as "
                f"before, got {list(image.shape[1:])}; bring all images of the data to one size."
            )
            raise ValueError(msg)


def _noisy(x: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    return x + sigma.view(-1, 1, 1, 1) * eps


def _levels_of(name: str, by_level: BinnedMean) -> dict[str, Tensor]:
    """`name`_level_k of the bins that something fell into, and start again."""
    return {f"{name}_level_{k}": mean for k, mean in enumerate(by_level.pop()) if not bool(mean.isnan())}
