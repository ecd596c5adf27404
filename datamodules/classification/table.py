"""Images named in a CSV or Parquet table."""

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from datamodules.atomic import write_atomically
from datamodules.classification.contents import UNKNOWN, Contents, ImageSource, Role, check_labels
from datamodules.loading import resolve_root
from datamodules.segmentation.pairs import Problem, list_files, relative_key

_ROLES = ("train", "val", "test")


class TableSource(ImageSource):
    """A table with the columns `path`, `label` and, if wanted, `split`, as .csv or .parquet.

    An empty label is an unlabelled image. `split` is train, val or test; an empty one, or a table without the column,
    is train. Where all labels are whole numbers and `class_names` are given, they are class ids; else they are names.

    Args:
        table: File; a relative one is looked for under the current directory, then under $FEWLIGHT_DATA.
        root: Folder that relative paths are below; None for the folder of the table.
        class_names: Names of the classes in the order of their ids; None takes those in the table, sorted.
        grey: Read the images as grey ones.
        unlisted: Take the images in `root`, nested folders included, that the table does not list for unlabelled ones:
            then it may be a short list of those that have a label.
    """

    layout = "path,label,split\nimages/1.png,cat,train\nimages/2.png,,train (no label)\nimages/3.png,dog,test"

    def __init__(
        self,
        table: str,
        root: str | None = None,
        class_names: Sequence[str] | None = None,
        grey: bool = False,
        unlisted: bool = False,
    ) -> None:
        """Look at nothing yet."""
        self.table = table
        self.root = root
        self._given_names = None if class_names is None else tuple(class_names)
        self.image_channels = 1 if grey else 3
        self.unlisted = unlisted

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        if self._given_names is not None:
            return self._given_names
        found = {label for label in self._columns["label"] if label}
        if not found:
            msg = f"Expected labels in {self.place}, but its column `label` is empty; label some images of each class."
            raise ValueError(msg)
        return tuple(
            sorted(found, key=lambda name: (float(name), name)) if all(map(_is_number, found)) else sorted(found)
        )

    @property
    def place(self) -> Path:
        """The table."""
        path = Path(self.table).expanduser()
        return path if path.is_file() else resolve_root(self.table)

    def check(self) -> None:
        """Look whether the table is there and has its columns.

        Raises:
            FileNotFoundError: If it is missing.
            ValueError: If it lacks a column.
        """
        _ = self._columns

    def read(self) -> Contents:
        """List the images in the table.

        Raises:
            FileNotFoundError: If the table is missing.
            ValueError: If it lacks a column, or a label or split is unknown.
        """
        columns, names = self._columns, self.class_names
        ids = {name: self._id(name) for name in set(columns["label"])}
        labels = np.asarray([ids[label] for label in columns["label"]], dtype=np.int64)
        check_labels(labels, len(names), columns["path"])
        for number, role in enumerate(columns["split"]):
            if role not in _ROLES:
                msg = f"Expected `split` to be one of {_ROLES}, but {self.place} has {role!r} in row {number + 1}."
                raise ValueError(msg)
        root = self.place.parent if self.root is None else resolve_root(self.root)
        seen: set[str] = set()
        rows, problems = [], []
        for row, key in enumerate(columns["path"]):
            # However it is written: no image may be trained on and tested on.
            file = os.path.normpath(root / key)
            if not key or file in seen:
                problems.append(Problem(root / key, f"row {row + 1}: " + ("named twice" if key else "no path")))
            else:
                rows.append(row)
                seen.add(file)
        keys = [columns["path"][row] for row in rows]
        roles = cast("list[Role]", [columns["split"][row] for row in rows])
        paths = [root / key for key in keys]
        if self.unlisted:
            others = [path for path in list_files(root) if os.path.normpath(path) not in seen]
            keys += [relative_key(root, path) for path in others]
            roles += ["train"] * len(others)
            paths += others
        known = np.full(len(keys), UNKNOWN)
        known[: len(rows)] = labels[rows]
        return Contents(keys, known, roles, paths=paths, problems=problems)

    def _id(self, label: str) -> int:
        if not label:
            return UNKNOWN
        names = self.class_names
        if label in names:
            return names.index(label)
        if _is_number(label) and self._given_names is not None:
            # -1 stands for no label elsewhere; here an empty one does, and a number is meant as a class.
            number = int(float(label))
            return number if number >= 0 else number - 1
        msg = f"Expected labels out of {names}, but {self.place} has {label!r}; add it to `class_names` or correct it."
        raise ValueError(msg)

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        path = self.place
        if not path.is_file():
            msg = (
                f"Expected argument `table` to be a file, but got {path.absolute()}. "
                f"It may begin like this:\n{self.layout}"
            )
            raise FileNotFoundError(msg)
        table = _read(path)
        missing = [name for name in ("path", "label") if name not in table.column_names]
        if missing:
            msg = (
                f"Expected columns `path` and `label` in {path}, but {missing} are missing among {table.column_names}. "
                f"It may begin like this:\n{self.layout}"
            )
            raise ValueError(msg)
        columns = {name: [_text(value) for value in table.column(name).to_pylist()] for name in ("path", "label")}
        roles = table.column("split").to_pylist() if "split" in table.column_names else [None] * table.num_rows
        columns["split"] = [str(role).strip() if role else "train" for role in roles]
        return columns


def write_table(paths: Sequence[str | Path], labels: Sequence[str | int | None] | None, file: str | Path) -> None:
    """Write a Parquet table that TableSource reads; either whole or not at all.

    Args:
        paths: Image files, absolute or relative to where the table will be.
        labels: Class name or id of each, None for no label; None for no labels at all.
        file: File to write.

    Raises:
        ValueError: If there are not as many labels as paths.
        OSError: If the file cannot be written.
    """
    labels = [None] * len(paths) if labels is None else labels
    if len(labels) != len(paths):
        msg = f"Expected argument `labels` to have an entry for each of {len(paths)} paths, but got {len(labels)}."
        raise ValueError(msg)
    columns = {
        "path": pa.array([str(path) for path in paths], pa.string()),
        "label": pa.array([None if label is None else str(label) for label in labels], pa.string()),
    }
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table(columns), sink)
    write_atomically(file, sink.getvalue().to_pybytes())


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pa.parquet.read_table(path)
        # Text, so that class "007" stays what it is.
        types = dict.fromkeys(("path", "label", "split"), pa.string())
        return pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=types))
    except pa.ArrowInvalid as error:
        msg = f"Expected argument `table` to be a .csv or .parquet file, but {path} cannot be read: {error}"
        raise ValueError(msg) from error


def _text(value: object) -> str:
    """What stands in a cell; whole numbers as such, which are floats in columns that also have empty cells."""
    if value is None or value != value:  # NaN
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.0+)?", text) is not None
