"""The report at the end of an evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # publishes no types
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped] # publishes no types
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import MetricsReport, print_metrics_table


class Scored(pl.LightningModule):
    def __init__(self, lr: float = 0.5, network: dict[str, Any] | None = None, note: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.layer(batch[0]).sum()  # type: ignore[no-any-return] # a layer's call is untyped

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_jaccard", 0.25)

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("test_jaccard", batch[0].mean())
        self.log("test_iou_none", float("nan"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.tensor([[0.5], [0.75]])))


def trainer(folder: Path, report: MetricsReport, logger: Logger | bool | None = None) -> pl.Trainer:
    if logger is None:
        logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    return pl.Trainer(
        accelerator="cpu",
        logger=logger,
        default_root_dir=folder,
        callbacks=[report],
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def test_one_table_and_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = MetricsReport()
    run = trainer(tmp_path, report)
    run.fit(Scored(), loader(), loader())
    assert not (tmp_path / "metrics.json").exists()
    assert capsys.readouterr().out.count("jaccard") == 0
    run.test(Scored(), loader())
    printed = capsys.readouterr().out
    assert printed.count("test_jaccard") == 1
    assert "0.6250" in printed
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "test_jaccard": 0.625,
        "test_iou_none": None,
    }
    run.validate(Scored(), loader())
    printed = capsys.readouterr().out
    assert printed.count("val_jaccard") == 1
    assert "test_jaccard" not in printed
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "test_jaccard": 0.625,
        "test_iou_none": None,
        "val_jaccard": 0.25,
    }


def test_hyperparameters_and_metrics_in_tensorboard(tmp_path: Path) -> None:
    report = MetricsReport(hyperparameters={"num_labels": 20})
    module = Scored(lr=0.5, network={"class_path": "ADMUNet", "init_args": {"channels": [1, 2]}})
    trainer(tmp_path, report).test(module, loader())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("test_jaccard")][-1] == 0.625
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    shown = {
        name: value.number_value if value.HasField("number_value") else value.string_value
        for name, value in values.items()
    }
    assert shown == {
        "lr": 0.5,
        "num_labels": 20.0,
        "network/class_path": "ADMUNet",
        "network/init_args/channels": "[1, 2]",
        "note": "None",
    }
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = HParamsPluginData.FromString(content).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"test_jaccard", "test_iou_none"}


@pytest.mark.parametrize("logger", ["csv", "none"])
def test_other_loggers(tmp_path: Path, logger: str) -> None:
    sink = CSVLogger(tmp_path, name="", version="") if logger == "csv" else False
    trainer(tmp_path, MetricsReport(file_name="numbers.json"), sink).test(Scored(), loader())
    assert json.loads((tmp_path / "numbers.json").read_text())["test_jaccard"] == 0.625


def test_columns_of_other_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = MetricsReport(run_name="pretrained", other_runs={"scratch": {"test_jaccard": 0.5}})
    report.add_run("supervised", {"test_dice": 0.125})
    trainer(tmp_path, report).test(Scored(), loader())
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[1]: line.split()[3::2] for line in lines if "test_" in line}
    assert cells == {
        "test_jaccard": ["0.5000", "-", "0.6250"],
        "test_dice": ["-", "0.1250", "-"],
        "test_iou_none": ["-", "-", "nan"],
    }
    for taken in ("pretrained", "scratch"):
        with pytest.raises(ValueError, match=f"`name` to be a new column, got '{taken}' again"):
            report.add_run(taken, {})


def printed(runs: dict[str, dict[str, float]], names: tuple[str, ...] = ()) -> list[list[str]]:
    """The cells of each line of the tables; a line without a table is one cell."""
    console = Console(width=200, record=True)
    print_metrics_table(runs, console, names)
    lines = [line.replace("┃", "│") for line in console.export_text().splitlines() if not set(line) & set("━─")]
    return [[cell.strip() for cell in line.removeprefix("│").removesuffix("│").split("│")] for line in lines]


def test_metrics_of_single_classes_have_a_table_of_their_own() -> None:
    metrics = {"test_accuracy": 0.75, "test_recall/0": 0.5, "test_recall/2": 1.0, "test_f1": 0.25, "a/b": 0.125}
    metrics |= {f"test_precision/{k}": k / 4 for k in range(3)}
    assert printed({"value": metrics}, ("ant", "[bee]")) == [
        ["metric", "value"],
        ["test_accuracy", "0.7500"],
        ["test_f1", "0.2500"],
        ["a/b", "0.1250"],
        ["class", "test_recall", "test_precision"],
        ["ant", "0.5000", "0.0000"],
        ["[bee]", "-", "0.2500"],
        ["2", "1.0000", "0.5000"],
    ]
    two = printed({"one": metrics, "two": {"test_recall/1": 0.375}})
    assert two[4:8] == [
        ["", "test_recall", "test_recall", "test_precision", "test_precision"],
        ["class", "one", "two", "one", "two"],
        ["0", "0.5000", "-", "0.0000", "-"],
        ["1", "-", "0.3750", "0.2500", "-"],
    ]


@pytest.mark.parametrize(("classes", "lines"), [(20, 22), (21, 2)])
def test_many_classes_are_one_line(classes: int, lines: int) -> None:
    found = printed({"value": {"test_f1": 0.5} | {f"test_recall/{k}": 0.5 for k in range(classes)}})
    assert len(found) == 1 + lines
    if classes > 20:
        assert found[-1] == ["test_recall of each of 21 classes: in the file of metrics and the logs."]


def test_wide_tables_do_not_wrap_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {f"a run with a rather long name, number {i}": {"test_jaccard": i / 10} for i in range(6)}
    print_metrics_table(runs)
    out = capsys.readouterr().out
    assert all(name in out for name in runs)
    console = Console(width=200, record=True)
    print_metrics_table({"one": {"m": 1.0}}, console)
    assert "1.0000" in console.export_text()


def test_a_file_that_holds_no_metrics_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("[1, 2]", "not json"):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(ValueError, match=r"metrics\.json to hold a JSON object of metrics"):
            trainer(tmp_path, MetricsReport()).test(Scored(), loader())
        assert (tmp_path / "metrics.json").read_text() == content
        assert "0.6250" in capsys.readouterr().out  # the result is not lost with it
