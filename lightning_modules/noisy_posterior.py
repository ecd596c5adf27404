"""The posterior of the clean class as a module: network, transition matrix, best weights, and its checkpoints."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_modules.base import BaseModule
from lightning_modules.checkpoints import load_checkpoint, network_weights, require_same_tensors
from lightning_modules.diffusion.denoisers import scaled_input
from lightning_modules.diffusion.learned_transition import LearnedTransition
from lightning_modules.diffusion.noise import EDMProcess, NoiseProcess
from lightning_modules.diffusion.transition import TransitionMatrix, require_transition
from lightning_modules.latent_images import LatentImages
from lightning_modules.networks.modes import evaluating

_KEY = "noisy_labels"  # where a checkpoint keeps what is in there beside the state dict


class NoisyPosterior(BaseModule):
    """What a NoisyLabelClassifier is beside its training: q(x_t) = p(clean class | x_t), T, and the best weights.

    Args:
        network: See NoisyLabelClassifier, as for all arguments.
        num_classes: Classes K.
        process: Noise process.
        transition: T.
        optimizer: Optimiser.
        lr_scheduler: Schedule.
        ema_decay: Decay of the moving average.
        ema_half_life: Its half-life in images.
        latent: Autoencoder.
        latent_cache: Folder for latents.

    Raises:
        ValueError: An argument is out of range, or T is not a transition matrix of K classes that can be inverted.
    """

    transition: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        process: NoiseProcess | None,
        transition: TransitionMatrix | None,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        ema_decay: float,
        ema_half_life: float | None,
        latent: nn.Module | None,
        latent_cache: str | None,
    ) -> None:
        if num_classes < 2:
            msg = f"Expected `num_classes` >= 2, got {num_classes}; a yes/no question has two classes."
            raise ValueError(msg)
        give_classes(network, num_classes)
        super().__init__(network, optimizer, lr_scheduler, ema_decay, ema_half_life=ema_half_life)
        self.num_classes = num_classes
        self.process = EDMProcess() if process is None else process
        self.images = LatentImages(latent, latent_cache)
        self.learned: LearnedTransition | None = None
        known = torch.full((num_classes, num_classes), torch.nan)
        self._given = transition is not None
        if isinstance(transition, LearnedTransition):
            transition.reset_classes(num_classes)
            self.learned = transition
            known = transition.matrix(num_classes).detach()
        elif transition is not None:
            known = require_transition(transition.matrix(num_classes), num_classes, "transition")
        # Not float64: there are devices without.
        self.register_buffer("transition", known.float())
        self._image_shape: tuple[int, int] | None = None  # channels and size, from the first batch
        self._best: dict[str, Any] = {}
        self._best_network: list[nn.Module] = []  # in a list: as an attribute it would be one of the module's parts

    # ---------------------------------------------------------------- the posterior

    @property
    def predictor(self) -> nn.Module:
        """The network that is used: the averaged one with the lowest `val_nll`, or, without validation, the last."""
        if not self._best:
            return self.ema_network
        if not self._best_network:
            best = copy.deepcopy(self.ema_network).requires_grad_(False)
            best.load_state_dict(self._best["network"])
            self._best_network.append(best.to(self.device).eval())
        return self._best_network[0]

    def log_posterior(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Log-probabilities of the clean classes of noisy images, without gradient, by `predictor`.

        Args:
            x: x + sigma * eps, [B, C, H, W], clean images being in [-1, 1], or latents.
            sigma: Noise levels [B].

        Returns:
            log q, float32 [B, K].
        """
        return self._evaluated(self.predictor, x, sigma)

    def current_transition(self) -> Tensor:
        """T as it is now, float32 [K, K]; NaN until it is known."""
        return self.transition.detach()

    @torch.no_grad()
    def _evaluated(self, network: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
        with evaluating(network):
            return self._log_posterior(network, x, sigma)

    def _log_posterior(self, network: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
        logits = network(scaled_input(network, self.process, x, sigma), self.process.c_noise(sigma))
        if logits.shape != (len(x), self.num_classes):
            msg = (
                f"Expected a `network` with logits {[len(x), self.num_classes]} for `num_classes` = "
                f"{self.num_classes}, got {list(logits.shape)}; set its classes, or give it reset_classes(num_classes)."
            )
            raise ValueError(msg)
        return torch.log_softmax(logits.float(), 1)

    def keep_if_best(self, val_nll: float) -> None:
        """Keep the averaged weights and T if no validation has found a lower value before.

        Args:
            val_nll: Negative log-likelihood of held-out given labels.
        """
        if val_nll < self._best.get("val_nll", float("inf")):
            weights = {k: v.detach().cpu().clone() for k, v in self.ema_network.state_dict().items()}
            self._best = {"val_nll": val_nll, "network": weights, "transition": self.transition.cpu().clone()}
            self._best_network = []

    # ---------------------------------------------------------------- the transition matrix

    def setup(self, stage: str) -> None:
        """Take T from the data unless it was given.

        Raises:
            ValueError: The data has other classes, or nobody knows T.
        """
        self.require_classes_of_data(self.num_classes)
        if stage != "fit" or self._given:
            return
        found = getattr(getattr(self.trainer, "datamodule", None), "transition_matrix", None)
        if found is None:
            msg = (
                "Expected a `transition`, got None, and the datamodule knows none: labels that are wrong already, or "
                "depend on the image, have no known matrix. Give ConfusionTransition with counts of a checked subset, "
                "SymmetricTransition with a guessed rate, or LearnedTransition."
            )
            raise ValueError(msg)
        self.transition.copy_(require_transition(found, self.num_classes, "transition_matrix"))

    def on_fit_start(self) -> None:
        """Forget what was best in another fit, unless this one goes on with it; get the autoencoder and latents."""
        super().on_fit_start()
        if not self.goes_on:
            self._best, self._best_network = {}, []
        data = getattr(self.trainer, "datamodule", None)
        size, channels = (getattr(data, name, None) for name in ("image_size", "image_channels"))
        if size is not None and channels is not None:
            self._image_shape = self._image_shape or (channels, size)
        self.images.prepare(self.trainer, size)

    def on_validation_start(self) -> None:
        """Refuse to judge by given labels without T.

        Raises:
            ValueError: T is not known.
        """
        if bool(self.transition.isnan().any()):
            msg = "Expected a `transition` to validate with, got None; give it, or a checkpoint (`ckpt_path`) of a fit."
            raise ValueError(msg)

    # ---------------------------------------------------------------- checkpoints

    def meaning(self) -> dict[str, Any]:
        """What decides the outputs beside the weights."""
        return {
            "num_classes": self.num_classes,
            "process": self.process.settings(),
            "transition": "known" if self.learned is None else "learned",
            **self.images.meaning(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a diffusion model has to agree with, and the best averaged weights."""
        super().on_save_checkpoint(checkpoint)
        channels, size = self._image_shape or (None, None)
        checkpoint[_KEY] = {
            "num_classes": self.num_classes,
            "image_size": size,
            "image_channels": channels,
            "process": self.process.settings(),
            "space": self.images.space(),
            "best": self._best,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the best weights, and refuse a checkpoint that was trained with another T."""
        super().on_load_checkpoint(checkpoint)
        theirs = checkpoint["state_dict"]["transition"].to(self.transition)
        known = self.learned is None and not bool(self.transition.isnan().any() | theirs.isnan().any())
        if known and not torch.allclose(theirs, self.transition, rtol=0.0, atol=1e-6):
            apart = float((theirs - self.transition).abs().max())
            msg = (
                f"Expected `ckpt_path` to hold a classifier trained with this `transition`, but entries differ by up "
                f"to {apart:.3g}; give the label noise (or `transition`) that it was trained with."
            )
            raise ValueError(msg)
        kept = checkpoint[_KEY]
        self._best, self._best_network = dict(kept["best"]), []
        if kept["image_size"] is not None:
            self._image_shape = (kept["image_channels"], kept["image_size"])


def give_classes(network: nn.Module, num_classes: int) -> None:
    """Give a network the last layer that its classes need, if it can be given one.

    Args:
        network: One without `reset_classes` is taken as it is.
        num_classes: Classes K.
    """
    reset = getattr(network, "reset_classes", None)
    if callable(reset) and getattr(network, "num_classes", None) != num_classes:
        reset(num_classes)


def load_noisy_classifier(
    network: nn.Module,
    path: str,
    argument: str,
    num_classes: int,
    image_size: int | None,
    image_channels: int | None,
    process_settings: Mapping[str, str | float],
    space: str = "pixels",
) -> Tensor:
    """Copy the best averaged weights of a NoisyLabelClassifier into a network.

    The best are those with the lowest negative log-likelihood of held-out given labels; without validation they are the
    averaged weights that the fit ended with, or the last ones where there is no average.

    Args:
        network: Takes the weights; of the class and the arguments that the classifier was trained with.
        path: The checkpoint.
        argument: Name of the argument that holds the path, for the errors.
        num_classes: Classes K.
        image_size: Height and width of the images; None if not known.
        image_channels: Channels of the images; None if not known.
        process_settings: `settings()` of the noise process that will ask the network.
        space: What the noise is added to, see `LatentImages.space`.

    Returns:
        T as the classifier was trained with, or learned: float64 [K, K] of float32 accuracy, rows = clean classes.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is of something else, or of another K, size, process, space or network.
    """
    checkpoint = load_checkpoint(path, argument)
    kept: dict[str, Any] = checkpoint.get(_KEY, {})
    if not kept:
        msg = (
            f"Expected `{argument}` to be the checkpoint of a NoisyLabelClassifier, but {path} is of another module; "
            "fit one on the same data first and give its checkpoints/last.ckpt."
        )
        raise ValueError(msg)
    wanted: dict[str, Any] = {"num_classes": num_classes, "image_size": image_size, "image_channels": image_channels}
    wanted |= {"process": dict(process_settings), "space": space}
    differing = [
        f"{name} {kept.get(name)}, not {value}"
        for name, value in wanted.items()
        if value is not None and kept.get(name) is not None and kept.get(name) != value
    ]
    if differing:
        msg = (
            f"Expected `{argument}` to be a classifier of the same classes, images, space and noise process, but "
            f"{path} was trained with {'; '.join(differing)}; fit one with the settings and the data of this fit."
        )
        raise ValueError(msg)
    best = kept.get("best") or {}
    weights = best["network"] if best else network_weights(checkpoint, path, argument)[0]
    transition = best["transition"] if best else checkpoint["state_dict"]["transition"]
    give_classes(network, num_classes)
    require_same_tensors(network.state_dict(), weights, argument)
    network.load_state_dict(weights)
    return require_transition(transition, num_classes, f"transition of {argument}")
