"""What drawn images do for a classifier with few labels: dual pseudo training, over label draws.

For each number of labels a class and each choice of them, the fits of configs/dpt_digits.yaml (or of another pipeline
with stages of the same names, `--config`):

    labels alone    the first classifier, which labels all images
    self-training   the same classifier on all images with these pseudo-labels: nothing is drawn
    plain           a diffusion model on the pseudo-labels, then the classifier on K drawn images a class and the labels
    tdsm            the same with a diffusion model that weighs the pseudo-labels by how likely they are wrong
    relabelled      self-training with the labels of the classifier of noisy images that weighs them: nothing is drawn

and the differences to the first in points of test accuracy, in pairs, mean and standard error. A run that is finished
is not repeated.

    python benchmarks/dual_pseudo_training.py
    FEWLIGHT_DATA=../shared/data python benchmarks/dual_pseudo_training.py --config configs/dpt_mnist.yaml
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from jobs import Job, run_all
from line_chart import Line, Panel, draw

from callbacks.metrics_report import markdown_table
from lightning_modules.command_line import known_variables

ROOT = Path(__file__).parents[1]
GENERATORS = {"plain": "generator", "tdsm": "generator_tdsm"}


@dataclass(frozen=True)
class Case:
    """A choice of labels."""

    per_class: int
    seed: int


class Study:
    """The jobs of a pipeline, and what they measured.

    Args:
        config: The pipeline.
        root: Where the runs go.
        most: Images a class that generators draw.
        flags: More flags for all runs.
    """

    def __init__(self, config: Path, root: Path, most: int, flags: Sequence[str]) -> None:
        """Nothing is run here."""
        self.config = config.resolve()
        self.name = config.stem
        self.root = root.resolve()
        self.most = most
        self.flags = tuple(flags)

    def runs(self, case: Case) -> Path:
        """The folder of a case."""
        return self.root / f"labels_{case.per_class}_seed_{case.seed}"

    def judge(self, stage: str) -> Job:
        """What drawn images are measured with, for all cases."""
        return Job(self.root / stage, self._words(self._stage(stage), ["--runs", str(self.root)]))

    def stage(self, case: Case, stage: str, folder: str) -> Job:
        """A stage of a case."""
        return self._job(case, self._stage(f"{self.name}_{stage}"), self.runs(case) / self.name / folder)

    def generator(self, case: Case, arm: str, judge: str) -> Job:
        """A generator of a case."""
        more = [f"--vars.images_per_class={self.most}", f"--vars.judge=../{judge}"]
        return self._job(case, self._stage(f"{self.name}_{GENERATORS[arm]}"), self._drawn(case, arm), more)

    def last(self, case: Case, arm: str, per_class: int) -> Job:
        """The classifier on labels and drawn images."""
        more = [
            f"--data.init_args.synthetic_images={self._drawn(case, arm) / 'images'}",
            f"--data.init_args.synthetic_per_class={per_class}",
        ]
        return self._job(case, self.config, self.runs(case) / self.name / f"{arm}_{per_class}", more)

    def _drawn(self, case: Case, arm: str) -> Path:
        return self.runs(case) / self.name / f"generator_{arm}"

    def _stage(self, stage: str) -> Path:
        return self.config.parent / "stages" / f"{stage}.yaml"

    def _job(self, case: Case, config: Path, place: Path, more: Sequence[str] = ()) -> Job:
        words = ["--stages", "null", "--runs", str(self.runs(case)), f"--trainer.default_root_dir={place}"]
        words += [f"--vars.labels_seed={case.seed}", f"--vars.labels_per_class={case.per_class}", *more]
        return Job(place, self._words(config, words))

    def _words(self, config: Path, words: Sequence[str]) -> tuple[str, ...]:
        """A command line; a fit that knows no such variable goes without it."""
        known = known_variables([str(config)])
        flags = [*words, *self.flags]
        kept = [f for f in flags if not f.startswith("--vars.") or f[len("--vars.") :].partition("=")[0] in known]
        return ("fit", "--config", str(config), *kept)


def run(
    study: Study,
    cases: Sequence[Case],
    arms: Sequence[str],
    amounts: Sequence[int],
    judges: Sequence[str],
    at_once: int,
) -> None:
    """Run what is not done, stage after stage, all cases beside each other."""
    first = [study.stage(case, "classifier", "round_0") for case in cases]
    run_all([*(study.judge(judge) for judge in judges), *first], at_once)
    second = [study.stage(case, "self_training", "self_training") for case in cases]
    second += [study.stage(case, "noisy_classifier", "noisy_classifier_1") for case in cases if "tdsm" in arms]
    run_all(second, at_once)
    run_all([study.stage(case, "relabelled", "relabelled") for case in cases if "tdsm" in arms], at_once)
    run_all([study.generator(case, arm, judges[0]) for case in cases for arm in arms], at_once)
    run_all([study.last(case, arm, k) for case in cases for arm in arms for k in amounts], at_once)


def measured(job: Job) -> dict[str, float]:
    """What a finished job's test found."""
    found: dict[str, float] = json.loads((job.place / "metrics.json").read_text())
    return found


