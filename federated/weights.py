"""What is exchanged: the weights of a module's network, without its moving average and all that it keeps beside it."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from pytorch_lightning import LightningModule
from torch import Tensor, nn


@runtime_checkable
class _Averages(Protocol):
    """A module whose moving average can start again from its network (BaseModule)."""

    def reset_ema(self) -> None:
        """Start the moving average again from the network as it is now."""
        ...


def network_state(module: LightningModule) -> dict[str, Tensor]:
    """Copy the weights of a module's network to the CPU, buffers such as BatchNorm's statistics included.

    Args:
        module: Has a `network`.
    """
    return {name: value.detach().cpu().clone() for name, value in _network(module).state_dict().items()}


def load_network_state(module: LightningModule, state: Mapping[str, Tensor]) -> None:
    """Give a module's network other weights; its moving average starts again from them.

    Args:
        module: Has a `network`.
        state: All tensors of the network, by name.

    Raises:
        ValueError: A tensor is missing, too many or of another shape.
    """
    network = _network(module)
    own = network.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        shown = ", ".join(f"{name} {_shape(state, name)} -> {_shape(own, name)}" for name in wrong[:3])
        msg = (
            f"Expected the weights of {type(module).__name__}'s network, got those of a model of another shape: "
            f"{len(wrong)} tensors differ ({shown}); give server and clients the same configuration."
        )
        raise ValueError(msg)
    network.load_state_dict(dict(state))
    if isinstance(module, _Averages):
        module.reset_ema()


def trained_names(module: LightningModule) -> list[str]:
    """Names of the weights of a module's network that are trained; the others are buffers.

    Args:
        module: Has a `network`.
    """
    return [name for name, _ in _network(module).named_parameters()]


def _network(module: LightningModule) -> nn.Module:
    network = getattr(module, "network", None)
    if isinstance(network, nn.Module):
        return network
    msg = f"Expected a module with a `network`, which is what clients exchange, got {type(module).__name__}."
    raise TypeError(msg)


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "absent"
