"""Curriculum Labeling: self-training in rounds, surest images first (Cascante-Bonilla et al., arXiv 2001.06001)."""

import copy
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.modes import Frozen, evaluating
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Split, Views
from lightning_modules.ssl.companions import agreed
from lightning_modules.ssl.parts import cross_entropy, joint
from lightning_modules.ssl.ramps import Ramp


@runtime_checkable
class RestartsAverage(Protocol):
    """A host whose moving average can be started again from the network as it is."""

    def reset_ema(self) -> None:
        """Start again."""
        ...


class CurriculumLabeling(Method):
    """Self-training in rounds: the network labels all images, the surest ones are learnt, from the start each time.

    Round 0 trains on the labelled images alone. Before round r, the network of the round before (its moving average)
    labels the unlabelled images, and those in the upper `step` * r share by confidence are drawn from: 20 %, 40 %,
    at last all of them; every round chooses anew. Then the network goes back to the weights that the fit began with, so
    that it does not keep the mistakes of earlier labels. The round that takes all images is the last one and lasts to
    the end of the fit, which therefore needs epochs_per_round * (1 / step + 1) epochs. Labelled images keep their given
    labels. L = H(y, p(w(x))) + mu H(y', p(s(u))).

    Reference settings: step 20 %, about 700 epochs a round on CIFAR-10, strong augmentation.

    What deviates: each round starts from the same first weights, random or pre-trained, not from newly drawn ones. The
    moving average starts again with them. The optimiser does not: its momentum is of the round before, and forgotten
    within tens of batches. Neither does the learning-rate schedule, which is one of the fit; a constant rate, or one
    that falls late, gives each round the same chance. Labelled and unlabelled images are drawn by two streams, not from
    their union.

    Args:
        epochs_per_round: Epochs of the fit that a round takes, >= 1.
        step: Share of the images by which a round is larger than the one before, in (0, 1].
        restart: Go back to the first weights before each round; the paper's ablation does not.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("strong",), index=True)
    batch_norm = "joint"
    ramp = Ramp(1.0)

    label: Tensor
    confidence: Tensor
    chosen: Tensor

    def __init__(self, epochs_per_round: int = 10, step: float = 0.2, restart: bool = True) -> None:
        super().__init__()
        if epochs_per_round < 1 or not 0 < step <= 1:
            msg = f"Expected `epochs_per_round` >= 1 and `step` in (0, 1], got {epochs_per_round} and {step}."
            raise ValueError(msg)
        self.epochs_per_round = epochs_per_round
        self.step = step
        self.restart = restart
        self.first: nn.Module | None = None

    def setup(self, m: Host) -> None:
        """Make room for a label of each unlabelled image, and for the weights to go back to."""
        self.register_buffer("label", torch.zeros(m.num_unlabeled, dtype=torch.long))
        self.register_buffer("confidence", torch.zeros(m.num_unlabeled))
        self.register_buffer("chosen", torch.zeros(m.num_unlabeled, dtype=torch.bool))
        self.first = Frozen(copy.deepcopy(m.network)) if self.restart else None

    def fit_start(self, m: Host) -> None:
        """Remember the first weights."""
        if isinstance(self.first, Frozen):
            self.first.network.load_state_dict(m.network.state_dict())

    def share(self, epoch: int) -> float:
        """Share of the unlabelled images that is learnt in an epoch.

        Args:
            epoch: Its number, from 0.
        """
        return min(1.0, self.step * (epoch // self.epochs_per_round))

    def epoch_start(self, m: Host) -> None:
        """Where a round begins, label the images, choose, and go back to the first weights."""
        epoch = m.current_epoch
        if epoch == 0 or self.share(epoch) == self.share(epoch - 1):
            return
        with evaluating(m.ema_network):
            p = m.sweep(lambda image: m.ema_network(image).float().softmax(-1), "unlabeled")
        confidence, label = p.max(-1)
        given = m.labels_of("unlabeled")
        own = (given < 0).nonzero()[:, 0]
        surest = confidence[own].sort(descending=True, stable=True).indices
        chosen = torch.zeros_like(self.chosen)
        chosen[own[surest[: round(self.share(epoch) * len(own))]]] = True
        self.label.copy_(agreed(m, torch.where(given >= 0, given, label)))
        self.confidence.copy_(agreed(m, torch.where(given >= 0, 1.0, confidence)))
        self.chosen.copy_(agreed(m, chosen))
        if isinstance(self.first, Frozen):
            self._go_back(m, self.first.network)

    def _go_back(self, m: Host, first: nn.Module) -> None:
        weights = first.state_dict()
        m.network.load_state_dict(weights)
        if isinstance(m, RestartsAverage):
            m.reset_ema()
        elif m.ema_network is not m.network:
            m.ema_network.load_state_dict(weights)

    def select(self) -> dict[Split, Tensor] | None:
        """The images chosen; all where none is, as they are not learnt then."""
        chosen = self.chosen.nonzero()[:, 0]
        return {"unlabeled": chosen if len(chosen) else torch.arange(len(self.chosen), device=self.chosen.device)}

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Return cross-entropy with given labels and with the chosen ones."""
        if self.share(m.current_epoch) == 0:
            return Loss(sup=cross_entropy(m.network(labeled["image"]), labeled["label"]))
        x, u = joint(m.network, labeled["image"], unlabeled["strong"])
        index = unlabeled["index"]
        label, weight = self.label[index], self.chosen[index].float()
        return Loss(
            sup=cross_entropy(x, labeled["label"]),
            unsup=(weight * F.cross_entropy(u.float(), label, reduction="none")).mean(),
            guess=Guess(label, self.confidence[index], weight),
        )
