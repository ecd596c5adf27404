"""What benchmarks/label_noise_generation.py runs, and its table, against numbers worked out by hand."""

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from jobs import Job
from label_noise_generation import ARMS, COLUMNS, NOISES, ROOT, Study, arm_overlay, closed, spread, table, value

from lightning_modules.cli import main


def study(folder: Path, *more: Path) -> Study:
    return Study(ROOT / "configs/tdsm_digits.yaml", folder, 0.4, more)


def resolved(job: Job) -> dict[str, Any]:
    """The config that a job runs."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stopped, redirect_stdout(printed):
        main([*job.words, "--print_config"])
    assert stopped.value.code == 0
    found: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return found


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize("arm", ["reverse", "exact", "learned"])
def test_an_arm_is_a_config_that_the_command_line_takes(arm: str, tmp_path: Path) -> None:
    # Metrics and pictures are no arm's business, and take most of the time to parse.
    (tmp_path / "silent.yaml").write_text("trainer: {callbacks: null}")
    job = study(tmp_path / "runs", tmp_path / "silent.yaml").arm(arm, "asymmetric", 3)
    config = resolved(job)
    wanted = yaml.safe_load((job.place.parent / f"{arm}.yaml").read_text())
    found = config["model"]["init_args"]
    assert {name: found[name] for name in wanted["model"]["init_args"]} == wanted["model"]["init_args"]
    assert (found["classifier"] is None) == (arm == "reverse")
    noise = config["data"]["init_args"]["label_noise"]["init_args"]
    assert (noise["kind"], noise["rate"], noise["seed"]) == ("asymmetric", 0.4, 3)
    assert config["seed_everything"] == 3
    assert config["trainer"]["default_root_dir"] == str(job.place) == str(tmp_path / f"runs/asymmetric/seed_3/{arm}")


def test_the_other_arms_set_what_these_set(tmp_path: Path) -> None:
    arms = {arm: arm_overlay(arm, "symmetric", 0.4, 0, tmp_path)["model"]["init_args"] for arm in ARMS}
    assert arms["clean"] == arms["noisy"] == arms["reverse"] | {"weighting": "none"}
    assert arms["sampled"] == arms["learned"] | {"classifier_from": arms["exact"]["classifier_from"]}
    assert arms["learned"]["classifier_from"] != arms["exact"]["classifier_from"]


def test_arms_start_from_what_the_stages_write(tmp_path: Path) -> None:
    ours = study(tmp_path)
    for kind in ("known_classifier", "learned_classifier"):
        job = ours.classifier(kind, "symmetric", 1)
        arm = "learned" if kind == "learned_classifier" else "sampled"
        taken = arm_overlay(arm, "symmetric", 0.4, 1, ours.runs("symmetric", 1))["model"]["init_args"]
        assert taken["classifier_from"] == str(job.place / "checkpoints/last.ckpt")
    transition = resolved(job)["model"]["init_args"]["transition"]
    assert transition["class_path"].endswith("LearnedTransition")
    # The metrics of all arms look for the judge here.
    assert ours.judge().place == tmp_path / "digits_clean_classifier"


def test_true_labels_are_learned_from_once(tmp_path: Path) -> None:
    clean, other = (study(tmp_path).arm("clean", noise, 2) for noise in NOISES)
    assert clean == other
    overlay = yaml.safe_load((clean.place.parent / "clean.yaml").read_text())
    assert overlay["vars"] == {"noise": "symmetric", "rate": 0.0, "labels_seed": 2}


# ---------------------------------------------------------------- what is printed


def run(fid: float, cas: float, consistency: float) -> dict[str, float]:
    """Metrics of a run as they are logged, with some that are in no column."""
    return {
        "test_fid_classifier": fid,
        "test_cw_fid_classifier": 10 * fid,
        "test_cas_wideresnet": cas,
        "test_label_consistency_classifier": consistency,
        "test_label_consistency_real_classifier": 0.99,
        "test_cw_precision_k3_classifier": 0.5,
    }


def test_a_column_finds_its_metric() -> None:
    assert [value(run(2.0, 0.75, 0.5), column) for column in COLUMNS] == [2.0, 20.0, 75.0, 50.0]


def test_shares_of_the_gap_are_of_the_same_seed() -> None:
    # Lower is better in the first, higher in the second; the last one is worse than noisy labels.
    assert closed([4.0, 75.0, 40.0], [8.0, 50.0, 50.0], [3.0, 100.0, 100.0]) == [80.0, 50.0, -20.0]


def test_the_table_has_means_spreads_and_gaps_in_pairs() -> None:
    found = {
        "clean": [run(1.0, 1.0, 1.0), run(2.0, 0.9, 1.0)],
        "noisy": [run(5.0, 0.5, 0.5), run(6.0, 0.5, 0.5)],
        "sampled": [run(2.0, 0.75, 0.9), run(4.0, 0.7, 0.9)],
    }
    head, _, *rows = table(found).splitlines()
    titles = "FID | CW-FID | CAS, % | consistency, % | CW-FID gap closed, % | CAS gap closed, %"
    assert head == f"| arm | {titles} | consistency gap closed, % |"
    # Standard deviation of two numbers: their difference over the root of two.
    assert rows[1] == "| noisy | 5.50 ± 0.71 | 55.00 ± 7.07 | 50.0 ± 0.0 | 50.0 ± 0.0 |  |  |  |"
    cells = "3.00 ± 1.41 | 30.00 ± 14.14 | 72.5 ± 3.5 | 90.0 ± 0.0 | 62 ± 18 | 50 ± 0 | 80 ± 0"
    assert rows[2] == f"| sampled | {cells} |"
    assert table({"sampled": found["sampled"]}).splitlines()[2].endswith("| 90.0 ± 0.0 |  |  |  |")
    assert spread([1.25], 2) == "1.25"
