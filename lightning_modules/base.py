"""What every module of the collection shares: optimiser, moving average, repeatable randomness, sane losses."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_modules.checkpoints import require_same_tensors


@runtime_checkable
class HasTrunkAndHead(Protocol):
    """A network that can tell its last layer from the rest."""

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but the last layer's."""
        ...

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The last layer's parameters."""
        ...


_Tensors = tuple[Tensor, ...] | list[Tensor]


def _ema_update(weight: Callable[[int], float]) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """The in-place EMA of a list of tensors, given the weight of the newest ones in update n."""

    @torch.no_grad()
    def update(averaged: _Tensors, current: _Tensors, num_averaged: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, weight(int(num_averaged)))

    return update


def ema_weight(decay: float, n: int) -> float:
    """The weight of the newest weights in update n of a moving average; early updates use a shorter memory.

    With the plain constant decay the average of a run much shorter than 1 / (1 - decay) would still be mostly its
    random start, so update n uses min(decay, (1 + n) / (10 + n)), the warm-up of TensorFlow's
    ExponentialMovingAverage.
    """
    return 1.0 - min(decay, (1 + n) / (10 + n))


class HalfLife:
    """The weight of the newest weights in a moving average whose memory is counted in images.

    After b images more the older weights count beta = 0.5^(b / min(half-life, 0.05 n b)) as much, n being the number
    of updates before: the memory is never longer than a twentieth of the run (Karras et al., arXiv 2206.00364,
    appendix F.2, and its released training loop).

    Args:
        images: The half-life.

    Attributes:
        images_per_update: b, the images between two updates, over all devices; set before the first.
    """

    def __init__(self, images: float) -> None:
        self.images = images
        self.images_per_update = 1

    def __call__(self, n: int) -> float:
        """The weight in update n, counted from 0."""
        memory = min(self.images, 0.05 * n * self.images_per_update)
        return 1.0 - 0.5 ** (self.images_per_update / memory) if memory > 0 else 1.0


