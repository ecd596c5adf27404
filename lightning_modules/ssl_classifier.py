"""Semi-supervised classification: one module, the method is plugged in."""

import copy
from typing import Any

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_modules.class_module import EvalSplit
from lightning_modules.classification_metrics import PseudoLabelCounts
from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl.base import Batch, Guess, Loss, Method
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl_host import SSLHost


class SSLClassifier(SSLHost):
    """A classifier trained on few labelled and many unlabelled images: L = Ls + aux + mu(t) * Lu.

    The module trains any method (`lightning_modules.ssl`) on any network. It owns the network and its moving average,
    the ramp mu(t), optimisers, metrics and predictions; the method owns its maths and its memory. Methods with one
    player run under automatic optimisation, methods with several take turns, each with its own optimiser. mu(t), the
    learning-rate schedules, `max_steps` and `global_step` count batches in either case.

    Evaluated are the moving average at the end of training (`test_accuracy`, the number to report), the network itself
    (`test_accuracy_student`) and, where there are validation images, the moving average with the best validation
    accuracy (`test_accuracy_best`). Nothing is ever chosen by test images.

    Args:
        network: Classifier, image [B, C, H, W] in [0, 1] -> logits [B, K]; it owns its mean and std. One with a
            `reset_classifier(num_classes)`, as in timm, is given a last layer of the right size.
        method: The semi-supervised method; `Supervised` trains on labelled images alone.
        num_classes: Classes K; the CLI takes it from the data.
        ramp: mu(t); None takes the method's own.
        optimizer: Called with the parameters of each player, returns its optimiser. Biases and parameters of norms
            (one axis) get no weight decay.
        lr_scheduler: Called with each optimiser; stepped after every batch.
        ema_decay: Decay of the moving average of the network per batch; 0 switches it off.
        init_from: Checkpoint of another fit whose network (the averaged one) this one starts from.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from functools import partial
        >>> from lightning_modules import SSLClassifier, WideResNet
        >>> from lightning_modules.ssl.fixmatch import FixMatch
        >>> sgd = partial(torch.optim.SGD, lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
        >>> model = SSLClassifier(WideResNet(10, 1), FixMatch(), num_classes=10, optimizer=sgd)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        method: Method,
        num_classes: int,
        ramp: Ramp | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.999,
        init_from: str | None = None,
    ) -> None:
        reset = getattr(network, "reset_classifier", None)
        if callable(reset) and getattr(network, "num_classes", None) != num_classes:
            reset(num_classes)
        super().__init__(network, method, optimizer, lr_scheduler, ema_decay, init_from)
        self.save_hyperparameters(ignore=["network", "method", "ramp", "optimizer", "lr_scheduler"])
        self.build_class_metrics(num_classes)
        self.ramp = method.ramp if ramp is None else ramp
        self.guesses = PseudoLabelCounts(num_classes)
        # The predictor with the best validation accuracy so far, by name; in checkpoints beside the state dict.
        self._best: dict[str, Tensor] = {}
        self._best_accuracy = -1.0
        # In a list: as an attribute it would be one of the module's parts.
        self._best_predictor: list[nn.Module] = []

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [0, 1], without gradient, by the network that is reported."""
        return self._evaluated(self.predictor, image)

    @property
    def predictor(self) -> nn.Module:
        """The network that is evaluated and predicts."""
        self._set_up_method()
        return self.method.predictor(self)

    @torch.no_grad()
    def _evaluated(self, network: nn.Module, image: Tensor) -> Tensor:
        with evaluating(network):
            logits: Tensor = network(image)
        return logits.float()

    # ---------------------------------------------------------------- training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build one optimiser a player, weight decay on kernels only, and its schedule.

        Raises:
            ValueError: There is no optimiser, or a player has nothing to train.
            TypeError: The schedule is one by epochs.
        """
        if self._make_optimizer is None:
            return super().configure_optimizers()  # raises
        taken: set[int] = set()
        built = []
        for name, player in self.method.players(self).items():
            new = [p for p in player.parameters() if p.requires_grad and id(p) not in taken]
            taken |= {id(p) for p in new}
            kernels, others = [p for p in new if p.ndim > 1], [p for p in new if p.ndim <= 1]
            groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
            if not new:
                msg = (
                    f"Expected player {name!r} of {type(self.method).__name__} to have parameters of its own, got none;"
                    " return disjoint modules from `players`."
                )
                raise ValueError(msg)
            optimizer = self._make_optimizer([group for group in groups if group["params"]])
            scheduler = self._make_lr_scheduler(optimizer) if self._make_lr_scheduler else None
            if isinstance(scheduler, ReduceLROnPlateau):
                msg = "Expected an `lr_scheduler` that counts batches, got ReduceLROnPlateau; use CosineDecay."
                raise TypeError(msg)
            entry: dict[str, Any] = {"optimizer": optimizer}
            built.append(entry | ({"lr_scheduler": {"scheduler": scheduler, "interval": "step"}} if scheduler else {}))
        return tuple(built)  # type: ignore[return-value]  # TypedDicts of Lightning

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Train on a batch.

        Args:
            batch: {"labeled": {image, label, index}, "unlabeled": {views, index}}.
            batch_idx: Number of the batch in the epoch.

        Returns:
            `loss`, and for callbacks what the method took the labels to be: `guess` (label, confidence, weight [B]) and
            `true_label` [B], -1 where it is not known; both None where the method has no pseudo-labels.
        """
        labeled, unlabeled, true_label = self.taken_apart(batch)
        mu = self.ramp(self.progress)
        if self.automatic_optimization:
            ((_, loss),) = self.method.turns(self, labeled, unlabeled)
            total = loss.total(mu)
            self._require_finite(total, loss)
        else:
            total, loss = self._take_turns(labeled, unlabeled, mu)
        self._log_batch(total, loss, mu, len(labeled["label"]))
        if loss.guess is not None:
            known = torch.full_like(loss.guess.label, -1) if true_label is None else true_label
            self.guesses.update(loss.guess.label, loss.guess.weight, known)
        return {"loss": total, "guess": loss.guess and _detached(loss.guess), "true_label": true_label}

    def _take_turns(self, labeled: Batch, unlabeled: Batch, mu: float) -> tuple[Tensor, Loss]:
        """One turn after the other: backward, clip, step; what follows a yield in the method sees the new weights."""
        names = list(self.method.players(self))
        turns: list[Loss] = []
        for name, loss in self.method.turns(self, labeled, unlabeled):
            total = loss.total(mu)
            self._require_finite(total, loss)
            self.step_player(names.index(name), total, counts=not turns)
            guess = loss.guess and _detached(loss.guess)
            turns.append(Loss(_plain(loss.sup), _plain(loss.unsup), _plain(loss.aux), loss.logs, guess))
        self.step_schedules()
        self.update_ema()
        together = Loss(
            sup=sum(turn.sup for turn in turns),
            unsup=sum(turn.unsup for turn in turns),
            aux=sum(turn.aux for turn in turns),
            logs={name: value for turn in turns for name, value in turn.logs.items()},
            guess=next((turn.guess for turn in turns if turn.guess is not None), None),
        )
        return torch.as_tensor(together.total(mu)), together

    def _require_finite(self, total: Tensor, loss: Loss) -> None:
        terms = {"sup": loss.sup, "unsup": loss.unsup, "aux": loss.aux}
        self.require_finite(total.detach(), **{k: torch.as_tensor(v).detach() for k, v in terms.items()})

    def _log_batch(self, total: Tensor, loss: Loss, mu: float, size: int) -> None:
        # Logging costs as much as a small network's step, so only the batches that are written are logged.
        if (self.batch_number + 1) % max(1, getattr(self.trainer, "log_every_n_steps", 1)):
            return
        terms = {"loss": total, "sup": loss.sup, "unsup": loss.unsup, "aux": loss.aux, "mu": mu, **loss.logs}
        if loss.guess is not None:
            terms["mask_rate"] = (loss.guess.weight > 0).float().mean()
        values = {f"train_{name}": _plain(value) for name, value in terms.items()}
        shown = {"train_sup", "train_unsup"}
        self.log_dict({k: v for k, v in values.items() if k in shown}, prog_bar=True, batch_size=size)
        self.log_dict({k: v for k, v in values.items() if k not in shown}, batch_size=size)

    def on_train_epoch_end(self) -> None:
        """Let the method end its epoch, then log its numbers per class and how good its pseudo-labels were."""
        self.method.epoch_end(self)
        for name, values in self.method.per_class().items():
            self._log_agreed({f"train_{name}/{c}": value for c, value in enumerate(values.float())})
        self._log_agreed({f"train_{name}": value for name, value in self.guesses.summary(self.gather).items()})
        self.guesses.reset()

    # ---------------------------------------------------------------- evaluation

    def _eval_step(self, batch: dict[str, Tensor], split: EvalSplit) -> None:
        image, label = self.checked(batch)
        metrics = self._metrics_of(split)
        predictor = self.predictor
        metrics.update("", self._evaluated(predictor, image), label)
        if predictor is not self.network:
            metrics.update("student", self._evaluated(self.network, image), label)
        for best in self._best_predictor if split == "test" else ():
            metrics.update("best", self._evaluated(best, image), label)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics, and keep the predictor if it is the best so far."""
        found = self.val_metrics.compute()
        self._log_agreed(found)
        accuracy = float(found.get("val_accuracy", -1.0))
        # Within a fit, `trainer.training` is False while it validates.
        fits = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if fits and accuracy > self._best_accuracy:
            self._best_accuracy = accuracy
            self._best = {k: v.detach().cpu().clone() for k, v in self.predictor.state_dict().items()}
        self.val_metrics.reset()

    def on_test_start(self) -> None:
        """Build the predictor that was best in validation."""
        self._best_predictor = []
        if self._best:
            best = copy.deepcopy(self.predictor)
            best.load_state_dict(self._best)
            self._best_predictor.append(best.eval())

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        super().on_test_epoch_end()
        self._best_predictor = []

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the best predictor too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["best"] = {"accuracy": self._best_accuracy, "predictor": self._best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the best predictor too."""
        super().on_load_checkpoint(checkpoint)
        best = checkpoint.get("best", {})
        self._best_accuracy, self._best = best.get("accuracy", -1.0), dict(best.get("predictor", {}))


def _plain(value: Tensor | float) -> Tensor | float:
    return value.detach().float() if isinstance(value, Tensor) else value


def _detached(guess: Guess) -> Guess:
    return Guess(guess.label.detach(), guess.confidence.detach(), guess.weight.detach())
