import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules import stages
from lightning_modules.checkpoints import file_sha256


def _finish(run_dir: Path, config_hash: str, content: bytes = b"weights") -> None:
    """Leave what a finished fit leaves."""
    last = run_dir / stages.LAST
    last.parent.mkdir(parents=True, exist_ok=True)
    last.write_bytes(content)
    checkpoint = {"path": str(stages.LAST), "sha256": file_sha256(last)}
    stages.write_manifest(run_dir, {"config_hash": config_hash, "checkpoint": checkpoint})


def _stage(tmp_path: Path, name: str, config_hash: str) -> stages.Stage:
    return stages.Stage(tmp_path / f"{name}.yaml", tmp_path / name, config_hash, ("--config", f"{name}.yaml"))


def test_a_run_is_done_only_with_its_hash_and_its_checkpoint(tmp_path: Path) -> None:
    assert not stages.is_done(tmp_path, "h")
    _finish(tmp_path, "h")
    assert stages.is_done(tmp_path, "h")
    assert not stages.is_done(tmp_path, "other")
    (tmp_path / stages.LAST).write_bytes(b"other weights")
    assert not stages.is_done(tmp_path, "h")
    (tmp_path / stages.LAST).unlink()
    assert not stages.is_done(tmp_path, "h")
    (tmp_path / stages.MANIFEST).write_text('{"config_hash": "h", "check')
    assert not stages.is_done(tmp_path, "h")


def test_only_an_own_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    last = tmp_path / stages.LAST
    assert not stages.has_own_checkpoint(tmp_path, "h")
    last.parent.mkdir()
    torch.save({"config_hash": "h", "state_dict": {}}, last)
    assert stages.has_own_checkpoint(tmp_path, "h")
    assert not stages.has_own_checkpoint(tmp_path, "other")
    last.write_bytes(last.read_bytes()[:50])
    assert not stages.has_own_checkpoint(tmp_path, "h")


def test_a_previous_run_is_moved_aside_and_the_users_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for number in (1, 2):
        _finish(tmp_path, "h", f"run {number}".encode())
        (tmp_path / "events.out.tfevents.1").write_text("events")
        assert stages.set_previous_run_aside(tmp_path) == tmp_path / "previous" / str(number)
    assert (tmp_path / "previous/1" / stages.LAST).read_bytes() == b"run 1"
    assert (tmp_path / "previous/2" / stages.LAST).read_bytes() == b"run 2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "previous"]


def test_nothing_of_the_users_is_ever_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "other.pth").write_text("weights")
    (tmp_path / "config.yaml").write_text("x: 1")
    aside = stages.set_previous_run_aside(tmp_path)
    assert aside is not None
    assert (aside / "checkpoints" / "other.pth").read_text() == "weights"
    assert (aside / "config.yaml").read_text() == "x: 1"
    assert stages.set_previous_run_aside(tmp_path) is None


def test_a_run_is_not_done_when_what_it_started_from_has_changed(tmp_path: Path) -> None:
    source = tmp_path / "source.ckpt"
    source.write_bytes(b"first")
    _finish(tmp_path, "h")
    manifest = stages.read_manifest(tmp_path)
    assert manifest is not None
    stages.write_manifest(tmp_path, manifest | {"inputs": {str(source): file_sha256(source)}})
    assert stages.is_done(tmp_path, "h")
    source.write_bytes(b"second")
    assert not stages.is_done(tmp_path, "h")
    stages.write_manifest(tmp_path, manifest | {"resumed_from": "elsewhere.ckpt"})
    assert not stages.is_done(tmp_path, "h")


def test_a_run_is_not_done_without_the_artifact_it_made(tmp_path: Path) -> None:
    _finish(tmp_path, "h")
    made = tmp_path / "pairs" / "manifest.json"
    made.parent.mkdir()
    made.write_text('{"kind": "synthetic_images"}')
    manifest = stages.read_manifest(tmp_path)
    assert manifest is not None
    stages.write_manifest(tmp_path, manifest | {"artifacts": {str(made): file_sha256(made)}})
    assert stages.is_done(tmp_path, "h")
    made.unlink()
    assert not stages.is_done(tmp_path, "h")