class BaseModule(pl.LightningModule):
    """A LightningModule around one injected network.

    - The optimiser and the learning-rate schedule are injected as callables; there is no default.
    - An exponential moving average of the network only (`ema_network`) serves validation, test, prediction and
      export. It is part of the state dict, so a resumed run continues it bit-equal. Parameters are averaged,
      buffers (BatchNorm statistics) are copied from the network.
    - Every training batch starts by seeding torch from (seed of the run, number of the batch, rank). What a batch
      draws (noise, dropout) then depends on nothing that a killed process would take with it.
    - A loss that is not finite stops the run before the weights are touched.

    Args:
        network: The network that is trained.
        optimizer: Called with parameter groups, returns the optimiser; needed for fit only.
        lr_scheduler: Called with the optimiser; stepped after every optimiser step (ReduceLROnPlateau: every epoch).
        ema_decay: Decay of the moving average in optimiser steps, in [0, 1); 0 switches it off.
        trunk_lr_scale: Learning rate of everything but the last layer, relative to the last layer's; positive.
        ema_half_life: Half-life of the moving average in images, instead of `ema_decay`; see HalfLife.

    Attributes:
        goes_on: Whether the weights are those of a checkpoint that was loaded.

    Raises:
        ValueError: `ema_decay`, `ema_half_life` or `trunk_lr_scale` is out of range.
    """

    goes_on = False

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.9999,
        trunk_lr_scale: float = 1.0,
        ema_half_life: float | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= ema_decay < 1.0:
            msg = f"Expected `ema_decay` in [0, 1), got {ema_decay}; use 0 to train without a moving average."
            raise ValueError(msg)
        if trunk_lr_scale <= 0.0:
            msg = (
                f"Expected a positive `trunk_lr_scale`, got {trunk_lr_scale}; to freeze the trunk use the callback "
                "StageTransition."
            )
            raise ValueError(msg)
        if ema_half_life is not None and ema_half_life <= 0:
            msg = f"Expected a positive `ema_half_life`, got {ema_half_life}; None counts by `ema_decay`."
            raise ValueError(msg)
        self.network = network
        self._half_life = None if ema_half_life is None else HalfLife(ema_half_life)
        averages = ema_decay > 0 or self._half_life is not None
        self.ema = (
            AveragedModel(network, multi_avg_fn=_ema_update(self._half_life or partial(ema_weight, ema_decay)))
            if averages
            else None
        )  # deep-copies, so it is built before anything is wrapped or compiled
        if self.ema is not None:
            self.ema.requires_grad_(False)
        self.ema_decay = ema_decay
        self.trunk_lr_scale = trunk_lr_scale
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        self._run_seed: int | None = None

    @property
    def ema_network(self) -> nn.Module:
        """The averaged network in evaluation mode, or the trained one when the average is switched off."""
        return self.network if self.ema is None else self.ema.module.eval()

    def reset_ema(self) -> None:
        """Start the moving average again from the network as it is now."""
        if self.ema is None:
            return
        # Tensor by tensor: a network compiled in the meantime has other names.
        for averaged, own in zip(_tensors(self.ema.module), _tensors(self.network), strict=True):
            averaged.data.copy_(own)
        self.ema.n_averaged.zero_()

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """All trained parameters but the last layer's.

        Raises:
            TypeError: The network cannot tell its last layer from the rest.
        """
        return self._split_network().trunk_parameters()

    def _split_network(self) -> HasTrunkAndHead:
        if isinstance(self.network, HasTrunkAndHead):
            return self.network
        head = getattr(self.network, "segmentation_head", None)
        if isinstance(head, nn.Module):
            return _SplitByHead(self.network, head)
        msg = (
            f"`trunk_lr_scale` and StageTransition need a `network` with trunk_parameters() and head_parameters() "
            f"(ADMUNet) or a segmentation_head (segmentation_models_pytorch), got {type(self.network).__name__}; "
            "add the two methods or train all layers alike."
        )
        raise TypeError(msg)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the injected optimiser over (trunk, head), the trunk with its own learning rate if asked."""
        if self._make_optimizer is None:
            msg = (
                "Expected an `optimizer` for fit, got None; give model.init_args.optimizer.class_path in the config "
                "or optimizer=partial(torch.optim.AdamW, lr=...) in Python."
            )
            raise ValueError(msg)
        if self.trunk_lr_scale == 1.0:
            optimizer = self._make_optimizer(self.network.parameters())
        else:
            split = self._split_network()
            groups = [{"params": list(split.trunk_parameters())}, {"params": list(split.head_parameters())}]
            optimizer = self._make_optimizer(groups)
            optimizer.param_groups[0]["lr"] *= self.trunk_lr_scale
        self.extend_optimizer(optimizer)
        return self.scheduled(optimizer)

    def scheduled(self, optimizer: Optimizer) -> OptimizerLRScheduler:
        """Put the injected learning-rate schedule beside an optimiser.

        Args:
            optimizer: With all its parameter groups.

        Raises:
            ValueError: The schedule does not keep `trunk_lr_scale`.
        """
        if self._make_lr_scheduler is None:
            return optimizer
        scheduler = self._make_lr_scheduler(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        apart = self.trunk_lr_scale != 1.0
        if apart and not math.isclose(rates[0], rates[1] * self.trunk_lr_scale, rel_tol=1e-6):
            msg = (
                f"Expected an `lr_scheduler` that keeps `trunk_lr_scale` {self.trunk_lr_scale}, but "
                f"{type(scheduler).__name__} sets one rate for all ({rates[0]:g}, {rates[1]:g}); give it two rates, or "
                "use one that multiplies the optimiser's (LambdaLR, CosineAnnealingLR)."
            )
            raise ValueError(msg)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config |= {"interval": "epoch", "monitor": getattr(scheduler, "monitor", "val_loss")}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]  # a TypedDict of Lightning

    def extend_optimizer(self, optimizer: Optimizer) -> None:
        """Add what a module trains beside its network; called before the schedule is built.

        Args:
            optimizer: The optimiser of the network.
        """

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then average: here and not at the batch's end, where a step-wise checkpoint is already written."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.update_ema()

    def update_ema(self) -> None:
        """Take the network's weights into the moving average."""
        if self.ema is not None:
            self.ema.update_parameters(self.network)

    def count_images(self, batch_size: int) -> None:
        """Tell the half-life of the moving average how many images lie between two updates.

        Args:
            batch_size: Images of a batch on this device.
        """
        if self._half_life is not None:
            accumulated = self.trainer.accumulate_grad_batches
            self._half_life.images_per_update = batch_size * self.trainer.world_size * accumulated

    def on_fit_start(self) -> None:
        """Fix the seed of the run (seed_everything's, or the one a checkpoint brought along).

        Raises:
            ValueError: The weights are kept in 16 bits, where averages and sums no longer move.
        """
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in self.parameters()):
            msg = (
                f"Expected `trainer.precision` with weights in 32 bits, got {self.trainer.precision}: moving averages "
                "and metrics stand still in 16; use bf16-mixed or 16-mixed."
            )
            raise ValueError(msg)
        if self._run_seed is None:
            self._run_seed = torch.initial_seed() % 2**63

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Make the randomness of this batch a function of (run, batch number, rank)."""
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        entropy = (self._run_seed or 0, number, self.global_rank)
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
        if self.device.type == "cpu":
            # torch.manual_seed notes a stack trace for GPUs that nobody uses: 2 ms, as much as a small step takes.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def meaning(self) -> dict[str, Any]:
        """What decides the outputs beside the weights, as plain values: weights must not meet other settings."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed of the run, and what the weights mean."""
        checkpoint["run_seed"] = self._run_seed
        checkpoint["meaning"] = self.meaning()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the seed of the run; refuse other settings, and another network before torch lists its tensors."""
        own, found = self.meaning(), checkpoint.get("meaning", {})
        differing = [f"{k} {found[k]} -> {own[k]}" for k in sorted(own.keys() & found.keys()) if own[k] != found[k]]
        if differing:
            msg = (
                f"Expected `ckpt_path` to hold weights for this module's settings, but they were trained with others: "
                f"{'; '.join(differing)}; give the module the arguments that the checkpoint was trained with."
            )
            raise ValueError(msg)
        require_same_tensors(self.state_dict(), checkpoint["state_dict"])
        self._run_seed = checkpoint.get("run_seed")
        self.goes_on = True

    def require_classes_of_data(self, num_classes: int) -> None:
        """Compare the module's number of classes with the datamodule's, where that knows it.

        Raises:
            ValueError: They differ.
        """
        of_data = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if of_data is not None and of_data != num_classes:
            msg = (
                f"Expected `num_classes` to be the data's, got {num_classes} for the module and {of_data} from "
                f"the datamodule; build the module with num_classes={of_data}."
            )
            raise ValueError(msg)

    def require_finite(self, loss: Tensor, **terms: Tensor) -> Tensor:
        """Return the loss if it is finite.

        Args:
            loss: The scalar loss of a training batch.
            terms: Its parts, named in the error.

        Raises:
            FloatingPointError: The loss is NaN or infinite.
        """
        if not bool(torch.isfinite(loss)):
            parts = ", ".join(f"{name} = {value.item():.4g}" for name, value in terms.items())
            msg = (
                f"Expected a finite training loss, got {loss.item()} at step {self.global_step} ({parts}). The last "
                "checkpoint is from before this step. Lower the learning rate, clip gradients "
                "(trainer.gradient_clip_val), use precision bf16-mixed or 32-true instead of 16-mixed, and check "
                "the images for NaN."
            )
            raise FloatingPointError(msg)
        return loss

    def _log_agreed(self, values: Mapping[str, Tensor]) -> None:
        """Log what is the same on every process, where Lightning would warn once a name that it may not be."""
        self.log_dict(dict(values), sync_dist=True)

    def say(self, message: str) -> None:
        """Tell the user something once, from rank zero."""
        rank_zero_info(message)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


class _SplitByHead:
    """Trunk and head of a segmentation_models_pytorch model."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        self._network, self._head = network, head

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        head = {id(p) for p in self._head.parameters()}
        return (p for p in self._network.parameters() if id(p) not in head)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        return self._head.parameters()
