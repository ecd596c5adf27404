"""PseudoLabels: labels that a module gave to images, as one stage hands them to the next.

    <folder>/pseudo_labels.parquet   key, label, confidence, split; top_label and top_confidence (lists) where wanted
    <folder>/manifest.json           what made them, which images they are for, how often they are wrong; written
                                     last: no manifest = not finished

Rows are columns in memory, and sorted by key on disk: the same labels always give the same bytes, in whichever order
the processes that made them came.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datamodules.artifact_files import MANIFEST, listed, parquet_bytes, read_json, read_manifest
from datamodules.atomic import write_atomically
from datamodules.pseudo_label_origin import Origin, check_manifest, manifest_bytes, read_confusion

__all__ = [
    "KIND",
    "SPLITS",
    "LabelTable",
    "Origin",
    "PseudoLabels",
    "histogram",
    "is_written",
    "read",
    "read_confusion",
    "require_free",
    "write",
]

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

KIND = "pseudo_labels"
# What an image was to the module that labelled it.
SPLITS = ("labeled", "unlabeled", "val", "test")
# Those whose images to train on had labels: what is held out to validate on is a part of the labelled images.
_LABELLED = ("labeled", "val")
# Classes that an error names, and those whose sizes it lists.
_NAMED = 10
_SHOWN = 100
_TABLE = "pseudo_labels.parquet"
_SCHEMA = pa.schema([("key", pa.string()), ("label", pa.int64()), ("confidence", pa.float32()), ("split", pa.string())])
_TOP = pa.schema([("top_label", pa.list_(pa.int64())), ("top_confidence", pa.list_(pa.float32()))])


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Pseudo-labels by row, as columns.

    Attributes:
        keys: One unique name an image, as its source has it: a list, or a string array of pyarrow.
        labels: Class ids int64 [N].
        confidence: How sure the module is of them, float32 [N] in [0, 1].
        splits: What each image was to the module, places in SPLITS [N].
        top_labels: The most likely classes, best first, int64 [N, k]; None leaves them out.
        top_confidence: Their probabilities, float32 [N, k], in [0, 1].
    """

    keys: Any
    labels: Int64Array
    confidence: Float32Array
    splits: npt.NDArray[np.integer[Any]]
    top_labels: Int64Array | None = None
    top_confidence: Float32Array | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.keys)


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """A finished artifact.

    Attributes:
        folder: Where it is.
        manifest: What made it and which images it is for.
        table: Its rows, by key.
    """

    folder: Path
    manifest: Mapping[str, Any]
    table: LabelTable

    @property
    def is_selection(self) -> bool:
        """Whether its writer was asked to leave images out: some may have no row."""
        return self.manifest.get("selection") is not None

    @property
    def of_people(self) -> npt.NDArray[np.bool_]:
        """Which rows are of images that people labelled, those held out to validate on included, bool [N]."""
        return np.isin(self.table.splits, [SPLITS.index(name) for name in _LABELLED])

    @property
    def by_people(self) -> npt.NDArray[np.bool_]:
        """Which rows have the label that people gave the image, bool [N]; without `true_labels` none has."""
        made_with = self.manifest.get("made_with")
        kept = isinstance(made_with, Mapping) and made_with.get("true_labels") is True
        return self.of_people & kept

    def require(self, class_names: Sequence[str], fingerprint: str | None = None) -> None:
        """Refuse labels that do not belong to a data set.

        Args:
            class_names: The classes of the data set.
            fingerprint: Identifies its images; None does not compare them.

        Raises:
            ValueError: The classes or the images are others.
        """
        names, origin = self.manifest["class_names"], self.manifest.get("fingerprint")
        if list(names) != list(class_names):
            ours, theirs = listed(class_names, _NAMED), listed(names, _NAMED)
            msg = (
                f"Expected `pseudo_labels` with the classes of the data ({ours}), but those in {self.folder} are "
                f"{theirs}; label the images with a module that was trained on these classes."
            )
            raise ValueError(msg)
        if fingerprint is None or origin == fingerprint:
            return
        which = "data that they do not name" if origin is None else f"other images (fingerprint {str(origin)[:12]})"
        msg = (
            f"Expected `pseudo_labels` of the images of the data (fingerprint {fingerprint[:12]}), but those in "
            f"{self.folder} are of {which}: files were added, removed or moved to another split since, or the source "
            "is another one. Label the images anew with the `source` that is trained on here."
        )
        raise ValueError(msg)

    def rows_of(self, keys: Sequence[str]) -> Int64Array:
        """Find images by their names.

        Args:
            keys: Names of images.

        Returns:
            Row of each [N], -1 where there is none.
        """
        found = pc.index_in(pa.array(keys, pa.string()), value_set=self.table.keys)
        return np.asarray(found.fill_null(-1), dtype=np.int64)

    def strangers(self, keys: Sequence[str], most: int = 5) -> list[str]:
        """Name rows of images that are not among some.

        Args:
            keys: Names of images.
            most: How many to name at most.
        """
        known = pc.is_in(self.table.keys, value_set=pa.array(keys, pa.string()))
        found: list[str] = self.table.keys.filter(pc.invert(known)).slice(0, most).to_pylist()
        return found


