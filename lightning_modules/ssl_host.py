"""What a semi-supervised method may ask of its module: networks, teacher, data sizes, sweeps, processes, turns."""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_modules.base import ema_weight
from lightning_modules.checkpoints import load_network
from lightning_modules.class_module import ClassModule
from lightning_modules.networks.modes import fresh_copy
from lightning_modules.ssl.base import Batch, Method, Split
from lightning_modules.ssl_data import FeedsMethods, LearnsAugmentation, SharesRates, require_labels, required_parts

_NO_DATA = {"num_labeled": 0, "num_unlabeled": 0}


class SSLHost(ClassModule):
    """A module around a method: everything a method may ask for (`lightning_modules.ssl.base.Host`).

    Args:
        network: The network that is trained.
        method: The semi-supervised method.
        optimizer: See SSLClassifier.
        lr_scheduler: See SSLClassifier.
        ema_decay: See SSLClassifier.
        init_from: See SSLClassifier.
    """

    def __init__(
        self,
        network: nn.Module,
        method: Method,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        ema_decay: float,
        init_from: str | None,
    ) -> None:
        super().__init__(network, optimizer, lr_scheduler, ema_decay)
        self.init_from = init_from
        self.method = method
        self._sizes: dict[str, int] | None = None
        self._num_batches = 0

    # ---------------------------------------------------------------- what methods ask for

    @property
    def num_labeled(self) -> int:
        """Labelled training images."""
        return (self._sizes or {}).get("num_labeled", 0)

    @property
    def num_unlabeled(self) -> int:
        """Unlabelled training images."""
        return (self._sizes or {}).get("num_unlabeled", 0)

    @property
    def batch_number(self) -> int:
        """Batches trained on before this one."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch."""
        return int(self.trainer.num_training_batches)

    @property
    def progress(self) -> float:
        """Share of the fit's batches that is done, in [0, 1]."""
        return min(1.0, self.batch_number / self._num_batches)

    @torch.no_grad()
    def teacher(self, image: Tensor) -> Tensor:
        """Logits [B, K] of the moving average, without gradient, its BatchNorm as the method's `teacher_buffers`.

        Raises:
            ValueError: There is no moving average.
        """
        if self.ema is None:
            msg = f"Expected `ema_decay` > 0 for {type(self.method).__name__}, which learns from the average, got 0."
            raise ValueError(msg)
        network = self.ema.module
        if self.method.teacher_buffers != "own":
            logits: Tensor = network.eval()(image)
            return logits
        logits = network.train()(image)
        network.eval()
        return logits

    def new_network(self) -> nn.Module:
        """A network like the trained one with weights of its own, drawn by `reset_parameters` of network or layers."""
        return fresh_copy(self.network)

    def load_trained(self, network: nn.Module, path: str, argument: str) -> None:
        """Copy the weights that another fit ended with, averaged where there are such, into a network.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: It is none, or of another network.
        """
        load_network(network, path, argument)

    def labels_of(self, split: Split) -> Tensor:
        """The given labels of all training images of a split, -1 where there is none."""
        return self._feeder("labels_of").labels_of(split).to(self.device)

    @torch.no_grad()
    def sweep(self, function: Callable[[Tensor], Tensor], split: Split) -> Tensor:
        """Apply a function of images to all training images of a split, unaugmented, in evaluation mode.

        Returns:
            Results [N, ...] in the order of the index, the same on every process.
        """
        size = self.num_labeled if split == "labeled" else self.num_unlabeled
        loader = self._feeder("sweep_dataloader").sweep_dataloader(split)
        (values,) = self.swept(loader, lambda batch: [function(batch["image"])], f"{split} images", size)
        return values

    def _feeder(self, what: str) -> FeedsMethods:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, FeedsMethods):
            return data
        msg = (
            f"Expected a datamodule with {what} for {type(self.method).__name__}, got {type(data).__name__}; use "
            "SemiSupervisedDataModule, or give yours the methods of FeedsMethods."
        )
        raise TypeError(msg)

    # ---------------------------------------------------------------- life of a fit

    def setup(self, stage: str) -> None:
        """Tell the data which views to make, and let the method build what depends on their sizes.

        Raises:
            ValueError: The trainer cannot be used with this method.
        """
        if stage != "fit":
            return
        data = getattr(self.trainer, "datamodule", None)
        found = None
        if isinstance(data, FeedsMethods):
            found = {"num_labeled": data.num_labeled, "num_unlabeled": data.num_unlabeled}
            data.declare_views(self.method.views.labeled, self.method.views.unlabeled)
        elif self.method.views.index:
            self._feeder("num_unlabeled")
        if self._sizes == _NO_DATA and found is not None and not self.goes_on:
            self._sizes = None  # something was predicted before there were training images
        if self._sizes is not None and found is not None and found != self._sizes:
            msg = (
                f"Expected data with {self._sizes} for {type(self.method).__name__}, which remembers images by their "
                f"number, got {found}; build a new module for other data."
            )
            raise ValueError(msg)
        self._set_up_method(found)
        if isinstance(self.method, LearnsAugmentation) and isinstance(data, SharesRates):
            data.share_rates(self.method.rates)
        if len(self.method.players(self)) > 1:
            # Not before: Lightning would refuse clipping, which `step_player` does.
            self._require_turns_possible()
            self.automatic_optimization = False

    def _set_up_method(self, sizes: dict[str, int] | None = None) -> None:
        if self._sizes is None:
            self._sizes = sizes or dict(_NO_DATA)
            self.method.setup(self)

    def _require_turns_possible(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            msg = (
                f"Expected `trainer.accumulate_grad_batches` 1 for {type(self.method).__name__}, whose networks take "
                f"turns in each batch, got {self.trainer.accumulate_grad_batches}; raise the batch size instead."
            )
            raise ValueError(msg)
        if self.trainer.gradient_clip_val and self.trainer.precision == "16-mixed":
            msg = (
                f"Expected `trainer.precision` bf16-mixed or 32-true for clipping with {type(self.method).__name__}, "
                "got 16-mixed, whose gradients are scaled while they would be clipped."
            )
            raise ValueError(msg)

    def on_fit_start(self) -> None:
        """Let the method begin a new fit, and draw from what it selects."""
        super().on_fit_start()
        if not self.goes_on:
            if self.init_from is not None:
                self.load_trained(self.network, self.init_from, "init_from")
                self.reset_ema()
            self.method.fit_start(self)
        self._select()

    def on_train_start(self) -> None:
        """Work out how many batches there will be.

        Raises:
            ValueError: Nothing says when training ends.
        """
        batches = self.trainer.estimated_stepping_batches * self.trainer.accumulate_grad_batches
        if batches == float("inf"):
            msg = "Expected `trainer.max_steps` or `trainer.max_epochs`, got neither; mu(t) needs to know the end."
            raise ValueError(msg)
        self._num_batches = max(1, int(batches))

    def on_train_epoch_start(self) -> None:
        """Let the method begin an epoch, and draw from what it selects."""
        self.method.epoch_start(self)
        self._select()

    def _select(self) -> None:
        chosen = self.method.select()
        if chosen is not None:
            for split, indices in chosen.items():
                self._feeder("select").select(split, indices)

    def train(self, mode: bool = True) -> "SSLHost":
        """Switch the mode of everything but the moving average, which predicts."""
        super().train(mode)
        if self.ema is not None:
            self.ema.eval()
        return self

    @torch.no_grad()
    def update_ema(self) -> None:
        """Take the network's weights into the moving average, and its buffers as the method's `teacher_buffers`."""
        if self.ema is None:
            return
        policy, first = self.method.teacher_buffers, int(self.ema.n_averaged) == 0
        buffers = list(self.ema.module.buffers())
        before = [] if policy == "copy" or first else [buffer.clone() for buffer in buffers]
        super().update_ema()
        n = int(self.ema.n_averaged) - 1
        for buffer, old in zip(buffers, before, strict=False):
            if policy == "own":
                buffer.copy_(old)
            elif buffer.is_floating_point():
                buffer.copy_(old.lerp(buffer, ema_weight(self.ema_decay, n)))

    # ---------------------------------------------------------------- turns

    def step_player(self, number: int, loss: Tensor, counts: bool) -> None:
        """Minimise the loss of one player.

        Args:
            number: Which of the players.
            loss: Its loss.
            counts: Whether this step counts in `global_step`; one a batch does, so that all counts are of batches.
        """
        listed = self.optimizers()
        optimizer = (listed if isinstance(listed, list) else [listed])[number]
        if not isinstance(optimizer, LightningOptimizer):
            msg = f"Expected optimisers wrapped by Lightning, got {type(optimizer).__name__}."
            raise TypeError(msg)
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.trainer.gradient_clip_val:
            self.clip_gradients(
                optimizer.optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm or "norm"
            )
        if counts:
            optimizer.step()
        else:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None, model=self)

    def step_schedules(self) -> None:
        """Step every learning-rate schedule once."""
        listed = self.lr_schedulers() or []
        for schedule in listed if isinstance(listed, list) else [listed]:
            schedule.step()  # type: ignore[call-arg]  # not ReduceLROnPlateau: configure_optimizers refuses it

    # ---------------------------------------------------------------- batches

    def taken_apart(self, batch: object) -> tuple[Batch, Batch, Tensor | None]:
        """Return labelled and unlabelled part of a batch as methods see them, and the hidden labels of the second.

        Raises:
            ValueError: A view, index or label that the method needs is missing or out of range.
        """
        labeled, unlabeled = required_parts(batch, self.method)
        require_labels(labeled["label"], self.num_classes)
        labeled.pop("true_label", None)
        return labeled, unlabeled, unlabeled.pop("true_label", None)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sizes that the method's memory was built for."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ssl_sizes"] = self._sizes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the method's memory as large as the checkpoint's before it is filled.

        Raises:
            ValueError: It was built for other data already.
        """
        # First: another number of classes mostly comes with other sizes, and says more.
        self.require_own_classes(checkpoint)
        sizes = checkpoint.get("ssl_sizes")
        if self._sizes is not None and sizes != self._sizes:
            msg = (
                f"Expected a checkpoint of a fit on {self._sizes}, got one on {sizes}; {type(self.method).__name__} "
                "goes on with the same data only (same num_labels, labels_seed and images)."
            )
            raise ValueError(msg)
        self._set_up_method(sizes)
        super().on_load_checkpoint(checkpoint)
