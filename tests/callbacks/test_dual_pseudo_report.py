"""The report of a pipeline of dual pseudo training, against numbers that are counted by hand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import pytorch_lightning as pl
import torch
from board import board_trainer, pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # publishes no types
from tiny_nets import tiny_trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from callbacks import DualPseudoReport
from callbacks.pseudo_label_scores import score
from callbacks.summary_chart import draw_summary
from datamodules import pseudo_labels
from datamodules.pseudo_labels import SPLITS, LabelTable, Origin

Int64Array = npt.NDArray[np.int64]
ROLES = {
    "labels alone": "dpt/classifier",
    "self-training": "dpt/self",
    "dual pseudo training": "this",
    "full supervision": "dpt/full",
}
OTHERS = {
    "dpt/classifier": {"test_accuracy": 0.5, "test_precision": 0.25, "test_recall": 0.5},
    "dpt/full": {"test_accuracy": 0.9},
    "dpt/generator": {
        "test_fid_classifier": 12.5,
        "test_cw_fid_classifier": 20.0,
        "test_label_consistency_classifier": 0.75,
        "test_cas_wideresnet": 0.5,
        "test_confidence": 0.5,
        "test_loss": 1.0,
    },
}


class Data(pl.LightningDataModule):
    """Image i is called k<i>; every process may ask for its true label."""

    def __init__(self, truth: Sequence[int], names: Sequence[str]) -> None:
        super().__init__()
        self.truth = list(truth)
        self.class_names = tuple(names)
        self.images_fingerprint = "f" * 64

    def truth_of(self, keys: Sequence[str]) -> Int64Array:
        return np.array([self.truth[int(key[1:])] for key in keys], dtype=np.int64)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.tensor([[0.75]])))


class Scored(pl.LightningModule):
    def test_step(self, batch: list[Tensor]) -> None:
        self.log_dict({"test_accuracy": batch[0].mean(), "test_precision": 0.5, "test_recall": 0.625})

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_accuracy", batch[0].mean())


def write(folder: Path, labels: Sequence[int], names: Sequence[str], labeled: int = 0, print_of: str = "f" * 64) -> str:
    """Pseudo-labels of images k0, k1, ..., the first of them labelled by people, every second to validate on."""
    people = np.resize([SPLITS.index("labeled"), SPLITS.index("val")], len(labels))
    splits = np.where(np.arange(len(labels)) < labeled, people, SPLITS.index("unlabeled"))
    keys = [f"k{i}" for i in range(len(labels))]
    table = LabelTable(keys, np.array(labels), np.ones(len(labels), np.float32), splits)
    pseudo_labels.write(folder, table, Origin(names, print_of))
    return str(folder)


def by_hand(truth: Sequence[int], labels: Sequence[int], k: int) -> tuple[float, float]:
    """Precision and recall of a class by a loop."""
    right = guessed = there = 0
    for true, label in zip(truth, labels, strict=True):
        if true >= 0:
            guessed += label == k
            there += true == k
            right += label == true == k
    if not guessed + there:
        return math.nan, math.nan
    return right / max(guessed, 1), right / max(there, 1)


def lines(out: str) -> dict[str, list[str]]:
    """Cells of the rows of all tables, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("unknown", [0, 40])
def test_scores_are_those_of_a_loop(tmp_path: Path, unknown: int) -> None:
    rng = np.random.default_rng(unknown)
    names = ["a", "b", "c", "never"]
    truth, labels = rng.integers(0, 3, 120), rng.integers(0, 3, 120)
    truth[20 : 20 + unknown] = -1
    truth[60:62] = -7, 4  # no classes: as good as unknown
    data = Data(truth.tolist(), names)
    found = score(pseudo_labels.read(write(tmp_path, labels.tolist(), names, labeled=10)), data.truth_of)
    truth[60:62] = -1
    pairs = [by_hand(truth[10:].tolist(), labels[10:].tolist(), k) for k in range(4)]
    np.testing.assert_allclose(np.stack([found.precision, found.recall], 1), np.array(pairs))
    assert found.known == 108 - unknown
    assert found.labels.tolist() == [int((labels[10:] == k).sum()) for k in range(4)]
    right = sum(int(t == g) for t, g in zip(truth[10:], labels[10:], strict=True))
    assert found.accuracy == pytest.approx(right / found.known)
    assert found.macro_precision == pytest.approx(sum(p for p, _ in pairs[:3]) / 3)
    assert found.macro_recall == pytest.approx(sum(r for _, r in pairs[:3]) / 3)


