"""Drawn pairs as additional training images."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from datamodules.loading import MixedTrainSampler, TrainSampler
from datamodules.segmentation.decoding import UInt8Array, read_raw_mask, to_class_ids
from datamodules.segmentation.pairs import Pair, describe_problems
from datamodules.segmentation.reading import PairReader
from datamodules.segmentation.store import ImageStore, build_store
from datamodules.synthetic_images import PairRow, SyntheticImages

_LAYOUT = "images/NAME.png\nmasks/NAME.png (8-bit grey, class ids)\nmetadata.parquet\nmanifest.json"
_MEGABYTE = 2**20


def load_drawn(
    artifact: SyntheticImages[PairRow], num_classes: int, image_size: int, cache_megabytes: int
) -> ImageStore:
    """Decode drawn pairs as files of a data set are.

    Args:
        artifact: The pairs.
        num_classes: Number of classes, background included.
        image_size: Side of the decoded squares in pixels; drawn ones of another size are resized.
        cache_megabytes: Memory for them; if they need more they are decoded on every access.

    Returns:
        A store of all pairs, keys and files as in the table.

    Raises:
        ValueError: If files cannot be decoded, or a mask holds other numbers than class ids, listing them.
    """
    folder = artifact.folder
    pairs = [Pair(row.file_name, folder / row.file_name, (folder / row.mask_file_name,)) for row in artifact.rows]
    reader = PairReader(image_size, False, partial(_read_ids, num_classes=num_classes))
    store, problems = build_store(pairs, reader.decode, reader.probe, image_size, cache_megabytes, "drawn pairs")
    if problems:
        report = describe_problems(problems, len(pairs), folder, _LAYOUT)
        msg = f"{report}\nDraw them again, or take `synthetic_images` out."
        raise ValueError(msg)
    return store


def _read_ids(pair: Pair, num_classes: int) -> UInt8Array:
    return to_class_ids(read_raw_mask(pair.masks[0]), num_classes)


def cached_megabytes(store: ImageStore) -> int:
    """Return what a store holds in memory, rounded up."""
    held = sum(array.nbytes for array in (store.images, store.masks) if array is not None)
    return -(-held // _MEGABYTE)


class JoinedStore(ImageStore):
    """Several stores, one after the other, as one; nothing is copied.

    Args:
        stores: The stores; each row of the whole is a row of one of them.
    """

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        """Number the rows."""
        super().__init__(
            [pair for store in stores for pair in store.pairs], [size for store in stores for size in store.sizes]
        )
        self.stores = list(stores)
        self._places = [(part, row) for part, store in enumerate(stores) for row in range(len(store.pairs))]

    def take(self, rows: Sequence[int]) -> ImageStore:
        """Copy some rows into a store of their own.

        Args:
            rows: Which images, in their new order.

        Returns:
            A store of only these.
        """
        chosen = [self._places[row] for row in rows]
        own = [[row for part, row in chosen if part == number] for number in range(len(self.stores))]
        taken = JoinedStore([store.take(members) for store, members in zip(self.stores, own, strict=True)])
        seen = [0] * len(self.stores)
        places = []
        for part, _ in chosen:
            places.append((part, seen[part]))
            seen[part] += 1
        taken.pairs = [self.pairs[row] for row in rows]
        taken.sizes = [self.sizes[row] for row in rows]
        taken._places = places
        return taken

    def get(self, row: int) -> tuple[UInt8Array, UInt8Array | None]:
        """Return image and mask of a row; they must not be written to.

        Args:
            row: Which image.

        Returns:
            As the store that it is from.
        """
        part, inner = self._places[row]
        return self.stores[part].get(inner)


class Training(NamedTuple):
    """What an epoch is made of.

    Attributes:
        store: Where the images are.
        rows: Rows of it that are trained on, labelled images first.
        sampler: Their order.
    """

    store: ImageStore
    rows: list[int]
    sampler: TrainSampler


def training_data(
    store: ImageStore,
    rows: list[int],
    drawn: ImageStore | None,
    share: float | None,
    samples_per_epoch: int | None,
    seed: int,
    batch_size: int,
) -> Training:
    """Put labelled and drawn images together.

    Args:
        store: The labelled images.
        rows: Rows of it to train on.
        drawn: The drawn pairs, None for none.
        share: Share of samples that are drawn; None takes all images equally often.
        samples_per_epoch: See TrainSampler.
        seed: Seed of the order.
        batch_size: Images of a batch on one device.

    Returns:
        Store, rows and order.
    """
    if drawn is None:
        return Training(store, rows, TrainSampler(len(rows), samples_per_epoch, seed, batch_size))
    joined = JoinedStore([store, drawn])
    both = [*rows, *range(len(store.pairs), len(joined.pairs))]
    if share is None:
        return Training(joined, both, TrainSampler(len(both), samples_per_epoch, seed, batch_size))
    sampler = MixedTrainSampler(len(rows), len(drawn.pairs), share, samples_per_epoch, seed, batch_size)
    return Training(joined, both, sampler)
