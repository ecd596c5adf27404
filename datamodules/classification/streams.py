"""Which images a training batch holds, and the datasets that fetch whole batches of them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from datamodules.classification.contents import Int64Array
from datamodules.classification.store import Pixels
from datamodules.loading import SampleKey, Stream, world

StreamName = Literal["labeled", "unlabeled"]
TrainBatch = dict[str, dict[str, Any]]

# Tell the streams of one seed apart.
_SALT = {"labeled": 2, "unlabeled": 3}
_QUOTA_SALT = 4


class MakesViews(Protocol):
    """WorkerViews: the views of one image."""

    def __call__(self, image: Tensor, names: Sequence[str], seed: int) -> dict[str, Tensor]:
        """Return the views of an image, uint8 [C, H, W], by their keys."""
        ...


@dataclass(frozen=True)
class Quota:
    """Images of which every batch holds as many.

    Attributes:
        indices: Theirs.
        count: How many of each batch of one rank they are.
    """

    indices: Int64Array
    count: int


@dataclass
class Pool:
    """Images that a stream draws from.

    Attributes:
        size: Number of images of the split.
        batch_size: Images a batch on one rank.
        selected: Indices to draw from, repeats count; None for all.
        quota: Images that have a fixed part of each batch; None draws from all alike.
    """

    size: int
    batch_size: int
    selected: Int64Array | None = None
    quota: Quota | None = None

    def parts(self, seed: int, salt: int) -> list["_Part"]:
        """Return the series of permutations that batches are put together from.

        Args:
            seed: Seed of the permutations.
            salt: Tells this stream from others of the seed.
        """
        if self.quota is None:
            size = self.size if self.selected is None else len(self.selected)
            return [_Part(Stream(size, seed, (salt,)), self.selected, self.batch_size)]
        indices = np.arange(self.size) if self.selected is None else self.selected
        inside = np.isin(indices, self.quota.indices)
        rest, fixed = indices[~inside], indices[inside]
        return [
            _Part(Stream(len(rest), seed, (salt,)), rest, self.batch_size - self.quota.count),
            _Part(Stream(len(fixed), seed, (_QUOTA_SALT,)), fixed, self.quota.count),
        ]


@dataclass
class _Part:
    """Endless permutations of some indices, and how many of them a batch of one rank takes."""

    stream: Stream
    indices: Int64Array | None
    count: int

    def take(self, step: int, rank: int, ranks: int) -> Int64Array:
        whole = self.count * ranks
        items = self.stream.take(step * whole + rank, (step + 1) * whole, ranks)
        return items if self.indices is None else self.indices[items]


@dataclass(frozen=True)
class Drawn:
    """A stream's part of a batch.

    Attributes:
        index: Which images of the split.
        draw: Position of the first one in the training stream.
        stride: Distance of two images' positions, the number of ranks.
    """

    index: Int64Array
    draw: int
    stride: int


BatchKey = dict[StreamName, Drawn]


class StreamSampler(DistributedSampler[Any]):
    """What each batch of an epoch holds, for one stream of images or for two that end together.

    Each stream is an endless series of seeded permutations of the images it draws from, cut into batches: a batch can
    be larger than the number of images, all images are seen equally often, and an epoch depends on the seed, its
    number and the selection alone. Batch b of epoch e on W ranks holds the positions (e S + b) W B to
    (e S + b + 1) W B, every W-th of them on one rank; S are the batches of an epoch. Images with a quota q of each
    batch have a series of their own, of which a batch takes W q, behind W (B - q) of the others'.

    Args:
        pools: What the streams draw from; looked at when an epoch begins.
        steps: Batches of an epoch S.
        seed: Seed of the permutations.
        world_size: Number of processes; None asks torch.distributed.
        rank: This process; None asks torch.distributed.
    """

    def __init__(
        self,
        pools: dict[StreamName, Pool],
        steps: int,
        seed: int,
        world_size: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Remember the streams."""
        current_size, current_rank = world()
        # Lightning leaves a DistributedSampler alone instead of replacing it; the parent only wants a length.
        super().__init__(
            _Range(steps),
            num_replicas=current_size if world_size is None else world_size,
            rank=current_rank if rank is None else rank,
            shuffle=False,
        )
        self.pools = pools
        self.num_samples = steps
        self.seed = seed

    def __iter__(self) -> Iterator[BatchKey]:
        """Yield this rank's batches of the epoch given to `set_epoch`."""
        streams = {name: pool.parts(self.seed, _SALT[name]) for name, pool in self.pools.items()}
        for step in range(self.epoch * self.num_samples, (self.epoch + 1) * self.num_samples):
            key: BatchKey = {}
            for name, parts in streams.items():
                start = step * self.pools[name].batch_size * self.num_replicas + self.rank
                index = np.concatenate([part.take(step, self.rank, self.num_replicas) for part in parts])
                key[name] = Drawn(index, start, self.num_replicas)
            yield key


