"""The numbers that a federated run ends with, as a table of the terminal and of Markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BASELINE = "labels"
HEAD = ("trained on", "test accuracy, %", "points gained", "worst client, %", "note")


@dataclass(frozen=True)
class Row:
    """A trained classifier.

    Attributes:
        name: What it was trained on: the name of an arm, or of training in one place.
        accuracy: Share of the test images of all clients that it is right on, in [0, 1]; None if it was not trained or
            there is nothing to test.
        worst_client: The lowest such share of a client; None if it is not known.
        note: What there is to say of it, such as why it was not trained.
        clients: Client number -> share of its test images.
    """

    name: str
    accuracy: float | None = None
    worst_client: float | None = None
    note: str = ""
    clients: Mapping[int, float] = field(default_factory=dict)


def finite(value: float | None) -> float | None:
    """Turn NaN and infinity, which JSON has no word for, into None.

    Args:
        value: The number.
    """
    return None if value is None or not math.isfinite(value) else float(value)


def percent(share: float | None, sign: str = "") -> str:
    """Write a share in per cent, or a difference of shares in points; "-" for one that is not known.

    Args:
        share: The share.
        sign: "+" to write that of positive numbers.
    """
    known = finite(share)
    return "-" if known is None else f"{100 * known:{sign}.1f}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Write the cells below `HEAD`; points are gained over the row called "labels".

    Args:
        rows: The rows.
    """
    base = next((finite(row.accuracy) for row in rows if row.name == BASELINE), None)
    written = []
    for row in rows:
        own = finite(row.accuracy)
        gain = None if own is None or base is None or row.name == BASELINE else own - base
        written.append(
            [
                row.name,
                percent(own),
                percent(gain, "+") if gain is not None else "",
                percent(row.worst_client),
                row.note,
            ]
        )
    return written


def with_missing_clients(rows: Sequence[Row]) -> list[Row]:
    """Note in a row which clients did not test it that tested others: it is of other images than those.

    Args:
        rows: The rows; those of training in one place, which no client tests, stay as they are.
    """
    tested = {client for row in rows for client in row.clients}
    noted = []
    for row in rows:
        missing = sorted(tested - row.clients.keys()) if row.clients else []
        note = f"not tested at client {', '.join(map(str, missing))}"
        noted.append(replace(row, note=note) if missing else row)
    return noted


@dataclass(frozen=True)
class SelectionFacts:
    """How many pseudo-labels there are and how many of them are right, as far as true labels are known.

    Attributes:
        labels: Pseudo-labels.
        kept: Those that were selected.
        right: Share of all of them that is right; None where nobody knows, or there are none.
        right_of_kept: Share of the selected ones that is right, likewise.
    """

    labels: int
    kept: int
    right: float | None
    right_of_kept: float | None

    @classmethod
    def of(cls, counts: Int64Array) -> "SelectionFacts":
        """Sum up the classes.

        Args:
            counts: [K, 5], a row for each predicted class: pseudo-labels, those kept, those whose true label is known,
                right ones, right ones among the kept.
        """
        labels, kept, known, right, right_of_kept = (int(n) for n in counts.sum(0))
        # Which of the kept ones are known is not counted, so that all have to be.
        whole = known == labels
        return cls(labels, kept, right / known if known else None, right_of_kept / kept if whole and kept else None)

    def sentence(self) -> str:
        """Say it in a line."""
        share = f" ({percent(self.kept / self.labels)} %)" if self.labels else ""
        before, after = (f", {percent(part)} % right" if part is not None else "" for part in self._shares())
        return f"Pseudo-labels: {self.labels:,}{before}; selected: {self.kept:,}{share}{after}"

    def _shares(self) -> tuple[float | None, float | None]:
        return self.right, self.right_of_kept

    def to_plain(self) -> dict[str, float | None]:
        """Write it as JSON can hold it."""
        return {"labels": self.labels, "kept": self.kept, "right": self.right, "right_of_kept": self.right_of_kept}


@dataclass(frozen=True)
class DrawnFacts:
    """How many images were drawn.

    Attributes:
        candidates: Drawn images that were looked at, until there were enough.
        kept: Those that the classifier takes for what they were drawn as; all of them without a gate.
    """

    candidates: int
    kept: int

    @classmethod
    def of(cls, counts: Int64Array) -> "DrawnFacts":
        """Sum up the classes.

        Args:
            counts: [K, 2], a row for each class: candidates, those kept.
        """
        candidates, kept = (int(n) for n in counts.sum(0))
        return cls(candidates, kept)

    def rate(self) -> float | None:
        """Share of the candidates that was kept; None without candidates."""
        return self.kept / self.candidates if self.candidates else None

    def sentence(self) -> str:
        """Say it in a line."""
        share = f" ({percent(self.rate())} %)" if self.candidates else ""
        return f"Drawn images: {self.candidates:,} looked at; kept: {self.kept:,}{share}"

    def to_plain(self) -> dict[str, float | None]:
        """Write it as JSON can hold it."""
        return {"candidates": self.candidates, "kept": self.kept, "rate": self.rate()}
