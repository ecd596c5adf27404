"""Where data is found and in which order it is read, as functions of explicit seeds."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from torch.utils.data.dataloader import _BaseDataLoaderIter

T_co = TypeVar("T_co", covariant=True)

DATA_VARIABLE = "FEWLIGHT_DATA"


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What a sampler asks a dataset for.

    Attributes:
        index: Position in the dataset; -1 asks for a filler that metrics and losses ignore.
        draw: Position in the endless training stream; it alone (with the dataset's seed) decides the
            augmentation.
    """

    index: int
    draw: int


def resolve_root(root: str | Path) -> Path:
    """Find a data folder.

    Args:
        root: Folder; `~` is expanded, and a relative one is looked for under $FEWLIGHT_DATA when that is set,
            else under the current directory.

    Returns:
        The path, which need not exist.
    """
    path = Path(root).expanduser()
    base = os.environ.get(DATA_VARIABLE, "")
    if path.is_absolute() or not base:
        return path
    return Path(base).expanduser() / path


def world() -> tuple[int, int]:
    """Return (world_size, rank) of torch.distributed, (1, 0) where it is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


class LateLoader(DataLoader[T_co]):
    """A DataLoader that asks its sampler for nothing before the first batch is asked for.

    Lightning makes the iterator of an epoch before it tells the sampler which epoch that is, and before the hooks
    of the epoch's start. A DataLoader with worker processes asks its sampler for the first batches right then: a
    resumed fit would go through the first epoch's images again.
    """

    def __iter__(self) -> "_BaseDataLoaderIter":
        """Return an iterator that does nothing yet."""
        return cast("_BaseDataLoaderIter", self._batches())

    def _batches(self) -> Iterator[T_co]:
        yield from super().__iter__()


class _ShardSampler(DistributedSampler[Any]):
    """What both samplers share: Lightning leaves a DistributedSampler alone instead of replacing it."""

    def __init__(self, size: int, world_size: int | None, rank: int | None) -> None:
        if size < 1:
            msg = f"Expected argument `size` to be at least 1, but got {size}: there is nothing to draw from."
            raise ValueError(msg)
        current_size, current_rank = world()
        world_size = current_size if world_size is None else world_size
        rank = current_rank if rank is None else rank
        if not 0 <= rank < world_size:
            msg = f"Expected argument `rank` to be in [0, {world_size}), but got {rank}."
            raise ValueError(msg)
        # The parent only wants a length.
        super().__init__(cast("Dataset[Any]", range(size)), num_replicas=world_size, rank=rank, shuffle=False)
        self.size = size


class Stream:
    """Endless seeded permutations of n items; any element can be had without those before it.

    Args:
        size: Number of items n.
        seed: Seed of the permutations.
        salt: Tells streams of one seed apart.
    """

    def __init__(self, size: int, seed: int, salt: tuple[int, ...] = ()) -> None:
        """Draw nothing yet."""
        self.size = size
        self.seed = seed
        self.salt = salt
        self._block = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        """Return the item at a position of the stream."""
        block, place = divmod(position, self.size)
        return int(self._permutation(block)[place])

    def take(self, start: int, stop: int, step: int = 1) -> npt.NDArray[np.int64]:
        """Return the items at the positions of a range.

        Args:
            start: First position.
            stop: End of the range.
            step: Distance of two positions.
        """
        positions = np.arange(start, stop, step)
        blocks = positions // self.size
        items = np.empty(len(positions), dtype=np.int64)
        for block in range(start // self.size, (stop - 1) // self.size + 1):
            chosen = blocks == block
            items[chosen] = self._permutation(block)[positions[chosen] - block * self.size]
        return items

    def _permutation(self, block: int) -> npt.NDArray[np.int64]:
        if block != self._block:
            self._block = block
            self._order = np.random.default_rng((self.seed, block, *self.salt)).permutation(self.size)
        return self._order


class TrainSampler(_ShardSampler):
    """An endless stream of seeded permutations, cut into epochs of any length.

    Position p of the stream is element p mod n of permutation p div n, which is drawn from (seed, p div n).
    Epoch e holds positions [e L, (e + 1) L), so all images are seen equally often (the counts differ by one at
    most) whatever L is, and the order of an epoch can be had without the epochs before it: a resumed run sees
    what the uninterrupted one would have seen.

    Args:
        size: Number of images n.
        samples_per_epoch: Length L of an epoch over all ranks; None takes n. It is rounded up to a multiple
            of `world_size`, so that the ranks take equally many steps, then down to whole batches.
        seed: Seed of the permutations.
        batch_size: Images of a batch on one rank. A short last batch would be a noisy step, and a loader that
            drops it would tear gaps into the stream; so epochs hold whole batches, or one short batch where
            L is not enough for one.
        world_size: Number of processes; None asks torch.distributed.
        rank: This process; None asks torch.distributed.

    Raises:
        ValueError: If a size is below 1 or `rank` is outside the world.
    """

    def __init__(
        self,
        size: int,
        samples_per_epoch: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
        world_size: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Work out the length of an epoch."""
        super().__init__(size, world_size, rank)
        length = size if samples_per_epoch is None else samples_per_epoch
        if length < 1:
            msg = (
                f"Expected argument `samples_per_epoch` to be at least 1, but got {length}. "
                "Leave it out to visit every image once an epoch."
            )
            raise ValueError(msg)
        if batch_size < 1:
            msg = f"Expected argument `batch_size` to be at least 1, but got {batch_size}."
            raise ValueError(msg)
        self.seed = seed
        own = -(-length // self.num_replicas)
        self.num_samples = own - own % batch_size if own > batch_size else own
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[SampleKey]:
        """Yield this rank's samples of the epoch given to `set_epoch`."""
        start = self.epoch * self.total_size
        stream = Stream(self.size, self.seed)
        for draw in range(start + self.rank, start + self.total_size, self.num_replicas):
            yield SampleKey(stream[draw], draw)


class MixedTrainSampler(TrainSampler):
    """A share of each batch from a second source, at evenly spaced positions.

    Both sources have an endless stream of seeded permutations of their own, so within a source all images are seen
    equally often. With W ranks, the samples W k, ..., W k + W - 1 of the training stream are step k of the ranks; they
    come from the second source where floor((k + 1) share) > floor(k share). Any B samples in a row of any rank hold
    B share of them within one, and like TrainSampler's an epoch does not depend on the epochs before it.

    Args:
        size: Number of images of the first source; they have the indices 0 to `size` - 1.
        extra: Number of images of the second source; their indices follow.
        share: Share of samples from the second source, in (0, 1).
        samples_per_epoch: As for TrainSampler; None takes `size` + `extra`.
        seed: Seed of the permutations.
        batch_size: Images of a batch on one rank.
        world_size: Number of processes; None asks torch.distributed.
        rank: This process; None asks torch.distributed.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        size: int,
        extra: int,
        share: float,
        samples_per_epoch: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
        world_size: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Check the share."""
        for name, value in (("size", size), ("extra", extra)):
            if value < 1:
                msg = f"Expected argument `{name}` to be at least 1, but got {value}: there is nothing to mix."
                raise ValueError(msg)
        if not 0 < share < 1:
            msg = f"Expected argument `share` to be in (0, 1), but got {share}."
            raise ValueError(msg)
        super().__init__(size + extra, samples_per_epoch, seed, batch_size, world_size, rank)
        self.first = size
        self.extra = extra
        # As it is written: the binary number nearest to 0.3 is below it, and positions would drift.
        self.share = Fraction(str(share))

    def __iter__(self) -> Iterator[SampleKey]:
        """Yield this rank's samples of the epoch given to `set_epoch`."""
        first, second = Stream(self.first, self.seed), Stream(self.extra, self.seed, salt=(1,))
        ranks, rank = self.num_replicas, self.rank
        for step in range(self.epoch * self.num_samples, (self.epoch + 1) * self.num_samples):
            before = self._second_before(step)
            if self._second_before(step + 1) > before:
                index = self.first + second[before * ranks + rank]
            else:
                index = first[(step - before) * ranks + rank]
            yield SampleKey(index, step * ranks + rank)

    def _second_before(self, step: int) -> int:
        return step * self.share.numerator // self.share.denominator


class EvalSampler(_ShardSampler):
    """Every image exactly once over all ranks, in order.

    Args:
        size: Number of images.
        pad: Give every rank equally many samples by adding fillers, `SampleKey(-1, 0)`; a metric that waits
            for all ranks would hang otherwise. Nothing waits in prediction, which takes no fillers.
        world_size: Number of processes; None asks torch.distributed.
        rank: This process; None asks torch.distributed.
        block: Images in a row that go to the same rank. With the size of a batch, any number of ranks makes the
            batches that one makes: what is computed of an image may depend on the others of its batch, in its last
            bits.

    Raises:
        ValueError: If `size` or `block` is below 1, or `rank` is outside the world.
    """

    def __init__(
        self, size: int, pad: bool = True, world_size: int | None = None, rank: int | None = None, block: int = 1
    ) -> None:
        """Work out this rank's share."""
        super().__init__(size, world_size, rank)
        if block < 1:
            msg = f"Expected argument `block` to be at least 1, but got {block}."
            raise ValueError(msg)
        self.block = block
        self._own = sum(len(part) for part in self._parts(self.rank))
        # The first rank has the most.
        self.num_samples = sum(len(part) for part in self._parts(0)) if pad else self._own

    def _parts(self, rank: int) -> Iterator[range]:
        for start in range(rank * self.block, self.size, self.num_replicas * self.block):
            yield range(start, min(start + self.block, self.size))

    def __iter__(self) -> Iterator[int | SampleKey]:
        """Yield this rank's images, then its fillers."""
        for part in self._parts(self.rank):
            yield from part
        for _ in range(self.num_samples - self._own):
            yield SampleKey(-1, 0)
