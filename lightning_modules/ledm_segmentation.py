"""LEDMSegmentation: an ensemble of pixel classifiers on the features of a frozen denoiser."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.checkpoints import head_name, load_checkpoint, load_trunk_and_head, network_weights
from lightning_modules.diffusion.denoisers import JointDenoiser, takes_time
from lightning_modules.diffusion.noise import NoiseProcess
from lightning_modules.diffusion.vp_noise import VPProcess
from lightning_modules.mask_losses import IGNORE, mask_loss_per_image
from lightning_modules.mask_module import MaskModule, Split
from lightning_modules.networks.decoder_features import FeatureCache, decoder_maps, require_blocks
from lightning_modules.networks.pixel_classifiers import PixelClassifiers, features_at
from lightning_modules.uncertainty import entropy, image_confidence

PATIENCE_FROM_EPOCH = 4
"""`patience` counts from this epoch on, the fifth."""


class Verdict(NamedTuple):
    """What the ensemble says about images.

    Attributes:
        probabilities: [B, K, H, W], mean over the members.
        votes: [B, K, H, W], how many members prefer each class.
        uncertainty: [B, H, W] in nats, Jensen-Shannon divergence between the members.
    """

    probabilities: Tensor
    votes: Tensor
    uncertainty: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, H, W], the class with most votes; argmax takes the first of equals, so ties go to the smallest."""
        return self.votes.argmax(1)