def require_free(folder: str | Path) -> None:
    """Refuse a folder to write to that holds something else.

    Args:
        folder: The folder, which need not exist.

    Raises:
        ValueError: It has the manifest of something else.
    """
    folder = Path(folder).expanduser()
    manifest = folder / MANIFEST
    if manifest.is_file() and (kind := read_json(manifest, "folder").get("kind")) != KIND:
        msg = f"Expected a folder of its own for pseudo-labels, but {folder} holds a {kind!r}; choose another folder."
        raise ValueError(msg)


def is_written(folder: str | Path, origin: Origin) -> bool:
    """Whether a folder holds finished pseudo-labels of an origin, undamaged.

    Args:
        folder: The folder, which need not exist.
        origin: What they should be made from.
    """
    try:
        return origin.made(read(folder).manifest)
    except (FileNotFoundError, ValueError):
        return False


def write(folder: str | Path, table: LabelTable, origin: Origin) -> None:
    """Write an artifact, or write it anew.

    One process does it, when it has the rows of all; their order does not matter. A manifest from before is removed
    first, so that whoever meets the folder half-way finds it unfinished.

    Args:
        folder: Where to; a relative folder is below the current directory. Made if missing.
        table: The rows.
        origin: What they were made from.

    Raises:
        ValueError: The rows do not fit together, or the folder holds something else.
        OSError: A file could not be written.
    """
    folder = Path(folder).expanduser()
    manifest = folder / MANIFEST
    require_free(folder)
    columns = _sorted(table)
    _check(columns, len(origin.class_names), f"to write into {folder}")
    matrices = origin.matrices()
    data = _table_bytes(columns)
    manifest.unlink(missing_ok=True)
    write_atomically(folder / _TABLE, data)
    head = {
        "kind": KIND,
        **origin.head(),
        "counts": _counts(columns, len(origin.class_names)),
        "table_sha256": hashlib.sha256(data).hexdigest(),
    }
    write_atomically(manifest, manifest_bytes(head, matrices))


def read(folder: str | Path) -> PseudoLabels:
    """Read a finished artifact.

    Args:
        folder: The folder; a relative one is below the current directory.

    Returns:
        Its rows, by key.

    Raises:
        FileNotFoundError: There is no such folder, it is not finished, or its table is missing.
        ValueError: It is something else, or damaged.
    """
    folder = Path(folder).expanduser()
    manifest, path = _read_manifest(folder), folder / _TABLE
    if not path.is_file():
        msg = f"Expected `pseudo_labels` with its table, but there is no {path}; copy the folder again."
        raise FileNotFoundError(msg)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.get("table_sha256"):
        msg = (
            f"Expected `pseudo_labels` as they were written, but {path} is not the table that {MANIFEST} beside it "
            "tells of; copy the folder again, or label the images anew."
        )
        raise ValueError(msg)
    names = manifest.get("class_names")
    if not isinstance(names, list):
        msg = (
            f"Expected `pseudo_labels` that name their classes, but {folder / MANIFEST} has no `class_names`; label "
            "the images anew."
        )
        raise ValueError(msg)  # noqa: TRY004 - the content of a file, not the type of an argument
    table = _parsed(data, path)
    _check(table, len(names), f"in {path}")
    check_manifest(manifest, _counts(table, len(names)), folder / MANIFEST)
    return PseudoLabels(folder, manifest, table)


def histogram(class_names: Sequence[str], counts: Sequence[int]) -> str:
    """Say how many images each class has, for a message.

    Args:
        class_names: Names of the K classes.
        counts: Images of each [K].
    """
    shown = [f"{name} {count}" for name, count in zip(class_names, counts, strict=True)]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


def _counts(table: LabelTable, num_classes: int) -> dict[str, Any]:
    splits = np.bincount(table.splits, minlength=len(SPLITS))
    return {
        "images": len(table),
        "classes": np.bincount(table.labels, minlength=num_classes).tolist(),
        "splits": dict(zip(SPLITS, splits.tolist(), strict=True)),
    }


def _sorted(table: LabelTable) -> LabelTable:
    """The rows by key, each column of the type it is written as."""
    keys = table.keys if isinstance(table.keys, pa.Array) else pa.array(table.keys, pa.string())
    lengths = {"keys": len(keys), "labels": len(table.labels), "confidence": len(table.confidence)}
    lengths["splits"] = len(table.splits)
    best = {"top_labels": table.top_labels, "top_confidence": table.top_confidence}
    lengths |= {name: len(column) for name, column in best.items() if column is not None}
    shapes = [column.shape for column in best.values() if column is not None]
    if len(set(lengths.values())) > 1 or len(shapes) == 1 or len(set(shapes)) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        msg = (
            f"Expected columns of one length, and `top_labels` and `top_confidence` together and of one shape, but got "
            f"{shown} (shapes {shapes}); give every image one row."
        )
        raise ValueError(msg)
    order = pc.sort_indices(keys)
    places = np.asarray(order)
    return LabelTable(
        keys.take(order),
        table.labels[places].astype(np.int64),
        table.confidence[places].astype(np.float32),
        table.splits[places].astype(np.int64),
        None if table.top_labels is None else table.top_labels[places].astype(np.int64),
        None if table.top_confidence is None else table.top_confidence[places].astype(np.float32),
    )


