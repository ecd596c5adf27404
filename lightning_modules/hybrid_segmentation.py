"""HybridSegmentation: one UNet that denoises an image and predicts its mask."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads
from torchmetrics import MeanMetric, MetricCollection

from lightning_modules.checkpoints import head_name, load_checkpoint, load_trunk_and_head, network_weights
from lightning_modules.diffusion.denoisers import JointDenoiser, takes_time
from lightning_modules.diffusion.evaluation_noise import bin_names, evaluation_noise, level_bin
from lightning_modules.diffusion.noise import NoiseProcess
from lightning_modules.diffusion.vp_noise import VPProcess
from lightning_modules.mask_losses import MaskLoss, mask_loss_per_image, mask_probabilities
from lightning_modules.mask_module import MaskModule, Split
from lightning_modules.metrics.binned_mean import BinnedMean
from lightning_modules.networks.modes import evaluating
from lightning_modules.pair_drawing import draw_pairs
from lightning_modules.uncertainty import image_confidence

Objective = Literal["hybrid", "supervised", "generative"]
_Terms = tuple[Tensor | None, Tensor | None]


class HybridSegmentation(MaskModule):
    r"""One network F(x_t, t) -> (image, mask), a denoiser and a segmenter at once (Sauvalle & Salzmann, 2024).

    The hybrid objective is (arXiv 2408.03433)

        L = E_{(x, y), t, eps} [ ||x - x_hat(x_t, t)||^2 + mask_weight * ||y - y_hat(x_t, t)||^2 ],

    x the image in [-1, 1], y its one-hot mask in {0, 1}, x_t the noisy image. Both squared norms are means here:
    over channels and pixels of each image (the mask's over its labelled pixels), then over the batch. With sums
    instead of means the equivalent weight is `mask_weight` * 3 / num_classes. All terms are computed in float32,
    also under mixed precision: at the paper's weight of 1e-4 the mask's gradients would underflow in float16.

    t = 0 is the clean image, sigma exactly 0, in training, fine-tuning and prediction alike (see
    lightning_modules.diffusion.noise): a segmentation is F(image, t = 0).

    Objectives over the same network:

    - `hybrid`: the loss above. The network has 3 + num_classes output channels.
    - `generative`: its image term alone. Same channels; the mask's get no gradient.
    - `supervised`: the mask term alone, on clean images at t = 0. Same channels, or num_classes of them; any
      segmentation_models_pytorch model will do. With `init_from` this is fine-tuning.

    Args:
        network: Called as network(x, t) -> [B, channels, H, W], or network(x) under `supervised`. Image channels
            come first, mask channels last.
        num_classes: Mask classes including the background, class 0; the CLI takes it from the data.
        objective: What is trained, see above.
        process: Noise process; None is VPProcess().
        mask_weight: Weight of the mask term under `hybrid`; the paper's is 1e-4.
        mask_loss: Loss on the mask channels; None is mse under `hybrid` (the channels then estimate class
            probabilities) and ce under `supervised` (the channels are logits). `dice_ce` is the sum of both.
        init_from: Checkpoint whose network, EMA weights where it has them, fit starts from. A last layer of another
            size is replaced by a new one, its image channels kept.
        optimizer: Called with parameter groups, returns the optimiser.
        lr_scheduler: Called with the optimiser; stepped after every optimiser step.
        trunk_lr_scale: Learning rate of everything but the last layer, relative to the last layer's.
        ema_decay: Decay of the moving average of the weights per optimiser step; 0 switches it off.
        image_channels: Channels of the images.
        num_level_bins: The losses are logged for clean images and for this many bins of the noise level.

    Raises:
        ValueError: An argument is out of range, or the network's channels do not fit the objective.

    Example:
        >>> from lightning_modules import ADMUNet, HybridSegmentation
        >>> model = HybridSegmentation(ADMUNet.small(out_channels=5), num_classes=2)
        >>> model.segment(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 2, 32, 32])
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        objective: Objective = "hybrid",
        process: NoiseProcess | None = None,
        mask_weight: float = 1e-4,
        mask_loss: MaskLoss | None = None,
        init_from: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        trunk_lr_scale: float = 1.0,
        ema_decay: float = 0.9999,
        image_channels: int = 3,
        num_level_bins: int = 4,
    ) -> None:
        super().__init__(network, optimizer, lr_scheduler, ema_decay, trunk_lr_scale)
        self.save_hyperparameters(ignore=["network", "process", "optimizer", "lr_scheduler"])
        if mask_weight < 0:
            msg = f"Expected `mask_weight` >= 0, got {mask_weight}; the paper's value is 1e-4."
            raise ValueError(msg)
        for name, choice, choices in (("objective", objective, Objective), ("mask_loss", mask_loss, MaskLoss)):
            if choice is not None and choice not in get_args(choices):
                msg = f"Expected `{name}` to be one of {', '.join(get_args(choices))}, got {choice!r}."
                raise ValueError(msg)
        if num_level_bins < 1:
            msg = f"Expected `num_level_bins` >= 1, got {num_level_bins}; 4 is the default."
            raise ValueError(msg)
        self.build_mask_metrics(num_classes)
        self.objective: Objective = objective
        self.process = VPProcess() if process is None else process
        self.mask_weight = mask_weight
        self.mask_loss: MaskLoss = mask_loss or ("ce" if objective == "supervised" else "mse")
        self.image_channels = image_channels
        self.num_level_bins = num_level_bins
        self.init_from = init_from
        self._require_fitting_network()
        self.val_losses = MetricCollection({"image": MeanMetric(), "mask": MeanMetric()})
        self.test_losses = self.val_losses.clone()
        # One bin for clean images, then equal bins of the noise level.
        self.image_by_level = BinnedMean(self.num_level_bins + 1)
        self.mask_by_level = BinnedMean(self.num_level_bins + 1)

    def _require_fitting_network(self) -> None:
        """Compare the objective with what the network declares; `_outputs` compares with what it returns."""
        if self.objective != "supervised" and not takes_time(self.network):
            msg = (
                f"Expected a `network` called as network(x, t) for objective {self.objective!r}, got "
                f"{type(self.network).__name__} without a time input; use ADMUNet, or objective 'supervised'."
            )
            raise ValueError(msg)
        channels = getattr(self.network, "out_channels", None)
        if isinstance(channels, int):
            self._require_channels(channels)

    def _require_channels(self, channels: int) -> None:
        both = self.image_channels + self.num_classes
        allowed = {both, self.num_classes} if self.objective == "supervised" else {both}
        if channels not in allowed:
            msg = (
                f"Expected a `network` with {' or '.join(map(str, sorted(allowed, reverse=True)))} output channels for "
                f"objective {self.objective!r} with {self.image_channels} image channels and {self.num_classes} "
                f"classes, got {channels}; set the network's out_channels (smp: classes)."
            )
            raise ValueError(msg)

    # ---------------------------------------------------------------- the network

    def _outputs(self, network: nn.Module, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Denoised image in [-1, 1] units and raw mask channels, both float32."""
        denoiser = JointDenoiser(network, self.process, self._image_outputs(network))
        image, mask = denoiser.joint(x, sigma)
        if mask.shape[1] != self.num_classes:
            self._require_channels(image.shape[1] + mask.shape[1])
        return image.float(), mask.float()

    def _image_outputs(self, network: nn.Module) -> int:
        """How many of the network's channels are the image: none for a plain segmenter."""
        if not takes_time(network):
            return 0
        channels = getattr(network, "out_channels", None)
        return 0 if channels == self.num_classes else self.image_channels

    @contextmanager
    def _evaluating(self) -> Iterator[nn.Module]:
        """The network to predict with, without dropout and gradients whatever mode the module is in."""
        with torch.no_grad(), evaluating(self.ema_network):
            yield self.ema_network

    def segment(self, image: Tensor) -> Tensor:
        """Class probabilities of clean images, from the EMA network at t = 0.

        Args:
            image: [B, C, H, W] in [0, 1].

        Returns:
            [B, num_classes, H, W], non-negative, summing to 1 over the classes.
        """
        x = 2.0 * image - 1.0
        with self._evaluating() as network:
            _, mask = self._outputs(network, x, x.new_zeros(len(x)))
        return mask_probabilities(mask, self.mask_loss)

    def denoise(
        self, image: Tensor, level: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add noise of a level to images and take it out again with the EMA network.

        Args:
            image: [B, C, H, W] in [0, 1].
            level: Noise level in [0, 1]; 0 is t = 0, 1 the end of the process.
            generator: Source of the noise, on the CPU.

        Returns:
            Noisy image as the network sees it, clipped to [0, 1]; denoised image in [0, 1]; class probabilities.

        Raises:
            ValueError: The network has no image output.
        """
        if not takes_time(self.network):
            msg = f"Expected a `network` that denoises, got {type(self.network).__name__}; use ADMUNet."
            raise ValueError(msg)
        x = 2.0 * image - 1.0
        eps = torch.randn(x.shape, generator=generator).to(x)
        sigma = self.process.sigma_at(torch.full((len(x),), level)).to(x)
        noisy = x + sigma.view(-1, 1, 1, 1) * eps
        with self._evaluating() as network:
            denoised, mask = self._outputs(network, noisy, sigma)
        seen = noisy / (1.0 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
        probabilities = mask_probabilities(mask, self.mask_loss)
        return (seen.clamp(-1, 1) + 1) / 2, (denoised.clamp(-1, 1) + 1) / 2, probabilities

    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        """Draw (image, mask) pairs from the joint distribution that the EMA network has learnt.

        Args:
            request: `seed` [B] int64, one an image: the same seed gives the same pair, in whatever batch; `image_size`;
                `sampler`, a SamplerName; `num_steps` of it.

        Returns:
            image [B, C, H, W] in [0, 1], mask [B, H, W] of class ids, probabilities [B, K, H, W], confidence [B],
            seed [B].

        Raises:
            ValueError: The module was not trained for both images and masks.
        """
        objective = self.loaded.get("objective", self.objective)
        if objective != "hybrid":
            msg = (
                f"Expected `objective` hybrid to draw pairs, got weights trained with {objective!r}, which trains no "
                f"{'images' if objective == 'supervised' else 'masks'}; draw from a hybrid checkpoint."
            )
            raise ValueError(msg)
        with self._evaluating() as network:
            denoiser = JointDenoiser(network, self.process, self.image_channels)
            image, probabilities = draw_pairs(denoiser, request, self.num_classes, self.mask_loss, self.device)
        return {
            "image": image,
            "mask": probabilities.argmax(1),
            "probabilities": probabilities,
            "confidence": image_confidence(probabilities),
            "seed": request["seed"],
        }

    # ---------------------------------------------------------------- training

    def meaning(self) -> dict[str, Any]:
        """What decides the outputs beside the weights."""
        masks = {} if self.objective == "generative" else {"mask_loss": self.mask_loss}
        return masks if self.objective == "supervised" else masks | {"process": self.process.settings()}

    def on_fit_start(self) -> None:
        """Start a new fit from `init_from`; one that goes on has its weights from its own checkpoint."""
        super().on_fit_start()
        self.loaded = {}
        # Not in `setup`: there it is not known yet whether a checkpoint will be loaded.
        if self.init_from is not None and not self.goes_on:
            self.load_network(self.init_from)

    def load_network(self, path: str) -> None:
        """Take the network over from a checkpoint: EMA weights where there are any, else the last ones.

        Args:
            path: Checkpoint of a module of this collection with the same network. A last layer of another size is
                not taken: this module's own stays, with the image channels copied where both have them.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a checkpoint, or the networks differ in more than the last layer.
        """
        checkpoint = load_checkpoint(path, "init_from")
        weights, kind = network_weights(checkpoint, path, "init_from")
        head = head_name(self.network)
        theirs = checkpoint.get("hyper_parameters", {}).get("num_classes", self.num_classes)
        outputs = next((len(value) for name, value in weights.items() if name.startswith(f"{head}.")), 0)
        image_rows = max(0, outputs - theirs), self._image_outputs(self.network)
        # Layers of one size may still mean different things: 0 + 5 channels are not 3 + 2.
        same = theirs == self.num_classes and image_rows[0] == image_rows[1]
        replaced = load_trunk_and_head(self.network, weights, head, min(image_rows), same, path)
        self.reset_ema()
        self.goes_on = True  # with what it has learnt, should there be a second fit
        self.say(f"init_from: {kind} weights of {path}; last layer {head}: {replaced or 'taken over as it is'}")

    def _terms(self, network: nn.Module, batch: dict[str, Tensor], sigma: Tensor, eps: Tensor | None) -> _Terms:
        """The loss terms of each image of a batch at given noise levels; None is no noise."""
        x = 2.0 * batch["image"] - 1.0
        noisy = x if eps is None else x + sigma.view(-1, 1, 1, 1) * eps
        denoised, mask = self._outputs(network, noisy, sigma)
        image_term = None
        if self.objective != "supervised":
            image_term = self.process.image_weight(sigma) * F.mse_loss(denoised, x, reduction="none").mean((1, 2, 3))
        mask_term = None
        if self.objective != "generative":
            mask_term = mask_loss_per_image(mask, self.known(batch["mask"]), self.mask_loss)
        return image_term, mask_term

    def _total(self, image_term: Tensor | None, mask_term: Tensor | None) -> Tensor:
        if image_term is None:
            if mask_term is None:
                msg = "a loss without terms"  # unreachable: every objective has one
                raise RuntimeError(msg)
            return mask_term
        return image_term if mask_term is None else image_term + self.mask_weight * mask_term

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of the objective on a batch of image [B, C, H, W] and mask [B, H, W]."""
        # A generative network needs no masks.
        batch = self.checked(batch, "image", *(["mask"] if self.objective != "generative" else []))
        image = batch["image"]
        sigma, eps = image.new_zeros(len(image)), None
        if self.objective != "supervised":
            sigma = self.process.sample_sigma(len(image), device=image.device)
            eps = torch.randn_like(image)
        image_term, mask_term = self._terms(self.network, batch, sigma, eps)
        loss = self._total(image_term, mask_term).mean()
        parts = {}
        for name, term, by_level in (
            ("image", image_term, self.image_by_level),
            ("mask", mask_term, self.mask_by_level),
        ):
            if term is not None:
                parts[f"train_{name}_loss"] = term.detach().mean()
                by_level.update(term.detach(), level_bin(self.process, sigma, self.num_level_bins))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(image))
        self.log_dict(parts, batch_size=len(image))
        return self.require_finite(loss, **parts)

    def on_train_epoch_end(self) -> None:
        """Log each loss term by noise level."""
        if self.objective != "generative":
            super().on_train_epoch_end()
        n = self.num_level_bins
        for term, by_level in (("image", self.image_by_level), ("mask", self.mask_by_level)):
            found = zip(bin_names(n), by_level.pop(), strict=True)
            self._log_agreed({f"train_{term}_loss/{name}": mean for name, mean in found if not mean.isnan()})

    # ---------------------------------------------------------------- evaluation

    def _losses_of(self, split: Split) -> MetricCollection:
        return self.val_losses if split == "val" else self.test_losses

    def _eval_step(self, batch: dict[str, Tensor], split: Split) -> None:
        """Update losses at fixed noise and metrics at t = 0; padding (index -1) counts nowhere."""
        real = batch["index"] >= 0
        if not bool(real.any()):
            return
        batch = {name: value[real] for name, value in batch.items()}
        sigma, eps = self._fixed_noise(batch)
        image_term, mask_term = self._terms(self.ema_network, batch, sigma, eps)
        for name, term in (("image", image_term), ("mask", mask_term)):
            if term is not None:
                self._losses_of(split)[name].update(term)
        if self.objective != "generative":
            self.metrics_of(split).update(self.segment(batch["image"]), batch["mask"])

    def _fixed_noise(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        image = batch["image"]
        if self.objective == "supervised":
            return image.new_zeros(len(image)), None
        return evaluation_noise(self.process, batch["index"], image)

    def _log_eval(self, split: Split) -> None:
        losses, metrics = self._losses_of(split), self.metrics_of(split)
        # What is computed depends on the objective alone: a rank that saw only padding must take part as well.
        image = losses["image"].compute() if self.objective != "supervised" else None
        mask = losses["mask"].compute() if self.objective != "generative" else None
        losses.reset()
        values = {f"{split}_loss": self._total(image, mask)}
        values |= {f"{split}_{n}_loss": v for n, v in (("image", image), ("mask", mask)) if v is not None}
        if self.objective != "generative":
            values |= metrics.compute()
            metrics.reset()
        headline = f"{split}_{'loss' if self.objective == 'generative' else 'jaccard'}"
        self.log(headline, values.pop(headline), prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)

    def reliability(self, split: Split) -> tuple[Tensor, Tensor, Tensor] | None:
        """Confidence, accuracy and count of each calibration bin so far; None under `generative`."""
        return None if self.objective == "generative" else super().reliability(split)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Segment a batch of images (see MaskModule), or draw a batch of requests (see `draw`)."""
        return self.draw(batch) if "seed" in batch else super().predict_step(batch, batch_idx, dataloader_idx)