class _Range(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def view_seed(seed: int, stream: StreamName, draw: int) -> int:
    """Seed of the augmentations of a draw, a function of these three alone.

    Args:
        seed: Seed of the run.
        stream: Which stream.
        draw: Position in it.

    Returns:
        A number of 63 bits.
    """
    digest = hashlib.blake2b(f"{seed}:{stream}:{draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class SplitRows:
    """The images of a training split.

    Attributes:
        rows: Rows of the store.
        labels: Given class ids, -1 for none.
        truth: True class ids, -1 where unknown; for reports only.
        names: Views to make of each image.
    """

    rows: Int64Array
    labels: Tensor
    truth: Tensor
    names: tuple[str, ...] = ()


@dataclass
class TrainBatches(Dataset[TrainBatch]):
    """Fetches the whole batch that a key of StreamSampler asks for.

    Attributes:
        store: Where the images are.
        splits: What the streams' indices mean.
        seed: Seed of the augmentations.
        views: Makes the views of each image here, in the loader; None leaves `image` uint8 [B, C, H, W], with the
            first draw of the batch beside it, and the views to whoever has the batch on the device.
    """

    store: Pixels
    splits: dict[StreamName, SplitRows]
    seed: int = 0
    views: MakesViews | None = None
    steps: int = field(default=0)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self.steps

    def __getitem__(self, key: BatchKey) -> TrainBatch:
        """Return a batch: for each stream images or views, label, index and true_label."""
        return {name: self._part(name, drawn) for name, drawn in key.items()}

    def _part(self, name: StreamName, drawn: Drawn) -> dict[str, Any]:
        split = self.splits[name]
        index = torch.from_numpy(drawn.index)
        images = self.store.fetch(split.rows[drawn.index])
        part: dict[str, Any] = {}
        if self.views is None:
            part.update(image=images, draw=drawn.draw)
        else:
            draws = range(drawn.draw, drawn.draw + len(index) * drawn.stride, drawn.stride)
            made = [
                self.views(image, split.names, view_seed(self.seed, name, draw))
                for image, draw in zip(images, draws, strict=True)
            ]
            part.update(keyed({key: torch.stack([views[key] for views in made]) for key in made[0]}, split.names, name))
        part.update(index=index, true_label=split.truth[index])
        if name == "labeled":
            part["label"] = split.labels[index]
        return part


def keyed(views: dict[str, Tensor], names: Sequence[str], stream: StreamName) -> dict[str, Tensor]:
    """Give the first view of labelled images its name in a batch, `image`.

    Args:
        views: Views by the keys they were made with.
        names: Names of the views that were asked for, in order.
        stream: Whose views they are.
    """
    if stream == "unlabeled":
        return views
    return {"image" if key == names[0] else key: view for key, view in views.items()}


class EvalImages(Dataset[dict[str, Tensor]]):
    """Images as they are, for evaluation, sweeps and prediction; fetched a batch at a time.

    Args:
        store: Where the images are.
        rows: Rows of this dataset, in its order.
        labels: Class ids, -1 for none.
        keys: Names of the images.
        more: What else a batch has of each image, by name, [N].
    """

    def __init__(
        self,
        store: Pixels,
        rows: Int64Array,
        labels: Tensor,
        keys: Sequence[str],
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Remember which rows are whose."""
        self.store = store
        self.rows = rows
        self.labels = labels
        self.keys = keys
        self.more = dict(more or {})

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Tensor]:
        """Return one image: image float32 [C, H, W] in [0, 1], label and index int64 scalars.

        Args:
            key: Index, or what EvalSampler asks for; -1 is a filler: image 0 with label and index -1.
        """
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int | SampleKey]) -> dict[str, Tensor]:
        """Return a batch of them.

        Args:
            keys: As for one image.
        """
        index = torch.tensor([key.index if isinstance(key, SampleKey) else key for key in keys])
        shown = index.clamp_min(0)
        image = self.store.fetch(self.rows[np.asarray(shown)])
        label = torch.where(index < 0, -1, self.labels[shown])
        batch = {"image": image.float().div_(255), "label": label, "index": index}
        return batch | {name: values[shown] for name, values in self.more.items()}
