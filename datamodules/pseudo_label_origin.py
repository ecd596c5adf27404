"""What the manifest of pseudo-labels says of where they come from: written and checked here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.number[Any]]

_MATRICES = ("confusion", "expected_confusion")
_REMEDY = "copy the folder again, or label the images anew"


@dataclass(frozen=True, eq=False)
class Origin:
    """What pseudo-labels are made from.

    Attributes:
        class_names: Names of the K classes; their positions are the class ids.
        fingerprint: Identifies the images, whatever their labels (`images_fingerprint` of a datamodule); None where
            nobody knows.
        weights: `weights_sha256` of the module that made them, or SHA-256 of its checkpoint.
        config_hash: Identifies the configuration that trained it.
        made_with: What else decides the labels: views, precision, ..., as JSON has it.
        selection: What images were left out by, as JSON has it; None if none were to be left out.
        confusion: Counts [K, K] of labelled images that the module had not learned from: row = class, column =
            pseudo-label. None where nobody knows.
        expected_confusion: Sum [K, K] over the images that the module labelled, of the probability p(i | x) of each
            class i (row), in the column of the label of x. None where nobody knows.
    """

    class_names: Sequence[str]
    fingerprint: str | None = None
    weights: str | None = None
    config_hash: str | None = None
    made_with: Mapping[str, Any] | None = None
    selection: Mapping[str, Any] | None = None
    confusion: Matrix | None = None
    expected_confusion: Matrix | None = None

    def with_expected(self, confusion: Matrix) -> "Origin":
        """Return it with an `expected_confusion`, which is known only with the labels."""
        return replace(self, expected_confusion=confusion)

    def made(self, manifest: Mapping[str, Any]) -> bool:
        """Whether a manifest is of pseudo-labels made from this; `expected_confusion` follows from the rest.

        Args:
            manifest: The manifest.
        """
        known = json.loads(json.dumps({**self.head(), "confusion": self.matrices()["confusion"]}))
        return all(name in manifest and manifest[name] == value for name, value in known.items())

    def head(self) -> dict[str, Any]:
        """Return what the manifest says of it, as JSON has it; matrices apart."""
        return {
            "fewlight": version("fewlight"),
            "config_hash": self.config_hash,
            "weights": self.weights,
            "made_with": None if self.made_with is None else dict(self.made_with),
            "class_names": list(self.class_names),
            "fingerprint": self.fingerprint,
            "selection": None if self.selection is None else dict(self.selection),
        }

    def matrices(self) -> dict[str, list[list[float]] | None]:
        """Return the matrices by their names in the manifest.

        Raises:
            ValueError: One is not K x K numbers, finite and not negative.
        """
        made: dict[str, list[list[float]] | None] = {}
        for name in _MATRICES:
            value: Matrix | None = getattr(self, name)
            if value is not None and (wrong := _not_counts(value, len(self.class_names))):
                msg = f"Expected `{name}` of pseudo-labels to be counts, but {wrong}; look at the module that made it."
                raise ValueError(msg)
            made[name] = None if value is None else value.tolist()
        return made


def manifest_bytes(head: Mapping[str, Any], matrices: Mapping[str, list[list[float]] | None]) -> bytes:
    """Encode a manifest as JSON, each row of a matrix on a line.

    Args:
        head: All but the matrices.
        matrices: The matrices by name.
    """
    entries = [json.dumps(head, indent=2, ensure_ascii=False, allow_nan=False).rstrip("}").rstrip()]
    for name, matrix in matrices.items():
        # By rows: a thousand classes are a million numbers, which would take a line each.
        rows = "null" if matrix is None else "[\n    " + ",\n    ".join(map(json.dumps, matrix)) + "\n  ]"
        entries.append(f"  {json.dumps(name)}: {rows}")
    return (",\n".join(entries) + "\n}\n").encode()


def read_confusion(path: str | Path, num_classes: int) -> npt.NDArray[np.float64]:
    """Read a confusion matrix.

    Args:
        path: JSON file with K rows (classes) of K counts (labels), or with an entry `confusion` that is such a table,
            as the manifest of pseudo-labels has.
        num_classes: Classes K.

    Returns:
        The counts [K, K].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        msg = f"Expected `confusion` to be a JSON file, but there is none at {path.absolute()}; write the counts first."
        raise FileNotFoundError(msg)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    value = value.get("confusion") if isinstance(value, dict) else value
    wrong = "holds none" if value is None else _not_counts(value, num_classes)
    if wrong is None and not np.any(value):
        wrong = "counts no image"
    if wrong:
        msg = (
            f"Expected `confusion` to be a JSON file with {num_classes} rows (classes) of {num_classes} counts "
            f"(labels), or the manifest of pseudo-labels that has them, but {path} {wrong}."
        )
        raise ValueError(msg)
    return np.asarray(value, dtype=np.float64)


def check_manifest(manifest: Mapping[str, Any], counts: Mapping[str, Any], path: Path) -> None:
    """Refuse a manifest that was damaged, or edited by hand.

    Args:
        manifest: The manifest; it names its classes.
        counts: What there is in the table, as the manifest should have it.
        path: Where it is, for the message.

    Raises:
        ValueError: It does not fit the table, or an entry is not what it should be.
    """
    selection = manifest.get("selection")
    wrong = []
    if manifest.get("counts") != counts:
        wrong.append(f"`counts` are {manifest.get('counts')}, and the table has {dict(counts)}")
    if selection is not None and not isinstance(selection, dict):
        wrong.append(f"`selection` is {selection!r} instead of null, or the options that left images out")
    for name in _MATRICES:
        value = manifest.get(name)
        problem = None if value is None else _not_counts(value, len(manifest["class_names"]))
        if problem:
            wrong.append(f"`{name}` {problem}")
    if wrong:
        msg = (
            f"Expected `pseudo_labels` as they were written, but in {path} {'; '.join(wrong)}. {_REMEDY.capitalize()}."
        )
        raise ValueError(msg)


def _not_counts(value: object, num_classes: int) -> str | None:
    """What is wrong with a matrix of counts; None if nothing is."""
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return f"is no {num_classes} x {num_classes} table of numbers"
    if numbers.shape != (num_classes, num_classes):
        return f"has shape {list(numbers.shape)} instead of {num_classes} x {num_classes}, one row for each class"
    # Written so that NaN is wrong.
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        return f"has numbers that are negative or not finite, as {float(numbers.min())}"
    return None
