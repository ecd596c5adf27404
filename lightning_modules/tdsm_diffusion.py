"""TDSMDiffusion: a class-conditional diffusion model that learns the clean classes from noisy labels."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads
from torchmetrics import MeanMetric

from lightning_modules.base import BaseModule
from lightning_modules.class_drawing import draw_classes
from lightning_modules.diffusion.denoisers import ClassDenoiser
from lightning_modules.diffusion.evaluation_noise import bin_names, evaluation_noise, level_bin
from lightning_modules.diffusion.noise import EDMProcess, NoiseProcess
from lightning_modules.diffusion.transition import TransitionMatrix
from lightning_modules.diffusion.transition_weights import Others
from lightning_modules.latent_images import LatentImages
from lightning_modules.metrics.binned_mean import BinnedMean
from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl_data import require_labels
from lightning_modules.transition_weighting import TransitionWeighting, Weighting

Split = Literal["val", "test"]


@runtime_checkable
class ConditionalNetwork(Protocol):
    """What TDSMDiffusion asks of a network beside network(x, t, label)."""

    num_classes: int | None
    null_label: int | None
    in_channels: int
    image_size: int

    def reset_classes(self, num_classes: int) -> None:
        """Make room for this many classes."""
        ...


class TDSMDiffusion(BaseModule):
    r"""Transition-aware weighted denoising score matching (Na et al., ICLR 2024, arXiv 2402.17517).

    The loss of an image x_0 with the given label y is

        L = E_{sigma, eps} lambda(sigma) || sum_i w_i(x_t, y) D(x_t; sigma, i) - x_0 ||^2,    x_t = x_0 + sigma eps,

    with w_i = p(clean class i | given label y, x_t), made of a transition matrix T and a classifier of noisy images
    (see lightning_modules.diffusion.transition_weights; `NoisyLabelClassifier` trains one). Its minimiser is the
    denoiser of the clean classes: asking for class c then draws class c although the labels are wrong. The squared norm
    is a mean over channels and pixels here. With T = I this is plain denoising score matching, to the last bit.

    - `weighting: posterior` is the above. `reverse` takes w_i = p(clean class i | given label y), without a classifier:
      the baseline whose minimiser is not clean. `none` trusts the labels: plain conditional diffusion.
    - Label dropout for classifier-free guidance makes "no class" of a label before anything is weighted; such images
      are matched unweighted, since wrong labels do not change what images look like on the whole. (The released code
      would take them for class 0.)
    - Classifier and generator see the same x_t and no augmentation labels. Augmentations belong into the datamodule;
      leave flips out where they change the class, as with digits.

    Draws are of the averaged network. All noise levels are in variance-exploding units, x + sigma eps, x in [-1, 1].

    Args:
        network: Called as network(x, t, label) -> like x (`UViT`, `ClassUNet`).
        num_classes: Classes K; the CLI takes it from the data.
        process: Noise process; None is EDMProcess().
        weighting: See above.
        classifier: Classifier of noisy images, called as network(x, t) -> logits [B, K] (`NoisyResNet`); needed for
            `posterior`. It is not trained here.
        classifier_from: Checkpoint of a NoisyLabelClassifier that a fit takes the classifier's weights, and T, from;
            None takes the classifier as it is given.
        transition: T; None takes the one of `classifier_from`, or else the label noise that the datamodule knows.
        others: How the classes beside the given one are summed, see `mixed_estimate`: all of them (`exact`), or one of
            them drawn at random (`sampled`: the same on average, at most one more pass whatever K is).
        threshold: Largest weight that `exact` leaves out; the released code has 0.01.
        renormalize: Let the weights that `exact` keeps sum to 1. The released code does not, and inflates images.
        pairs_at_once: Most images in a pass without gradient, a limit to memory; None for as many as the batch has.
        temperature: Divides the classifier's logits. One that was stopped early, before it knew wrong labels by heart,
            is less sure than it could be: below 1 makes up for that. Its held-out likelihood tells which is right.
        label_dropout: Probability of training on an image without its label.
        latent: Diffuse in the latent space of an autoencoder.
        latent_cache: Folder for the latents of the training images; None encodes every batch anew.
        optimizer: Called with the network's parameters, returns the optimiser.
        lr_scheduler: Called with the optimiser; stepped after every optimiser step.
        ema_half_life: Half-life of the moving average of the weights in images.
        compile: Backend for torch.compile ("inductor"); None does not compile.
        draw_batch: Images that go through the network at once when drawing. Part of what an image is: another number
            rounds differently.
        num_level_bins: The losses are logged for this many bins of the noise level.

    Raises:
        TypeError: `network` takes no classes, or `latent` is none.
        ValueError: An argument is out of range, or what `weighting` needs is missing.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        process: NoiseProcess | None = None,
        weighting: Weighting = "posterior",
        classifier: nn.Module | None = None,
        classifier_from: str | None = None,
        transition: TransitionMatrix | None = None,
        others: Others = "sampled",
        threshold: float = 0.0,
        renormalize: bool = True,
        pairs_at_once: int | None = None,
        temperature: float = 1.0,
        label_dropout: float = 0.0,
        latent: nn.Module | None = None,
        latent_cache: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_half_life: float = 500_000.0,
        compile: str | None = None,
        draw_batch: int = 64,
        num_level_bins: int = 4,
    ) -> None:
        for name, count in (("draw_batch", draw_batch), ("num_level_bins", num_level_bins)):
            if count < 1:
                msg = f"Expected `{name}` to be at least 1, got {count}; leave it out for the default."
                raise ValueError(msg)
        _give_classes(network, num_classes, label_dropout)
        super().__init__(network, optimizer, lr_scheduler, ema_half_life=ema_half_life)
        self.save_hyperparameters(
            ignore=["network", "process", "classifier", "transition", "latent", "optimizer", "lr_scheduler"]
        )
        self.num_classes = num_classes
        self.process = EDMProcess() if process is None else process
        self.weighting = TransitionWeighting(
            num_classes,
            weighting,
            classifier,
            classifier_from,
            transition,
            others,
            threshold,
            renormalize,
            pairs_at_once,
            temperature,
        )
        self.label_dropout = label_dropout
        self.images = LatentImages(latent, latent_cache)
        self.compile_backend = compile
        self.draw_batch = draw_batch
        self.num_level_bins = num_level_bins
        self._is_weighted = False
        # In a list: a compiled network is the same parameters under other names.
        self._compiled: list[nn.Module] = []
        self.losses = nn.ModuleDict({"val_": MeanMetric(), "test_": MeanMetric()})
        self.loss_by_level = BinnedMean(num_level_bins + 1)

    def meaning(self) -> dict[str, Any]:
        """What decides the outputs beside the weights."""
        return {"process": self.process.settings(), "draw_batch": self.draw_batch, **self.images.meaning()}

    # ---------------------------------------------------------------- before a fit

    def setup(self, stage: str) -> None:
        """Compare the classes with the data's."""
        self.require_classes_of_data(self.num_classes)

    def on_fit_start(self) -> None:
        """Get classifier, transition matrix and latents; a fit that goes on has the first two from its checkpoint.

        Raises:
            FileNotFoundError: A checkpoint is not there.
            ValueError: The data's images are not the network's, T is not known, or a checkpoint is of something else.
        """
        super().on_fit_start()
        if self.compile_backend is not None and not self._compiled:
            self._compiled = [cast("nn.Module", torch.compile(self.network, backend=self.compile_backend))]
        shape = self.images.image_shape(self._network)
        _require_images(getattr(self.trainer, "datamodule", None), *shape)
        self._is_weighted = False  # a second fit may have other data
        self._prepare_weighting()
        self.images.prepare(self.trainer, shape[0])

    def on_validation_start(self) -> None:
        """Get classifier and transition matrix, if this is a validation of a module that was not fitted."""
        self._prepare_weighting()

    def _prepare_weighting(self) -> None:
        if not self.goes_on and not self._is_weighted:
            data = getattr(self.trainer, "datamodule", None)
            self.weighting.prepare(data, self.images.image_shape(self._network), self.process, self.images.space())
            self._is_weighted = True

    @property
    def _network(self) -> ConditionalNetwork:
        return cast("ConditionalNetwork", self.network)

    # ---------------------------------------------------------------- training

    def loss_per_image(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        eps: Tensor,
        label: Tensor,
        weighted: bool = True,
        trusted: Tensor | None = None,
    ) -> Tensor:
        """The loss of each image.

        Args:
            network: The network, or its average.
            x: Clean images in the space of the diffusion, [B, C, H, W].
            sigma: Noise levels, [B].
            eps: Standard normal noise like the images.
            label: Given labels [B]; K for none.
            weighted: Whether to weight the classes; false takes the labels as they are.
            trusted: Labels that are right for certain, bool [B]; None for none.

        Returns:
            [B].
        """
        noisy = x + sigma.view(-1, 1, 1, 1) * eps
        denoiser = ClassDenoiser(network, self.process)
        if weighted:
            estimate = self.weighting.estimate(denoiser, noisy, sigma, label, trusted)
        else:
            estimate = denoiser(noisy, sigma, label)
        error = F.mse_loss(estimate.float(), x.float(), reduction="none").mean((1, 2, 3))
        return self.process.image_weight(sigma) * error

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss on a batch of image [B, C, H, W] in [0, 1], label [B] and index [B].

        Labels that are right for certain, such as those that people gave, are `trusted`, bool [B].
        """
        label = batch["label"]
        require_labels(label, self.num_classes)
        self.count_images(len(label))
        x = self.images.of_training(batch)
        sigma = self.process.sample_sigma(len(x), device=x.device)
        eps = torch.randn_like(x)
        dropped = torch.rand(len(x), device=x.device) < self.label_dropout
        label = torch.where(dropped, self.num_classes, label)
        network = self._compiled[0] if self._compiled else self.network
        losses = self.loss_per_image(network, x, sigma, eps, label, trusted=batch.get("trusted"))
        loss = losses.mean()
        self.loss_by_level.update(losses.detach(), level_bin(self.process, sigma, self.num_level_bins))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(x))
        seen = (self.trainer.fit_loop.epoch_loop.total_batch_idx + 1) * len(x) * self.trainer.world_size
        self.log("train_kimg", seen / 1000, prog_bar=True, batch_size=len(x))
        return self.require_finite(loss)

    def on_train_epoch_end(self) -> None:
        """Log the loss by noise level."""
        found = zip(bin_names(self.num_level_bins), self.loss_by_level.pop(), strict=True)
        self._log_agreed({f"train_loss/{name}": mean for name, mean in found if not mean.isnan()})

    # ---------------------------------------------------------------- evaluation

    def _eval_step(self, batch: dict[str, Tensor], split: Split) -> None:
        real = batch["index"] >= 0
        if not bool(real.any()):
            return
        image, label, index = (batch[name][real] for name in ("image", "label", "index"))
        require_labels(label, self.num_classes)
        x = self.images.of(image)
        sigma, eps = evaluation_noise(self.process, index, x)
        # Classes drawn at random must not depend on what was drawn before.
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(int(index[0]))
            with evaluating(self.ema_network):
                losses = self.loss_per_image(self.ema_network, x, sigma, eps, label, weighted=split == "val")
        self._loss_of(split).update(losses)

    def _loss_of(self, split: Split) -> MeanMetric:
        return cast("MeanMetric", self.losses[f"{split}_"])

    def _log_eval(self, split: Split) -> None:
        metric = self._loss_of(split)
        self.log(f"{split}_loss", metric.compute(), prog_bar=True, sync_dist=True)
        metric.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the loss at fixed noise; what `sampled` draws adds to it, so `exact` has another, lower one."""
        self._eval_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log it."""
        self._log_eval("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the loss at fixed noise; the labels of test images are true, so they are taken as they are."""
        self._eval_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log it."""
        self._log_eval("test")

    # ---------------------------------------------------------------- drawing

    @torch.no_grad()
    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        """Draw images of classes with the averaged network.

        Args:
            request: `seed` [B] and `label` [B] int64, one an image: the same pair gives the same image, in whatever
                batch; `image_size`; `sampler`, a SamplerName; `num_steps` of it; `guidance`, 0 for none.

        Returns:
            image [B, C, H, W] in [0, 1], label [B], seed [B].

        Raises:
            TypeError: These are no requests for images of classes.
            ValueError: A label is no class, the size is not the network's, or there is no null class to be guided by.
        """
        if not {"seed", "label", "image_size"} <= request.keys():
            msg = (
                f"Expected requests with `seed`, `label` and `image_size`, got {sorted(request)}; ask for "
                "`images_per_class`, with SamplingDataModule in predict."
            )
            raise TypeError(msg)
        require_labels(request["label"], self.num_classes)
        size, _ = self.images.image_shape(self._network)
        if request["image_size"] != size:
            msg = (
                f"Expected `image_size` {size}, which the network was built for, got {request['image_size']}; ask for "
                f"image_size={size}."
            )
            raise ValueError(msg)
        denoiser = ClassDenoiser(self.ema_network, self.process)
        guidance = request.get("guidance", 0.0)
        if guidance != 0 and not (denoiser.null_label is not None and self.label_dropout > 0):
            msg = (
                f"Expected `guidance` 0 for a network that was trained without `label_dropout`, got {guidance}; train "
                "with `null_class` and label_dropout 0.1, or draw without guidance."
            )
            raise ValueError(msg)
        side = self._network.image_size
        with evaluating(self.ema_network):
            x = draw_classes(denoiser, request, (self._network.in_channels, side, side), self.draw_batch, self.device)
        image = self.images.to_images(x, self.draw_batch)
        return {"image": image, "label": request["label"], "seed": request["seed"]}

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Draw a batch of requests, see `draw`."""
        return self.draw(batch)


