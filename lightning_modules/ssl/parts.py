"""Small pieces of maths that several methods are made of."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@runtime_checkable
class Embeds(Protocol):
    """A classifier that can be asked for its features: network(x) is network.classify(network.embed(x))."""

    num_features: int

    def embed(self, image: Tensor) -> Tensor:
        """Pooled features [B, num_features] of images [B, C, H, W] in [0, 1]."""
        ...

    def classify(self, embedding: Tensor) -> Tensor:
        """Logits [B, K] of such features."""
        ...


def embedding_network(network: nn.Module, method: str) -> Embeds:
    """Return a network as one that embeds.

    Args:
        network: The network.
        method: Who asks, for the error.

    Raises:
        TypeError: It does not embed.
    """
    if isinstance(network, Embeds):
        return network
    msg = (
        f"Expected a `network` with num_features, embed(image) and classify(embedding) for {method}, got "
        f"{type(network).__name__}; use TimmClassifier or WideResNet, or give yours the two methods."
    )
    raise TypeError(msg)


def joint(network: nn.Module, *images: Tensor) -> list[Tensor]:
    """Apply a network to several batches in one forward, so that its BatchNorm sees all of them together.

    Args:
        network: Image -> tensor.
        images: Batches [B_i, C, H, W].

    Returns:
        The outputs, one for each batch.
    """
    return list(network(torch.cat(images)).split([len(image) for image in images]))


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch, as in training, without moving its running statistics.

    Args:
        network: Any network.
    """
    norms = [n for n in network.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm) and n.track_running_stats]
    try:
        for norm in norms:
            # Without statistics to track, a BatchNorm in training mode leaves its buffers alone.
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / sum p^(1/T), which is softmax(log p / T); T = 0 is one-hot at the largest.

    Args:
        probabilities: [..., K], summing to 1.
        temperature: T >= 0.
    """
    if temperature == 0:
        return F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).to(probabilities)
    return (probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log() / temperature).softmax(-1)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy, a scalar, of logits [B, K] with class ids [B]."""
    return F.cross_entropy(logits.float(), label)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_c target_c log p_c of each row.

    Args:
        logits: [B, K].
        target: Probabilities [B, K].

    Returns:
        [B], not averaged: masked losses are averaged over the whole batch by who calls this.
    """
    return -(target * logits.log_softmax(-1)).sum(-1)


def squared_error(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean over the classes (not the sum) of the squared difference: [B]. Published weights presuppose the mean."""
    return (probabilities - target).square().mean(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): [B]; its gradient is finite everywhere."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def class_divergence(logits: Tensor) -> Tensor:
    """KL(uniform || mean prediction) = sum_c 1/K log((1/K) / mean p_c), a scalar, 0 where the mean is uniform.

    Arazo et al., arXiv 1908.02983, section 3; DivideMix, arXiv 2002.07394, equation 11.

    Args:
        logits: [B, K].
    """
    # The mean's logarithm without leaving logarithms: a class that nobody predicts has a gradient, too.
    log_mean = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return -(log_mean + math.log(logits.shape[1])).mean()


def beta_samples(alpha: float, size: int, like: Tensor, folded: bool = True) -> Tensor:
    """Draw lambda ~ Beta(alpha, alpha) from torch's global generator.

    Args:
        alpha: Positive; 0 gives ones (no mixing).
        size: How many.
        like: Gives dtype and device.
        folded: Return max(lambda, 1 - lambda), which keeps the first image the main one.

    Returns:
        [size].
    """
    if alpha == 0:
        return like.new_ones(size)
    drawn = torch.distributions.Beta(alpha, alpha).sample((size,)).to(like)
    return torch.maximum(drawn, 1 - drawn) if folded else drawn


def mix(first: Tensor, second: Tensor, lam: Tensor) -> Tensor:
    """Interpolate: lam * first + (1 - lam) * second (MixUp, Zhang et al., arXiv 1710.09412, equation 1).

    Args:
        first: [B, ...].
        second: [B, ...].
        lam: One weight a row [B], or a single one [1].
    """
    lam = lam.view(-1, *[1] * (first.ndim - 1))
    return lam * first + (1 - lam) * second