class LEDMSegmentation(MaskModule):
    r"""Pixel classifiers on features of a frozen denoiser (Baranchuk et al. 2022, arXiv 2112.03126).

    A denoiser that was trained on many images sees each image with a little noise, at a few levels; the outputs of some
    of its decoder blocks, upsampled to the image and concatenated, describe each pixel. An ensemble of small
    perceptrons learns the classes of the pixels of few labelled images. The mask is the members' majority vote (ties go
    to the smallest class), the probabilities are their mean, and a pixel's uncertainty is the Jensen-Shannon divergence
    between them, H(mean_m p_m) - mean_m H(p_m).

    What differs from the paper's code, on purpose:

    - Features stay at the resolution of their block, in training and in prediction, with the same numbers coming out
      (see PixelClassifiers): tens of MB for an image of 256 px instead of 1 to 2 GB.
    - All members are trained at once, each on its own pixels. A step draws them from the images of its batch, with
      replacement, where that code shuffles the pixels of all images.
    - `patience` stops all members together, where that code stops each on its own.

    The backbone never trains: it stays in evaluation mode, is not in the optimiser, and is saved with every checkpoint,
    which is therefore complete. Validation, test and prediction make features anew for each batch.

    Args:
        network: The backbone: ADMUNet, a Unet of segmentation_models_pytorch, or another network that can tell its
            decoder blocks. Its last layer is not used and may be of any size. It is frozen in place.
        num_classes: Mask classes including the background, class 0; the CLI takes it from the data.
        process: Noise process that the backbone was trained with; None is VPProcess().
        init_from: Checkpoint of a HybridSegmentation of any objective, whose network (EMA weights where it has them)
            becomes the backbone when a fit starts. None takes `network` as it was passed, and warns: features of a
            network that was not trained are random.
        sigmas: Noise levels, in the units of images in [-1, 1], at which features are taken. The defaults are the
            steps 50, 150 and 250 of the paper's linear schedule. 0.0 is the clean image: give it alone for a backbone
            that was trained without noise.
        blocks: Decoder blocks whose outputs are the features, numbered from the deepest; the defaults are the paper's,
            for six levels.
        num_members: Classifiers in the ensemble.
        hidden: Widths of their two hidden layers; None is (128, 32) below 30 classes, else (256, 128).
        pixels_per_batch: Pixels that each member draws from the labelled ones of a training batch.
        min_class_pixels: A class with fewer pixels than this in a training image is not learned from that image.
        patience: Stop once no member has beaten its best loss on a batch for more than this many steps, counted from
            the fifth epoch on (the paper's code: 50); None trains to the trainer's end.
        cache_features: Keep the features of each training image, on the device, after computing them once (default
            backbone: 50 MB for an image of 256 px). Augmentation has to be off then.
        noise_seed: Seed of the one noise image that all levels, images and splits share.
        optimizer: Called with parameter groups, returns the optimiser.
        lr_scheduler: Called with the optimiser; stepped after every optimiser step.
        ema_decay: Decay of a moving average of the classifiers' weights per optimiser step; 0 switches it off.

    Raises:
        ValueError: An argument is out of range or names a block that does not exist.
        TypeError: The backbone cannot tell its decoder blocks.

    Example:
        >>> from lightning_modules import ADMUNet, LEDMSegmentation
        >>> model = LEDMSegmentation(ADMUNet.small(), num_classes=2, blocks=(2, 3, 4))
        >>> model.segment(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 2, 32, 32])
    """

    network: PixelClassifiers
    best_loss: Tensor
    stale_steps: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        process: NoiseProcess | None = None,
        init_from: str | None = None,
        sigmas: tuple[float, ...] = (0.176, 0.522, 0.958),
        blocks: tuple[int, ...] = (5, 6, 7, 8, 12),
        num_members: int = 10,
        hidden: tuple[int, int] | None = None,
        pixels_per_batch: int = 64,
        min_class_pixels: int = 20,
        patience: int | None = None,
        cache_features: bool = True,
        noise_seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.0,
    ) -> None:
        process = VPProcess() if process is None else process
        _require_counts(num_classes, pixels_per_batch, min_class_pixels, patience)
        _require_levels(sigmas, process, network)
        channels = sum(shape.channels for shape in require_blocks(network.eval(), blocks))
        ensemble = PixelClassifiers(channels * len(sigmas), num_classes, num_members, hidden)
        super().__init__(ensemble, optimizer, lr_scheduler, ema_decay)
        self.save_hyperparameters(ignore=["network", "process", "optimizer", "lr_scheduler"])
        self.backbone = network.requires_grad_(False)
        self.process = process
        self.init_from = init_from
        self.sigmas = tuple(sigmas)
        self.blocks = tuple(blocks)
        self.pixels_per_batch = pixels_per_batch
        self.min_class_pixels = min_class_pixels
        self.patience = patience
        self.cache_features = cache_features
        self.noise_seed = noise_seed
        self._cache = FeatureCache()
        self.register_buffer("best_loss", torch.full((num_members,), torch.inf))
        self.register_buffer("stale_steps", torch.zeros(num_members, dtype=torch.long))
        self.build_mask_metrics(num_classes)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def train(self, mode: bool = True) -> "LEDMSegmentation":
        """Switch the classifiers between training and evaluation; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    # ---------------------------------------------------------------- the backbone

    def on_fit_start(self) -> None:
        """Start a new fit from `init_from`; one that goes on has its backbone in its own checkpoint."""
        super().on_fit_start()
        # Features of an earlier fit may be another backbone's.
        self._cache = FeatureCache()
        # Not in `setup`: there it is not known yet whether a checkpoint will be loaded.
        if self.goes_on:
            return
        if self.init_from is not None:
            self.load_backbone(self.init_from)
        else:
            rank_zero_warn(
                "`init_from` is None: features come from `network` as it was passed. If it was not trained before, "
                "they are random; give the checkpoint of a HybridSegmentation as model.init_args.init_from."
            )
            self.goes_on = True

    def on_fit_end(self) -> None:
        """Give the memory of the features back."""
        self._cache = FeatureCache()

    def meaning(self) -> dict[str, Any]:
        """What decides the outputs beside the weights."""
        features = {"sigmas": list(self.sigmas), "blocks": list(self.blocks), "noise_seed": self.noise_seed}
        return features | {"process": self.process.settings()}

    def load_backbone(self, path: str) -> None:
        """Take the backbone over from a checkpoint: EMA weights where there are any, else the last ones.

        Args:
            path: Checkpoint of a module of this collection with the same network, apart from its last layer.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a checkpoint, or the networks differ in more than the last layer.
        """
        checkpoint = load_checkpoint(path, "init_from")
        weights, kind = network_weights(checkpoint, path, "init_from")
        theirs = checkpoint.get("meaning", {}).get("process")
        if theirs is not None and theirs != self.process.settings() and any(self.sigmas):
            msg = (
                f"Expected `process` to be the one that `init_from` {path} was trained with, {theirs}, got "
                f"{self.process.settings()}; the backbone would take one noise level for another."
            )
            raise ValueError(msg)
        load_trunk_and_head(self.backbone, weights, head_name(self.backbone), 0, True, path)
        self.goes_on = True
        self.say(f"init_from: {kind} weights of {path} are the frozen backbone")
        if checkpoint.get("hyper_parameters", {}).get("objective") == "supervised" and any(self.sigmas):
            rank_zero_warn(
                f"`init_from` {path} was trained with objective 'supervised', on clean images only, but features are "
                f"taken at `sigmas` {self.sigmas}; set model.init_args.sigmas: [0.0]."
            )

    @torch.no_grad()
    def features(self, image: Tensor) -> list[Tensor]:
        """What the decoder blocks of the backbone put out for noisy versions of images.

        Args:
            image: [B, C, H, W] in [0, 1].

        Returns:
            Float32 maps [B, channels, h, w] at the blocks' own resolutions: all blocks of the first noise level, then
            all of the second, and so on.
        """
        x = 2.0 * image - 1.0
        # On the CPU, so that it is the same on every device.
        eps = torch.randn(
            x.shape[1:], generator=torch.Generator().manual_seed(self.noise_seed), dtype=torch.float32
        ).to(x)
        denoiser = JointDenoiser(self.backbone, self.process, image_channels=0)
        maps = []
        for sigma in self.sigmas:
            noisy = x + sigma * eps
            maps += decoder_maps(self.backbone, self.blocks, partial(denoiser.joint, noisy, sigma))
        return maps

    def _training_features(self, batch: dict[str, Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """Feature maps, and which of their rows belongs to each image of the batch."""
        image, index = batch["image"], batch["index"]
        if not self.cache_features:
            return self.features(image), torch.arange(len(image), device=image.device)
        for position in self._cache.missing(index, image):
            # One at a time: what a resumed run computes again must not depend on the company in the batch.
            alone = image[position : position + 1]
            self._cache.add(int(index[position]), alone, self.features(alone))
        return self._cache.maps, self._cache.rows(index)

    # ---------------------------------------------------------------- training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The members' summed loss on pixels of a batch of image [B, C, H, W] and mask [B, H, W]."""
        batch = self.checked(batch, "image", "mask", *(["index"] if self.cache_features else []))
        real = batch["index"] >= 0
        batch = {name: value[real] for name, value in batch.items()}
        mask = without_rare_classes(self.known(batch["mask"]), self.num_classes, self.min_class_pixels)
        labelled = (mask != IGNORE).flatten().nonzero().squeeze(1)
        if not len(labelled):
            # Nothing to learn here, but other processes may wait for this one's word and gradients.
            self._stop_if_stale(None)
            return torch.stack([0.0 * p.sum() for p in self.network.parameters()]).sum()
        maps, rows = self._training_features(batch)
        shape = self.network.num_members, self.pixels_per_batch
        pixel = labelled[torch.randint(len(labelled), shape, device=mask.device).flatten()]
        image, y, x = torch.unravel_index(pixel, mask.shape)
        features = features_at(maps, rows[image], y, x, (mask.shape[1], mask.shape[2]))
        losses = self.network.loss(features.view(*shape, -1), mask.flatten()[pixel].view(shape))
        self.log("train_loss", losses.detach().mean(), prog_bar=True, batch_size=len(mask))
        loss = self.require_finite(losses.sum(), train_loss=losses.detach().mean())
        self._stop_if_stale(losses.detach())
        return loss

    def _stop_if_stale(self, losses: Tensor | None) -> None:
        if self.patience is None or self.current_epoch < PATIENCE_FROM_EPOCH:
            return
        if losses is not None:
            better = losses < self.best_loss
            self.best_loss = torch.where(better, losses, self.best_loss)
            self.stale_steps = torch.where(better, 0, self.stale_steps + 1)
        stale = bool((self.stale_steps > self.patience).all())
        self.trainer.should_stop |= self.trainer.strategy.reduce_boolean_decision(stale, all=True)

    # ---------------------------------------------------------------- prediction

    @torch.no_grad()
    def judge(self, image: Tensor) -> Verdict:
        """Probabilities, mask and uncertainty of images [B, C, H, W] in [0, 1]."""
        ensemble = cast("PixelClassifiers", self.ema_network)
        said = ensemble.predict(self.features(image), (image.shape[2], image.shape[3]))
        disagreement = (entropy(said.probabilities) - said.entropy).clamp(min=0)
        return Verdict(said.probabilities, said.votes, disagreement)

    def segment(self, image: Tensor) -> Tensor:
        """Class probabilities of images, the mean over the ensemble.

        Their argmax is not always the mask that is evaluated and written: that is the majority vote, see `judge`.

        Args:
            image: [B, C, H, W] in [0, 1].

        Returns:
            [B, num_classes, H, W], non-negative, summing to 1 over the classes.
        """
        return self.judge(image).probabilities

    def masks(self, image: Tensor) -> Tensor:
        """Class ids [B, H, W] of images [B, C, H, W] in [0, 1]: the majority vote."""
        return self.judge(image).mask

    def uncertainty(self, image: Tensor) -> Tensor:
        """Jensen-Shannon divergence between the members at each pixel of images [B, C, H, W], in nats: [B, H, W]."""
        return self.judge(image).uncertainty

    def _eval_step(self, batch: dict[str, Tensor], split: Split) -> None:
        """Update loss and metrics; padding (index -1) counts nowhere."""
        real = batch["index"] >= 0
        if not bool(real.any()):
            return
        verdict, mask = self.judge(batch["image"][real]), self.known(batch["mask"][real])
        log_p = verdict.probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
        self._loss_of(split).update(mask_loss_per_image(log_p, mask, "ce"))
        # Overlap is the vote's, calibration the probabilities'.
        for name, metric in self.metrics_of(split).items(keep_base=True):
            metric.update(verdict.probabilities if name == "ece" else verdict.mask, mask)

    def _loss_of(self, split: Split) -> MeanMetric:
        return self.val_loss if split == "val" else self.test_loss

    def _log_eval(self, split: Split) -> None:
        loss, metrics = self._loss_of(split), self.metrics_of(split)
        values = metrics.compute() | {f"{split}_loss": loss.compute()}
        loss.reset()
        metrics.reset()
        self.log(f"{split}_jaccard", values.pop(f"{split}_jaccard"), prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Segment a batch of images.

        Returns:
            probabilities and votes [B, K, H, W], mask [B, H, W] of class ids (the majority vote), uncertainty [B, H, W]
            in nats, confidence [B] in [0, 1], index [B].
        """
        batch = self.checked(batch, "image")
        verdict = self.judge(batch["image"])
        said = {"mask": verdict.mask, "confidence": image_confidence(verdict.probabilities), "index": batch["index"]}
        return verdict._asdict() | said


def without_rare_classes(mask: Tensor, num_classes: int, min_pixels: int) -> Tensor:
    """Ignore classes that have only a few pixels in an image, as LEDM's code does in training images.

    Args:
        mask: [B, H, W] class ids, 255 = unlabelled.
        num_classes: Number of classes.
        min_pixels: Fewer pixels than this are a few.

    Returns:
        [B, H, W], the mask with the pixels of such classes set to 255.
    """
    # One histogram for the batch: bin (image, class), the last class of each image being what is ignored anyway.
    image = torch.arange(len(mask), device=mask.device).view(-1, 1, 1)
    cell = image * (num_classes + 1) + mask.where(mask != IGNORE, num_classes)
    rare = torch.bincount(cell.flatten(), minlength=len(mask) * (num_classes + 1)) < min_pixels
    return torch.where(rare[cell], IGNORE, mask)


def _require_counts(num_classes: int, pixels_per_batch: int, min_class_pixels: int, patience: int | None) -> None:
    for name, value, least, remedy in (
        ("num_classes", num_classes, 2, "count the background, so one lesion class makes 2"),
        ("pixels_per_batch", pixels_per_batch, 2, "64 is usual, and batch statistics need more than one"),
        ("min_class_pixels", min_class_pixels, 0, "20 is the paper's, 0 keeps every pixel"),
        ("patience", 0 if patience is None else patience, 0, "leave it out to train to the trainer's end"),
    ):
        if value < least:
            msg = f"Expected `{name}` >= {least}, got {value}; {remedy}."
            raise ValueError(msg)


def _require_levels(sigmas: Sequence[float], process: NoiseProcess, network: nn.Module) -> None:
    if not sigmas or not all(0.0 <= sigma <= process.sigma_max for sigma in sigmas):
        msg = (
            f"Expected `sigmas` to be noise levels from 0 (the clean image) to the process's sigma_max = "
            f"{process.sigma_max:.4g}, got {tuple(sigmas)}; the paper's are (0.176, 0.522, 0.958)."
        )
        raise ValueError(msg)
    if any(sigmas) and not takes_time(network):
        msg = (
            f"Expected `sigmas` = (0.0,) for {type(network).__name__}, which has no time input and knows clean images "
            f"only, got {tuple(sigmas)}; set it, or use ADMUNet."
        )
        raise ValueError(msg)
