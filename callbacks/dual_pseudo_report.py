"""What dual pseudo training gained: the runs of its pipeline side by side, pseudo-labels before and after."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from callbacks.metrics_report import MetricsReport, Scalar, print_metrics_table, print_table
from callbacks.picture import image_sink
from callbacks.pseudo_label_scores import PseudoLabelScores, score
from callbacks.summary_chart import draw_summary
from datamodules.pseudo_labels import read

THIS = "this"
_TOP_1, _PRECISION, _RECALL = "test_accuracy", "test_precision", "test_recall"
_OF_GENERATOR = re.compile(r"test_(?:\w+_)?(?:\w*fid|label_consistency|cas)(?:_\w+)?")
_MOST_CLASSES, _MOST_CHANGED = 20, 10
_TIMES = ("before", "after")


@runtime_checkable
class KnowsTruth(Protocol):
    """A datamodule that tells true labels to reports."""

    class_names: Sequence[str]
    images_fingerprint: str

    def truth_of(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """True class ids [N] of images by their names, -1 where nobody knows."""
        ...


@dataclass(frozen=True)
class _Role:
    """A run of the pipeline, as a row of the table."""

    title: str
    run: str
    metrics: Mapping[str, float] | None

    def percent(self, metric: str) -> float:
        return 100 * (self.metrics or {}).get(metric, math.nan)


class DualPseudoReport(MetricsReport):
    """Reports the test of the last fit of dual pseudo training (You et al., 2023, arXiv 2302.10586).

    After the tables of its own metrics it prints: a row for each role that a run plays (labels alone, plain
    self-training, dual pseudo training, full supervision) with top-1, macro precision and recall of its test and the
    difference to the first role in points; what was measured of the generator; accuracy, precision and recall of the
    pseudo-labels before and after, as a whole and for each class. Only images that people did not label count there.
    True labels are `truth_of(keys)` of the datamodule, which nothing but reports may ask. What is not known is "-", and
    a line says why; it never stops a run.

    The numbers are logged, kept in `metrics.json` and added to the trainer's metrics as `summary/...`; those of single
    classes are in the file. TensorBoard shows bars (`summary/dual_pseudo_training`).

    Args:
        roles: Title of a role -> directory of the run that plays it, or its name among `other_runs`, in the order of
            the rows; "this" is this run. The first role is what the others are compared with. Runs of earlier rounds
            have titles of their own.
        generator: Directory or name of the run that trained the generator; None leaves its row out.
        before: Folder of the PseudoLabels that the generator learned from; in later rounds those of the round before.
        after: Folder of the PseudoLabels that this run wrote when its fit ended.
        hyperparameters: More of them for the HParams tab, such as what describes the data.
        run_name: Head of this run's column.
        other_runs: Metrics of the other runs: name of the run -> metric -> value.
        file_name: Name of the file in the log directory.

    Raises:
        ValueError: Two roles are "this".
    """

    def __init__(
        self,
        roles: dict[str, str] | None = None,
        generator: str | None = None,
        before: str | None = None,
        after: str | None = None,
        hyperparameters: dict[str, Scalar] | None = None,
        run_name: str = "value",
        other_runs: dict[str, dict[str, float]] | None = None,
        file_name: str = "metrics.json",
    ) -> None:
        """Nothing is read before a test has ended."""
        super().__init__(hyperparameters, run_name, other_runs, file_name)
        self.roles = dict(roles or {})
        self.generator = generator
        self.before = before
        self.after = after
        own = [title for title, run in self.roles.items() if run == THIS]
        if len(own) > 1:
            msg = f"Expected `roles` with at most one run {THIS!r}, got {' and '.join(own)}; name the other run."
            raise ValueError(msg)

    def show(
        self, trainer: pl.Trainer, metrics: Mapping[str, float], class_names: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Print the tables; called by one process.

        Args:
            trainer: The trainer.
            metrics: Metrics of the evaluation.
            class_names: Names of the classes; empty where nobody knows them.

        Returns:
            Numbers of the summary by name, and those of single classes for the file alone.
        """
        # Of this run alone: a column for each stage would be too wide to read.
        print_metrics_table({self.run_name: metrics}, class_names=class_names)
        if trainer.state.fn != TrainerFn.TESTING:
            return {}, {}
        console = Console()
        roles = self._played(metrics)
        _print_roles(roles, console)
        generated = self._generated(console)
        scores, reasons = self._scores(getattr(trainer, "datamodule", None))
        _print_pseudo_labels(scores, console)
        for reason in reasons:
            _print_line(reason, console)
        if any(scores.values()):
            _print_classes(scores, class_names, console)
        numbers = _role_numbers(roles) | generated | _pseudo_numbers(scores)
        self._draw(trainer, roles, scores, class_names)
        return numbers, _class_numbers(scores)

    def _played(self, metrics: Mapping[str, float]) -> list[_Role]:
        """The roles in order; this run is one of them in any case."""
        roles = self.roles if THIS in self.roles.values() else {**self.roles, self.run_name: THIS}
        return [_Role(t, run, metrics if run == THIS else self._measured(run)) for t, run in roles.items()]

    def _measured(self, run: str) -> Mapping[str, float] | None:
        """What the test of another run found; None if that is not known."""
        if run in self.other_runs:
            return self.other_runs[run]
        try:
            manifest = json.loads((Path(run).expanduser() / "manifest.json").read_text(encoding="utf-8"))
            found = {name: float(value) for name, value in manifest["metrics"].items() if value is not None}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return {name: value for name, value in found.items() if name.startswith("test_")} or None

    def _generated(self, console: Console) -> dict[str, float]:
        """Print what was measured of the generator, and return it as numbers of the summary."""
        if self.generator is None:
            return {}
        measured = self._measured(self.generator)
        found = {name: value for name, value in (measured or {}).items() if _OF_GENERATOR.fullmatch(name)}
        table = Table()
        for column in ("metric", "value"):
            table.add_column(column, justify="right" if column == "value" else "left")
        for name, value in found.items():
            table.add_row(name, f"{value:.4f}")
        if not found:
            table.add_row("-", "not tested" if measured is None else "no FID or label consistency in its test")
        _print_titled(f"Generator {self.generator}", table, console)
        return {f"summary/generator_{name.removeprefix('test_')}": value for name, value in found.items()}

    def _scores(self, data: object) -> tuple[dict[str, PseudoLabelScores | None], list[str]]:
        """Scores of the pseudo-labels before and after, and why there are none."""
        scores: dict[str, PseudoLabelScores | None] = dict.fromkeys(_TIMES)
        reasons = []
        for time, folder in zip(_TIMES, (self.before, self.after), strict=True):
            if folder is None:
                reasons.append(f"{time}: `{time}` names no folder of pseudo-labels.")
            elif not isinstance(data, KnowsTruth):
                reasons.append(f"{time}: {type(data).__name__} has no `truth_of`, so nobody knows what is right.")
            else:
                # A report at the end of hours of training says what it lacks; it does not stop.
                try:
                    labels = read(folder)
                    labels.require(data.class_names, data.images_fingerprint)
                except (OSError, ValueError) as error:
                    reasons.append(f"{time}: {error}")
                    continue
                found = scores[time] = score(labels, data.truth_of)
                images = int(found.labels.sum())
                if found.known < images:
                    reasons.append(f"{time}: true labels of {images - found.known:,} of {images:,} are not known.")
        return scores, reasons

    def _draw(
        self,
        trainer: pl.Trainer,
        roles: Sequence[_Role],
        scores: Mapping[str, PseudoLabelScores | None],
        class_names: Sequence[str],
    ) -> None:
        """Show bars in TensorBoard, where there is one."""
        add_image = image_sink(trainer)
        if add_image is None:
            return
        panels = {
            f"{name} of pseudo-labels": (_values(scores["before"], name), _values(scores["after"], name))
            for name in ("precision", "recall")
        }
        top_1 = {role.title: _or_none(role.percent(_TOP_1) / 100) for role in roles}
        own = next(role.title for role in roles if role.run == THIS)
        drawn = draw_summary(top_1, own, panels, class_names, "Dual pseudo training: top-1 of test images")
        add_image("summary/dual_pseudo_training", drawn, trainer.global_step, dataformats="HWC")


