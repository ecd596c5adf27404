"""What benchmarks/federated_training.py prints, against numbers worked out by hand."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from federated_training import accuracies, chart, curves, differences, evenly, job, measured, tables


def a_run(labels: float, selected: float, drawn: float | None, rate: float | None) -> dict[str, Any]:
    """What results.json holds of a run."""
    arms = {"labels": labels, "selected": selected, "drawn": drawn}
    return {
        "arms": {
            name: {
                "accuracy": accuracy,
                "worst_client": None if accuracy is None else accuracy / 2,
                "clients": {},
                "note": "refused" if accuracy is None else "",
            }
            for name, accuracy in arms.items()
        },
        "selection": {"labels": 200, "kept": 50, "right": 0.5, "right_of_kept": labels},
        "drawn": {} if rate is None else {"candidates": 100, "kept": 40, "rate": rate},
        "rounds": {"classifier": {"1": labels / 2, "2": labels}, "generator": {"1": None}},
    }


FOUND = {0: a_run(0.4, 0.5, 0.3, 0.6), 1: a_run(0.6, 0.8, None, None)}


def test_differences_are_in_pairs_of_seeds_that_have_both() -> None:
    assert accuracies(FOUND, "drawn") == {0: pytest.approx(30)}
    assert differences(FOUND, "selected") == [pytest.approx(10), pytest.approx(20)]
    assert differences(FOUND, "drawn") == [pytest.approx(-10)]
    assert accuracies(FOUND, "nothing") == {}


def test_tables_have_means_standard_errors_and_what_is_not_there() -> None:
    arms, selected, drawn = tables(FOUND)
    # Standard error of two numbers: half their difference.
    assert arms.splitlines()[2:] == [
        "| labels | 50.0 ± 10.0 |  |  | 25.0 ± 5.0 |  |",
        "| selected | 65.0 ± 15.0 | +15.0 ± 5.0 | 2 of 2 | 32.5 ± 7.5 |  |",
        "| drawn | 30.0 | -10.0 | 0 of 1 | 15.0 | 1 of 2 seeds; refused |",
    ]
    assert selected.splitlines() == [
        "| pseudo-labels | seed 0 | seed 1 | mean |",
        "| --- | --- | --- | --- |",
        "| selected, % | 25.0 | 25.0 | 25.0 ± 0.0 |",
        "| right of all, % | 50.0 | 50.0 | 50.0 ± 0.0 |",
        "| right of the selected, % | 40.0 | 60.0 | 50.0 ± 10.0 |",
    ]
    assert drawn.splitlines() == [
        "| drawn images | seed 0 | mean |",
        "| --- | --- | --- |",
        "| the classifier agrees with, % | 60.0 | 60.0 |",
        "| images kept | 40.0 | 40.0 |",
    ]


def test_a_run_without_a_generator_has_no_table_of_drawn_images() -> None:
    assert len(list(tables({1: FOUND[1]}))) == 2


def test_curves_of_labels_alone_are_those_of_the_first_classifier() -> None:
    assert curves(FOUND, "labels") == [{1: 20.0, 2: 40.0}, {1: 30.0, 2: 60.0}]
    assert curves(FOUND, "selected") == []


def test_the_chart_has_a_line_for_each_arm_by_round_and_by_seed() -> None:
    drawn = chart(FOUND, ["labels"])
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 2 + 2 + 1  # rounds, seeds and the legend
    assert "cross" not in drawn


def test_rounds_of_the_chart_are_spread_evenly() -> None:
    assert evenly([3, 4]) == [3, 4]
    assert evenly(range(1, 101)) == [1, 12, 23, 34, 45, 56, 67, 78, 89, 100]


def test_a_job_is_a_federated_run_of_a_seed_in_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("vars:\n  seed: 0\nseed: ${vars.seed}\n")
    found = job(tmp_path / "c.yaml", tmp_path / "runs", 3, ["--vars.alpha=1"])
    assert found.place == tmp_path / "runs/seed_3"
    assert found.words[:3] == ("federate", "--config", str(tmp_path / "c.yaml"))
    assert {"--vars.seed=3", f"--run_dir={tmp_path}/runs/seed_3", "--vars.alpha=1"} <= set(found.words)
    found.place.mkdir(parents=True)
    (found.place / "results.json").write_text('{"arms": {}}')
    assert measured({3: found}) == {3: {"arms": {}}}


def test_seeds_have_to_make_a_difference(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("vars:\n  lr: 0.1\n")
    with pytest.raises(ValueError, match="`seed`"):
        job(tmp_path / "c.yaml", tmp_path, 0, [])
