"""Which pretraining helps a segmenter that has 5, 10 or 20 labels? Runs the configs of the README and prints tables.

    FEWLIGHT_DATA=../shared/data python benchmarks/hybrid_transfer.py --overlay configs/overlays/cpu_32px.yaml
    python benchmarks/hybrid_transfer.py --task lesions

The first goes from ISIC 2018 to PH2, the second from generated source lesions to generated target lesions and needs no
data. Every arm is the same network (but `smp`, a segmentation_models_pytorch UNet) with the same budget; arms differ in
what the network did before (`scratch`: nothing), methods in what is done with the labels (`vanilla`: the whole network
is fine-tuned, `ledm`: pixel classifiers on its frozen features). Label seed s starts from pretraining seed
`--pretrain_seeds`[s mod their number], in every arm, so that arms can be compared in pairs. `--arms` takes any name of
ARMS below, the variations of the ablation too.

Runs that are finished are not repeated, whatever has changed since: remove their folder to do so. One process a core:
`--jobs` at a time, one thread each.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jobs import Job, is_done, run_all
from transfer_report import Results, differences_table, draw_chart, means_table

CONFIGS = Path(__file__).parent.parent / "configs"
LAST = Path("checkpoints") / "last.ckpt"
MAIN_ARMS = ("scratch", "smp", "supervised", "generative", "hybrid")


@dataclass(frozen=True)
class Task:
    """The configs of a source and a target domain."""

    source: str
    target: str
    ledm: str
    runs: str


TASKS = {
    "ph2": Task("hybrid_isic.yaml", "hybrid_ph2.yaml", "ledm_ph2.yaml", "runs"),
    "lesions": Task("stages/lesions_source.yaml", "hybrid_lesions.yaml", "ledm_lesions.yaml", "runs/lesions"),
}
_UNET = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 2}
SMP = (
    "--model.init_args.network",
    json.dumps({"class_path": "segmentation_models_pytorch.Unet", "init_args": _UNET}),
)


def _pretraining(objective: str, *flags: str) -> tuple[str, ...]:
    return ("--vars.pretraining", objective, *flags)


def _process(**arguments: str) -> tuple[str, ...]:
    return tuple(w for k, v in arguments.items() for w in (f"--model.init_args.process.init_args.{k}", v))


# Flags of the fit on the source domain.
PRETRAININGS: dict[str, tuple[str, ...]] = {
    **{name: _pretraining(name) for name in ("hybrid", "supervised", "generative")},
    "smp": _pretraining("supervised", *SMP),
    "hybrid_paper_weight": _pretraining("hybrid", "--vars.mask_weight", "1e-4", "--vars.mask_loss", "mse"),
    **{f"hybrid_weight_{w}": _pretraining("hybrid", "--vars.mask_weight", w) for w in ("0.01", "0.1", "1", "3")},
    **{f"hybrid_mse_{w}": _pretraining("hybrid", "--vars.mask_weight", w, "--vars.mask_loss", "mse") for w in ("1",)},
    **{f"hybrid_clean_{c}": _pretraining("hybrid", *_process(clean_share=c)) for c in ("0", "0.25", "0.75")},
    "hybrid_linear": _pretraining("hybrid", *_process(schedule="linear")),
    "hybrid_edm": _pretraining("hybrid", "--model.init_args.process", "EDMProcess", *_process(clean_share="0.5")),
    **{
        f"{name}_4000_steps": _pretraining(name, "--vars.pretrain_steps", "4000")
        for name in ("hybrid", "supervised", "generative")
    },
}


@dataclass(frozen=True)
class Arm:
    """Where the weights come from, flags of the fit on the target domain, and the share of drawn pairs in it."""

    pretraining: str | None
    flags: tuple[str, ...] = ()
    drawn_share: float = 0.0


_NO_AUGMENTATION = {"class_path": "albumentations.Compose", "init_args": {"transforms": []}}
# Fine-tuning goes on denoising, on the labelled images; half of them are shown clean.
_KEEP_DENOISING = ("--model.init_args.objective", "hybrid", "--model.init_args.mask_loss", "ce")
ARMS: dict[str, Arm] = {
    "scratch": Arm(None),
    **{name: Arm(name, SMP if name == "smp" else ()) for name in PRETRAININGS},
    **{f"{a}_lr_{r}": Arm(a, ("--vars.finetune_lr", r)) for a in ("hybrid", "supervised") for r in ("2e-4", "1e-3")},
    **{
        f"{a}_trunk_lr_{r}": Arm(a, ("--model.init_args.trunk_lr_scale", r))
        for a in ("hybrid", "supervised")
        for r in ("0.1", "0.3")
    },
    "hybrid_no_augmentation": Arm("hybrid", ("--data.init_args.train_transform", json.dumps(_NO_AUGMENTATION))),
    **{f"hybrid_drawn_{share}": Arm("hybrid", drawn_share=share) for share in (0.25, 0.5)},
    "hybrid_keeps_denoising": Arm("hybrid", (*_KEEP_DENOISING, "--model.init_args.mask_weight", "1")),
}


def pretraining_job(task: Task, root: Path, shared: Sequence[str], name: str, seed: int) -> Job:
    """A fit on the source domain."""
    place = _pretrained(root, name, seed)
    words = ("fit", "--config", str(CONFIGS / task.source), *shared, *PRETRAININGS[name])
    return Job(place, (*words, "--seed_everything", str(seed), *_in(place)))


def target_job(task: Task, root: Path, shared: Sequence[str], case: tuple[str, str, int, int], pretrained: int) -> Job:
    """The fit and test on the target domain of one (arm, method, labels, seed)."""
    name, method, labels, seed = case
    arm = ARMS[name]
    place = root / name / method / f"labels_{labels}_seed_{seed}"
    config = task.ledm if method == "ledm" else task.target
    start = "null" if arm.pretraining is None else str(_pretrained(root, arm.pretraining, pretrained) / LAST)
    words = ["fit", "--config", str(CONFIGS / config), *shared, "--stages", "null"]
    words += ["--model.init_args.init_from", start, *_labels(labels, seed), *_in(place)]
    if arm.drawn_share:
        drawn = generator_job(task, root, shared, (labels, seed), pretrained).place / "pairs"
        words += ["--data.init_args.synthetic_images", str(drawn)]
        words += ["--data.init_args.synthetic_share", str(arm.drawn_share)]
    # The noise process is the pretraining's in everything that starts from it.
    known = PRETRAININGS.get(arm.pretraining or "", ())
    words += [w for i, w in enumerate(known) if ".process" in w or (i and ".process" in known[i - 1])]
    if method == "ledm" and arm.pretraining is not None and arm.pretraining.startswith("supervised"):
        words += ["--model.init_args.sigmas", "[0.0]"]  # it has never seen noise
    return Job(place, (*words, *arm.flags, "--seed_everything", str(seed)))


def generator_job(task: Task, root: Path, shared: Sequence[str], case: tuple[int, int], pretrained: int) -> Job:
    """The fit that goes on with the hybrid objective on the labelled target images, and draws pairs at its end."""
    place = root / "generators" / "labels_{}_seed_{}".format(*case)
    overlay = yaml.safe_load(Path(shared[1]).read_text()) if shared else {}
    size = overlay.get("data", {}).get("init_args", {}).get("image_size", 32)
    start = str(_pretrained(root, "hybrid", pretrained) / LAST)
    request = {"num_images": 256, "image_size": size, "sampler": "ancestral", "num_steps": 50}
    writer = {
        "class_path": "SyntheticImageWriter",
        "init_args": {"output_dir": str(place / "pairs"), "request": request},
    }
    words = ["fit", "--config", str(CONFIGS / task.target), *shared, "--stages", "null", *_KEEP_DENOISING]
    words += [
        "--model.init_args.mask_weight",
        "0.3",
        "--model.init_args.init_from",
        start,
        *_labels(*case),
        *_in(place),
    ]
    return Job(place, (*words, "--trainer.callbacks", json.dumps([writer]), "--test_after_fit", "false"))


def _labels(labels: int, seed: int) -> tuple[str, ...]:
    return ("--data.init_args.num_labels", str(labels), "--data.init_args.labels_seed", str(seed))


def _pretrained(root: Path, name: str, seed: int) -> Path:
    return root / "pretrained" / f"{name}_seed_{seed}"


def _in(place: Path) -> tuple[str, ...]:
    return ("--trainer.default_root_dir", str(place), "--trainer.enable_progress_bar", "false")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="ph2")
    parser.add_argument("--overlay", type=Path, help="the size of the runs, from configs/overlays")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(MAIN_ARMS))
    parser.add_argument("--methods", nargs="+", choices=("vanilla", "ledm"), default=["vanilla", "ledm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="which images are labelled")
    parser.add_argument("--pretrain_seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--chart", type=Path, help="write the picture of the README here, as SVG")
    args = parser.parse_args()
    task, shared = TASKS[args.task], ["--overlay", str(args.overlay)] if args.overlay else []
    runs = yaml.safe_load(args.overlay.read_text()).get("runs", task.runs) if args.overlay else task.runs
    root = Path(runs) / "transfer" / args.task
    cases = [
        (arm, method, labels, seed)
        for labels in args.labels
        for seed in args.seeds
        for method in args.methods
        for arm in args.arms
        if not (method == "ledm" and arm == "smp")  # its features know no noise level and have other shapes
    ]
    starts = {case: args.pretrain_seeds[case[3] % len(args.pretrain_seeds)] for case in cases}
    jobs = {case: target_job(task, root, shared, case, starts[case]) for case in cases}
    open_ones = {(ARMS[case[0]].pretraining, starts[case]) for case in cases if not is_done(jobs[case])}
    needed = sorted((name, seed) for name, seed in open_ones if name is not None)
    run_all([pretraining_job(task, root, shared, name, seed) for name, seed in needed], args.jobs)
    drawn = dict.fromkeys(case[2:] for case in cases if ARMS[case[0]].drawn_share and not is_done(jobs[case]))
    seeds = args.pretrain_seeds
    run_all([generator_job(task, root, shared, c, seeds[c[1] % len(seeds)]) for c in drawn], args.jobs)
    run_all(list(jobs.values()), args.jobs)
    results: Results = {case: json.loads((job.place / "metrics.json").read_text()) for case, job in jobs.items()}
    print(means_table(results))
    print(differences_table(results))
    if args.chart:
        args.chart.write_text(draw_chart(results))


if __name__ == "__main__":
    main()
