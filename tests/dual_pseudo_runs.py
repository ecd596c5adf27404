"""Dual pseudo training on digits as its configs have it, in seconds, each fit in a process that can be killed."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cli_runs import environment, smaller

from datamodules import DigitsSource
from lightning_modules.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
PER_CLASS = 3
# In three steps of the generator it writes checkpoints that a killed fit goes on from; thirty images are four blocks.
_VARS = {"images_per_class": PER_CLASS, "steps": 3, "classifier_steps": 3, "sampler_steps": 2}
_KEPT = ("PseudoLabelWriter", "SyntheticImageWriter")
_QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
# A fork starts at once and knows what this process has imported.
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Kill:
    """Where a run is killed without warning, together with the command that started it.

    Attributes:
        run: Stem of the config of the fit.
        owner: Class or module of a function.
        name: The function.
        call: At which of its calls.
    """

    run: str
    owner: Any
    name: str
    call: int

    def arm(self, run: str) -> None:
        """Let it happen in this process if that is the fit."""
        if run != self.run:
            return
        original, calls = getattr(self.owner, self.name), itertools.count(1)

        def dying(*args: Any, **options: Any) -> Any:  # noqa: ANN401 - whatever the function takes and returns
            # Stages are forks of the command: they have what it has armed for itself.
            if _stage_of <= {run} and next(calls) == self.call:
                if _stage_of:
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(self.owner, self.name, dying)


# Stem of the config of the stage that this process runs, if it runs one.
_stage_of: set[str] = set()


def write_configs(
    folder: Path, pipeline: str = "dpt_digits", only: Sequence[str] | None = None, **changes: Any
) -> Path:
    """Write configs that are based on those of a pipeline and make its fits tiny.

    Args:
        folder: Where to.
        pipeline: Stem of the config of the last fit.
        only: Stems of the configs of the stages; None takes all.
        changes: What else every config says.

    Returns:
        That of the last fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = _mapping(CONFIGS / f"{pipeline}.yaml")
    stages = [Path(stage) for stage in whole["stages"] if only is None or Path(stage).stem in only]
    for stage in stages:
        (folder / stage.name).write_text(yaml.safe_dump(_tiny(CONFIGS / stage) | changes))
    last = _tiny(CONFIGS / f"{pipeline}.yaml") | changes
    last |= {"stages": [stage.name for stage in stages], "stage_vars": _VARS | whole.get("stage_vars", {})}
    file = folder / f"{pipeline}.yaml"
    file.write_text(yaml.safe_dump(last | {"vars": _VARS}))
    return file


