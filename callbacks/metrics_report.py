"""The numbers at the end of an evaluation: one table, one file, one row in TensorBoard's HParams tab."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datamodules.atomic import write_json_atomically

Scalar = bool | int | float | str
_CLASS_METRIC = re.compile(r".+/\d+")
_MOST_CLASSES = 20


def print_metrics_table(
    runs: Mapping[str, Mapping[str, float]], console: Console | None = None, class_names: Sequence[str] = ()
) -> None:
    """Print a row for each metric and a column for each run; then a row for each class, where metrics are of classes.

    Metrics of one class are called `<metric>/<number of the class>`. With more than 20 classes they are left out, and
    a line says how many there are.

    Args:
        runs: Name of a run -> name of a metric -> its value. A metric that a run lacks is shown as "-".
        console: Where to print; standard output by default.
        class_names: Names of the classes; by default their numbers.
    """
    console = console or Console()
    names = list(dict.fromkeys(metric for values in runs.values() for metric in values))
    of_classes = [name for name in names if _CLASS_METRIC.fullmatch(name)]
    table = Table()
    table.add_column("metric", overflow="fold")
    for name in runs:
        table.add_column(name, justify="right", overflow="fold")
    for metric in names:
        if metric not in of_classes:
            table.add_row(metric, *(_cell(values, metric) for values in runs.values()))
    print_table(table, console)
    if of_classes:
        _print_classes(runs, of_classes, class_names, console)


def _print_classes(
    runs: Mapping[str, Mapping[str, float]], names: Sequence[str], class_names: Sequence[str], console: Console
) -> None:
    """Print a row for each class and a column for each of its metrics in each run."""
    metrics = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
    classes = sorted({int(name.rpartition("/")[2]) for name in names})
    if len(classes) > _MOST_CLASSES:
        console.print(
            f"{' and '.join(metrics)} of each of {len(classes)} classes: in the file of metrics and the logs."
        )
        return
    columns = [(metric, run) for metric in metrics for run in runs]
    table = Table()
    table.add_column("class", overflow="fold")
    for metric, run in columns:
        table.add_column(metric if len(runs) == 1 else f"{metric}\n{run}", justify="right", overflow="fold")
    for k in classes:
        label = class_names[k] if k < len(class_names) else str(k)
        table.add_row(escape(label), *(_cell(runs[run], f"{metric}/{k}") for metric, run in columns))
    print_table(table, console)


def _cell(values: Mapping[str, float], metric: str) -> str:
    return f"{values[metric]:.4f}" if metric in values else "-"


def print_table(table: Table, console: Console) -> None:
    """Print a table as wide as it needs to be, unless a terminal has an edge.

    Args:
        table: The table.
        console: Where to print.
    """
    if not console.is_terminal:  # a log file has no edge to wrap at
        unbounded = console.options.update(max_width=10_000)
        console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown.

    Args:
        head: The heads of the columns.
        rows: The cells of each row, a text for each column.
    """
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (lines[0], ["---"] * len(head), *lines[1:]))


class MetricsReport(pl.Callback):
    """Reports the metrics of `test`, and of `validate` when that is run by itself.

    Prints tables in place of Lightning's own (one of all metrics, one of those of single classes), merges the metrics
    into `metrics.json` in the log directory (NaN becomes null) and gives them, with the hyper-parameters of the module,
    to TensorBoard's HParams tab.

    Args:
        hyperparameters: More of them for the HParams tab, such as what describes the data.
        run_name: Head of this run's column.
        other_runs: Columns of other runs to print before this one: run -> metric -> value.
        file_name: Name of the file in the log directory.
    """

    def __init__(
        self,
        hyperparameters: dict[str, Scalar] | None = None,
        run_name: str = "value",
        other_runs: dict[str, dict[str, float]] | None = None,
        file_name: str = "metrics.json",
    ) -> None:
        """Nothing is read or written before an evaluation."""
        self.hyperparameters = dict(hyperparameters or {})
        self.run_name = run_name
        self.other_runs = {name: dict(metrics) for name, metrics in (other_runs or {}).items()}
        self.file_name = file_name

    def add_run(self, name: str, metrics: Mapping[str, float]) -> None:
        """Print another run's metrics beside this one's.

        Args:
            name: Head of its column.
            metrics: Its metrics.

        Raises:
            ValueError: The column is taken.
        """
        if name in (self.run_name, *self.other_runs):
            msg = f"Expected `name` to be a new column, got {name!r} again; name each run differently."
            raise ValueError(msg)
        self.other_runs[name] = dict(metrics)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch off Lightning's own table of results.

        Args:
            trainer: The trainer.
            pl_module: Not looked at.
        """
        trainer.test_loop.verbose = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch off Lightning's own table of results.

        Args:
            trainer: The trainer.
            pl_module: Not looked at.
        """
        trainer.validate_loop.verbose = False

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the test.

        Args:
            trainer: The trainer.
            pl_module: The module whose hyper-parameters are reported.
        """
        self._report(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report a validation that is not part of a fit.

        Args:
            trainer: The trainer.
            pl_module: The module whose hyper-parameters are reported.
        """
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, pl_module)

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Both may talk to the other processes, so all of them ask before all but one leave.
        found = trainer.callback_metrics
        metrics = {name: float(value) for name, value in found.items()}
        folder = trainer.log_dir
        if not trainer.is_global_zero or not metrics:
            return
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None) or ()
        logged, kept = self.show(trainer, metrics, [str(name) for name in names])
        # The trainer's own, which the command line writes into the manifest of the run.
        found.update({name: torch.tensor(value) for name, value in logged.items()})
        self._log_hyperparameters(trainer, pl_module, metrics | logged)
        if folder is not None:
            _merge(Path(folder) / self.file_name, {**metrics, **logged, **kept})

    def show(
        self, trainer: pl.Trainer, metrics: Mapping[str, float], class_names: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Print the tables; called by one process.

        Args:
            trainer: The trainer.
            metrics: Metrics of the evaluation.
            class_names: Names of the classes; empty where nobody knows them.

        Returns:
            More numbers by name, which are logged, kept in the file and added to the trainer's metrics; and more for
            the file alone.
        """
        del trainer  # for reports that say more
        print_metrics_table({**self.other_runs, self.run_name: metrics}, class_names=class_names)
        return {}, {}

    def _log_hyperparameters(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: dict[str, float]
    ) -> None:
        params = dict(_flat(dict(pl_module.hparams))) | self.hyperparameters
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(params, metrics, step=trainer.global_step)


def _flat(params: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """Names joined by slashes and values that the HParams tab can show; other objects by their text."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value if isinstance(value, Scalar) else str(value)


def _merge(path: Path, metrics: Mapping[str, float]) -> None:
    """Put metrics into a JSON file; those of other evaluations stay in it."""
    before: object = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
    if not isinstance(before, dict):
        msg = f"Expected {path} to hold a JSON object of metrics, got something else; rename the file."
        raise ValueError(msg)  # noqa: TRY004 - the content of a file, not the type of an argument
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    write_json_atomically(path, {**before, **finite})