class Results:
    """Test accuracies of all cases, in per cent."""

    def __init__(self, study: Study, cases: Sequence[Case], arms: Sequence[str], amounts: Sequence[int]) -> None:
        """Read what the runs wrote."""
        self.cases = list(cases)
        self.first = {
            case: 100 * measured(study.stage(case, "classifier", "round_0"))["test_accuracy"] for case in cases
        }
        self.gains: dict[str, dict[Case, float]] = {
            "self-training": {c: self._gain(study.stage(c, "self_training", "self_training"), c) for c in cases}
        }
        if "tdsm" in arms:
            jobs = {case: study.stage(case, "relabelled", "relabelled") for case in cases}
            self.gains["relabelled"] = {case: self._gain(job, case) for case, job in jobs.items()}
        for arm in arms:
            for k in amounts:
                self.gains[f"{arm} {k}"] = {c: self._gain(study.last(c, arm, k), c) for c in cases}
        self.drawn = {arm: {c: measured(study.generator(c, arm, "")) for c in cases} for arm in arms}

    def _gain(self, job: Job, case: Case) -> float:
        return 100 * measured(job)["test_accuracy"] - self.first[case]

    def rows(self) -> Iterator[tuple[str, list[Case]]]:
        """Cases by number of labels, then all of them."""
        numbers = sorted({case.per_class for case in self.cases})
        for number in numbers:
            yield f"{number}", [case for case in self.cases if case.per_class == number]
        if len(numbers) > 1:
            yield "all", self.cases


def with_error(values: Sequence[float], sign: str = "+") -> str:
    """Mean and standard error."""
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{mean(values):{sign}.1f} ± {error:.1f}"


def tables(found: Results) -> Iterator[str]:
    """The differences, TDSM against plain diffusion in pairs, and what the generators draw."""
    names = list(found.gains)
    rows = [
        [
            name,
            with_error([found.first[c] for c in cases], ""),
            *(with_error([found.gains[g][c] for c in cases]) for g in names),
        ]
        for name, cases in found.rows()
    ]
    yield markdown_table(["labels a class", "labels alone, %", *names], rows)
    amounts = [g.removeprefix("tdsm ") for g in names if g.startswith("tdsm ")]
    if amounts and "plain" in found.drawn:
        rows = [
            [
                name,
                *(
                    with_error([found.gains[f"tdsm {k}"][c] - found.gains[f"plain {k}"][c] for c in cases])
                    for k in amounts
                ),
            ]
            for name, cases in found.rows()
        ]
        yield markdown_table(["labels a class, tdsm minus plain", *amounts], rows)
    shown = {
        "consistency, %": ("test_label_consistency_classifier", 100),
        "FID": ("test_fid_classifier", 1),
        "CW-FID": ("test_cw_fid_classifier", 1),
    }
    rows = [
        [name, arm, *(with_error([scale * drawn[c][metric] for c in cases], "") for metric, scale in shown.values())]
        for name, cases in found.rows()
        for arm, drawn in found.drawn.items()
    ]
    yield markdown_table(["labels a class", "generator", *shown], rows)


def chart(found: Results, arms: Sequence[str], amounts: Sequence[int]) -> str:
    """The gain against the number of drawn images, and against how good the first classifier is."""

    def spread(values: Sequence[float]) -> tuple[float, float]:
        return mean(values), (stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0)

    lines = [
        Line(
            arm,
            [
                (0, 0.0, 0.0),
                *((i + 1, *spread(list(found.gains[f"{arm} {k}"].values()))) for i, k in enumerate(amounts)),
            ],
        )
        for arm in arms
    ]
    by_amount = Panel("by images drawn", "images a class", [(i, str(k)) for i, k in enumerate((0, *amounts))], lines)
    groups = [(name, cases) for name, cases in found.rows() if name != "all"]
    best = 128 if 128 in amounts else amounts[-1]
    ticks = [
        (mean(found.first[c] for c in cases), f"{name}: {mean(found.first[c] for c in cases):.0f} %")
        for name, cases in groups
    ]
    curves = {arm: f"{arm} {best}" for arm in arms} | {g: g for g in found.gains if g.rpartition(" ")[0] not in arms}
    lines = [
        Line(
            arm,
            [
                (x, *spread([found.gains[key][c] for c in cases]))
                for (x, _), (_, cases) in zip(ticks, groups, strict=True)
            ],
        )
        for arm, key in curves.items()
    ]
    by_quality = Panel(f"by the first classifier ({best} images a class)", "labels a class: its accuracy", ticks, lines)
    return draw([by_amount, by_quality], "test accuracy gained, points")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "dpt_digits.yaml")
    parser.add_argument(
        "--judges", nargs="+", default=["digits_clean_classifier"], help="stages that judge drawn images"
    )
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 2, 5], help="labels a class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(GENERATORS), default=list(GENERATORS))
    parser.add_argument("--amounts", type=int, nargs="+", default=[12, 128, 512], help="drawn images a class")
    parser.add_argument("--runs", type=Path, help="where the runs go; default runs/<config>_study")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--chart", type=Path, help="where to draw two charts, an SVG")
    args, flags = parser.parse_known_args()
    study = Study(args.config, args.runs or Path(f"runs/{args.config.stem}_study"), max(args.amounts), flags)
    cases = [Case(number, seed) for number in args.labels for seed in args.seeds]
    run(study, cases, args.arms, args.amounts, args.judges, args.jobs)
    found = Results(study, cases, args.arms, args.amounts)
    for table in tables(found):
        print(f"\n{table}")
    if args.chart is not None:
        args.chart.write_text(chart(found, args.arms, args.amounts))


if __name__ == "__main__":
    main()