def _mapping(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content


def _tiny(config: Path) -> dict[str, Any]:
    """A config based on another one that takes no time."""
    chain = [_mapping(config)]
    place = config
    while "base" in chain[-1]:
        place = place.parent / chain[-1]["base"]
        chain.append(_mapping(place))
    said = next(part["trainer"]["callbacks"] for part in chain if "callbacks" in part.get("trainer", {}))
    callbacks = [callback for callback in said if callback["class_path"] in _KEPT]
    for callback in callbacks:
        if "request" in callback["init_args"]:
            callback["init_args"]["request"]["batch_size"] = 8
    changes: dict[str, Any] = {"base": str(config), "trainer": {"callbacks": callbacks, **_QUIET}}
    kind = next(part["model"]["class_path"] for part in chain if "class_path" in part.get("model", {}))
    small = {"batch_size": 8, "steps_per_epoch": 1}
    if kind == "SSLClassifier":
        changes["model"] = {"init_args": {"network": smaller({"class_path": "WideResNet"})}}
        changes["data"] = {"init_args": small}
        changes["trainer"]["max_steps"] = 2
    elif kind == "NoisyLabelClassifier":
        changes["model"] = {"init_args": {"network": smaller({"class_path": "NoisyResNet"})}}
        changes["data"] = {"init_args": small}
    elif kind == "TDSMDiffusion":
        networks = {"network": smaller({"class_path": "UViT"})}
        if "classifier" not in chain[0]["model"]["init_args"]:
            networks["classifier"] = smaller({"class_path": "NoisyResNet"})
        changes |= {"model": {"init_args": networks}, "data": {"init_args": small}, "test_after_fit": False}
    return changes


def run(folder: Path, *words: str | Path, kill: Kill | None = None, patch: Callable[[], None] | None = None) -> str:
    """Run a command in a folder, and each of its stages in a process of its own.

    Args:
        folder: Where to.
        words: What follows `lightning`.
        kill: Where to kill it; then it has to be killed, and else to succeed.
        patch: Called in the process of the command before it begins; its stages know what it changed.

    Returns:
        What the command and its stages printed.
    """
    output = folder / "output.txt"
    process = _FORK.Process(target=_command, args=(folder, list(map(str, words)), kill, patch))
    folder.mkdir(parents=True, exist_ok=True)
    process.start()
    process.join()
    text = output.read_text()
    output.unlink()
    assert process.exitcode == (0 if kill is None else -signal.SIGKILL), text
    return text


def _command(folder: Path, words: list[str], kill: Kill | None, patch: Callable[[], None] | None) -> None:
    os.chdir(folder)
    _begin(environment())
    sys.stdout = sys.stderr = Path("output.txt").open("w", buffering=1)  # noqa: SIM115 - the process's own
    if patch is not None:
        patch()

    def stage(command: list[str], env: Mapping[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        del check
        process = _FORK.Process(target=_stage, args=(command[3:], env, kill))
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode or 0)

    subprocess.run = stage  # type: ignore[assignment]  # in this process only
    if kill is not None:
        kill.arm(Path(words[words.index("--config") + 1]).stem)
    main(words)


def _stage(words: list[str], env: Mapping[str, str], kill: Kill | None) -> None:
    _begin(env)
    name = Path(words[words.index("--config") + 1]).stem
    _stage_of.add(name)
    if kill is not None:
        kill.arm(name)
    main(words)


def _begin(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def artifacts(folder: Path) -> dict[str, bytes | dict[str, Any]]:
    """What fits made for later ones, byte by byte, and what their own manifests say.

    Without what was logged in training, as a fit that goes on behind its last step logs none of it again, and without
    the hashes of checkpoints, in which Lightning counts epochs that had no batches; their weights are to be compared.
    """
    found: dict[str, bytes | dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".parquet", ".png"):
            found[name] = path.read_bytes()
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            if manifest["kind"] == "fit":
                logged, consumed = manifest["metrics"].items(), manifest["inputs"].items()
                manifest["metrics"] = {key: value for key, value in logged if key.startswith("test_")}
                manifest["inputs"] = {key: None if key.endswith(".ckpt") else value for key, value in consumed}
                del manifest["checkpoint"]["sha256"]
            found[name] = manifest if manifest["kind"] == "fit" else path.read_bytes()
    return found


def finished(runs: Path) -> dict[str, int]:
    """When each fit below a folder was finished."""
    return {
        str(path.parent.relative_to(runs)): path.stat().st_mtime_ns
        for path in sorted(runs.rglob("manifest.json"))
        if json.loads(path.read_text())["kind"] == "fit"
    }


def hide_labels(poison: bool) -> None:
    """In this process only: people have labelled two digits of each class, and others' labels are right or garbage.

    Args:
        poison: Make those wrong that nobody may look at.
    """
    contents = DigitsSource().read()
    train = np.asarray([role == "train" for role in contents.roles])
    given = ~train
    for label in range(10):
        given[np.flatnonzero(train & (contents.labels == label))[:2]] = True
    generator = np.random.default_rng(0)
    garbage = (contents.labels + generator.integers(1, 10, len(given))) % 10
    hidden = garbage if poison else contents.labels
    found = replace(contents, labels=np.where(given, contents.labels, hidden), given=given)
    setattr(DigitsSource, "read", lambda _: found)  # noqa: B010 - in this process only