def test_what_a_run_drew_goes_aside_with_it_and_other_runs_below_it_stay(tmp_path: Path) -> None:
    _finish(tmp_path, "h")
    for name, file, content in (
        ("pairs", "manifest.json", '{"kind": "synthetic_images"}'),
        ("labels", "manifest.json", '{"kind": "pseudo_labels"}'),
        ("begun", "drawing.json", "{}"),
        ("inner_run", "manifest.json", '{"kind": "fit"}'),
        ("mine", "manifest.json", '{"kind": "of something else"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    aside = stages.set_previous_run_aside(tmp_path)
    assert aside is not None
    assert {"pairs", "begun", "manifest.json"} <= {path.name for path in aside.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner_run", "mine", "previous"]
    stages.bring_back(tmp_path, aside)
    assert (tmp_path / "pairs" / "manifest.json").is_file()


def test_a_run_that_made_no_step_gives_the_directory_back(tmp_path: Path) -> None:
    _finish(tmp_path, "h", b"old")
    aside = stages.set_previous_run_aside(tmp_path)
    assert aside is not None
    (tmp_path / "config.yaml").write_text("new")
    stages.bring_back(tmp_path, aside)
    assert stages.is_done(tmp_path, "h")
    assert not (tmp_path / "config.yaml").exists()
    assert not (tmp_path / "previous").exists()


def test_a_run_directory_takes_one_fit_at_a_time(tmp_path: Path) -> None:
    with (
        stages.only_one_fit(tmp_path),
        pytest.raises(RuntimeError, match="another process is training in"),
        stages.only_one_fit(tmp_path),
    ):
        pass
    with stages.only_one_fit(tmp_path):
        pass


def test_a_manifest_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*manifest.json \(No space left on device\); make room"):
        stages.write_manifest(tmp_path, {"config_hash": "h"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1", "RANK": "1"}, 4),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train"}, 8),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"LOCAL_RANK": "0"}, 2),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, 1),
    ],
)
def test_processes_started_from_outside_are_counted(
    variables: dict[str, str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "SLURM_NTASKS", "SLURM_JOB_NAME", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert stages.outside_world_size() == size


class _Runs:
    """Stands in for the processes of stages."""

    def __init__(self, effect: Callable[[list[str]], int]) -> None:
        self.effect = effect
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[Any]:
        assert not check
        self.commands.append(command[3:])
        self.environments.append(env)
        return subprocess.CompletedProcess(command, self.effect(command))


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "FEWLIGHT_STAGES_RAN"):
        monkeypatch.delenv(name, raising=False)
    # run_stages sets it; setting it here makes monkeypatch remove it afterwards.
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "nothing")


@pytest.mark.usefixtures("no_launcher")
def test_stages_run_in_order_and_finished_ones_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = [_stage(tmp_path, "a", "hash_a"), _stage(tmp_path, "b", "hash_b")]
    _finish(tmp_path / "a", "hash_a")

    def finish(_: list[str]) -> int:
        _finish(tmp_path / "b", "hash_b")
        return 0

    runs = _Runs(finish)
    monkeypatch.setattr(subprocess, "run", runs)
    monkeypatch.setenv("MASTER_PORT", "1234")
    stages.run_stages(pipeline, "whole")
    assert runs.commands == [["fit", "--config", "b.yaml"]]
    assert "MASTER_PORT" not in runs.environments[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage 1/2 a.yaml: skipped, finished in")
    assert lines[1] == "stage 2/2 b.yaml: started: lightning fit --config b.yaml"
    assert lines[2] == "stage 2/2 b.yaml: finished"
    stages.run_stages(pipeline, "whole")
    assert len(runs.commands) == 1


@pytest.mark.usefixtures("no_launcher")
def test_an_interrupted_stage_goes_on_from_its_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = tmp_path / "a" / stages.LAST
    last.parent.mkdir(parents=True)
    torch.save({"config_hash": "hash_a", "state_dict": {}}, last)

    def finish(_: list[str]) -> int:
        _finish(tmp_path / "a", "hash_a")
        return 0

    runs = _Runs(finish)
    monkeypatch.setattr(subprocess, "run", runs)
    stages.run_stages([_stage(tmp_path, "a", "hash_a")], "whole")
    assert runs.commands == [["fit", "--config", "a.yaml", "--ckpt_path", "last"]]


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(
    ("code", "exits", "line"), [(3, 3, "failed (exit code 3)"), (0, 1, "ended without a manifest")]
)
def test_a_failed_stage_stops_the_run(
    code: int,
    exits: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = _Runs(lambda _: code)
    monkeypatch.setattr(subprocess, "run", runs)
    with pytest.raises(SystemExit) as stopped:
        stages.run_stages([_stage(tmp_path, "a", "hash_a"), _stage(tmp_path, "b", "hash_b")], "whole")
    assert stopped.value.code == exits
    assert line in capsys.readouterr().out
    assert len(runs.commands) == 1


@pytest.mark.usefixtures("no_launcher")
def test_ranks_that_lightning_launched_do_not_run_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _Runs(lambda _: 1)
    monkeypatch.setattr(subprocess, "run", runs)
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "whole")
    monkeypatch.setenv("LOCAL_RANK", "1")
    stages.run_stages([_stage(tmp_path, "a", "hash_a")], "whole")
    assert runs.commands == []


@pytest.mark.usefixtures("no_launcher")
def test_an_outside_launcher_gets_an_error_with_the_commands_unless_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    pipeline = [_stage(tmp_path, "a", "hash_a")]
    with pytest.raises(RuntimeError, match=r"(?s)2 processes.*lightning fit --config a.yaml.*--stages null"):
        stages.run_stages(pipeline, "whole")
    _finish(tmp_path / "a", "hash_a")
    stages.run_stages(pipeline, "whole")


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    stages.write_manifest(tmp_path, {"config_hash": "h", "metrics": {"a": 0.5}})
    assert json.loads((tmp_path / stages.MANIFEST).read_text()) == {"config_hash": "h", "metrics": {"a": 0.5}}
    assert stages.read_manifest(tmp_path) == {"config_hash": "h", "metrics": {"a": 0.5}}
