"""Fits that follow each other: which are done, which go on, which begin.

A run directory (`trainer.default_root_dir`) holds config.yaml, checkpoints/, metrics.json, the TensorBoard events
and, written last, manifest.json. No manifest means not finished. A stage is done when its manifest carries the hash
of the stage's resolved configuration, its checkpoint is the one the manifest names, and the files it started from (an
earlier stage's checkpoint) are still the ones it names.
"""

import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_modules.checkpoints import file_sha256
from lightning_modules.run_files import written_whole
from lightning_modules.stage_summary import stage_lines

MANIFEST = "manifest.json"
LAST = Path("checkpoints") / "last.ckpt"
# Entries of a run directory that belong to a fit. Anything else in there is the user's and is never touched.
_RUN_FILES = (
    "checkpoints",
    "config.yaml",
    "config_test.yaml",
    "config_validate.yaml",
    "config_predict.yaml",
    "hparams.yaml",
    "metrics.json",
    MANIFEST,
    "events.out.tfevents.*",
    "hpc_ckpt_*.ckpt",  # Lightning's own, on SLURM; it would go on from one unasked
)
# Set by the process that ran the stages, for the ranks it launches: they find the hash of their own run in it.
_STAGES_RAN = "FEWLIGHT_STAGES_RAN"
_PARENT = "FEWLIGHT_PARENT"
_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "LOCAL_WORLD_SIZE",
    "PL_GLOBAL_SEED",
)
_LAUNCHER_PREFIXES = ("MASTER_", "TORCHELASTIC_", "ROLE_", "GROUP_WORLD")


