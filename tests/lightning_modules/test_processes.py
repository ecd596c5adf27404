"""What only shows when processes are killed or several of them work together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_runs import environment, lightning, write


def _pipeline(folder: Path, epochs: int, **changes: object) -> Path:
    """A fit that starts from the checkpoint of an earlier one."""
    write(folder, "source", trainer__max_epochs=epochs)
    return write(
        folder,
        "target",
        stages=["source.yaml"],
        model__init_args__init_from="${runs}/source/checkpoints/last.ckpt",
        model__init_args__objective="supervised",
        data__init_args__domain="target",
        test_after_fit=True,
        **changes,
    )


def _weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "runs" / run / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


def _processes_in(folder: Path) -> list[int]:
    """The processes whose working directory is a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            here = (process / "cwd").readlink()
        except OSError:
            continue
        if here == folder:
            found.append(int(process.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc; elsewhere the orphan holds the lock")
def test_a_killed_pipeline_goes_on_where_it_stopped_and_ends_bit_equal(tmp_path: Path) -> None:
    epochs = 12
    command = ("fit", "--config", _pipeline(tmp_path / "straight", epochs))
    straight = lightning(*command, cwd=tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr

    folder = tmp_path / "killed"
    words = ["fit", "--config", str(_pipeline(folder, epochs))]
    killed = subprocess.Popen(
        [sys.executable, "-m", "lightning_modules", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first_checkpoint = folder / "runs/source/checkpoints/last.ckpt"
    _wait_for(first_checkpoint.is_file, seconds=60)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    # The stage's process goes with the one that started it.
    _wait_for(lambda: not _processes_in(folder), seconds=20)
    assert not (folder / "runs/source/manifest.json").exists(), "killed too late to show anything"
    assert torch.load(first_checkpoint, weights_only=True)["epoch"] < epochs - 1

    again = lightning(*words, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "stage 1/1 source.yaml: resumed" in again.stdout
    assert "going on from runs/source/checkpoints/last.ckpt" in again.stdout
    for run in ("source", "target"):
        expected = _weights(tmp_path / "straight", run)
        for name, value in _weights(folder, run).items():
            assert torch.equal(value, expected[name]), (run, name)
    metrics = [json.loads((f / "runs/target/metrics.json").read_text()) for f in (tmp_path / "straight", folder)]
    assert metrics[0] == metrics[1]

    third = lightning(*words, cwd=folder)
    assert "stage 1/1 source.yaml: skipped, finished in runs/source" in third.stdout


def _wait_for(condition: object, seconds: float) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_run_each_stage_once_and_measure_what_one_measures(tmp_path: Path) -> None:
    # Seven test images do not divide by two: the padding must not be counted.
    config = _pipeline(tmp_path, 2, data__init_args__num_labels=17)
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    fitted = lightning("fit", "--config", config, *two, cwd=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    assert fitted.stdout.count("source.yaml: started") == 1
    assert fitted.stdout.count("source.yaml: finished") == 1
    assert not (tmp_path / "runs/source/previous").exists()
    assert not (tmp_path / "runs/target/previous").exists()
    assert json.loads((tmp_path / "runs/target/manifest.json").read_text())["counts"]["test"] == 7

    def measure(*flags: str) -> dict[str, float]:
        result = lightning("test", "--config", config, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        metrics: dict[str, float] = json.loads((tmp_path / "runs/target/metrics.json").read_text())
        return {name: value for name, value in metrics.items() if name.startswith("test_")}

    in_fit = json.loads((tmp_path / "runs/target/metrics.json").read_text())
    one = measure()
    assert measure(*two) == pytest.approx(one, rel=1e-5)
    assert {name: in_fit[name] for name in one} == pytest.approx(one, rel=1e-5)


def test_under_torchrun_missing_stages_are_an_error_and_done_ones_are_not_run_again(tmp_path: Path) -> None:
    config = _pipeline(tmp_path, 1)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    refused = lightning("fit", "--config", config, cwd=tmp_path, **rank)
    assert refused.returncode == 1
    assert "Run them first, or pass --stages null" in refused.stderr
    assert "lightning fit --config" in refused.stderr
    assert not (tmp_path / "runs").exists()


def _torchrun(*words: str | Path, cwd: Path) -> list[subprocess.Popen[str]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lightning_modules"]
    return [_started([*launcher, *map(str, words)], cwd)]


def _srun(*words: str | Path, cwd: Path) -> list[subprocess.Popen[str]]:
    """What `srun --ntasks 2` starts on one node, each process with its own variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "1", "MASTER_PORT": port}
    return [
        _started(
            ["-m", "lightning_modules", *map(str, words)],
            cwd,
            **job,
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
        )
        for rank in (0, 1)
    ]


def _started(words: list[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_what_torchrun_and_slurm_start_ends_like_what_lightning_starts(tmp_path: Path) -> None:
    # Seven test images do not divide by two.
    config = _pipeline(tmp_path, 1, data__init_args__num_labels=17)
    command = ("fit", "--config", config, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    fitted = lightning(*command, cwd=tmp_path)  # its stage is done then, which the others need
    assert fitted.returncode == 0, fitted.stderr
    weights, metrics = _weights(tmp_path, "target"), (tmp_path / "runs/target/metrics.json").read_text()
    for number, launch in enumerate((_torchrun, _srun), 1):
        processes = launch(*command, cwd=tmp_path)
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), outputs
        assert "source.yaml: skipped, finished in runs/source" in outputs[0]
        assert "source.yaml: started" not in "".join(outputs)
        # The run that was there went aside once, not once a process.
        assert sorted(path.name for path in (tmp_path / "runs/target/previous").iterdir()) == [
            str(n) for n in range(1, number + 1)
        ]
        found = _weights(tmp_path, "target")
        assert [name for name, value in weights.items() if not torch.equal(value, found[name])] == []
        assert (tmp_path / "runs/target/metrics.json").read_text() == metrics
        assert json.loads((tmp_path / "runs/target/manifest.json").read_text())["counts"]["test"] == 7
