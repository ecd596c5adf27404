"""What selected pseudo-labels and drawn images do for classifiers that clients train together, over seeds.

For each seed one run of a federated configuration, all of its arms on the same split and the same first weights. Tables
in Markdown: test accuracy, mean ± standard error, and the differences to the arm `labels`, in pairs; how many
pseudo-labels are right, before and after selection; how many drawn images the classifier agrees with. A run that is
finished is not repeated.

    python benchmarks/federated_training.py
    python benchmarks/federated_training.py --config configs/federated_digits.yaml --seeds 0 1 2 3 4 5 --jobs 1
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dual_pseudo_training import with_error
from jobs import Job, run_all
from line_chart import Line, Panel, draw

from callbacks.metrics_report import markdown_table
from lightning_modules.command_line import known_variables

ROOT = Path(__file__).parents[1]
BASELINE = "labels"
_MOST_POINTS = 10

Found = Mapping[int, dict[str, Any]]
"""Seed -> what its run has written as results.json."""


def job(config: Path, root: Path, seed: int, flags: Sequence[str]) -> Job:
    """The run of a seed.

    Raises:
        ValueError: The configuration has no seed to set, so that all runs would be the same.
    """
    if "seed" not in known_variables([str(config)]):
        msg = f"Expected `vars` of {config} with a `seed` that its `seed` and `split.seed` refer to; add it."
        raise ValueError(msg)
    place = root.resolve() / f"seed_{seed}"
    words = ["federate", "--config", str(config.resolve()), f"--vars.seed={seed}", f"--run_dir={place}", *flags]
    return Job(place, tuple(words))


def measured(jobs: Mapping[int, Job]) -> Found:
    """What finished runs found."""
    return {seed: json.loads((job.place / "results.json").read_text()) for seed, job in jobs.items()}


def accuracies(found: Found, arm: str, measure: str = "accuracy") -> dict[int, float]:
    """A measure of an arm in per cent, of the seeds that have it."""
    values = {seed: run["arms"].get(arm, {}).get(measure) for seed, run in found.items()}
    return {seed: 100 * value for seed, value in values.items() if value is not None}


def differences(found: Found, arm: str) -> list[float]:
    """What an arm gains over `labels` in points, seed by seed."""
    own, base = accuracies(found, arm), accuracies(found, BASELINE)
    return [own[seed] - base[seed] for seed in own if seed in base]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error; the value alone where there is one."""
    if not values:
        return "-"
    return with_error(values, sign) if len(values) > 1 else f"{values[0]:{sign}.1f}"


def arms_of(found: Found) -> list[str]:
    """What classifiers were trained on, in the order of the runs."""
    return list(dict.fromkeys(arm for run in found.values() for arm in run["arms"]))


def arm_rows(found: Found) -> Iterator[list[str]]:
    """A row for each arm."""
    for arm in arms_of(found):
        own, pairs = accuracies(found, arm), differences(found, arm)
        notes = dict.fromkeys(note for run in found.values() if (note := run["arms"].get(arm, {}).get("note")))
        yield [
            arm.replace("_", " "),
            spread(list(own.values())),
            "" if arm == BASELINE else spread(pairs, "+"),
            "" if arm == BASELINE else f"{sum(d > 0 for d in pairs)} of {len(pairs)}",
            spread(list(accuracies(found, arm, "worst_client").values())),
            "; ".join([*([] if len(own) == len(found) else [f"{len(own)} of {len(found)} seeds"]), *notes]),
        ]


