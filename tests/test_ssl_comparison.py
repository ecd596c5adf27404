"""The table of benchmarks/ssl_comparison.py, against numbers worked out by hand."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from ssl_comparison import baseline, job, names, table


def test_every_config_is_a_method_and_has_a_baseline_among_them() -> None:
    assert {"supervised", "fixmatch", "dividemix"} <= set(names())
    assert {baseline(name) for name in names()} == {"supervised", "supervised_noisy"}


def test_the_table_has_means_spreads_and_differences_in_pairs() -> None:
    def run(accuracy: float, student: float | None = None) -> dict[str, float]:
        metrics = {"test_accuracy": accuracy, "train_seconds_per_step": 0.02}
        return metrics if student is None else metrics | {"test_accuracy_student": student}

    results = {
        ("supervised", 0): run(0.8, 0.7),
        ("supervised", 1): run(0.6, 0.7),
        ("fixmatch", 0): run(0.9),
        ("fixmatch", 1): run(0.8),
    }
    lines = table(results, ["supervised", "fixmatch"], [0, 1]).splitlines()
    # Standard deviation of two numbers: their difference over the root of two.
    assert lines[2] == "| fixmatch | 85.0 ± 7.1 | +15.0 ± 7.1 | 85.0 ± 7.1 | 20 |"
    assert lines[3] == "| supervised | 70.0 ± 14.1 | +0.0 ± 0.0 | 70.0 ± 0.0 | 20 |"


def test_a_job_gives_its_seed_to_the_stages_too(tmp_path: Path) -> None:
    found = job(tmp_path, Path("o.yaml"), "noisy_student", 3)
    assert found.place == tmp_path / "seed_3/ssl/noisy_student"
    overlays = [found.words[i + 1] for i, word in enumerate(found.words) if word == "--overlay"]
    assert overlays == ["o.yaml", str(tmp_path / "seed_3/seed.yaml")]
    assert "labels_seed: 3" in (tmp_path / "seed_3/seed.yaml").read_text()
