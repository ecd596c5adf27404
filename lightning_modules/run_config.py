"""A resolved configuration as plain values: its hash, what differs between two, and the files it reads."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.checkpoints import file_sha256, identifying_file

# What does not change a run's result is left out of its hash: where it writes, what it shows, how fast it reads.
# `vars`, `runs` and `round` have done their work once the configuration is resolved; stages go in by their own hashes.
_NOT_HASHED = {
    "": {"base", "config", "ckpt_path", "overlay", "stages", "report", "vars", "runs", "checkpoint"}
    | {"stage_vars", "rounds", "round", "previous_round"},
    "trainer": {
        "default_root_dir",
        "enable_checkpointing",
        "enable_model_summary",
        "enable_progress_bar",
        "log_every_n_steps",
        "logger",
        "profiler",
    },
    "model.init_args": {"feature_cache", "latent_cache"},
    "data.init_args": {"num_workers", "cache_megabytes", "predict_images", "predict_split"},
}
# What datamodules, and the sources of SemiSupervisedDataModule, look for under $FEWLIGHT_DATA.
_SOURCE = "data.init_args.source.init_args"
_PLACES = ("data.init_args.root", f"{_SOURCE}.root", f"{_SOURCE}.table", f"{_SOURCE}.label_list")
# A run may be gone on with for longer, or tested at its end: the steps so far are the same.
_MAY_DIFFER = {
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.min_steps",
    "trainer.min_epochs",
    "test_after_fit",
}


def settings(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a resolved configuration that its result depends on, as `{dotted key: value}`.

    The folder that a relative data root is looked for under, $FEWLIGHT_DATA, is one of them.

    Args:
        resolved: Sub-command's part of the parsed configuration, as plain nested values.
    """
    hidden = {f"{place}.{name}".lstrip(".") for place, names in _NOT_HASHED.items() for name in names}
    flat = dict(_flat(resolved))
    # Where a callback writes is no matter either, unless a later stage looks for it there: images that were requested,
    # and pseudo-labels.
    writers = {key.split(".request")[0] for key in flat if ".request." in key}
    classes = {key.removesuffix(".class_path"): str(value) for key, value in flat.items() if key.endswith("class_path")}
    writers |= {f"{key}.init_args" for key, name in classes.items() if name.endswith("PseudoLabelWriter")}
    hidden |= {key for key in flat if key.endswith(".output_dir") and key.removesuffix(".output_dir") not in writers}
    # Nor in how many files drawn images lie.
    hidden |= {key for key in flat if key.endswith(".shards_above")}
    kept = {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in hidden)
    }
    base = os.environ.get("FEWLIGHT_DATA")
    if base and any(
        isinstance(p, str) and p and not Path(p).expanduser().is_absolute() for p in map(kept.get, _PLACES)
    ):
        kept["FEWLIGHT_DATA"] = str(Path(base).expanduser().resolve())
    return kept


def config_hash(kept: Mapping[str, Any], earlier: Sequence[str]) -> str:
    """SHA-256 over settings and the hashes of the stages before them.

    Args:
        kept: What `settings` returned.
        earlier: Hashes of the stages that come first.
    """
    content = {"settings": dict(kept), "stages": list(earlier)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What stands in the way of going on with a run: keys whose values differ, except how long it is to be."""
    keys = sorted((before.keys() | now.keys()) - _MAY_DIFFER)
    return [f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]


def input_files(kept: Mapping[str, Any]) -> dict[str, str]:
    """The files that a run starts from, with their SHA-256: checkpoints, exported weights, manifests of artifacts.

    Args:
        kept: What `settings` returned. Every string in it that is the path of a file, or of a folder with exported
            weights or a manifest.json, counts.
    """
    found = {}
    for key, value in kept.items():
        if isinstance(value, str) and value and not key.endswith(".output_dir"):
            path = identifying_file(Path(value).expanduser())
            if path.is_file():
                found[str(path)] = file_sha256(path)
    return found


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - whatever YAML can hold
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{number}")
    else:
        yield key, value