def _print_line(line: str, console: Console) -> None:
    console.print(escape(line), soft_wrap=True, highlight=False)


def _print_titled(title: str, table: Table, console: Console) -> None:
    """Print a table below its title, which may be wider."""
    _print_line(f"\n{title}", console)
    print_table(table, console)


def _print_roles(roles: Sequence[_Role], console: Console) -> None:
    """Print a row for each role, whether it was played or not."""
    table = Table()
    for column in ("role", "run"):
        table.add_column(column, overflow="fold")
    for column in ("top-1", "precision", "recall", "points gained"):
        table.add_column(column, justify="right")
    for place, role in enumerate(roles):
        run = role.run if role.metrics is not None else f"{role.run} (not run)"
        cells = [_cell(role.percent(metric)) for metric in (_TOP_1, _PRECISION, _RECALL)]
        gain = _cell(_gain(roles, role), signed=True) if place else ""
        table.add_row(escape(role.title), escape(run), *cells, gain)
    _print_titled("Dual pseudo training: test images, in %", table, console)


def _print_pseudo_labels(scores: Mapping[str, PseudoLabelScores | None], console: Console) -> None:
    """Print how right the pseudo-labels are as a whole."""
    table = Table()
    table.add_column("measure")
    for column in (*_TIMES, "points gained"):
        table.add_column(column, justify="right")
    counts = ["-" if found is None else f"{int(found.labels.sum()):,}" for found in (scores[t] for t in _TIMES)]
    table.add_row("images", *counts, "")
    for name in ("accuracy", "macro_precision", "macro_recall"):
        old, new = (100 * _whole(scores[time], name) for time in _TIMES)
        table.add_row(name.replace("_", " "), _cell(old), _cell(new), _cell(new - old, signed=True))
    _print_titled("Pseudo-labels of images that people did not label, in %", table, console)


