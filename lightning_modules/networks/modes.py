"""Networks that are asked and not trained, the mode they are asked in, and networks that start anew."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode, and every layer back into its own mode afterwards.

    Args:
        networks: Any networks.
    """
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def fresh_copy(network: nn.Module) -> nn.Module:
    """A network like this one with weights of its own, drawn from torch's global generator.

    Args:
        network: One with a `reset_parameters`, or whose layers have one.
    """
    fresh = copy.deepcopy(network)
    for part in [fresh] if hasattr(fresh, "reset_parameters") else fresh.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return fresh


class Frozen(nn.Module):
    """A network that is asked and never trained: no gradient, always in evaluation mode, in checkpoints.

    Args:
        network: Inputs -> logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the network's logits [B, K]."""
        logits: Tensor = self.network(*inputs)
        return logits
