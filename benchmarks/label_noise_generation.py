"""What do wrong labels cost a conditional diffusion model, and how much of it does TDSM win back? Prints a table.

    python benchmarks/label_noise_generation.py
    python benchmarks/label_noise_generation.py --figure digits.png
    FEWLIGHT_DATA=../shared/data python benchmarks/label_noise_generation.py --config configs/tdsm_mnist.yaml

For each kind of noise and each seed, which chooses the wrong labels and starts all networks, it runs a config's stages
and then the generator in every arm, all on the same images, steps and judge:

    clean       plain diffusion on true labels: the ceiling
    noisy       plain diffusion on the wrong labels
    reverse     weights from the label alone (S-DSM), with the true transition matrix
    exact       TDSM, all classes with a weight above 0.001 summed and renormalised
    sampled     TDSM, one other class drawn
    learned     TDSM (sampled) with a transition matrix learned together with its classifier (VolMinNet)

The last columns say how much of the gap between noisy and clean is closed, (arm - noisy) / (clean - noisy), in pairs.
FID and class-wise FID are of the judge's features against real test images; not to be compared with Inception's.

`--figure` draws a row of images for each class, plain diffusion left and TDSM (sampled) right, from the same seeds.

Runs that are finished are not repeated, whatever has changed since: remove their folder to do so. One process a core:
`--jobs` at a time, one thread each.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml
from jobs import Job, run_all
from PIL import Image

from callbacks.drawn_sheet import class_sheet

ROOT = Path(__file__).parent.parent
ARMS = ("clean", "noisy", "reverse", "exact", "sampled", "learned")
NOISES = ("symmetric", "asymmetric")
# What the name of a metric begins with, and the title of its column.
COLUMNS = (
    ("test_fid_", "FID"),
    ("test_cw_fid_", "CW-FID"),
    ("test_cas_", "CAS, %"),
    ("test_label_consistency_", "consistency, %"),
)
_PLAIN: dict[str, Any] = {"weighting": "none", "classifier": None, "classifier_from": None}


def arm_overlay(arm: str, noise: str, rate: float, seed: int, runs: Path) -> dict[str, Any]:
    """What an arm changes in the config of the generator."""
    known, learned = (
        {"classifier_from": str(runs / stage / "checkpoints/last.ckpt")}
        for stage in ("known_classifier", "learned_classifier")
    )
    model: dict[str, Any] = {
        "clean": _PLAIN,
        "noisy": _PLAIN,
        "reverse": _PLAIN | {"weighting": "reverse"},
        "exact": {"others": "exact", "threshold": 0.001} | known,
        "sampled": {"others": "sampled"} | known,
        "learned": {"others": "sampled"} | learned,
    }[arm]
    chosen = {"noise": noise, "rate": 0.0 if arm == "clean" else rate, "labels_seed": seed}
    trainer = {"default_root_dir": str(runs / arm), "enable_progress_bar": False}
    return {"seed_everything": seed, "vars": chosen, "model": {"init_args": model}, "trainer": trainer}


def stage_overlay(stage: str, noise: str, rate: float, seed: int, place: Path) -> dict[str, Any]:
    """What the seed and the noise change in the config of a stage."""
    overlay: dict[str, Any] = {
        "seed_everything": seed,
        "trainer": {"default_root_dir": str(place), "enable_progress_bar": False},
    }
    if stage != "judge":
        overlay["vars"] = {"noise": noise, "rate": rate, "labels_seed": seed}
    if stage == "learned_classifier":
        overlay["model"] = {
            "init_args": {"transition": {"class_path": "LearnedTransition", "init_args": {"lr_scale": 5.0}}}
        }
    return overlay


class Study:
    """The runs of one config.

    Args:
        config: Config of the generator; its stages are the judge and the classifier of noisy images.
        root: Where the runs go.
        rate: Probability of a wrong label.
        more: Overlays for all runs.
    """

    def __init__(self, config: Path, root: Path, rate: float, more: Sequence[Path]) -> None:
        self.config, self.root, self.rate, self.more = config, root, rate, more
        stages = yaml.safe_load(config.read_text())["stages"]
        self.judge_config, self.classifier_config = (config.parent / stage for stage in stages)

    def judge(self) -> Job:
        """The classifier of clean images that the metrics use; one for all."""
        name = yaml.safe_load(self.judge_config.read_text())["trainer"]["default_root_dir"].rpartition("/")[2]
        return self._job(self.judge_config, stage_overlay("judge", "", 0.0, 0, self.root / name), self.root / name)

    def classifier(self, stage: str, noise: str, seed: int) -> Job:
        """A classifier of noisy images, with T known or learned."""
        place = self.runs(noise, seed) / stage
        return self._job(self.classifier_config, stage_overlay(stage, noise, self.rate, seed, place), place)

    def arm(self, arm: str, noise: str, seed: int) -> Job:
        """A generator; clean ones do not depend on the noise."""
        noise = NOISES[0] if arm == "clean" else noise
        runs = self.runs(noise, seed)
        return self._job(self.config, arm_overlay(arm, noise, self.rate, seed, runs), runs / arm)

    def runs(self, noise: str, seed: int) -> Path:
        """Folder of a kind of noise and a seed."""
        return self.root / noise / f"seed_{seed}"

    def _job(self, config: Path, overlay: Mapping[str, Any], place: Path) -> Job:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.parent / f"{place.name}.yaml"
        file.write_text(yaml.safe_dump(dict(overlay)))
        words = ["fit", "--config", str(config), "--runs", str(self.root)]
        for path in (*self.more, file):
            words += ["--overlay", str(path)]
        return Job(place, (*words, "--stages", "null"))


def value(metrics: Mapping[str, float], column: tuple[str, str]) -> float:
    """A column's metric of a run, percentages as such."""
    (name,) = [name for name in metrics if name.startswith(column[0]) and "_real_" not in name]
    return metrics[name] * (100 if column[1].endswith("%") else 1)