def _print_classes(
    scores: Mapping[str, PseudoLabelScores | None], class_names: Sequence[str], console: Console
) -> None:
    """Print a row for each class, or for those that changed most of many."""
    shown = [*range(len(class_names))]
    title = "Pseudo-labels of images that people did not label, by class, in %"
    if len(shown) > _MOST_CLASSES:
        shown = _most_changed(scores, len(shown))
        which = f"{len(shown)} of {len(class_names)} classes"
        which = f"the {which} that changed most" if all(scores.values()) else f"the first {which}"
        title += f": {which}; all are in the file of metrics"
    table = Table()
    table.add_column("class", overflow="fold")
    for measure in ("pseudo-labels", "precision", "recall"):
        for time in _TIMES:
            table.add_column(f"{measure}\n{time}", justify="right")
    for k in shown:
        cells = [
            *("-" if (found := scores[time]) is None else f"{found.labels[k]:,}" for time in _TIMES),
            *(_cell(100 * _of_class(scores[time], name, k)) for name in ("precision", "recall") for time in _TIMES),
        ]
        table.add_row(escape(class_names[k]), *cells)
    _print_titled(title, table, console)


def _most_changed(scores: Mapping[str, PseudoLabelScores | None], classes: int) -> list[int]:
    """The classes whose precision and recall changed most, in sum; the first ones where nobody knows."""
    before, after = (scores[time] for time in _TIMES)
    change = np.zeros(classes)
    if before is not None and after is not None:
        for name in ("precision", "recall"):
            change += np.nan_to_num(np.abs(getattr(after, name) - getattr(before, name)))
    order: list[int] = np.argsort(-change, kind="stable")[:_MOST_CHANGED].tolist()
    return order


def _role_numbers(roles: Sequence[_Role]) -> dict[str, float]:
    """Top-1 of the roles that were played in %, and what they gained in points."""
    numbers = {}
    for place, role in enumerate(roles):
        name = re.sub(r"\W+", "_", role.title.lower()).strip("_")
        if role.metrics is not None:
            numbers[f"summary/top_1_{name}"] = role.percent(_TOP_1)
            if place:
                numbers[f"summary/gain_{name}"] = _gain(roles, role)
        if role.run == THIS and place:
            numbers["summary/gain"] = _gain(roles, role)
    return numbers


def _pseudo_numbers(scores: Mapping[str, PseudoLabelScores | None]) -> dict[str, float]:
    """Shares of right pseudo-labels; NaN where nobody knows."""
    names = ("accuracy", "macro_precision", "macro_recall")
    return {f"summary/pseudo_{name}_{time}": _whole(scores[time], name) for name in names for time in _TIMES}


def _class_numbers(scores: Mapping[str, PseudoLabelScores | None]) -> dict[str, float]:
    """Numbers of single classes, by their numbers."""
    return {
        f"summary/pseudo_{name}_{time}/{k}": float(value)
        for time, found in scores.items()
        if found is not None
        for name in ("labels", "precision", "recall")
        for k, value in enumerate(getattr(found, name))
    }


def _gain(roles: Sequence[_Role], role: _Role) -> float:
    return role.percent(_TOP_1) - roles[0].percent(_TOP_1)


def _whole(found: PseudoLabelScores | None, name: str) -> float:
    return math.nan if found is None else float(getattr(found, name))


def _of_class(found: PseudoLabelScores | None, name: str, k: int) -> float:
    return math.nan if found is None else float(getattr(found, name)[k])


def _values(found: PseudoLabelScores | None, name: str) -> npt.NDArray[np.float64] | None:
    """A measure of each class; None where nobody knows it."""
    return getattr(found, name) if found is not None and found.known else None


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _cell(value: float, *, signed: bool = False) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:+.2f}" if signed else f"{value:.2f}"
