"""What a semi-supervised method is, and what it may ask of the module that trains it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from lightning_modules.ssl.ramps import Ramp

Batch = Mapping[str, Tensor]
Split = Literal["labeled", "unlabeled"]
BatchNormPolicy = Literal["joint", "first", "own"]
TeacherBuffers = Literal["copy", "average", "own"]


@dataclass(frozen=True)
class Views:
    """The views of an image that a method needs, by the names of the augmentations that make them.

    Names are those of the data's augmentations: "plain" (none), "weak", "strong", "probe" (CTAugment with random
    magnitudes, labelled images only). The same name twice gives two independent views. In a batch the n-th view of a
    name is called after it, the second and later ones with their number: weak, weak_2, strong. The first labelled view
    is called `image`.

    Attributes:
        labeled: Views of labelled images, at least one.
        unlabeled: Views of unlabelled images; none for methods that use labelled images only.
        index: Whether the method addresses unlabelled images by their number in the data.
    """

    labeled: tuple[str, ...] = ("weak",)
    unlabeled: tuple[str, ...] = ("weak", "strong")
    index: bool = False


def view_keys(names: tuple[str, ...], labeled: bool = False) -> tuple[str, ...]:
    """The keys that views have in a batch.

    Args:
        names: Names of the views, in order.
        labeled: Whether they are those of labelled images, whose first view is called `image`.
    """
    keys = []
    for position, name in enumerate(names):
        number = names[: position + 1].count(name)
        keys.append("image" if labeled and position == 0 else name if number == 1 else f"{name}_{number}")
    return tuple(keys)


@dataclass
class Guess:
    """What a method took the labels of a batch of unlabelled images to be, for reports only.

    Attributes:
        label: Class ids [B].
        confidence: How sure it was [B], in [0, 1].
        weight: With what weight the image was learnt from [B]; 0 where it was left out.
    """

    label: Tensor
    confidence: Tensor
    weight: Tensor


@dataclass
class Loss:
    """The terms of one batch: sup + aux + mu(t) * unsup is minimised.

    Attributes:
        sup: Loss of the labelled images.
        unsup: Loss of the unlabelled images, ramped by mu(t).
        aux: Further terms that are not ramped.
        logs: Scalars to log.
        guess: The pseudo-labels behind `unsup`, one for each unlabelled image of the batch, in its order.
    """

    sup: Tensor | float = 0.0
    unsup: Tensor | float = 0.0
    aux: Tensor | float = 0.0
    logs: dict[str, Tensor | float] = field(default_factory=dict)
    guess: Guess | None = None

    def total(self, mu: float) -> Tensor:
        """Return sup + aux + mu * unsup.

        Raises:
            TypeError: No term is a tensor.
        """
        # A term with weight 0 is left out: a NaN in it must not count, and its gradient is 0.
        whole = self.sup + self.aux + (mu * self.unsup if mu != 0 else 0.0)
        if not isinstance(whole, Tensor):
            if isinstance(self.unsup, Tensor):
                return self.unsup * 0.0
            msg = f"Expected a Loss with a tensor among its terms, got {self}; return what the batch costs."
            raise TypeError(msg)
        return whole


class Host(Protocol):
    """What a method may ask of the module that trains it (SSLClassifier)."""

    num_classes: int

    @property
    def network(self) -> nn.Module:
        """The network that is trained: image [B, C, H, W] in [0, 1] -> logits [B, K]."""
        ...

    @property
    def ema_network(self) -> nn.Module:
        """Its moving average in evaluation mode, or the network itself where there is no average."""
        ...

    @property
    def num_labeled(self) -> int:
        """Labelled training images; their `index` counts from 0 to this."""
        ...

    @property
    def num_unlabeled(self) -> int:
        """Unlabelled training images; their `index` counts from 0 to this."""
        ...

    @property
    def progress(self) -> float:
        """Share of the fit's batches that is done, in [0, 1)."""
        ...

    @property
    def batch_number(self) -> int:
        """Batches trained on so far."""
        ...

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch."""
        ...

    @property
    def current_epoch(self) -> int:
        """Number of the epoch, from 0."""
        ...

    def teacher(self, image: Tensor) -> Tensor:
        """Logits [B, K] of the moving average, without gradient, its BatchNorm as the method's `teacher_buffers`."""
        ...

    def new_network(self) -> nn.Module:
        """A network like the trained one, with weights of its own."""
        ...

    def load_trained(self, network: nn.Module, path: str, argument: str) -> None:
        """Copy the weights that another fit ended with (averaged where there are such) into a network."""
        ...

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of all processes, one after the other along the first axis."""
        ...

    def labels_of(self, split: Split) -> Tensor:
        """The given labels of all training images of a split [N], -1 where there is none, by index, on the device."""
        ...

    def sweep(self, function: Callable[[Tensor], Tensor], split: Split) -> Tensor:
        """Apply a function of images to all training images of a split, unaugmented and in evaluation mode.

        Returns:
            The results [N, ...] in the order of their index, the same on every process.
        """
        ...


class Method(nn.Module):
    """A semi-supervised method: its maths, and what it remembers in buffers.

    A subclass writes `loss`. Buffers and parameters made in `__init__` or `setup` go into checkpoints, to the device
    and to the other processes by themselves.

    Attributes:
        views: The views of images it needs.
        batch_norm: What moves the running statistics of the network's BatchNorm: "joint", one forward of all views
            together; "first", the labelled images only; "own", every forward.
        teacher_buffers: Buffers of the moving average: "copy", the network's; "average", averaged like the
            parameters (EMAN); "own", those of its own forwards in training mode (Mean Teacher's).
        ramp: mu(t) unless the module is given another one.
    """

    views: Views = Views()
    batch_norm: BatchNormPolicy = "joint"
    teacher_buffers: TeacherBuffers = "copy"
    ramp: Ramp = Ramp()

    def setup(self, m: Host) -> None:
        """Build buffers and networks whose size depends on data or network, before weights are loaded.

        Called once, and once more if the module had to predict before it was given training images.
        """

    def players(self, m: Host) -> dict[str, nn.Module]:
        """What is optimised, by name; each player has an optimiser of its own.

        Returns:
            One player (the default: network and method together) is trained by Lightning's automatic optimisation;
            several take turns.
        """
        return {"main": nn.ModuleList([m.network, self])}

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """The loss of a batch.

        Args:
            m: The module.
            labeled: `image` (and further views), `label` [B], `index` [B].
            unlabeled: Views and `index` [B]; empty for methods without unlabelled views.
        """
        msg = f"{type(self).__name__} must define `loss`, or `turns` if several networks are trained."
        raise NotImplementedError(msg)

    def turns(self, m: Host, labeled: Batch, unlabeled: Batch) -> Iterator[tuple[str, Loss]]:
        """The turns of the players, each with its loss; what follows a yield sees the player's new weights."""
        yield "main", self.loss(m, labeled, unlabeled)

    def fit_start(self, m: Host) -> None:
        """Called once before the first batch of a new fit, not when a fit goes on from a checkpoint."""

    def epoch_start(self, m: Host) -> None:
        """Called before each epoch; may `sweep`."""

    def epoch_end(self, m: Host) -> None:
        """Called after each epoch, before its checkpoint is written."""

    def select(self) -> dict[Split, Tensor] | None:
        """Indices of the images to draw from in the next epoch, by split; repeats count. None draws from all.

        It must be a function of the buffers, as a resumed fit asks again.
        """
        return None

    def predictor(self, m: Host) -> nn.Module:
        """The network to evaluate and predict with: image -> logits."""
        return m.ema_network

    def per_class(self) -> dict[str, Tensor]:
        """Numbers per class [K] to log at the end of an epoch, such as thresholds."""
        return {}