def _selection_shares(selection: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    labels = selection.get("labels") or 0
    yield "selected, %", 100 * selection["kept"] / labels if labels else None
    for name, key in (("right of all, %", "right"), ("right of the selected, %", "right_of_kept")):
        share = selection.get(key)
        yield name, None if share is None else 100 * share


def _drawn_shares(drawn: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    rate = drawn.get("rate")
    yield "the classifier agrees with, %", None if rate is None else 100 * rate
    yield "images kept", drawn.get("kept")


def share_table(
    title: str,
    found: Found,
    part: str,
    shares: Callable[[Mapping[str, Any]], Iterator[tuple[str, float | None]]],
) -> str | None:
    """A table of what selection or drawing counted: a column for each seed, and the mean; None if no run has any."""
    columns = {seed: dict(shares(run[part])) for seed, run in found.items() if run[part]}
    if not columns:
        return None
    rows = []
    for name in next(iter(columns.values())):
        values = [column[name] for column in columns.values()]
        known = [value for value in values if value is not None]
        rows.append([name, *("-" if value is None else f"{value:.1f}" for value in values), spread(known)])
    return markdown_table([title, *(f"seed {seed}" for seed in columns), "mean"], rows)


def tables(found: Found) -> Iterator[str]:
    """All that is printed."""
    head = ["trained on", "test accuracy, %", "minus labels, in pairs", "seeds gained", "worst client, %", "note"]
    yield markdown_table(head, list(arm_rows(found)))
    selected = share_table("pseudo-labels", found, "selection", _selection_shares)
    drawn = share_table("drawn images", found, "drawn", _drawn_shares)
    yield from (table for table in (selected, drawn) if table is not None)


def curves(found: Found, arm: str) -> list[dict[int, float]]:
    """Round -> test accuracy of an arm in per cent, for each seed that has one."""
    # The arm without more than labels is the first classifier, unless that was trained on a part of them.
    steps = [
        run["rounds"].get(arm, run["rounds"].get("classifier") if arm == BASELINE else None) for run in found.values()
    ]
    return [{int(r): 100 * a for r, a in step.items() if a is not None} for step in steps if step]


def chart(found: Found, arms: Sequence[str]) -> str:
    """Test accuracy by round, mean and standard error over the seeds, and by seed; SVG."""
    by_round, by_seed = [], []
    seeds = list(found)
    for arm in arms:
        name, seen = arm.replace("_", " "), curves(found, arm)
        rounds = evenly(sorted(set.intersection(*map(set, seen)))) if seen else []
        values = [[curve[r] for curve in seen] for r in rounds]
        errors = [stdev(v) / sqrt(len(v)) if len(v) > 1 else 0.0 for v in values]
        by_round.append(Line(name, [(r, mean(v), e) for r, v, e in zip(rounds, values, errors, strict=True)]))
        by_seed.append(Line(name, [(seeds.index(s), a, 0.0) for s, a in accuracies(found, arm).items()]))
    rounds = evenly(sorted({int(x) for line in by_round for x, _, _ in line.points}))
    panels = [
        Panel("mean over seeds", "round", [(r, str(r)) for r in rounds], by_round),
        Panel("at the end", "seed", [(place, str(seed)) for place, seed in enumerate(seeds)], by_seed),
    ]
    return draw(panels, "test accuracy of all clients, %")


def evenly(rounds: Sequence[int]) -> list[int]:
    """At most ten of them, evenly spread, the first and the last among them."""
    if len(rounds) <= _MOST_POINTS:
        return list(rounds)
    return [rounds[round(k * (len(rounds) - 1) / (_MOST_POINTS - 1))] for k in range(_MOST_POINTS)]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "federated_digits.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="split, first weights and order")
    parser.add_argument("--runs", type=Path, help="where the runs go; default runs/<config>_study")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--chart", type=Path, help="where to draw the accuracy by round and by seed, an SVG")
    args, flags = parser.parse_known_args()
    root = args.runs or Path(f"runs/{args.config.stem}_study")
    jobs = {seed: job(args.config, root, seed, flags) for seed in args.seeds}
    run_all(list(jobs.values()), args.jobs)
    found = measured(jobs)
    for table in tables(found):
        print(f"\n{table}")
    if args.chart is not None:
        together = [arm for arm in arms_of(found) if curves(found, arm)]
        args.chart.write_text(chart(found, together))


if __name__ == "__main__":
    main()
