"""What a federated run shows and leaves behind, against counts worked out by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from board import pictures
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # publishes no types

from federated.report import Report
from federated.rounds import RoundReport
from federated.table import DrawnFacts, Row, SelectionFacts, cells, with_missing_clients

NAMES = ("cat", "dog|wolf", "[owl]")
SELECTION = np.array([[10, 4, 10, 6, 3], [20, 5, 20, 9, 5], [0, 0, 0, 0, 0]])
DRAWN = np.array([[8, 6], [2, 1], [0, 0]])


def scalars(folder: Path) -> dict[str, dict[int, list[float]]]:
    """All scalars in the event files: tag -> step -> values, more than one if it was written again."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[str, dict[int, list[float]]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(tag, {}).setdefault(event.step, []).append(event.value)
    return found


def a_round(number: int) -> RoundReport:
    """Client 2 has no labels, client 0 no test images."""
    return RoundReport(
        number, {0: (30, 1.0), 1: (10, 2.0 * number), 2: (0, None)}, {0: (0, 0), 1: (6, 10), 2: (number, 30)}
    )


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_rounds_are_curves_of_all_clients_and_of_each(tmp_path: Path) -> None:
    report = Report(tmp_path)
    for number in (1, 2):
        report.round("classifier", a_round(number))
    report.round("generator", RoundReport(1, {0: (5, 0.5)}, {}))
    report.close()
    found = scalars(tmp_path)
    assert found["accuracy/classifier"] == {1: [pytest.approx(7 / 40)], 2: [pytest.approx(8 / 40)]}
    # The mean over images, not over clients.
    assert found["loss/classifier"] == {1: [pytest.approx((30 + 20) / 40)], 2: [pytest.approx((30 + 40) / 40)]}
    assert found["accuracy_of_clients/classifier/02"] == {1: [pytest.approx(1 / 30)], 2: [pytest.approx(2 / 30)]}
    assert found["loss/generator"] == {1: [0.5]}
    assert not {"accuracy_of_clients/classifier/00", "loss_of_clients/classifier/02", "accuracy/generator"} & set(found)


def test_what_is_told_again_is_shown_once_and_a_run_that_goes_on_knows_what_it_said(tmp_path: Path) -> None:
    first = Report(tmp_path, "a")
    first.round("classifier", a_round(1))
    first.selection(SELECTION, NAMES)
    first.close()
    # The server was killed; the step says its first round again.
    second = Report(tmp_path, "a", silent())
    for number in (1, 2):
        second.round("classifier", a_round(number))
    second.finish([])
    assert scalars(tmp_path)["accuracy/classifier"] == {1: [pytest.approx(7 / 40)], 2: [pytest.approx(8 / 40)]}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rounds"] == {"classifier": {"1": 7 / 40, "2": 8 / 40}}
    assert results["selection"]["kept"] == 9


def test_a_run_of_other_settings_forgets_what_was_there(tmp_path: Path) -> None:
    first = Report(tmp_path, "a")
    first.round("classifier", a_round(1))
    first.round("classifier", a_round(2))
    first.drawn(DRAWN, NAMES)
    first.close()
    second = Report(tmp_path, "b", silent())
    second.round("classifier", a_round(1))
    second.finish([Row("labels", 0.5)])
    assert scalars(tmp_path)["accuracy/classifier"] == {1: [pytest.approx(7 / 40)]}
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["config_hash"], results["drawn"], list(results["rounds"]["classifier"])) == ("b", {}, ["1"])


def test_pictures_are_in_tensorboard_and_in_files_and_drawn_once(tmp_path: Path) -> None:
    report = Report(tmp_path)
    counts = np.array([[5, 1, 0], [2, 7, 0], [0, 0, 0]])
    for _ in range(2):
        report.confusion(counts, NAMES)
        report.confusion(counts, NAMES, of="test images, all pseudo labels")
        report.selection(SELECTION, NAMES)
        report.drawn(DRAWN, NAMES)
        report.samples(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2, NAMES)
        report.client_classes(np.full((9, 7, 3), 80, dtype=np.uint8))
    report.close()
    shown = pictures(tmp_path)
    names = {tag.removeprefix("federated/") for tag in shown}
    assert names == {
        "client_classes",
        "confusion_held_out_labels",
        "confusion_test_images_all_pseudo_labels",
        "drawn_counts",
        "samples",
        "selected_counts",
        "selected_precision",
    }
    for name in names:
        with Image.open(tmp_path / "pictures" / f"{name}.png") as image:
            assert np.array_equal(np.asarray(image), shown[f"federated/{name}"][0])
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert {tag: len(events.Images(tag)) for tag in shown} == dict.fromkeys(shown, 1)


