"""Dual pseudo training on digits, made tiny: killed, changed, in rounds, by two processes, and poisoned."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import lightning
from dual_pseudo_runs import PER_CLASS, Kill, artifacts, finished, hide_labels, run, write_configs

from datamodules import pseudo_labels, synthetic_images
from lightning_modules import LinearProbe, NoisyLabelClassifier, TDSMDiffusion, stages
from lightning_modules.cli import main

SHORT = ("dpt_digits_classifier", "dpt_digits_generator")
DRAWING = Kill("dpt_digits_generator", TDSMDiffusion, "draw", 4)  # the first image is a trial before the training
KILLS = [
    Kill("dpt_digits_classifier", pseudo_labels, "write_atomically", 2),  # the table is there, its manifest is not
    Kill("dpt_digits_noisy_classifier", NoisyLabelClassifier, "training_step", 3),
    Kill("dpt_digits_generator_tdsm", TDSMDiffusion, "training_step", 3),
    Kill("dpt_digits_generator_tdsm", TDSMDiffusion, "draw", 3),
    Kill("dpt_digits_tdsm", LinearProbe, "training_step", 1),
    Kill("dpt_digits_tdsm", pseudo_labels, "write_atomically", 2),
]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a classifier, a generator and the last fit."""
    return write_configs(tmp_path_factory.mktemp("configs"), only=SHORT, test_after_fit=False)


