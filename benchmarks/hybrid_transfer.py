"""ISIC 2018 -> PH2 with 20 labels: which pretraining helps? Runs the configs of the README and prints one table.

    FEWLIGHT_DATA=../shared/data python benchmarks/hybrid_transfer.py --overlay configs/overlays/cpu_32px.yaml

Every arm is the same network with the same fine-tuning; they differ in what the network did before. Runs that are
finished are not repeated. One process a core: `--jobs` of them at a time, one thread each.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
PRETRAININGS = ("hybrid", "supervised", "generative")
METRICS = ("test_jaccard", "test_jaccard_isic2018", "test_miou", "test_dice")


def overlay_of(pretraining: str) -> list[str]:
    """The flags that choose a pretraining; hybrid is what the configs say."""
    if pretraining == "hybrid":
        return []
    return ["--overlay", str(CONFIGS / "overlays" / f"pretraining_{pretraining}.yaml")]


def commands(
    runs: Path, shared: Sequence[str], seeds: Sequence[int], labels: int
) -> tuple[dict[Path, list[str]], dict[Path, list[str]]]:
    """The command of each run directory: the pretrainings, and what can run once they are done."""
    pretrain = {
        runs / f"isic_{name}": ["fit", "--config", str(CONFIGS / "hybrid_isic.yaml"), *shared, *overlay_of(name)]
        for name in PRETRAININGS
    }
    target = ["--config", str(CONFIGS / "hybrid_ph2.yaml"), *shared]
    then: dict[Path, list[str]] = {}
    for seed in seeds:
        folder = f"labels_{labels}_seed_{seed}"
        choice = ["--data.init_args.labels_seed", str(seed), "--data.init_args.num_labels", str(labels)]
        scratch = ["--stages", "null", "--model.init_args.init_from", "null", "--vars.pretraining", "scratch"]
        then[runs / "ph2_scratch" / folder] = ["fit", *target, *scratch, *choice]
        for name in PRETRAININGS:
            then[runs / f"ph2_{name}" / folder] = ["fit", *target, *overlay_of(name), *choice]
        for name in ("hybrid", "supervised"):
            place = runs / f"ph2_{name}_before_fine_tuning" / folder
            weights = ["--ckpt_path", str(runs / f"isic_{name}" / "checkpoints" / "last.ckpt")]
            then[place] = ["test", *target, *choice, *weights, "--trainer.default_root_dir", str(place)]
    return pretrain, then


def run_all(jobs: dict[Path, list[str]], at_once: int) -> None:
    """Run what is not finished; a failure stops the script with the output of what failed."""

    def run(place: Path, arguments: list[str]) -> None:
        done = place / ("manifest.json" if arguments[0] == "fit" else "metrics.json")
        if done.is_file():
            print(f"done before: {place}", flush=True)
            return
        command = [sys.executable, "-m", "lightning_modules", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            msg = f"{shlex.join(command)} failed:\n{result.stdout}\n{result.stderr}"
            raise RuntimeError(msg)
        print(f"finished: {place}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(run, place, arguments) for place, arguments in jobs.items()]:
            future.result()


def print_table(runs: Path, seeds: Sequence[int], labels: int) -> None:
    """Mean and standard deviation over the label seeds, and each seed's Jaccard."""
    arms = ["scratch"]
    arms += [a for name in PRETRAININGS for a in (f"{name}_before_fine_tuning", name) if (runs / f"ph2_{a}").is_dir()]
    print(f"| pretraining | {' | '.join(METRICS)} | test_jaccard of each seed |")
    print("|---" * (len(METRICS) + 2) + "|")
    for arm in arms:
        results = [
            json.loads((runs / f"ph2_{arm}" / f"labels_{labels}_seed_{seed}" / "metrics.json").read_text())
            for seed in seeds
        ]
        cells = []
        for metric in METRICS:
            values = [result[metric] for result in results]
            cells.append(f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}")
        each = ", ".join(f"{result['test_jaccard']:.4f}" for result in results)
        print(f"| {arm.replace('_', ' ')} | {' | '.join(cells)} | {each} |")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", type=Path, required=True, help="the size of the runs, from configs/overlays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    args = parser.parse_args()
    runs = Path(yaml.safe_load(args.overlay.read_text())["runs"])
    pretrain, then = commands(runs, ["--overlay", str(args.overlay)], args.seeds, args.labels)
    run_all(pretrain, args.jobs)
    run_all(then, args.jobs)
    print_table(runs, args.seeds, args.labels)


if __name__ == "__main__":
    main()
