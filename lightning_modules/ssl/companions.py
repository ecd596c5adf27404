"""Networks beside the trained one: frozen teachers and second players, and in what mode they are asked."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl.base import Host
from lightning_modules.ssl.parts import frozen_statistics


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Normalise by the batch without moving the running statistics, and drop nothing out.

    Two forwards of the same images then differ by what happened to the weights alone.

    Args:
        network: Any network.
    """
    with evaluating(network), frozen_statistics(network):
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        yield


def with_classes(network: nn.Module, num_classes: int) -> nn.Module:
    """Give an injected network the last layer that the trained one has.

    Args:
        network: A network; one without `reset_classifier` is taken as it is.
        num_classes: Classes K.
    """
    reset = getattr(network, "reset_classifier", None)
    if callable(reset) and getattr(network, "num_classes", num_classes) != num_classes:
        reset(num_classes)
    return network


def require_teacher(teacher_from: str | None, teacher: nn.Module | None, method: str) -> None:
    """Refuse a method without a trained teacher.

    Args:
        teacher_from: Path of the checkpoint of the fit that trained it.
        teacher: A network that is trained already, or the one that the checkpoint is of.
        method: Who asks.

    Raises:
        ValueError: There is neither.
    """
    if teacher_from is None and teacher is None:
        msg = (
            f"Expected `teacher_from` or `teacher` for {method}, which learns from a trained network, got neither; "
            "give the path of the checkpoint of an earlier fit."
        )
        raise ValueError(msg)


def agreed(m: Host, value: Tensor) -> Tensor:
    """Return what the first process found, so that all go on with the same.

    Args:
        m: The host.
        value: [N, ...], of one shape on all processes.
    """
    return m.gather(value)[0][: len(value)]