def test_tables_numbers_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("ant", "[bee]")
    truth = [0, 1, 0, 0, 1, 1]
    report = DualPseudoReport(
        ROLES,
        "dpt/generator",
        write(tmp_path / "before", [1, 0, 0, 1, 0, 1], names, labeled=2),
        write(tmp_path / "after", [0, 1, 0, 0, 1, 0], names, labeled=2),
        run_name="retrained",
        other_runs=OTHERS,
    )
    trainer = board_trainer(tmp_path / "run", report)
    trainer.test(Scored(), Data(truth, names))
    out = capsys.readouterr().out
    rows = lines(out)
    assert rows["labels alone"] == ["dpt/classifier", "50.00", "25.00", "50.00", ""]
    assert rows["self-training"] == ["dpt/self (not run)", "-", "-", "-", "-"]
    assert rows["dual pseudo training"] == ["this", "75.00", "50.00", "62.50", "+25.00"]
    assert rows["full supervision"] == ["dpt/full", "90.00", "-", "-", "+40.00"]
    assert rows["test_label_consistency_classifier"] == ["0.7500"]
    assert [name for name in rows if name.startswith("test_") and name not in ("test_precision", "test_recall")] == [
        "test_accuracy",
        "test_fid_classifier",
        "test_cw_fid_classifier",
        "test_label_consistency_classifier",
        "test_cas_wideresnet",
    ]
    assert rows["test_accuracy"] == ["0.7500"]  # the wide table is of this run alone
    assert rows["images"] == ["4", "4", ""]
    assert rows["accuracy"] == ["50.00", "75.00", "+25.00"]
    # Of k2 ... k5: truth 0 0 1 1, before 0 1 0 1, after 0 0 1 0.
    assert rows["macro recall"] == ["50.00", "75.00", "+25.00"]
    assert rows["macro precision"] == ["50.00", "83.33", "+33.33"]
    assert rows["ant"] == ["2", "3", "50.00", "66.67", "50.00", "100.00"]
    assert rows["[bee]"] == ["2", "1", "50.00", "100.00", "50.00", "50.00"]
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    expected = {
        "test_accuracy": 0.75,
        "summary/top_1_labels_alone": 50.0,
        "summary/gain_full_supervision": 40.0,
        "summary/gain": 25.0,
        "summary/generator_fid_classifier": 12.5,
        "summary/pseudo_accuracy_before": 0.5,
        "summary/pseudo_accuracy_after": 0.75,
        "summary/pseudo_macro_precision_after": 2.5 / 3,
        "summary/pseudo_macro_recall_after": 0.75,
        "summary/pseudo_precision_after/1": 1.0,
        "summary/pseudo_labels_before/0": 2.0,
    }
    assert {name: kept[name] for name in expected} == pytest.approx(expected)
    assert "summary/top_1_self_training" not in kept
    # What the manifest of the run takes.
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["summary/gain"] == 25.0
    assert "summary/pseudo_precision_after/1" not in logged
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.value for event in events.Scalars("summary/pseudo_accuracy_after")] == [0.75]
    (drawn,) = pictures(tmp_path / "run")["summary/dual_pseudo_training"].values()
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 10


def test_what_is_not_known_is_said_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("ant", "bee")
    before = write(tmp_path / "before", [0, 1, 1], names)
    for report, reasons in (
        (
            DualPseudoReport({"labels alone": "dpt/classifier"}, "dpt/generator", before, str(tmp_path / "none")),
            ["before: true labels of 3 of 3 are not known", "after: Expected `pseudo_labels` to be a finished folder"],
        ),
        (
            DualPseudoReport(before=write(tmp_path / "foreign", [0], names, print_of="0" * 64)),
            ["before: Expected `pseudo_labels` of the images of the data", "after: `after` names no folder"],
        ),
    ):
        tiny_trainer(tmp_path, callbacks=[report]).test(Scored(), Data([-1, -1, -1], names))
        out = capsys.readouterr().out
        rows = lines(out)
        assert rows["accuracy"] == rows["macro recall"] == ["-", "-", "-"]
        assert all(reason in out for reason in reasons)
        assert rows["value"][:2] == ["this", "75.00"]
        if report.generator is not None:
            assert rows["labels alone"] == ["dpt/classifier (not run)", "-", "-", "-", ""]
            assert rows["value"] == ["this", "75.00", "50.00", "62.50", "-"]
            assert rows["-"] == ["not tested"]
            assert rows["bee"] == ["2", "-", "-", "-", "-", "-"]
            kept = json.loads((tmp_path / "metrics.json").read_text())
            assert kept["summary/pseudo_accuracy_before"] is None
            assert kept["summary/pseudo_labels_before/1"] == 2


