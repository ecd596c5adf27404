"""A datamodule of points with noise for views, for tests that train semi-supervised methods."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from sklearn.datasets import make_moons
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.loading import EvalSampler, SampleKey, TrainSampler
from lightning_modules.ssl.base import Split, view_keys

NOISE = {"plain": 0.0, "weak": 0.05, "strong": 0.15, "probe": 0.15}


class _Points(Dataset[dict[str, Tensor]]):
    """Points as images [2, 1, 1]; asked with a SampleKey they come in views, with a number as they are."""

    def __init__(self, points: Tensor, labels: Tensor, truth: Tensor | None = None, keys: Sequence[str] = ()) -> None:
        self.points, self.labels, self.truth, self.keys = points, labels, truth, keys
        self.chosen = torch.arange(len(points))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Tensor]:
        if not isinstance(key, SampleKey) or not self.keys:
            number = key.index if isinstance(key, SampleKey) else key
            return {
                "image": self.points[number],
                "label": self.labels[number] if number >= 0 else torch.tensor(-1),
                "index": torch.tensor(number),
            }
        index = self.chosen[key.index % len(self.chosen)]
        generator = torch.Generator().manual_seed(key.draw)
        views: dict[str, Tensor] = {}
        for name in self.keys:
            scale = NOISE["weak" if name == "image" else name.split("_")[0]]
            views[name] = self.points[index] + scale * torch.randn(2, 1, 1, generator=generator)
            if name == "probe":
                views["probe_ops"] = torch.randint(0, 19, (2,), generator=generator)
                views["probe_bins"] = torch.randint(0, 6, (2, 2), generator=generator)
        label = {"label": self.labels[index]} if self.truth is None else {"true_label": self.truth[index]}
        return views | label | {"index": index}


class ToyData(pl.LightningDataModule):
    """Two moons with a few labels, seen through Gaussian noise; the labelled points are among the unlabelled ones."""

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
        points, truth = make_moons(size, noise=0.1, random_state=seed)
        test, test_truth = make_moons(400, noise=0.1, random_state=seed + 1000)
        self.points = torch.tensor(points, dtype=torch.float32).view(-1, 2, 1, 1)
        self.truth = torch.tensor(truth)
        self.test = _Points(torch.tensor(test, dtype=torch.float32).view(-1, 2, 1, 1), torch.tensor(test_truth))
        given = [(self.truth == c).nonzero().flatten()[:labels_per_class] for c in range(2)]
        self.known = torch.cat(given)
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
        return DataLoader(data, batch_size=64, sampler=EvalSampler(len(data)))

    def train_dataloader(self) -> CombinedLoader:
        loaders: dict[str, Any] = {}
        for name, stream in self.streams.items():
            size = self.batch_size * (1 if name == "labeled" else self.ratio)
            sampler = TrainSampler(len(stream), self.steps * size, seed=3, batch_size=size)
            loaders[name] = DataLoader(stream, batch_size=size, sampler=sampler)
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(_Points(self.points[self.known], self.given), batch_size=64)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.test, batch_size=100, sampler=EvalSampler(len(self.test)))