def _check(table: LabelTable, num_classes: int, where: str) -> None:
    """Refuse rows, sorted by key, that no reader could use."""
    keys = table.keys
    if not len(table):
        msg = f"Expected pseudo-labels {where}, but there are none; label some images."
        raise ValueError(msg)
    if keys.null_count:
        msg = f"Expected pseudo-labels with a key each {where}, but {keys.null_count} have none; name the images."
        raise ValueError(msg)
    rows = np.flatnonzero(np.asarray(pc.less_equal(keys[1:], keys[:-1])))
    if len(rows):
        msg = (
            f"Expected one pseudo-label an image, sorted by key, {where}, but {keys[int(rows[0]) + 1].as_py()!r} and "
            f"{len(rows) - 1} more come twice or out of order; give every image one row."
        )
        raise ValueError(msg)
    numbers: list[tuple[str, npt.NDArray[Any] | None, int]] = [
        ("label", table.labels, num_classes - 1),
        ("confidence", table.confidence, 1),
        ("split", table.splits, len(SPLITS) - 1),
        ("top_label", table.top_labels, num_classes - 1),
        ("top_confidence", table.top_confidence, 1),
    ]
    for name, values, last in numbers:
        if values is None:
            continue
        # Written so that NaN is wrong.
        rows = np.flatnonzero(~((values >= 0) & (values <= last)).reshape(len(table), -1).all(1))
        if len(rows):
            msg = (
                f"Expected pseudo-labels whose `{name}` is from 0 to {last} {where}, but got "
                f"{values[rows[0]].tolist()} for {keys[int(rows[0])].as_py()!r} and {len(rows) - 1} more out of range; "
                "look at the module that made them."
            )
            raise ValueError(msg)


def _table_bytes(table: LabelTable) -> bytes:
    """Encode rows as Parquet, see `parquet_bytes`."""
    split = pa.DictionaryArray.from_arrays(table.splits.astype(np.int8), list(SPLITS)).cast(pa.string())
    columns = [table.keys, pa.array(table.labels), pa.array(table.confidence), split]
    schema = _SCHEMA
    if table.top_labels is not None and table.top_confidence is not None:
        best: list[npt.NDArray[Any]] = [table.top_labels, table.top_confidence]
        lists = [pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1]) for values in best]
        columns += [values.cast(field.type) for values, field in zip(lists, _TOP, strict=True)]
        schema = pa.schema([*_SCHEMA, *_TOP])
    return parquet_bytes(pa.table(columns, schema=schema), use_dictionary=["split"])


def _parsed(data: bytes, path: Path) -> LabelTable:
    try:
        found = pq.read_table(pa.BufferReader(data))
        columns = found.select(_SCHEMA.names).cast(_SCHEMA)
        best = found.select(_TOP.names).cast(_TOP) if _TOP.names[0] in found.column_names else None
    except (pa.ArrowException, KeyError) as error:
        msg = (
            f"Expected `pseudo_labels` with a table of {', '.join(_SCHEMA.names)}, but {path} is none "
            f"({type(error).__name__}); copy the folder again, or label the images anew."
        )
        raise ValueError(msg) from error
    rows = columns.num_rows
    keys, labels, confidence, split = (column.combine_chunks() for column in columns.columns)
    codes = pc.index_in(split, value_set=pa.array(SPLITS)).fill_null(-1)
    top = [None, None] if best is None else [_matrix(column.combine_chunks(), rows) for column in best.columns]
    # An empty cell becomes a value out of range, which `_check` names.
    return LabelTable(
        keys,
        np.asarray(labels.fill_null(-1)),
        np.asarray(confidence.fill_null(np.nan)),
        np.asarray(codes, dtype=np.int64),
        *top,
    )


def _matrix(lists: Any, rows: int) -> npt.NDArray[Any]:  # noqa: ANN401 - pyarrow tells no types
    return np.asarray(lists.flatten()).reshape(rows, -1)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        what = f"has no {MANIFEST}: it is not finished" if folder.is_dir() else "is no folder"
        msg = (
            f"Expected `pseudo_labels` to be a finished folder of pseudo-labels, but {folder.absolute()} {what}; label "
            "the images first. A relative folder is looked for under the current directory."
        )
        raise FileNotFoundError(msg)
    return read_manifest(folder, KIND, "pseudo_labels", "give the folder that a module's labels were written to")
