"""A datamodule of points with noise for views, for tests that train semi-supervised methods."""

import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.loading import EvalSampler, SampleKey, TrainSampler
from lightning_modules.ssl.base import Split, view_keys

NOISE = {"plain": 0.0, "weak": 0.05, "strong": 0.2, "probe": 0.2}


def moons(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two half circles in each other's arms, blurred less than half of the gap between them.

    Returns:
        Points [size, 2, 1, 1], class [size], and how far along its moon each point is [size], in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    label, along = torch.arange(size) % 2, torch.rand(size, generator=generator)
    x, y = (math.pi * along).cos(), (math.pi * along).sin()
    points = torch.where(label[:, None] == 0, torch.stack([x, y], 1), torch.stack([1 - x, 0.5 - y], 1))
    points += 0.05 * torch.randn(size, 2, generator=generator)
    return points.view(-1, 2, 1, 1), label, along


def as_it_is(batch: object) -> object:
    """Batches come whole."""
    return batch


class _Points(Dataset[dict[str, Tensor]]):
    """Points as images [2, 1, 1]; asked with a SampleKey they come in views, with a number as they are."""

    def __init__(self, points: Tensor, labels: Tensor, truth: Tensor | None = None, keys: Sequence[str] = ()) -> None:
        self.points, self.labels, self.truth, self.keys = points, labels, truth, keys
        self.chosen = torch.arange(len(points))

    def __len__(self) -> int:
        return len(self.points)

    def __getitems__(self, keys: list[int | SampleKey]) -> dict[str, Tensor]:
        """A batch at once: the noise is a function of where in the training stream it begins."""
        numbers = torch.tensor([key.index if isinstance(key, SampleKey) else key for key in keys])
        first = keys[0]
        if not isinstance(first, SampleKey) or not self.keys:
            labels = torch.where(numbers < 0, -1, self.labels[numbers])
            return {"image": self.points[numbers], "label": labels, "index": numbers}
        index = self.chosen[numbers % len(self.chosen)]
        generator = torch.Generator().manual_seed(first.draw)
        views: dict[str, Tensor] = {}
        for name in self.keys:
            scale = NOISE["weak" if name == "image" else name.split("_")[0]]
            views[name] = self.points[index] + scale * torch.randn(len(index), 2, 1, 1, generator=generator)
            if name == "probe":
                views["probe_ops"] = torch.randint(0, 19, (len(index), 2), generator=generator)
                views["probe_bins"] = torch.randint(0, 6, (len(index), 2, 2), generator=generator)
        label = {"label": self.labels[index]} if self.truth is None else {"true_label": self.truth[index]}
        return views | label | {"index": index}


class ToyData(pl.LightningDataModule):
    """Two moons with a few labels, seen through Gaussian noise; the labelled points are among the unlabelled ones.

    Those with a label are spread evenly along each moon: chance does not decide whether there is one near a tip, where
    a network that has seen labels alone is wrong and sure of it.
    """

    num_classes = 2
    class_names = ("upper", "lower")

    def __init__(
        self,
        labels_per_class: int = 4,
        size: int = 300,
        batch_size: int = 8,
        ratio: int = 4,
        steps: int = 20,
        seed: int = 0,
        noisy: float = 0.0,
    ) -> None:
        super().__init__()
        self.points, self.truth, along = moons(size, seed)
        self.test = _Points(*moons(400, seed + 1000)[:2])
        wanted = torch.linspace(0.12, 0.88, labels_per_class)
        ordered = [along.where(self.truth == c, torch.inf).argsort()[: int((self.truth == c).sum())] for c in range(2)]
        self.known = torch.cat([members[(wanted * len(members)).long()] for members in ordered])
        self.given = self.truth[self.known].clone()
        wrong = torch.rand(len(self.given), generator=torch.Generator().manual_seed(seed)) < noisy
        self.given[wrong] = 1 - self.given[wrong]
        self.batch_size, self.ratio, self.steps = batch_size, ratio, steps
        self.num_labeled, self.num_unlabeled = len(self.known), size
        self.streams: dict[Split, _Points] = {}

    def declare_views(self, labeled: tuple[str, ...], unlabeled: tuple[str, ...]) -> None:
        self.streams = {
            "labeled": _Points(self.points[self.known], self.given, None, view_keys(labeled, labeled=True)),
        }
        if unlabeled:
            self.streams["unlabeled"] = _Points(self.points, self.truth, self.truth, view_keys(unlabeled))

    def share_rates(self, rates: Tensor) -> None:
        self.rates = rates

    def labels_of(self, split: Split) -> Tensor:
        if split == "labeled":
            return self.given
        labels = torch.full((self.num_unlabeled,), -1)
        labels[self.known] = self.given
        return labels

    def select(self, split: Split, indices: Tensor | None) -> None:
        stream = self.streams[split]
        stream.chosen = torch.arange(len(stream)) if indices is None else indices.cpu()

    def sweep_dataloader(self, split: Split) -> DataLoader[dict[str, Tensor]]:
        points = self.points[self.known] if split == "labeled" else self.points
        data = _Points(points, self.labels_of(split))
        return DataLoader(data, batch_size=64, sampler=EvalSampler(len(data)), collate_fn=as_it_is)

    def train_dataloader(self) -> CombinedLoader:
        loaders: dict[str, Any] = {}
        for name, stream in self.streams.items():
            size = self.batch_size * (1 if name == "labeled" else self.ratio)
            sampler = TrainSampler(len(stream), self.steps * size, seed=3, batch_size=size)
            loaders[name] = DataLoader(stream, batch_size=size, sampler=sampler, collate_fn=as_it_is)
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(_Points(self.points[self.known], self.given), batch_size=64, collate_fn=as_it_is)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.test, batch_size=100, sampler=EvalSampler(len(self.test)), collate_fn=as_it_is)