@dataclass(frozen=True)
class Stage:
    """One fit of a pipeline.

    Attributes:
        config: Its YAML file.
        run_dir: Where it writes.
        config_hash: Of its resolved configuration, its own stages included.
        arguments: What follows `fit` on its command line.
    """

    config: Path
    run_dir: Path
    config_hash: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The stage as one would type it."""
        return shlex.join(["lightning", "fit", *self.arguments])


def write_manifest(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Say that a run is finished: temporary name, then rename.

    Raises:
        OSError: The disk is full or not writable; nothing half-written is left.
    """
    with written_whole(run_dir / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2))


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """The manifest of a run directory; None when there is none or it is not one."""
    try:
        manifest = json.loads((run_dir / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return manifest if isinstance(manifest, dict) else None


def is_done(run_dir: Path, config_hash: str) -> bool:
    """Whether a finished run with this configuration lies in the directory, made from what is there now."""
    manifest = read_manifest(run_dir)
    if manifest is None or manifest.get("config_hash") != config_hash or manifest.get("resumed_from"):
        return False
    files = {Path(path): sha256 for path, sha256 in manifest.get("inputs", {}).items()}
    checkpoint = manifest.get("checkpoint")
    if checkpoint is not None:
        files[run_dir / checkpoint["path"]] = checkpoint["sha256"]
    files |= {Path(path): sha256 for path, sha256 in manifest.get("artifacts", {}).items()}
    return _are(files)


def test_metrics(stages: Sequence[Stage], runs: Path) -> dict[str, dict[str, float]]:
    """What tested stages measured, by their run directories below the folder `runs`."""
    found: dict[str, dict[str, float]] = {}
    for stage in stages:
        place, folder = stage.run_dir, runs.expanduser()
        metrics = (read_manifest(place) or {}).get("metrics", {})
        tested = {k: v for k, v in metrics.items() if k.startswith("test_") and v is not None}
        if tested:
            found[str(place.relative_to(folder) if place.is_relative_to(folder) else place)] = tested
    return found


def has_own_checkpoint(run_dir: Path, config_hash: str) -> bool:
    """Whether the last checkpoint of the directory was written by this configuration from the files that are there."""
    try:
        checkpoint = torch.load(run_dir / LAST, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # absent, truncated or foreign: in each case there is nothing to go on from
        return False
    if not isinstance(checkpoint, dict) or checkpoint.get("config_hash") != config_hash:
        return False
    return _are({Path(path): sha256 for path, sha256 in checkpoint.get("inputs", {}).items()})


def _are(files: Mapping[Path, str]) -> bool:
    return all(path.is_file() and file_sha256(path) == sha256 for path, sha256 in files.items())


def set_previous_run_aside(run_dir: Path) -> Path | None:
    """Move what an earlier fit left in a run directory to previous/<n>: nothing is overwritten or deleted.

    Returns:
        The new place, or None when there was nothing.
    """
    found = _run_files(run_dir)
    if not found:
        return None
    kept = run_dir / "previous"
    number = 1 + max((int(p.name) for p in kept.glob("*") if p.name.isdigit()), default=0)
    target = kept / str(number)
    target.mkdir(parents=True)
    # The manifest goes first: without it the directory no longer counts as finished, wherever this is interrupted.
    for path in sorted(found, key=lambda p: p.name != MANIFEST):
        path.rename(target / path.name)
    return target


def bring_back(run_dir: Path, aside: Path) -> None:
    """Undo `set_previous_run_aside` after a fit that made no step: what was there returns, what that fit left goes.

    Args:
        run_dir: The run directory; all run files in it are that fit's, as the earlier ones were moved.
        aside: What `set_previous_run_aside` returned.
    """
    for path in _run_files(run_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # The manifest comes last: only then is the directory a finished run again.
    for path in sorted(aside.iterdir(), key=lambda p: p.name == MANIFEST):
        path.rename(run_dir / path.name)
    aside.rmdir()
    with suppress(OSError):  # earlier runs lie there too
        aside.parent.rmdir()


def _run_files(run_dir: Path) -> list[Path]:
    files = [path for pattern in _RUN_FILES for path in sorted(run_dir.glob(pattern))]
    return files + [path for path in sorted(run_dir.glob("*")) if _is_artifact(path)]


def _is_artifact(folder: Path) -> bool:
    """Whether a folder is what a callback of a fit made for the next one, finished or begun; another run is not."""
    manifest = (read_manifest(folder) or {}) if folder.is_dir() else {}
    return (folder / "drawing.json").is_file() or manifest.get("kind") in ("pseudo_labels", "synthetic_images")


@contextmanager
def only_one_fit(run_dir: Path) -> Iterator[None]:
    """Hold a run directory against a second fit; the lock falls with the process, however that ends.

    Raises:
        RuntimeError: Another process is training there.
        OSError: It is no folder, or must not be written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+")
    except OSError as error:
        msg = (
            f"Expected `trainer.default_root_dir` to be a folder that can be written to, got {run_dir} "
            f"({error.strerror}); choose another one, or remove or permit what is in the way."
        )
        raise OSError(error.errno, msg) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = (
                f"Expected `trainer.default_root_dir` to be free, but another process is training in {run_dir}; wait "
                "for it, stop it, or give this run another directory."
            )
            raise RuntimeError(msg) from error
        except OSError as error:
            _say(f"{run_dir}: this file system cannot lock ({error.strerror}); do not start a second fit there")
        yield


def outside_world_size() -> int:
    """How many processes torchrun, SLURM or MPI started for this run; 1 when none of them did."""
    sizes = [int(os.environ.get(name, "1")) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE")]
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        sizes.append(2)  # a launcher we do not know: better an error than a stage run twice
    interactive = os.environ.get("SLURM_JOB_NAME") in {"bash", "interactive"}
    return max(sizes[1:] if interactive else sizes)


def is_rank_of(config_hash: str) -> bool:
    """Whether this process is a rank that Lightning launched for a run whose stages have been seen to."""
    return os.environ.get(_STAGES_RAN) == config_hash and "LOCAL_RANK" in os.environ


def run_stages(stages: Sequence[Stage], config_hash: str) -> None:
    """Run the stages that are not done, in order, each in its own process.

    Args:
        stages: The fits to run first.
        config_hash: Of the run they belong to.

    Raises:
        SystemExit: A stage failed; with its exit code.
        RuntimeError: A launcher started several processes and a stage is not done.
    """
    if is_rank_of(config_hash):
        return
    world_size = outside_world_size()
    missing = [s.command for s in stages if world_size > 1 and not is_done(s.run_dir, s.config_hash)]
    if missing:
        commands = "\n".join(f"  {command}" for command in missing)
        msg = (
            f"Expected all `stages` to be done before torchrun, SLURM or MPI start {world_size} processes, but "
            f"these are not:\n{commands}\nRun them first, or pass --stages null to go on without them."
        )
        raise RuntimeError(msg)
    for number, stage in enumerate(stages, 1):
        name = f"stage {number}/{len(stages)} {stage.config.name}"
        if is_done(stage.run_dir, stage.config_hash):  # asked here: it may start from what the one before it wrote
            _say(f"{name}: skipped, finished in {stage.run_dir} (config {stage.config_hash[:12]})")
        else:
            _run_stage(stage, name)
    os.environ[_STAGES_RAN] = config_hash


def _run_stage(stage: Stage, name: str) -> None:
    arguments = list(stage.arguments)
    resumed = has_own_checkpoint(stage.run_dir, stage.config_hash)
    if resumed:
        arguments += ["--ckpt_path", "last"]
    _say(f"{name}: {'resumed' if resumed else 'started'}: {stage.command}")
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER_VARIABLES and not key.startswith(_LAUNCHER_PREFIXES)
    }
    environment[_PARENT] = str(os.getpid())
    code = subprocess.run([sys.executable, "-m", "lightning_modules", "fit", *arguments], env=environment, check=False)
    if code.returncode != 0:
        _say(f"{name}: failed (exit code {code.returncode})")
        raise SystemExit(code.returncode if code.returncode > 0 else 1)
    if not is_done(stage.run_dir, stage.config_hash):
        _say(f"{name}: failed, ended without a manifest for config {stage.config_hash[:12]} in {stage.run_dir}")
        raise SystemExit(1)
    _say(f"{name}: finished")
    for line in stage_lines(stage.run_dir, read_manifest(stage.run_dir)):
        _say(line)


def end_with_parent() -> None:
    """In a stage's process: die when the process that started it does, so that a kill leaves no orphan training.

    Linux only; elsewhere the lock of the run directory keeps a second run out until the orphan ends.
    """
    parent = os.environ.pop(_PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):
        raise SystemExit(1)


def _say(line: str) -> None:
    print(line, flush=True)
