"""Prototypes: what images are assigned to where there are no classes, and what keeps the assignments from collapsing.

The notation is that of M. Assran et al., "Masked Siamese Networks for Label-Efficient Learning", arXiv 2204.07141:
K prototypes q, assignments p of anchor views, p+ of target views.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

MeanOverRanks = Callable[[Tensor], Tensor]
"""The mean of a tensor over all processes, without gradient."""


def alone(tensor: Tensor) -> Tensor:
    """The mean over one process."""
    return tensor


class Prototypes(nn.Module):
    """K trained directions, to which embeddings are assigned by their angle.

    Args:
        num_prototypes: K.
        dim: Length of an embedding, d; prototypes start uniform in [-1, 1] / sqrt(d).
        temperature: tau of equation 1.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, num_prototypes: int = 1024, dim: int = 256, temperature: float = 0.1) -> None:
        super().__init__()
        if num_prototypes < 2:
            msg = f"Expected `num_prototypes` >= 2, got {num_prototypes}; to one all images would be assigned alike."
            raise ValueError(msg)
        if temperature <= 0:
            msg = f"Expected a positive `temperature`, got {temperature}; the paper's is 0.1."
            raise ValueError(msg)
        self.weight = nn.Parameter(torch.empty(num_prototypes, dim).uniform_(-1, 1) / math.sqrt(dim))
        self.temperature = temperature

    def forward(self, embedding: Tensor) -> Tensor:
        """Log-assignments log p = log softmax(cos(z, q) / tau) [B, K], float32, of embeddings z [B, d]."""
        # Not in 16 bits: sharpened assignments are as small as exp(-80).
        with torch.autocast(embedding.device.type, enabled=False):
            cosine = F.normalize(embedding.float(), dim=1) @ F.normalize(self.weight.float(), dim=1).T
            return F.log_softmax(cosine / self.temperature, dim=1)


def sharpen(p: Tensor, temperature: float = 0.25) -> Tensor:
    """Assignments that are more certain: p^(1/T) / sum p^(1/T) (equation 2).

    Args:
        p: Assignments [B, K].
        temperature: T, in (0, 1].

    Returns:
        The same shape.
    """
    powers = p.pow(1 / temperature)
    return powers / powers.sum(1, keepdim=True)


@torch.no_grad()
def sinkhorn(p: Tensor, iterations: int = 3, mean_over_ranks: MeanOverRanks = alone) -> Tensor:
    """Assignments that use all prototypes equally often, as far as a few steps of Sinkhorn and Knopp get them there.

    A step makes the K columns sum to the same, over the batches of all processes, then every row to 1 (M. Caron et al.,
    "SwAV", arXiv 2006.09882, section 3.1).

    Args:
        p: Assignments [B, K], as many on every process.
        iterations: Steps; 0 leaves p as it is.
        mean_over_ranks: Averages over the processes.

    Returns:
        [B, K], rows sum to 1.
    """
    for _ in range(iterations):
        p = p / mean_over_ranks(p.mean(0))
        p = p / p.sum(1, keepdim=True)
    return p


def mean_entropy_gap(p: Tensor, mean_over_ranks: MeanOverRanks = alone) -> Tensor:
    """How far the mean entropy is from its largest value: ln K - H(mean p).

    It is 0 when the prototypes are used equally often, ln K when one is used for everything. Its descent is the
    ascent of the mean entropy, the paper's me-max regulariser (equation 3).

    Args:
        p: Assignments [B, K] of the anchors.
        mean_over_ranks: Averages over the processes. Each keeps the gradient of its own share, which is right where
            gradients are averaged over the processes afterwards.

    Returns:
        A scalar in [0, ln K].
    """
    mean = p.mean(0)
    mean = mean + (mean_over_ranks(mean.detach()) - mean.detach())
    gap: Tensor = math.log(p.shape[1]) - torch.special.entr(mean).sum()
    return gap


def assignment_loss(log_p: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy H(p+, p) over all pairs of a target and an anchor of the same image.

    Args:
        log_p: Log-assignments [V B, K] of V anchors of each of B images, view-major: all images of the first view, then
            all of the second.
        targets: p+ [B, K], without gradient.

    Returns:
        A scalar.
    """
    views = log_p.view(-1, *targets.shape)
    loss: Tensor = -(targets.detach() * views).sum(2).mean()
    return loss


def entropy(p: Tensor) -> Tensor:
    """The mean entropy of assignments [B, K], in nats."""
    mean: Tensor = torch.special.entr(p).sum(1).mean()
    return mean