@pytest.fixture(scope="module")
def straight(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where they ran undisturbed; not to be written to."""
    folder = tmp_path_factory.mktemp("straight")
    run(folder, "fit", "--config", short)
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that each fit ended with."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("last.ckpt")):
        checkpoint = torch.load(path, weights_only=True)
        name = str(path.relative_to(folder))
        found |= {f"{name} {key}": value for key, value in checkpoint["state_dict"].items()}
    return found


def _require_same(folder: Path, other: Path) -> None:
    """The same runs, artifacts and weights, bit by bit, and nothing that only one of them has."""
    assert artifacts(folder) == artifacts(other)
    assert finished(folder).keys() == finished(other).keys()
    assert not list(folder.rglob("previous"))
    mine, theirs = _weights(folder), _weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name, value in mine.items() if not torch.equal(value, theirs[name])] == []


def _require_once(runs: Path, images: int = 1297) -> None:
    """Every image has one pseudo-label and every drawn image is there once."""
    folders = list(runs.rglob("pseudo_labels.parquet"))
    assert len(folders) >= 2
    for file in folders:
        keys = pseudo_labels.read(file.parent).table.keys.to_pylist()
        assert len(set(keys)) == len(keys) == images
    for folder in runs.rglob("generator_*/images"):
        rows = synthetic_images.read(folder, "classes").rows
        assert Counter(row.label for row in rows) == dict.fromkeys(range(10), PER_CLASS)
        assert [row.seed for row in rows] == list(range(10 * PER_CLASS))
        assert len(list(folder.rglob("*.png"))) == 10 * PER_CLASS


@pytest.mark.slow
def test_a_kill_while_a_stage_draws_changes_nothing(short: Path, straight: Path, tmp_path: Path) -> None:
    said = run(tmp_path, "fit", "--config", short, kill=DRAWING)
    assert "stage 2/2 dpt_digits_generator.yaml: started" in said
    done = finished(tmp_path)
    assert list(done) == ["runs/dpt_digits/round_0"]
    drawn = tmp_path / "runs/dpt_digits/generator_1/images"
    assert list(drawn.rglob("*.png"))
    assert not (drawn / "manifest.json").exists()

    said = run(tmp_path, "fit", "--config", short)
    assert "stage 1/2 dpt_digits_classifier.yaml: skipped, finished in runs/dpt_digits/round_0" in said
    assert "stage 2/2 dpt_digits_generator.yaml: resumed" in said
    assert finished(tmp_path).items() >= done.items()
    _require_same(tmp_path, straight)
    _require_once(tmp_path)


@pytest.mark.slow
def test_so_does_a_kill_in_every_stage(tmp_path: Path) -> None:
    config = write_configs(tmp_path / "configs", "dpt_digits_tdsm")
    run(tmp_path / "straight", "fit", "--config", config)
    folder = tmp_path / "killed"
    done: dict[str, int] = {}
    for kill in KILLS:
        said = run(folder, "fit", "--config", config, kill=kill)
        assert said.count("skipped, finished in") == len(done)
        now = finished(folder)
        assert now.items() >= done.items(), kill
        done = now
    runs = "runs/dpt_digits_tdsm"
    assert f"{runs}/round_1" not in done
    said = run(folder, "fit", "--config", config)
    assert said.count("skipped, finished in") == 6
    assert finished(folder).items() >= done.items()
    # The last fit is not a stage: what a killed one has left is set aside.
    shutil.rmtree(folder / runs / "round_1/previous")
    _require_same(folder, tmp_path / "straight")
    _require_once(folder)


def _hashes(config: Path, *flags: str) -> dict[str, str]:
    """What the stages of a pipeline are resolved to; nothing is trained."""
    seen: list[stages.Stage] = []

    def stop(found: list[stages.Stage], _: str) -> None:
        seen.extend(found)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_stages", stop)
        with pytest.raises(KeyboardInterrupt):
            main(["fit", "--config", str(config), *flags])
    return {stage.run_dir.name: stage.config_hash for stage in seen}


def test_a_change_reaches_the_stages_that_depend_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config = write_configs(tmp_path / "configs", only=(*SHORT, "dpt_digits_self_training"))
    before = _hashes(config)
    assert list(before) == ["round_0", "generator_1", "self_training"]
    for flags, touched in (
        (("--vars.images_per_class", "2"), ["generator_1"]),
        # The generator finds other pseudo-labels, which a hash cannot tell: their manifest is among its inputs.
        (("--vars.labels_seed", "1"), ["round_0", "self_training"]),
    ):
        now = _hashes(config, *flags)
        assert [name for name, found in now.items() if found != before[name]] == touched
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_changed_config_repeats_what_it_touches(tmp_path: Path) -> None:
    config = write_configs(tmp_path / "configs")
    runs = tmp_path / "runs/dpt_digits"
    run(tmp_path, "fit", "--config", config)
    done = finished(runs)
    assert list(done) == ["all_labels", "generator_1", "round_0", "round_1", "self_training"]
    (tmp_path / "workers.yaml").write_text("data: {init_args: {num_workers: 1}}")
    for flags, again in (
        (["--report", "null", "--overlay", "workers.yaml"], set()),
        (["--vars.images_per_class", "2"], {"generator_1"}),
        (
            ["--vars.images_per_class", "2", "--vars.labels_seed", "1"],
            {"round_0", "generator_1", "self_training"},
        ),
    ):
        said = run(tmp_path, "fit", "--config", config, *flags)
        now = finished(runs)
        changed = {name for name in done if "previous" not in name and now[name] != done[name]}
        assert changed == {*again, "round_1"}, flags
        assert said.count(": started") == len(again)
        assert said.count(": skipped, finished in") == 5 - len(again)
        done = now


@pytest.mark.slow
def test_a_second_round_learns_from_the_first_and_repeats_nothing_of_it(
    short: Path, straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    runs = tmp_path / "runs/dpt_digits"
    before, files = finished(runs), artifacts(runs)
    said = run(tmp_path, "fit", "--config", short, "--rounds", "2")
    after = finished(runs)
    assert after.items() >= before.items()
    assert sorted(after.keys() - before.keys()) == ["generator_2", "round_2"]
    assert said.count("skipped, finished in") == 3
    assert artifacts(runs).items() >= files.items()
    _require_once(runs)

    def consumed(name: str) -> dict[str, str]:
        found: dict[str, str] = json.loads((runs / name / "manifest.json").read_text())["inputs"]
        return found

    for number in (1, 2):
        labels = f"runs/dpt_digits/round_{number - 1}/pseudo_labels/manifest.json"
        drawn = f"runs/dpt_digits/generator_{number}/images/manifest.json"
        assert list(consumed(f"generator_{number}")) == [labels]
        assert list(consumed(f"round_{number}")) == [drawn]
    assert consumed("generator_1") != consumed("generator_2")


@pytest.mark.slow
def test_two_processes_label_and_draw_each_image_once_and_as_one_does(
    short: Path, straight: Path, tmp_path: Path
) -> None:
    two = {"trainer": {"devices": 2, "strategy": "ddp"}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    ran = lightning("fit", "--config", short, "--overlay", "two.yaml", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("started: lightning fit") == 2
    _require_once(tmp_path)
    table = "runs/dpt_digits/round_0/pseudo_labels/pseudo_labels.parquet"
    assert (tmp_path / table).read_bytes() == (straight / table).read_bytes()

    # A generator that two have trained is another one: let two draw from the weights of one.
    drawn = Path("runs/dpt_digits/generator_1/images")
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(straight / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / drawn)
    generator = short.parent / "dpt_digits_generator.yaml"
    resumed = lightning(
        *("fit", "--config", generator, "--vars.images_per_class", str(PER_CLASS), "--vars.steps", "3"),
        *("--vars.sampler_steps", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        *("--ckpt_path", "runs/dpt_digits/generator_1/checkpoints/last.ckpt"),
        cwd=tmp_path,
    )
    assert resumed.returncode == 0, resumed.stderr
    made = [
        {name: data for name, data in artifacts(root / drawn).items() if name != "manifest.json"}
        for root in (tmp_path, straight)
    ]
    assert len(made[0]) == 10 * PER_CLASS + 1
    assert made[0] == made[1]


@pytest.mark.slow
def test_labels_that_are_hidden_are_never_looked_at(tmp_path: Path) -> None:
    only = ("dpt_digits_classifier", "dpt_digits_noisy_classifier", "dpt_digits_generator_tdsm")
    config = write_configs(tmp_path / "configs", "dpt_digits_tdsm", only=only)
    folders = [tmp_path / name for name in ("right", "poisoned")]
    for folder in folders:
        run(folder, "fit", "--config", config, patch=partial(hide_labels, poison=folder.name == "poisoned"))
    _require_same(*folders)
    # The poison was there: a report on pseudo-labels, which may look, says so.
    reports = [json.loads((folder / "runs/dpt_digits_tdsm/round_1/metrics.json").read_text()) for folder in folders]
    assert reports[0] != reports[1]