def test_nobody_knows_how_right_pseudo_labels_are_without_true_labels(tmp_path: Path) -> None:
    hidden = SELECTION * np.array([1, 1, 0, 0, 0])
    assert SelectionFacts.of(hidden) == SelectionFacts(30, 9, None, None)
    report = Report(tmp_path)
    report.selection(hidden, NAMES)
    report.close()
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"selected_counts"}


def test_facts_sum_up_the_classes() -> None:
    facts = SelectionFacts.of(SELECTION)
    assert facts == SelectionFacts(30, 9, 15 / 30, 8 / 9)
    assert facts.sentence() == "Pseudo-labels: 30, 50.0 % right; selected: 9 (30.0 %), 88.9 % right"
    # True labels of some alone: which of them are among the kept is not known.
    assert SelectionFacts.of(np.array([[10, 4, 5, 3, 2]])) == SelectionFacts(10, 4, 3 / 5, None)
    assert SelectionFacts.of(np.zeros((3, 5), dtype=np.int64)).sentence() == "Pseudo-labels: 0; selected: 0"
    drawn = DrawnFacts.of(DRAWN)
    assert (drawn, drawn.rate()) == (DrawnFacts(10, 7), 0.7)
    assert drawn.sentence() == "Drawn images: 10 looked at; kept: 7 (70.0 %)"
    assert DrawnFacts.of(np.zeros((3, 2), dtype=np.int64)).sentence() == "Drawn images: 0 looked at; kept: 0"


def test_points_are_gained_over_labels_where_both_are_known() -> None:
    rows = [Row("labels", 0.5, 0.25), Row("selected", 0.75, 0.125), Row("drawn", None, None, "why"), Row("x", 0.25)]
    assert cells(rows) == [
        ["labels", "50.0", "", "25.0", ""],
        ["selected", "75.0", "+25.0", "12.5", ""],
        ["drawn", "-", "", "-", "why"],
        ["x", "25.0", "-25.0", "-", ""],
    ]
    assert [row[2] for row in cells(rows[1:])] == ["", "", ""]


def test_rows_that_not_all_clients_tested_say_so() -> None:
    rows = [Row("labels", 0.5, 0.4, clients={0: 0.4, 1: 0.6}), Row("selected", 0.7, 0.7, clients={1: 0.7})]
    rows += [Row("drawn", note="not trained"), Row("central, all labels", 0.9)]
    assert [row.note for row in with_missing_clients(rows)] == ["", "not tested at client 0", "not trained", ""]
    assert with_missing_clients(rows[1:]) == rows[1:]


def test_the_end_is_a_table_and_two_files(tmp_path: Path) -> None:
    console = silent()
    report = Report(tmp_path, "abc", console)
    report.selection(SELECTION, NAMES)
    report.drawn(DRAWN, NAMES)
    report.finish(
        [Row("labels", 0.5, 0.2, "", {1: 0.8, 0: 0.2}), Row("drawn", float("nan"), None, "not trained: [odd] a|b")]
    )
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "not trained: [odd] a|b" in printed
    assert "selected: 9 (30.0 %), 88.9 % right." in printed
    assert (tmp_path / "results.md").read_text().splitlines() == [
        "| trained on | test accuracy, % | points gained | worst client, % | note |",
        "| --- | --- | --- | --- | --- |",
        "| labels | 50.0 |  | 20.0 |  |",
        r"| drawn | - |  | - | not trained: [odd] a\|b |",
        "",
        "Pseudo-labels: 30, 50.0 % right; selected: 9 (30.0 %), 88.9 % right.",
        "",
        "Drawn images: 10 looked at; kept: 7 (70.0 %).",
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config_hash"] == "abc"
    assert results["arms"]["labels"] == {
        "accuracy": 0.5,
        "worst_client": 0.2,
        "clients": {"0": 0.2, "1": 0.8},
        "note": "",
    }
    assert results["arms"]["drawn"]["accuracy"] is None
    assert results["selection"]["counts"] == SELECTION.tolist()
    assert results["drawn"]["rate"] == 0.7
