"""VAETraining: a small autoencoder of one's own images, for latent diffusion."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F  # the name everybody reads
from torchmetrics import MeanMetric, MetricCollection

from lightning_modules.base import BaseModule
from lightning_modules.networks.autoencoder import KLAutoencoder, draw, kl_divergence
from lightning_modules.networks.modes import evaluating

Reconstruction = Literal["l1", "mse"]
_Split = Literal["val", "test"]
_LEAST_ERROR = 1e-10  # 100 dB: an image that comes back exactly has a PSNR as well


@runtime_checkable
class SweepsImages(Protocol):
    """A datamodule that can give its training images once, unaugmented (GenerationDataModule)."""

    def sweep_dataloader(self) -> Iterable[Mapping[str, Tensor]]:
        """Batches of "image" and "index", shared among the processes; index -1 is a filler."""
        ...


class VAETraining(BaseModule):
    r"""Trains the autoencoder in whose latents a diffusion model then works (Rombach et al., 2022, arXiv 2112.10752).

    The loss of an image x [C, H, W] in [-1, 1] with z ~ q(z | x), the Gaussian of the encoder, is

        |x - decoder(z)| / (C H W) + kl_weight * KL(q(z | x) || N(0, 1)) / (C H W),

    the absolute (or squared) error and the divergence both summed over the image and its latents, then divided by the
    number of values of the image. The paper's code leaves out that division, of both alike, so `kl_weight` means the
    same here; its values are around 1e-6 (appendix G): enough to keep latents from growing, no more.

    Left out are the paper's perceptual and adversarial terms. They matter for sharp textures at large factors; without
    them large images come back smooth. For photographs take an autoencoder that was trained with them (LatentSpace's
    `folder`).

    At the end of every epoch the mean and the deviation of each latent channel over the training images are measured
    with the averaged network, so that a checkpoint carries them, and LatentSpace brings latents to deviation 1. The
    deviation includes the encoder's own variance: Var(z) = Var(mean) + E[variance].

    Args:
        network: The autoencoder.
        reconstruction: Error of a reconstruction: absolute (l1, the paper's) or squared (mse).
        kl_weight: Weight of the divergence, see above; not negative.
        optimizer: Called with the parameters, returns the optimiser.
        lr_scheduler: Called with the optimiser; stepped after every optimiser step.
        ema_decay: Decay of the moving average of the weights per optimiser step; 0 switches it off.
        ema_half_life: Half-life of the moving average in images, instead of `ema_decay`.
        latent_images: Training images, the first ones, whose latents are measured.

    Attributes:
        latent_mean: Mean of each latent channel, [z].
        latent_std: Deviation of each latent channel, [z].
        latents_measured: Whether they have been measured.

    Raises:
        ValueError: An argument is out of range.
    """

    latent_mean: Tensor
    latent_std: Tensor
    latents_measured: Tensor

    def __init__(
        self,
        network: KLAutoencoder,
        reconstruction: Reconstruction = "l1",
        kl_weight: float = 1e-6,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.999,
        ema_half_life: float | None = None,
        latent_images: int = 10_000,
    ) -> None:
        """Check the arguments."""
        super().__init__(network, optimizer, lr_scheduler, ema_decay, ema_half_life=ema_half_life)
        self.save_hyperparameters(ignore=["network", "optimizer", "lr_scheduler"])
        if reconstruction not in get_args(Reconstruction):
            msg = (
                f"Expected `reconstruction` to be one of {', '.join(get_args(Reconstruction))}, got {reconstruction!r}."
            )
            raise ValueError(msg)
        if kl_weight < 0:
            msg = f"Expected `kl_weight` >= 0, got {kl_weight}; the paper's is about 1e-6."
            raise ValueError(msg)
        if latent_images < 1:
            msg = f"Expected `latent_images` to be at least 1, got {latent_images}; a few thousand are plenty."
            raise ValueError(msg)
        self.reconstruction: Reconstruction = reconstruction
        self.kl_weight = kl_weight
        self.latent_images = latent_images
        self.register_buffer("latent_mean", torch.zeros(network.latent_channels))
        self.register_buffer("latent_std", torch.ones(network.latent_channels))
        self.register_buffer("latents_measured", torch.tensor(False))
        metrics = MetricCollection({name: MeanMetric() for name in ("loss", "reconstruction", "kl", "psnr")})
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def meaning(self) -> dict[str, Any]:
        """The architecture: LatentSpace compares it with the one that it is given."""
        return {"autoencoder": cast("KLAutoencoder", self.network).settings()}

    @property
    def _averaged(self) -> KLAutoencoder:
        return cast("KLAutoencoder", self.ema_network)

    # ---------------------------------------------------------------- the loss

    def reconstruct(self, image: Tensor) -> Tensor:
        """What becomes of images that go through the means of their latents, by the averaged network.

        Args:
            image: [B, C, H, W] in [0, 1].

        Returns:
            The same.
        """
        with torch.no_grad(), evaluating(self._averaged):
            x: Tensor = self._averaged(2.0 * image - 1.0)
        return (x.float().clamp(-1, 1) + 1) / 2

    def _terms(self, x: Tensor, decoded: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, reconstruction error (a mean over values) and divergence (a sum, in nats) of each image, [B]."""
        error = F.l1_loss if self.reconstruction == "l1" else F.mse_loss
        wrong = error(decoded.float(), x.float(), reduction="none").mean((1, 2, 3))
        kl = kl_divergence(moments)
        return wrong + self.kl_weight * kl / x[0].numel(), wrong, kl

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss on a batch with image [B, C, H, W] in [0, 1]."""
        network = cast("KLAutoencoder", self.network)
        x = 2.0 * _image_of(batch) - 1.0
        self.count_images(len(x))
        moments = network.encode(x)
        shape = (len(moments), network.latent_channels, *moments.shape[2:])
        decoded = network.decode(draw(moments, torch.randn(shape, device=moments.device)))
        loss, wrong, kl = (term.mean() for term in self._terms(x, decoded, moments))
        parts = {"train_reconstruction": wrong.detach(), "train_kl": kl.detach()}
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(x))
        self.log_dict(parts, batch_size=len(x))
        return self.require_finite(loss, **parts)

    # ---------------------------------------------------------------- the latents' mean and deviation

    def update_ema(self) -> None:
        """Average, and measure the latents after the last step of an epoch, before anything is written."""
        super().update_ema()
        steps = self.trainer.max_steps
        if self.trainer.is_last_batch or 0 < steps <= self.trainer.global_step + 1:
            self.measure_latents()

    def measure_latents(self) -> None:
        """Take mean and deviation of each channel over the first training images, with the averaged network."""
        channels = len(self.latent_mean)
        sums = torch.zeros(3, channels, dtype=torch.float64)
        wanted = -(-self.latent_images // self.trainer.world_size)
        with torch.no_grad(), evaluating(self._averaged):
            for image in self._training_images():
                part = image[:wanted].to(self.device)
                wanted -= len(part)
                mean, log_variance = self._averaged.encode(2.0 * part - 1.0).float().chunk(2, dim=1)
                second = mean.square() + log_variance.exp()
                values = (torch.ones_like(mean), mean, second)
                sums += torch.stack([value.sum((0, 2, 3)) for value in values]).cpu().double()
                if wanted <= 0:
                    break
        if self.trainer.world_size > 1:
            sums = cast("Tensor", self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")).cpu()
        count, first, second = sums
        mean = first / count
        self.latent_mean.copy_(mean)
        self.latent_std.copy_((second / count - mean.square()).clamp_min(1e-12).sqrt())
        self.latents_measured.fill_(True)

    def _training_images(self) -> Iterator[Tensor]:
        """This process's share of the training images, unaugmented, in batches."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SweepsImages):
            for batch in data.sweep_dataloader():
                yield batch["image"][batch["index"] >= 0]
            return
        images: Any = getattr(self.trainer.train_dataloader, "dataset", None)
        if not hasattr(images, "__getitem__") or not hasattr(images, "__len__"):
            msg = (
                "Expected training data whose images can be had one by one, to measure their latents, got "
                f"{type(images).__name__}; use GenerationDataModule, or a datamodule with sweep_dataloader()."
            )
            raise TypeError(msg)
        for start in range(self.global_rank, len(images), 64 * self.trainer.world_size):
            numbers = range(start, len(images), self.trainer.world_size)[:64]
            yield torch.stack([images[number]["image"] for number in numbers])

    # ---------------------------------------------------------------- evaluation

    def _eval_step(self, batch: Mapping[str, Tensor], split: _Split) -> None:
        """Update what is measured, on the means of the latents; padding (index -1) counts nowhere."""
        image = _image_of(batch)
        if "index" in batch:
            image = image[batch["index"] >= 0]
        if not len(image):
            return
        x = 2.0 * image - 1.0
        moments = self._averaged.encode(x)
        decoded = self._averaged.decode(moments.chunk(2, dim=1)[0])
        loss, wrong, kl = self._terms(x, decoded, moments)
        values = {"loss": loss, "reconstruction": wrong, "kl": kl, "psnr": psnr((decoded + 1) / 2, image)}
        metrics = self._metrics_of(split)
        for name, value in values.items():
            metrics[name].update(value)

    def _metrics_of(self, split: _Split) -> MetricCollection:
        return self.val_metrics if split == "val" else self.test_metrics

    def _log_eval(self, split: _Split) -> None:
        metrics = self._metrics_of(split)
        values = metrics.compute()
        metrics.reset()
        self.log(f"{split}_psnr", values.pop(f"{split}_psnr"), prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._eval_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_eval("val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Update the test metrics."""
        self._eval_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_eval("test")


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(1 / mean squared error).

    Args:
        image: [B, C, H, W]; cut off at 0 and 1.
        target: [B, C, H, W] in [0, 1].

    Returns:
        Decibels, [B]; 100 at most.
    """
    error = (image.float().clamp(0, 1) - target.float()).square().mean((1, 2, 3))
    return -10.0 * error.clamp_min(_LEAST_ERROR).log10()


def _image_of(batch: object) -> Tensor:
    image = batch.get("image") if isinstance(batch, Mapping) else None
    if not isinstance(image, Tensor) or image.ndim != 4 or not image.is_floating_point():
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        msg = (
            "Expected batches to be dicts with `image` [B, C, H, W] floating, in [0, 1], got "
            f"{got}; use a datamodule whose batches have it, such as GenerationDataModule."
        )
        raise ValueError(msg)
    return image
