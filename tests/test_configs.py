"""Every file under configs/: says how it is run, can be run, and fits the files it works with."""

import io
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import (
    NETWORK,
    has_published_autoencoder,
    small_data,
    small_model,
    small_writers,
    smaller,
    write_overlay,
)

from lightning_modules.cli import main

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in FILES if path.parent.name == "overlays"]
DRAWS = [path for path in FILES if path.stem.startswith("draw_")]
FEDERATED = [path for path in FILES if path.stem.startswith("federated_")]
CONFIGS = [path for path in FILES if path not in (*OVERLAYS, *DRAWS, *FEDERATED)]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("FEWLIGHT_DATA", raising=False)
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "")


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return content


def _whole(path: Path) -> dict[str, Any]:
    """A config with what its base says beside it."""
    content = _content(path)
    base = content.pop("base", None)
    return content if base is None else _merged(_whole(path.parent / base), content)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    both = first.keys() & second.keys()
    inner = {
        k: _merged(first[k], second[k]) for k in both if isinstance(first[k], dict) and isinstance(second[k], dict)
    }
    return {**first, **second, **inner}


def _stages(config: Path) -> list[Path]:
    """The fits that a config wants first, relative to the repository; a missing one stays in the list."""
    return [config.parent / stage for stage in _content(config).get("stages") or ()]


def _vars_used(config: Path) -> set[str]:
    """The values that a config, or a stage of it, takes from `vars`."""
    used = set(re.findall(r"\$\{vars\.(\w+)\}", yaml.safe_dump(_whole(config))))
    return used.union(*(_vars_used(stage) for stage in _stages(config)))


def _header(path: Path) -> str:
    """The comment that a file opens with."""
    lines = (ROOT / path).read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#") for line in lines[:end])


def _is_for(overlay: Path, config: Path) -> bool:
    """An overlay is for the configs that use any of the `vars` it sets; for all of them when it sets none.

    One that is shown with a semi-supervised config is for those.
    """
    given = set(_content(overlay).get("vars") or ())
    of_ssl = "configs/ssl/" in _header(overlay)
    return not given or (of_ssl == (config.parent.name == "ssl") and bool(given & _vars_used(config)))


# What the 29 files of configs/ssl share is looked at once, in these.
_OF_ALL_METHODS = {"supervised.yaml", "fixmatch.yaml", "dividemix.yaml", "noisy_student.yaml", "remixmatch.yaml"}


# For GPUs. test_published_pipelines.py runs them as a whole.
_PUBLISHED_SIZE = ("dpt_cifar10", "dpt_imagenet256", "dpt_folder_generator")


# As others, with another source or other labels.
_AS_OTHERS = (
    "dpt_mnist",
    "dpt_digits_all_labels",
    "dpt_digits_classifier",  # the last fit is based on it
    "dpt_digits_generator",  # so is that of TDSM
    "dpt_digits_relabelled",
    "dpt_digits_self_training",
)


def _by_default(config: Path, *more: object, quick: bool = True) -> object:
    """A case; of configs/ssl only some by default, as each takes seconds; of those for GPUs only quick ones."""
    of_ssl = config.parent.name == "ssl" and config.name not in _OF_ALL_METHODS
    # Overlays of its first stage, with which that is tested.
    twice = config.stem == "dpt_lesions" and any(isinstance(part, Path) for part in more)
    alike = config.stem.startswith(_AS_OTHERS)
    rare = of_ssl or twice or alike or (not quick and config.stem.startswith(_PUBLISHED_SIZE))
    return pytest.param(config, *more, marks=[pytest.mark.slow] if rare else [])


COMBINED = [(config, overlay) for config in CONFIGS for overlay in OVERLAYS if _is_for(overlay, config)]
ALONE_AND_COMBINED: list[tuple[Path, Path | None]] = [*((config, None) for config in CONFIGS), *COMBINED]


@cache
def _resolved(config: Path, overlay: Path | None, variables: tuple[str, ...] = ()) -> dict[str, Any]:
    """A fit alone; its stages are resolved by themselves."""
    more = ["--overlay", str(overlay)] if overlay else []
    return _printed("fit", "--config", str(config), *more, "--stages", "null", *variables)


