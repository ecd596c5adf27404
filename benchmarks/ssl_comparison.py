"""What does each semi-supervised method gain over the labels alone? Runs configs/ssl/*.yaml and prints a table.

    python benchmarks/ssl_comparison.py
    FEWLIGHT_DATA=../shared/data python benchmarks/ssl_comparison.py --overlay configs/overlays/cifar10_250.yaml \
        --methods supervised mean_teacher mixmatch fixmatch freematch dividemix --seeds 0

Label seed s chooses the labels and starts the network, in every method, so that methods can be compared in pairs. The
accuracy is that of the moving average at the end of training (of the network itself where a method has none); `student`
is the network. Seconds a step are those of the whole fit, sweeps included, on one thread.

Runs that are finished are not repeated, whatever has changed since: remove their folder to do so. One process a core:
`--jobs` at a time, one thread each.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import yaml
from jobs import Job, run_all
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

CONFIGS = Path(__file__).parent.parent / "configs" / "ssl"
# What a method on other data is compared with.
BASELINES = {"dividemix": "supervised_noisy", "supervised_noisy": "supervised_noisy"}


def names() -> list[str]:
    """The methods that have a config."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def job(root: Path, overlay: Path | None, method: str, seed: int) -> Job:
    """The fit and test of a method on the labels of a seed; its stages use the same seed and folder."""
    here = root / f"seed_{seed}"
    here.mkdir(parents=True, exist_ok=True)
    choice = here / "seed.yaml"
    choice.write_text(yaml.safe_dump({"seed_everything": seed, "vars": {"labels_seed": seed}}))
    words = ["fit", "--config", str(CONFIGS / f"{method}.yaml"), "--runs", str(here)]
    words += ["--overlay", str(overlay)] if overlay else []
    words += ["--overlay", str(choice), "--trainer.enable_progress_bar", "false"]
    return Job(here / "ssl" / method, tuple(words))


def measured(place: Path) -> dict[str, float]:
    """The metrics of a finished run, and its seconds a step by the clock of its TensorBoard events."""
    metrics: dict[str, float] = json.loads((place / "metrics.json").read_text())
    events = EventAccumulator(str(place))
    events.Reload()
    logged = events.Scalars("train_loss")
    metrics["train_seconds_per_step"] = (logged[-1].wall_time - logged[0].wall_time) / (
        logged[-1].step - logged[0].step
    )
    return metrics


def baseline(method: str) -> str:
    """The run that a method is compared with."""
    return BASELINES.get(method, "supervised")


def row(method: str, runs: Sequence[dict[str, float]], alone: Sequence[dict[str, float]]) -> str:
    """One line of the table."""
    accuracy = [100 * run["test_accuracy"] for run in runs]
    student = [100 * run.get("test_accuracy_student", run["test_accuracy"]) for run in runs]
    pairs = [a - 100 * b["test_accuracy"] for a, b in zip(accuracy, alone, strict=True)]
    seconds = [run["train_seconds_per_step"] for run in runs]
    cells = [method, _spread(accuracy), _spread(pairs, sign=True), _spread(student), f"{1000 * mean(seconds):.0f}"]
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float], sign: bool = False) -> str:
    centre = f"{mean(values):+.1f}" if sign else f"{mean(values):.1f}"
    return centre if len(values) < 2 else f"{centre} ± {stdev(values):.1f}"


def table(results: dict[tuple[str, int], dict[str, float]], methods: Sequence[str], seeds: Sequence[int]) -> str:
    """The table in Markdown, best first."""
    runs = {method: [results[method, seed] for seed in seeds] for method in methods}
    order = sorted(methods, key=lambda method: -mean(run["test_accuracy"] for run in runs[method]))
    head = [
        "| method | test accuracy, % | minus supervised, in pairs | student | ms a step |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row(method, runs[method], runs[baseline(method)]) for method in order)])


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", type=Path, help="other data or another size, from configs/overlays")
    parser.add_argument("--methods", nargs="+", choices=names(), default=names())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="which images are labelled")
    parser.add_argument("--runs", type=Path, help="where the runs go; default runs/<overlay or digits>")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    args = parser.parse_args()
    root = args.runs or Path("runs") / "ssl_comparison" / (args.overlay.stem if args.overlay else "digits")
    # Baselines first: they are stages of others, which skip them when they are finished.
    first = sorted({baseline(method) for method in args.methods})
    methods = [*first, *(method for method in args.methods if method not in first)]
    jobs = {(method, seed): job(root, args.overlay, method, seed) for method in methods for seed in args.seeds}
    run_all([jobs[case] for case in jobs if case[0] in first], args.jobs)
    run_all([jobs[case] for case in jobs if case[0] not in first], args.jobs)
    results = {case: measured(job.place) for case, job in jobs.items()}
    print(table(results, methods, args.seeds))


if __name__ == "__main__":
    main()
