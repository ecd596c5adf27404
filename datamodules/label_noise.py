"""Wrong labels: transition matrices, and noise that depends on the image."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.classification.contents import Int64Array

NoiseKind = Literal["symmetric", "asymmetric", "instance"]
PairsName = Literal["mnist", "cifar10", "cifar100"]

# Classes that people confuse, and the class each is taken for: 2 -> 7, 3 -> 8 and 5 <-> 6; truck -> automobile,
# bird -> airplane, deer -> horse and cat <-> dog (Patrini et al. 2017, arXiv 1609.03683, section 5).
_MNIST = {2: 7, 3: 8, 5: 6, 6: 5}
_CIFAR10 = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
# Superclass of each of CIFAR-100's classes, from the data set's own `coarse_labels`.
_SUPERCLASS = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11),
    *(6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5),
    *(5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17),
    *(10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13),
    *(16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)
_RATE_SPREAD = 0.1
_CHUNK = 256
_ROWS = 65536


def confused_pairs(pairs: PairsName | Mapping[int, int] | None, num_classes: int) -> dict[int, int]:
    """The class that each class is taken for.

    Args:
        pairs: "mnist" or "cifar10" for the pairs people confuse; "cifar100" for the next class of the same superclass;
            a mapping of class ids; None for the next class. The next of the last is the first.
        num_classes: Number of classes K.

    Returns:
        Wrong class of each class that is confused with another.

    Raises:
        ValueError: A class id is out of range, or a class is its own pair.
    """
    if pairs is None:
        found = {label: (label + 1) % num_classes for label in range(num_classes)}
    elif pairs == "cifar100":
        found = {}
        for label, group in enumerate(_SUPERCLASS):
            members = [other for other, its in enumerate(_SUPERCLASS) if its == group]
            found[label] = members[(members.index(label) + 1) % len(members)]
    elif isinstance(pairs, str):
        found = {"mnist": _MNIST, "cifar10": _CIFAR10}[pairs]
    else:
        found = {int(true): int(wrong) for true, wrong in pairs.items()}
    for true, wrong in found.items():
        if not 0 <= true < num_classes or not 0 <= wrong < num_classes or true == wrong:
            msg = (
                f"Expected argument `pairs` to map class ids from 0 to {num_classes - 1} to other ones, but it maps "
                f"{true} to {wrong}; number the classes from 0, and choose the pairs of this data set."
            )
            raise ValueError(msg)
    return found


def transition_matrix(
    kind: Literal["symmetric", "asymmetric"],
    rate: float,
    num_classes: int,
    pairs: PairsName | Mapping[int, int] | None = None,
    including_true: bool = False,
) -> Tensor:
    """Probabilities of given labels, T[i, j] = p(given label j | true class i).

    Symmetric noise takes every other class equally often, T[i, i] = 1 - rate and T[i, j] = rate / (K - 1), so that
    `rate` is the share of wrong labels. With `including_true` the new label is drawn from all classes, as in DivideMix
    (arXiv 2002.07394): T = (1 - rate) I + rate / K, and only rate (K - 1) / K are wrong. Asymmetric noise takes classes
    for the ones they are confused with, with probability `rate`.

    Args:
        kind: Which noise.
        rate: Probability of a flip, in [0, 1].
        num_classes: Number of classes K.
        pairs: What classes are taken for with asymmetric noise, see `confused_pairs`.
        including_true: Whether a symmetric flip may come back to the true class.

    Returns:
        Float64 tensor [K, K] whose rows sum to 1.

    Raises:
        ValueError: An argument is out of range.
    """
    _check_rate(rate)
    if num_classes < 2:
        msg = f"Expected argument `num_classes` to be at least 2, but got {num_classes}: there is no other class."
        raise ValueError(msg)
    clean = torch.eye(num_classes, dtype=torch.float64)
    if kind == "symmetric":
        if including_true:
            return (1 - rate) * clean + rate / num_classes
        return (1 - rate) * clean + rate / (num_classes - 1) * (1 - clean)
    for true, wrong in confused_pairs(pairs, num_classes).items():
        clean[true, true], clean[true, wrong] = 1 - rate, rate
    return clean


class LabelNoise:
    """Makes given labels wrong, seeded by itself.

    Args:
        kind: "symmetric" and "asymmetric" draw from `transition_matrix`; "instance" depends on the image (see
            `instance_probabilities`).
        rate: Probability of a flip, in [0, 1]; its mean with "instance".
        seed: Seed of the flips.
        pairs: What classes are taken for with "asymmetric", see `confused_pairs`.
        including_true: Whether a symmetric flip may come back to the true class.

    Raises:
        ValueError: An argument is unknown or out of range.
    """

    def __init__(
        self,
        kind: NoiseKind = "symmetric",
        rate: float = 0.4,
        seed: int = 0,
        pairs: PairsName | dict[int, int] | None = None,
        including_true: bool = False,
    ) -> None:
        """Check the arguments."""
        if kind not in ("symmetric", "asymmetric", "instance"):
            msg = f'Expected argument `kind` to be "symmetric", "asymmetric" or "instance", but got {kind!r}.'
            raise ValueError(msg)
        if seed < 0:
            msg = f"Expected argument `seed` to be at least 0, but got {seed}."
            raise ValueError(msg)
        _check_rate(rate)
        self.kind = kind
        self.rate = rate
        self.seed = seed
        self.pairs = pairs
        self.including_true = including_true

    def matrix(self, num_classes: int) -> Tensor | None:
        """The transition matrix [K, K]; None for noise that depends on the image.

        Args:
            num_classes: Number of classes K.
        """
        if self.kind == "instance":
            return None
        return transition_matrix(self.kind, self.rate, num_classes, self.pairs, self.including_true)

    def apply(self, labels: Tensor, num_classes: int, images: Callable[[Int64Array], Tensor]) -> Tensor:
        """Draw given labels.

        Args:
            labels: True class ids [N].
            num_classes: Number of classes K.
            images: Returns the images of positions in `labels`, uint8 [B, C, H, W]; called for "instance" only.

        Returns:
            Given class ids int64 [N].
        """
        matrix = self.matrix(num_classes)
        generator = torch.Generator().manual_seed(self.seed)
        # A row for each class, or for each image: one for each image would be ten gigabytes of ImageNet.
        rows = torch.arange(len(labels)) if matrix is None else labels
        if matrix is None:
            matrix = instance_probabilities(labels, num_classes, images, self.rate, generator)
        uniform = torch.rand(len(labels), 1, generator=generator, dtype=torch.float64)
        # The last class takes what rounding leaves of 1.
        ends = matrix.cumsum(1)[:, :-1]
        parts = zip(torch.split(rows, _ROWS), torch.split(uniform, _ROWS), strict=True)
        return torch.cat([(ends[own] <= drawn).sum(1) for own, drawn in parts])


def instance_probabilities(
    labels: Tensor, num_classes: int, images: Callable[[Int64Array], Tensor], rate: float, generator: torch.Generator
) -> Tensor:
    """Probabilities of given labels that depend on the image (Xia et al. 2020, arXiv 2006.07836, algorithm 2).

    Each image has a flip rate q from a normal distribution N(rate, 0.1^2), cut off at 0 and 1. Its pixels x (here in
    [0, 1]) are projected by a standard normal matrix of its true class y, x W_y; a softmax of that over the other
    classes, times q, are the probabilities of those, and 1 - q is that of y.

    Args:
        labels: True class ids [N].
        num_classes: Number of classes K.
        images: Returns the images of positions in `labels`, uint8 [B, C, H, W].
        rate: Mean flip rate before the cut.
        generator: Random numbers.

    Returns:
        Float64 tensor [N, K] whose rows sum to 1.
    """
    ends = torch.special.ndtr((torch.tensor([0.0, 1.0], dtype=torch.float64) - rate) / _RATE_SPREAD)
    uniform = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    flips = rate + _RATE_SPREAD * torch.special.ndtri(ends[0] + (ends[1] - ends[0]) * uniform)
    flips = flips.clamp(0, 1)
    scores = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    for label in range(num_classes):
        members = (labels == label).nonzero().squeeze(1)
        projection = None
        for rows in torch.split(members, _CHUNK):
            pixels = images(np.asarray(rows)).flatten(1).float() / 255
            if projection is None:
                projection = torch.randn(pixels.shape[1], num_classes, generator=generator)
            scores[rows] = (pixels @ projection).double()
    own = torch.nn.functional.one_hot(labels, num_classes).bool()
    others = flips[:, None] * scores.masked_fill(own, -torch.inf).softmax(1)
    return torch.where(own, 1 - flips[:, None], others)


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        msg = f"Expected argument `rate` to be in [0, 1], but got {rate}."
        raise ValueError(msg)
