"""MaskedSiamese: an encoder learned from images alone, for classifiers that have very few labels."""

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.base import BaseModule
from lightning_modules.networks.modes import evaluating
from lightning_modules.networks.prototypes import (
    Prototypes,
    assignment_loss,
    entropy,
    mean_entropy_gap,
    sharpen,
    sinkhorn,
)
from lightning_modules.networks.vit_encoder import SiameseNetwork, ViTEncoder
from lightning_modules.ssl.base import view_keys
from lightning_modules.ssl.schedules import half_cosine


@runtime_checkable
class DeclaresViews(Protocol):
    """A datamodule that makes the views it is told to (SemiSupervisedDataModule)."""

    def declare_views(self, labeled: tuple[str, ...], unlabeled: tuple[str, ...]) -> None:
        """Make these views from now on."""
        ...


class MaskedSiamese(BaseModule):
    r"""Masked Siamese Networks (M. Assran et al., 2022, arXiv 2204.07141): pretraining without labels.

    Of each image there are a target view, random views that lose patches (anchors), and focal views (anchors, small
    parts at a lower resolution). Network and target network, its moving average, map them to embeddings z and z+, and
    those are assigned to K trained prototypes q:

        p = softmax(cos(z, q) / tau),   p+ = sinkhorn(sharpen(softmax(cos(z+, q) / tau), T)),
        loss = mean over anchors of H(p+, p) + me_max_weight (ln K - H(mean p)).

    No gradient goes through p+. Sinkhorn's steps and the last term keep all prototypes in use; without them one
    assignment for all images would do. The target network averages parameters only, with a momentum that grows linearly
    from `momentum` to 1 over `stretch` times the steps of the fit; its BatchNorms use the statistics of their batch.

    What is learned is read by `load_encoder` (`encoder_from` of LinearProbe): the target network's encoder.

    Args:
        encoder: The vision transformer.
        head_width: Width of the projection head's layers.
        head_dim: Dimensions of an embedding.
        num_prototypes: Prototypes K.
        temperature: tau.
        sharpening: T, in (0, 1].
        sinkhorn_iterations: Steps of Sinkhorn and Knopp; 0 leaves the balance to the last term.
        me_max_weight: Weight of the last term; not negative.
        patch_drop: Share of the patches that a random view loses as an anchor, in [0, 1): 0.15 for small networks, 0.7
            for large ones.
        random_views: Random views of an image that are anchors.
        focal_views: Focal views of an image.
        momentum: Momentum of the target network at the start, in [0, 1).
        weight_decay: Weight decay at the start and at the end of half a cosine over `stretch` times the fit; of
            matrices of the network only. It takes the place of the optimiser's own.
        stretch: Length of the two schedules as a multiple of the fit, at least 1.
        optimizer: Called with parameter groups, returns the optimiser (the paper's is AdamW).
        lr_scheduler: Called with the optimiser; stepped after every step.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_modules import MaskedSiamese, ViTEncoder
        >>> encoder = ViTEncoder(image_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=4)
        >>> module = MaskedSiamese(encoder, head_width=64, optimizer=partial(torch.optim.AdamW, lr=1e-3))
        >>> module(torch.rand(2, 3, 28, 28)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        head_width: int = 2048,
        head_dim: int = 256,
        num_prototypes: int = 1024,
        temperature: float = 0.1,
        sharpening: float = 0.25,
        sinkhorn_iterations: int = 3,
        me_max_weight: float = 1.0,
        patch_drop: float = 0.15,
        random_views: int = 1,
        focal_views: int = 10,
        momentum: float = 0.996,
        weight_decay: tuple[float, float] = (0.04, 0.4),
        stretch: float = 1.25,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        # BaseModule keeps the copy; how it is averaged is said below.
        super().__init__(SiameseNetwork(encoder, head_width, head_dim), optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["encoder", "optimizer", "lr_scheduler"])
        for name, share in (("patch_drop", patch_drop), ("momentum", momentum)):
            if not 0 <= share < 1:
                msg = f"Expected `{name}` in [0, 1), got {share}."
                raise ValueError(msg)
        if not 0 < sharpening <= 1:
            msg = f"Expected `sharpening` in (0, 1], got {sharpening}; 1 leaves the targets as they are."
            raise ValueError(msg)
        if random_views < 0 or focal_views < 0 or random_views + focal_views == 0:
            msg = f"Expected `random_views` and `focal_views` >= 0 and not both 0, got {random_views}, {focal_views}."
            raise ValueError(msg)
        if sinkhorn_iterations < 0 or me_max_weight < 0 or min(weight_decay) < 0 or stretch < 1:
            msg = (
                "Expected `sinkhorn_iterations`, `me_max_weight` and `weight_decay` >= 0 and `stretch` >= 1, got "
                f"{sinkhorn_iterations}, {me_max_weight}, {weight_decay}, {stretch}."
            )
            raise ValueError(msg)
        self.prototypes = Prototypes(num_prototypes, head_dim, temperature)
        self.sharpening = sharpening
        self.sinkhorn_iterations = sinkhorn_iterations
        self.me_max_weight = me_max_weight
        self.patch_drop = patch_drop
        self.random_views = random_views
        self.focal_views = focal_views
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.stretch = stretch
        self._num_steps = 1
        self.register_buffer("_used", torch.zeros(num_prototypes, dtype=torch.bool), persistent=False)
        self._used: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """Features [B, D] of images [B, C, H, W] in [0, 1], without gradient, by the target network's encoder."""
        encoder = cast("SiameseNetwork", self.target).encoder
        with torch.no_grad(), evaluating(encoder):
            features: Tensor = encoder(image)
        return features.float()

    @property
    def target(self) -> nn.Module:
        """The moving average, in whatever mode it is."""
        return self.network if self.ema is None else self.ema.module

    # ---------------------------------------------------------------- schedules

    def momentum_at(self, step: int) -> float:
        """Momentum of the target network in an optimiser step, counted from 0."""
        return self.momentum + (1 - self.momentum) * min(1.0, step / (self.stretch * self._num_steps))

    def weight_decay_at(self, step: int) -> float:
        """Weight decay in an optimiser step, counted from 0."""
        start, end = self.weight_decay
        return end + (start - end) * half_cosine(step / (self.stretch * self._num_steps))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Take the network's parameters into the target network; buffers are its own."""
        if self.ema is None:
            return
        weight = 1 - self.momentum_at(int(self.ema.n_averaged))
        torch._foreach_lerp_(list(self.ema.module.parameters()), list(self.network.parameters()), weight)
        self.ema.n_averaged += 1

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the weight decay of this step."""
        optimizer.param_groups[0]["weight_decay"] = self.weight_decay_at(self.trainer.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, with weight decay on the network's matrices only, and its schedule."""
        if self._make_optimizer is None:
            return super().configure_optimizers()  # raises
        parameters = [*self.network.parameters()]
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay_at(0)},
            {"params": [*others, *self.prototypes.parameters()], "weight_decay": 0.0},
        ]
        return self.scheduled(self._make_optimizer(groups))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of the network; that of the prototypes is left as it is."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.network.parameters(), gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip_val)

    # ---------------------------------------------------------------- training

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views of an image: the target, then the anchors."""
        return ("random",) * (1 + self.random_views) + ("focal",) * self.focal_views

    def setup(self, stage: str) -> None:
        """Tell the data which views to make."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, DeclaresViews):
            data.declare_views((), self.views)

    def on_train_start(self) -> None:
        """Work out how many steps there will be.

        Raises:
            ValueError: Nothing says when training ends.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            msg = "Expected `trainer.max_steps` or `trainer.max_epochs`, got neither; the momentum grows until the end."
            raise ValueError(msg)
        self._num_steps = max(1, int(steps))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss on a batch {"unlabeled": {views}}."""
        target, *anchors = self._views_of(batch)
        size = len(target)
        log_p = self.prototypes(self._anchor_embeddings(anchors))
        with torch.no_grad():
            # Not the running statistics: those of the first steps are nobody's.
            raw = self.prototypes(self.target.train()([target], [0.0])).exp()
            targets = sinkhorn(sharpen(raw, self.sharpening), self.sinkhorn_iterations, self._mean_over_ranks)
        cross_entropy = assignment_loss(log_p, targets)
        gap = mean_entropy_gap(log_p.exp(), self._mean_over_ranks)
        loss = cross_entropy + self.me_max_weight * gap
        self._used[raw.argmax(1)] = True
        terms = {"cross_entropy": cross_entropy, "me_max": gap, "entropy": entropy(log_p.detach().exp())}
        values = {f"train_{name}": value.detach() for name, value in terms.items()}
        values["train_target_entropy"] = entropy(targets)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log_dict(values, batch_size=size)
        return self.require_finite(loss, **values)

    def _anchor_embeddings(self, anchors: list[Tensor]) -> Tensor:
        """Embeddings [V B, d] of all anchors, view-major; views of one kind go through the encoder together."""
        kinds = (anchors[: self.random_views], anchors[self.random_views :])
        groups = [(torch.cat(views), drop) for views, drop in zip(kinds, (self.patch_drop, 0.0), strict=True) if views]
        embedding: Tensor = self.network([views for views, _ in groups], [drop for _, drop in groups])
        return embedding

    def _views_of(self, batch: object) -> list[Tensor]:
        part = batch.get("unlabeled") if isinstance(batch, Mapping) else None
        found = part if isinstance(part, Mapping) else {}
        keys = view_keys(self.views)
        missing = [key for key in keys if key not in found]
        if missing:
            msg = (
                f"Expected training batches with {', '.join(keys)} under `unlabeled`, got "
                f"{', '.join(sorted(found)) or 'nothing'}; use SemiSupervisedDataModule with `crops`, or let your data "
                f"give {', '.join(missing)}."
            )
            raise ValueError(msg)
        return [found[key] for key in keys]

    def _mean_over_ranks(self, tensor: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return tensor
        return cast("Tensor", self.trainer.strategy.reduce(tensor.clone(), reduce_op="mean"))

    def on_train_epoch_end(self) -> None:
        """Log how many prototypes the target views of the epoch were nearest to, and say when it is one alone."""
        used = self._used
        if self.trainer.world_size > 1:
            used = cast("Tensor", self.trainer.strategy.reduce(used.int(), reduce_op="sum")) > 0
        count = used.sum()
        self._log_agreed({"train_prototypes_used": count.float()})
        self._used.zero_()
        if int(count) == 1:
            self.say(
                "MaskedSiamese: all images of this epoch were nearest to one prototype, so nothing tells them apart; "
                "raise `me_max_weight` or `sinkhorn_iterations`, or lower the learning rate."
            )