def test_data_that_tell_no_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "before", [0, 1], ("a", "b"))
    loader = DataLoader(TensorDataset(torch.tensor([[0.75]])))
    trainer = tiny_trainer(tmp_path, callbacks=[DualPseudoReport(before=before)])
    trainer.test(Scored(), loader)
    assert "before: NoneType has no `truth_of`" in capsys.readouterr().out
    trainer.validate(Scored(), loader)
    out = capsys.readouterr().out
    assert "val_accuracy" in out
    assert "people did not label" not in out


def test_of_many_classes_those_that_changed_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"class {k}" for k in range(30)]
    truth = [*range(30)] * 2
    before = np.array(truth)
    before[5:20] = 0
    report = DualPseudoReport(
        before=write(tmp_path / "before", before.tolist(), names), after=write(tmp_path / "after", truth, names)
    )
    tiny_trainer(tmp_path, callbacks=[report]).test(Scored(), Data(truth, names))
    out = capsys.readouterr().out
    assert "the 10 of 30 classes that changed most" in out
    shown = [name for name in lines(out) if name.startswith("class ")]
    # Class 0 gains 15 of 17 in precision, each of the next ones half of its recall.
    assert shown == ["class 0", *(f"class {k}" for k in range(5, 14))]
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["summary/pseudo_recall_before/19"] == 0.5
    assert kept["summary/pseudo_recall_after/29"] == 1.0
    assert kept["summary/pseudo_precision_before/0"] == pytest.approx(2 / 17)
    report.before = None
    tiny_trainer(tmp_path, callbacks=[report]).test(Scored(), Data(truth, names))
    out = capsys.readouterr().out
    assert "the first 10 of 30 classes" in out
    assert [name for name in lines(out) if name.startswith("class ")] == names[:10]


def test_a_second_round_is_compared_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("a", "b")
    roles = {"labels alone": "dpt/classifier", "round 1": "dpt/round_1/retrained", "round 2": "this"}
    before, after = (write(tmp_path / f"round_{n}", labels, names) for n, labels in ((1, [0, 0]), (2, [0, 1])))
    others = {"dpt/classifier": {"test_accuracy": 0.5}, "dpt/round_1/retrained": {"test_accuracy": 0.625}}
    report = DualPseudoReport(roles, before=before, after=after, other_runs=others)
    tiny_trainer(tmp_path, callbacks=[report]).test(Scored(), Data([0, 1], names))
    rows = lines(capsys.readouterr().out)
    assert rows["round 1"][-1] == "+12.50"
    assert rows["round 2"] == ["this", "75.00", "50.00", "62.50", "+25.00"]
    assert rows["accuracy"] == ["50.00", "100.00", "+50.00"]
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["summary/gain"] == kept["summary/gain_round_2"] == 25.0
    assert kept["summary/gain_round_1"] == 12.5


def test_this_run_plays_one_role() -> None:
    with pytest.raises(ValueError, match="`roles` with at most one run 'this', got a and b"):
        DualPseudoReport({"a": "this", "b": "this"})


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_bars_are_as_high_as_their_values(classes: int) -> None:
    values = np.full(classes, 0.25), np.full(classes, 0.75)
    values[0][1] = np.nan
    drawn = draw_summary({}, "x", {"precision": values}, [f"c{k}" for k in range(classes)], "title")
    before = (drawn == np.array([172, 184, 196])).all(-1)
    after = (drawn == np.array([33, 102, 172])).all(-1)
    # Of the panel of 170 pixels, below the keys of the legend.
    heights = [np.flatnonzero(found[62:].any(1)) for found in (before, after)]
    bottom = heights[0].max()
    assert abs(bottom - heights[0].min() - 0.25 * 170) < 3
    assert abs(bottom - heights[1].min() - 0.75 * 170) < 4


def test_the_manifest_of_a_run_tells_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "round_0"
    run.mkdir()
    metrics = {"test_accuracy": 0.5, "test_ece": None, "train_loss": 3.0}
    (run / "manifest.json").write_text(json.dumps({"metrics": metrics}))
    roles = {"labels alone": str(run), "lost": str(tmp_path / "lost"), "dual pseudo training": "this"}
    report = DualPseudoReport(roles)
    tiny_trainer(tmp_path, callbacks=[report]).test(Scored(), datamodule=Data([], []), verbose=False)
    printed = capsys.readouterr().out
    assert "+25.0" in printed
    assert "lost (not run)" in printed
    (run / "manifest.json").write_text(json.dumps({"metrics": [1]}))
    tiny_trainer(tmp_path, callbacks=[report]).test(Scored(), datamodule=Data([], []), verbose=False)
    assert "round_0 (not run)" in capsys.readouterr().out