def _resolved_stage(stage: Path, overlay: Path | None, config: Path) -> dict[str, Any]:
    """A stage as a pipeline runs it, with the variables that reach it."""
    known = _whole(stage).get("vars") or {}
    given = (_whole(config).get("stage_vars") or {}).items()
    return _resolved(stage, overlay, tuple(f"--vars.{name}={value}" for name, value in given if name in known))


def _printed(*words: str) -> dict[str, Any]:
    """What --print_config prints; words that name files of the repository may do so relative to it."""
    absolute = [str(ROOT / word) if Path(word) in FILES else word for word in words]
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stopped, redirect_stdout(printed):
        main([*absolute, "--print_config"])
    assert stopped.value.code == 0
    resolved: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return resolved


def _commands(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Variables and words of each command of the header; `... --flag` adds flags to the first one."""
    first: tuple[list[str], list[str]] = ([], [])
    for line in _header(path).splitlines():
        if match := re.fullmatch(r"   ((?:\w+=\S+ )*)lightning (.*)", line):
            first = (match[1].split(), shlex.split(match[2]))
            yield first
        elif match := re.fullmatch(r"   \.\.\. (.*)", line):
            yield first[0], [*first[1], *shlex.split(match[1])]


def test_there_are_configs_and_overlays() -> None:
    assert {"hybrid_isic.yaml", "hybrid_ph2.yaml", "hybrid_lesions.yaml"} <= {path.name for path in CONFIGS}
    assert {"cpu_32px.yaml", "gpu_128px.yaml"} <= {path.name for path in OVERLAYS}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_opens_with_its_command(path: Path) -> None:
    assert _header(path).startswith(" "), "a sentence comes first"
    assert "TODO" not in _header(path)
    variables, words = next(_commands(path))
    assert words[:2] == ["predict" if path in DRAWS else "federate" if path in FEDERATED else "fit", "--config"]
    base = Path(words[2])
    data = _whole(base)["source" if path in FEDERATED else "data"]
    if path in OVERLAYS:
        assert words[3:] == ["--overlay", str(path)]
        assert (base, path) in COMBINED
        data = _merged(data, _content(path).get("data", {}))
    else:
        assert words[2] == str(path)
    # A relative root is only found when $FEWLIGHT_DATA is set.
    needs_data = "root:" in yaml.safe_dump(data) and not any(word.endswith(".root") for word in words)
    assert [variable.split("=")[0] for variable in variables] == ["FEWLIGHT_DATA"] * needs_data


@pytest.mark.parametrize("path", [_by_default(path, quick=False) for path in FILES], ids=str)
def test_each_command_of_a_header_parses(path: Path) -> None:
    commands = [words for _, words in _commands(path)]
    for number, words in enumerate(commands):
        assert str(path) in words
        plain = words == ["fit", "--config", str(path)]
        if not plain and (number or path not in OVERLAYS):  # what is left out is among the combinations below
            printed = _printed(*words)
            assert (printed["classifier"] if path in FEDERATED else printed)["model"]["class_path"]


def _require_reached(config: Path, overlay: Path) -> None:
    """An overlay changes what it names, in a config and in its stages."""
    content = _content(overlay)
    for path in (config, *_stages(config)):
        resolved = _resolved(path, overlay)
        for name, value in content.get("vars", {}).items():
            assert resolved["vars"][name] == value
        network = content.get("model", {}).get("init_args", {}).get("network", {}).get("init_args", {})
        assert {name: resolved["model"]["init_args"]["network"]["init_args"][name] for name in network} == network
        for name, value in content.get("trainer", {}).items():
            assert resolved["trainer"][name] == value


@pytest.mark.parametrize(
    ("config", "overlay"), [_by_default(*case, quick=False) for case in ALONE_AND_COMBINED], ids=str
)
def test_a_config_and_an_overlay_fit_together(config: Path, overlay: Path | None) -> None:
    # One test, as resolving a configuration is what takes the time.
    if overlay is not None:
        _require_reached(config, overlay)
    _require_what_stages_write(config, overlay)


def _require_what_stages_write(config: Path, overlay: Path | None) -> None:
    """The stages write the checkpoints that the fit starts from, each into a directory of its own."""
    resolved = _resolved(config, overlay)
    stages = _stages(config)
    assert [stage for stage in stages if stage not in CONFIGS] == []
    stages = [inner for stage in stages for inner in (*_stages(stage), stage)]
    folders = [_resolved_stage(stage, overlay, config)["trainer"]["default_root_dir"] for stage in stages]
    checkpoints, artifacts = [*_checkpoints_taken(resolved["model"])], [*_artifacts_taken(resolved)]
    if checkpoints or artifacts:
        # Without stages the header says in words which config comes first.
        named = [path for path in CONFIGS if path.name in _header(config) and path != config]
        earlier = stages or [*named, *(stage for path in named for stage in _stages(path))]
        fits = [_resolved_stage(path, overlay, config) for path in earlier]
        assert set(checkpoints) <= {f"{fit['trainer']['default_root_dir']}/checkpoints/last.ckpt" for fit in fits}
        judge = resolved["model"]["init_args"].get("classifier_from")
        for fit in fits:
            if judge == f"{fit['trainer']['default_root_dir']}/checkpoints/last.ckpt":
                assert _noise(fit) == _noise(resolved), "the classifier has learned from other noise"
        assert set(artifacts) <= {folder for fit in fits for folder in _artifacts_written(fit)}
    everything = [*folders, resolved["trainer"]["default_root_dir"]]
    assert len(set(everything)) == len(everything), "two fits write into one directory"
    assert "${" not in yaml.safe_dump(resolved)


def _noise(resolved: dict[str, Any]) -> dict[str, Any]:
    process = resolved["model"]["init_args"]["process"] or {"class_path": "lightning_modules.EDMProcess"}
    package, _, name = process["class_path"].rpartition(".")
    settings: dict[str, Any] = getattr(import_module(package), name)(**process.get("init_args", {})).settings()
    return settings


def _checkpoints_taken(content: object) -> Iterator[str]:
    """What a model starts from, wherever in it that is said."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name in {"init_from", "teacher_from", "classifier_from"} and isinstance(value, str):
                yield value
            if name == "encoder_from" and str(value).endswith(".ckpt"):  # not one that others published
                yield value
            yield from _checkpoints_taken(value)


def _artifacts_taken(resolved: dict[str, Any]) -> Iterator[str]:
    """The folders that earlier fits filled for this one."""
    for name in ("pseudo_labels", "synthetic_images"):
        if folder := resolved["data"]["init_args"].get(name):
            yield folder
    transition = resolved["model"]["init_args"].get("transition") or {}
    if counts := transition.get("init_args", {}).get("counts"):
        yield counts.removesuffix("/manifest.json")


def _artifacts_written(resolved: dict[str, Any]) -> list[str]:
    callbacks = resolved["trainer"]["callbacks"] or []
    writers = [c for c in callbacks if c["class_path"].endswith(("PseudoLabelWriter", "SyntheticImageWriter"))]
    return [writer["init_args"]["output_dir"] for writer in writers]


def _shrink(config: Path, folder: Path) -> Path:
    """An overlay that makes a config small enough for the fake data: one that only names what the config has."""
    resolved = _resolved(config, None)
    kind = resolved["model"]["class_path"].rpartition(".")[2]
    if kind == "SSLClassifier":
        return _shrink_classifier(resolved, folder)
    if kind in {"TDSMDiffusion", "NoisyLabelClassifier", "VAETraining"}:
        return _shrink_generation(resolved, folder)
    if kind == "LinearProbe":
        return _shrink_probe(resolved, folder)
    if kind == "MaskedSiamese":
        crops = {"crops": {"focal_size": 8}}
        return _overlay(folder, small_model(resolved), small_data(resolved) | crops, fast_dev_run=True)
    data: dict[str, Any] = {"image_size": 16, "batch_size": 2, "num_workers": 0}
    # What a stage would have to draw first is left out.
    small = {"num_labels": 4, "num_images": 12, "synthetic_images": None, "synthetic_share": None}
    data |= {name: value for name, value in small.items() if resolved["data"]["init_args"].get(name) is not None}
    model: dict[str, Any] = {"network": NETWORK, "init_from": None}
    model |= {"blocks": [1, 2]} if "blocks" in resolved["model"]["init_args"] else {}
    assert resolved["model"]["init_args"]["network"]["class_path"].endswith("ADMUNet"), "shrink other networks too"
    return _overlay(folder, model, data, fast_dev_run=True)


# What another fit would have to make first.
_WITHOUT_ARTIFACTS = {"synthetic_images": None, "synthetic_per_class": None, "pseudo_labels": None}


def _overlay(folder: Path, model: dict[str, Any], data: dict[str, Any], **trainer: Any) -> Path:
    return write_overlay(folder / "shrink.yaml", model, data, **trainer)


def _shrink_probe(resolved: dict[str, Any], folder: Path) -> Path:
    model = small_model(resolved)
    model |= dict.fromkeys(("encoder_from", "feature_cache")) if model else {}
    return _overlay(folder, model, small_data(resolved) | _WITHOUT_ARTIFACTS, fast_dev_run=True)


def _shrink_classifier(resolved: dict[str, Any], folder: Path) -> Path:
    """The same for SSLClassifier; what the config starts from is a fit of one step."""
    arguments = resolved["model"]["init_args"]
    channels = arguments["network"]["init_args"]["in_channels"]
    network = {"class_path": "WideResNet", "init_args": {"depth": 10, "width": 4, "in_channels": channels}}
    model: dict[str, Any] = {"network": network}
    data: dict[str, Any] = {"batch_size": 4, "unlabeled_ratio": 2, "steps_per_epoch": 1, "num_workers": 0}
    data |= (
        {"image_size": 16, "labels_per_class": 2}
        if "root" in resolved["data"]["init_args"]["source"].get("init_args", {})
        else {}
    )
    data |= _WITHOUT_ARTIFACTS
    starts = [arguments["init_from"], arguments["method"].get("init_args", {}).get("teacher_from")]
    if any(starts):
        shrink = _overlay(folder, model, data, max_steps=1, default_root_dir=str(folder / "teacher"))
        main(["fit", "--config", str(ROOT / "configs/ssl/supervised.yaml"), "--overlay", str(shrink)])
        last = str(folder / "teacher/checkpoints/last.ckpt")
        model |= {"init_from": last} if starts[0] else {}
        model |= {"method": {"init_args": {"teacher_from": last}}} if starts[1] else {}
    return _overlay(folder, model, data, fast_dev_run=True)


def _shrink_generation(resolved: dict[str, Any], folder: Path) -> Path:
    """The same for generators and what comes before them; nothing is measured, as there is no judge yet."""
    arguments = resolved["model"]["init_args"]
    model = small_model(resolved, folder / "teacher" if has_published_autoencoder(resolved) else None)
    model |= {"classifier_from": None} if "classifier_from" in arguments else {}
    data = small_data(resolved)
    if resolved["data"]["init_args"].get("pseudo_labels") is not None:
        data |= dict.fromkeys({"pseudo_labels", "trusted_share"} & resolved["data"]["init_args"].keys())
        model |= {"transition": None} if arguments.get("transition") is not None else {}
    if arguments.get("latent") is not None and "latent" not in model:
        tiny = smaller(arguments["latent"]["init_args"]["network"])
        trained = _overlay(folder, {"network": tiny}, data, max_steps=1, default_root_dir=str(folder / "teacher"))
        main(["fit", "--config", str(ROOT / "configs/vae_digits.yaml"), "--overlay", str(trained)])
        last = str(folder / "teacher/checkpoints/last.ckpt")
        model |= {"latent": {"init_args": {"network": tiny, "init_from": last}}}
    return _overlay(folder, model, data, fast_dev_run=True, callbacks=small_writers(resolved))


@pytest.mark.parametrize("config", [_by_default(config, quick=False) for config in CONFIGS], ids=str)
def test_a_config_runs_one_step_on_data_in_the_official_layout(
    config: Path, tmp_path: Path, fake_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWLIGHT_DATA", str(fake_data))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    shrink = _shrink(config, tmp_path)
    cli = main(["fit", "--config", str(ROOT / config), "--overlay", str(shrink), "--stages", "null"])
    assert cli is not None
    assert cli.trainer.global_step == 1
    assert sum(p.numel() for p in cli.model.parameters() if p.requires_grad) < 200_000
    if cli.config.fit.test_after_fit:
        metrics = cli.trainer.callback_metrics
        shares = [float(metrics[name]) for name in ("test_jaccard", "test_accuracy") if name in metrics]
        losses = [float(metrics[name]) for name in ("test_loss", "test_reconstruction") if name in metrics]
        assert all(0 <= value <= 1 for value in shares)
        assert all(0 <= value < 1e4 for value in losses)
        assert shares or losses
    assert {path.name for path in tmp_path.iterdir()} <= {"shrink.yaml", "teacher"}


@pytest.mark.parametrize("config", DRAWS, ids=str)
def test_a_config_that_draws_draws_one_batch(config: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {"batch_size": 2, "num_steps": 2}
    arguments = _resolved_drawing(config)["model"]["init_args"]
    if arguments["network"]["class_path"].endswith("ADMUNet"):
        small = _overlay(tmp_path, {"network": NETWORK}, data | {"image_size": 16}, fast_dev_run=True)
    else:
        small = _overlay(tmp_path, small_model(_resolved_drawing(config)), data, fast_dev_run=True)
    cli = main(["predict", "--config", str(ROOT / config), "--overlay", str(small)])
    assert cli is not None
    assert cli.trainer.num_predict_batches == [1]
    assert [path.name for path in tmp_path.iterdir()] == [small.name]


@cache
def _resolved_drawing(config: Path) -> dict[str, Any]:
    return _printed("predict", "--config", str(config))


# What a module's weights mean, and what of a checkpoint has to be there.
_DRAWN_WITH = {
    "HybridSegmentation": ("objective", "mask_loss", "network", "image_channels"),
    "TDSMDiffusion": ("network", "classifier", "latent", "label_dropout", "draw_batch"),
}


_OF_TRAINING = {"p_mean", "p_std", "clean_share"}


@pytest.mark.parametrize("config", DRAWS, ids=str)
def test_a_config_that_draws_fits_the_run_whose_checkpoint_it_takes(config: Path) -> None:
    here = _resolved_drawing(config)
    # None of those of semi-supervised methods draws, and none of dual pseudo training has a config that draws more.
    fits = {
        path: _resolved(path, None)
        for path in CONFIGS
        if path.parent.name != "ssl" and not path.stem.startswith(("dpt_digits", *_AS_OTHERS, *_PUBLISHED_SIZE))
    }
    (there,) = [
        fit for fit in fits.values() if fit["trainer"]["default_root_dir"] == here["trainer"]["default_root_dir"]
    ]
    assert here["model"]["class_path"] == there["model"]["class_path"]
    for name in _DRAWN_WITH[here["model"]["class_path"].rpartition(".")[2]]:
        assert here["model"]["init_args"][name] == there["model"]["init_args"][name]
    processes = [run["model"]["init_args"]["process"] or {"class_path": None, "init_args": {}} for run in (here, there)]
    # How noise levels are drawn in training is nothing to a drawing.
    read_as = [{**p["init_args"], **dict.fromkeys(_OF_TRAINING), "class": p["class_path"]} for p in processes]
    assert read_as[0] == read_as[1]


def _apart_from_what_a_flag_is_for(config: Path) -> str:
    content = _whole(config)
    content.pop("seed_everything", None)
    content["trainer"].pop("default_root_dir", None)
    for name in ("num_labels", "labels_seed", "seed", "images_seed"):
        content["data"]["init_args"].pop(name, None)
    return yaml.safe_dump(content)


@pytest.mark.slow  # tests/federated runs all steps by default, too
@pytest.mark.parametrize("config", FEDERATED, ids=str)
def test_a_federated_config_runs_shrunk(config: Path, tmp_path: Path) -> None:
    content = _whole(config)
    source = content["source"] | {"init_args": content["source"]["init_args"] | {"num_train": 100, "num_test": 30}}
    split = content["split"] | {"num_clients": 3, "label_share": 0.5}
    content |= {"source": source, "split": split, "run_dir": str(tmp_path / "run")}
    for role in ("classifier", "generator"):
        content[role]["rounds"] = 1
        content[role]["data"]["init_args"]["steps_per_epoch"] = 1
    content["drawing"] |= {"num_steps": 1, "min_gate_rate": 0.0}
    content["central"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    main(["federate", "--config", str(tmp_path / "config.yaml")])
    arms = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    assert list(arms) == content["arms"]


def test_no_file_repeats_another_for_a_seed_or_a_label_count() -> None:
    assert [path.name for path in FILES if re.search(r"(seed|labels?)_?\d|\d_?(seeds?|labels?)", path.stem)] == []
    contents = [_apart_from_what_a_flag_is_for(config) for config in CONFIGS]
    assert len(set(contents)) == len(contents)