def closed(arm: Sequence[float], noisy: Sequence[float], clean: Sequence[float]) -> list[float]:
    """Share of the gap between noisy and clean that an arm closes, in percent, seed by seed."""
    return [100 * (a - n) / (c - n) for a, n, c in zip(arm, noisy, clean, strict=True)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A row for each arm; its runs in the order of the seeds."""
    titles = [title for _, title in COLUMNS]
    gaps = [f"{title.removesuffix(', %')} gap closed, %" for title in titles[1:]]
    lines = ["| arm | " + " | ".join([*titles, *gaps]) + " |", "|---" * (1 + len(titles) + len(gaps)) + "|"]
    columns = {arm: [[value(run, column) for run in runs] for column in COLUMNS] for arm, runs in found.items()}
    for arm, values in columns.items():
        cells = [spread(v, 2 if "FID" in title else 1) for v, title in zip(values, titles, strict=True)]
        for place in range(1, len(COLUMNS)):
            known = arm not in ("clean", "noisy") and {"clean", "noisy"} <= columns.keys()
            share = closed(values[place], columns["noisy"][place], columns["clean"][place]) if known else []
            cells.append(spread(share, 0) if share else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(noisy: Path, ours: Path, file: Path) -> None:
    """Draw what two arms draw of each class side by side.

    Args:
        noisy: Run of plain diffusion.
        ours: Run of TDSM.
        file: Where the picture goes.
    """
    sides = [class_sheet(run / "images") for run in (noisy, ours)]
    gap = np.full((sides[0].shape[0], 24, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([sides[0], gap, sides[1]], 1)).save(file)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tdsm_digits.yaml")
    parser.add_argument("--overlay", type=Path, nargs="*", default=[], help="changes for all runs")
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=NOISES)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="where the runs go; default runs/label_noise/<config>")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--figure", type=Path, help="picture of the first noise and seed, a PNG")
    args = parser.parse_args()
    study = Study(args.config, args.runs or Path("runs/label_noise") / args.config.stem, args.rate, args.overlay)
    cases = [(noise, seed) for seed in args.seeds for noise in args.noises]
    needed = {"exact": "known_classifier", "sampled": "known_classifier", "learned": "learned_classifier"}
    kinds = dict.fromkeys(needed[arm] for arm in args.arms if arm in needed)
    first = [study.judge(), *(study.classifier(kind, *case) for case in cases for kind in kinds)]
    jobs = {(arm, *case): study.arm(arm, *case) for case in cases for arm in args.arms}
    run_all(first, args.jobs)
    run_all(list({job.place: job for job in jobs.values()}.values()), args.jobs)
    for noise in args.noises:
        found = {
            arm: [json.loads((jobs[arm, noise, seed].place / "metrics.json").read_text()) for seed in args.seeds]
            for arm in args.arms
        }
        print(f"\n{args.config.stem}, {noise} noise, {args.rate:.0%} wrong, {len(args.seeds)} seeds\n\n{table(found)}")

    if args.figure is not None:
        runs = study.runs(args.noises[0], args.seeds[0])
        figure(runs / "noisy", runs / "sampled", args.figure)


if __name__ == "__main__":
    main()
