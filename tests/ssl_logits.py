"""Images that are their own logits, and two processes in two threads, for closed forms of semi-supervised methods."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from ssl_toys import ToyHost
from torch import Tensor, nn

from lightning_modules.ssl.base import Batch, Method, view_keys

T = TypeVar("T")


class LogitNet(nn.Module):
    """scale * image: an image [K, 1, 1] is its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.scale * image.flatten(1)
        return logits


def logit_host(method: Method, num_classes: int = 3, size: int = 24) -> ToyHost:
    """A host whose images are logits."""
    return ToyHost(method, LogitNet(), num_classes, torch.zeros(size, num_classes, 1, 1), num_labeled=6)


def logit_batch(method: Method, labeled: Tensor, label: Tensor, **views: Tensor) -> tuple[Batch, Batch]:
    """A batch of logits [n, K]; all labelled views are the same."""
    keys = view_keys(method.views.labeled, labeled=True)
    first = {key: labeled[:, :, None, None] for key in keys}
    second = {key: view[:, :, None, None] for key, view in views.items()}
    size = len(next(iter(views.values())))
    return (
        first | {"label": label, "index": torch.arange(len(label))},
        second | {"index": torch.arange(size)},
    )


def probabilities_to_logits(*rows: list[float]) -> Tensor:
    """Logits with these probabilities."""
    return torch.tensor(rows).log()


class RankHost(ToyHost):
    """One of two processes that gather from each other."""

    def __init__(self, method: Method, rank: int, shared: list[list[Tensor]], barrier: threading.Barrier) -> None:
        self.rank, self.shared, self.barrier = rank, shared, barrier
        super().__init__(method, LogitNet(), 3, torch.zeros(24, 3, 1, 1), num_labeled=6)

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        self.shared[self.rank] = list(tensors)
        self.barrier.wait()
        result = [torch.cat(pair) for pair in zip(*self.shared, strict=True)]
        self.barrier.wait()
        return result


def on_two_ranks(make: Callable[[], Method], work: Callable[[ToyHost, int], T]) -> list[T]:
    """What a piece of work returns on each of two processes."""
    shared: list[list[Tensor]] = [[], []]
    barrier = threading.Barrier(2, timeout=10)
    hosts = [RankHost(make(), rank, shared, barrier) for rank in range(2)]
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        results[rank] = work(hosts[rank], rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(2)]