def _give_classes(network: nn.Module, num_classes: int, label_dropout: float) -> None:
    """Make room for the classes, and for "no class" where that is trained."""
    if not isinstance(network, ConditionalNetwork):
        msg = (
            f"Expected a `network` with network(x, t, label), `null_label` and reset_classes(num_classes), got "
            f"{type(network).__name__}; use UViT or ClassUNet."
        )
        raise TypeError(msg)
    if not 0 <= label_dropout < 1:
        msg = f"Expected `label_dropout` in [0, 1), got {label_dropout}; guidance needs about 0.1, else leave it at 0."
        raise ValueError(msg)
    if network.num_classes != num_classes:
        network.reset_classes(num_classes)
    if label_dropout > 0 and network.null_label is None:
        msg = f"Expected a `network` with a null class for `label_dropout` {label_dropout}; set `null_class`."
        raise ValueError(msg)


def _require_images(data: object, image_size: int, image_channels: int) -> None:
    """Compare the network's images with the datamodule's, where that knows them: some networks take any size."""
    wanted = {"image_size": image_size, "image_channels": image_channels}
    found = {name: getattr(data, name, None) for name in wanted}
    wrong = [name for name, value in found.items() if value is not None and value != wanted[name]]
    if wrong:
        name = wrong[0]
        msg = (
            f"Expected a `network` for the images of the data, {name} {found[name]}, got one for {wanted[name]}; build "
            "it with their image_size and in_channels, or those of their latents."
        )
        raise ValueError(msg)
