"""From the settings of a role to its module and its data."""

import copy
import inspect
import json
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule, LightningModule

from datamodules import pseudo_labels
from datamodules.artifact_files import MANIFEST
from datamodules.classification.contents import ImageSource
from datamodules.generation import GenerationDataModule
from federated.settings import Role, Settings
from federated.tasks import FitTask
from lightning_modules.command_line import PACKAGES, as_it_was, know_short_names

CLIENT = "{client}"
PSEUDO_LABELS = "pseudo_labels"
SELECTED = "selected"
DRAWN = "drawn"

_BASES: dict[str, type[Any]] = {"model": LightningModule, "data": LightningDataModule, "source": ImageSource}
# Arguments of the data that say nothing without another one.
_NEEDS = {
    "pseudo_labels": ("min_confidence", "trusted_share"),
    "synthetic_images": (
        "synthetic_per_class",
        "synthetic_share",
        "synthetic_weight",
        "synthetic_from_other_data",
    ),
}


def role_of(settings: Settings, task: FitTask) -> Role:
    """Find the role that a task trains.

    Args:
        settings: The run.
        task: What is trained.

    Raises:
        ValueError: The run has no such role.
    """
    role: Role | None = getattr(settings, task.role)
    if role is None:
        msg = f"Expected settings with a `{task.role}` for the step {task.name!r}, got none; configure it."
        raise ValueError(msg)
    return role


def build_source(settings: Settings, overrides: Mapping[str, Any]) -> ImageSource:
    """Build the source of images.

    Args:
        settings: The run.
        overrides: Arguments of the source that take the place of the settings', such as the folder of a site.

    Raises:
        ValueError: The source does not take these arguments.
    """
    source = dict(settings.source)
    source["init_args"] = {**(source.get("init_args") or {}), **overrides}
    return cast("ImageSource", _instantiate("source", source))


def build(
    settings: Settings, task: FitTask, source: ImageSource | None, class_names: Sequence[str], folder: Path
) -> tuple[LightningModule, LightningDataModule | None]:
    """Build module and data of a task.

    Args:
        settings: The run.
        task: What is trained.
        source: The client's images; None builds no data: a server has none.
        class_names: Names of the classes.
        folder: Folder of the client.

    Returns:
        The module, with the same first weights everywhere, and the data; None without a source.

    Raises:
        ValueError: An argument of module or data is none, or does not fit.
    """
    role = role_of(settings, task)
    data = None if source is None else build_data(role, task, source, folder, settings.seed)
    return build_module(role, len(class_names), folder if source is not None else None, settings.seed), data


def build_module(role: Role, num_classes: int, folder: Path | None, seed: int) -> LightningModule:
    """Build the module of a role.

    Args:
        role: The role.
        num_classes: Classes K.
        folder: What `{client}` stands for; None leaves out arguments with it, for who wants the network only.
        seed: Seed of the first weights.

    Raises:
        ValueError: An argument is none, or the classes are others.
    """
    config = _config(role.model, folder)
    given = config["init_args"].get("num_classes")
    if given not in (None, num_classes):
        msg = (
            f"Expected `model.init_args.num_classes` to be the data's, got {given} for the model, {num_classes} from "
            "the data; leave it out."
        )
        raise ValueError(msg)
    if "num_classes" in inspect.signature(_class_of(str(config["class_path"]))).parameters:
        config["init_args"]["num_classes"] = num_classes
    if _names_client(role.model):
        return _built(config, seed)
    return copy.deepcopy(_alike_everywhere(json.dumps(config, sort_keys=True), seed))


# To build a module takes ten times as long as to copy it, and in one process all clients have the same.
@lru_cache(maxsize=3)
def _alike_everywhere(config: str, seed: int) -> LightningModule:
    return _built(json.loads(config), seed)


def _built(config: Mapping[str, Any], seed: int) -> LightningModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast("LightningModule", _instantiate("model", config))


def build_data(role: Role, task: FitTask, source: ImageSource, folder: Path, seed: int) -> LightningDataModule:
    """Build the data of a role for a task, with what of the client's pseudo-labels and drawn images it is to use.

    Where the client has none of these, its labels are all there is; whether it should have some is for `Provenance`.

    Args:
        role: The role.
        task: What is trained.
        source: The client's images.
        folder: Its folder.
        seed: Seed of the order and the augmentations.

    Raises:
        ValueError: An argument is none, or does not fit.
        FileNotFoundError: An artifact is damaged.
    """
    config = _config(role.data, folder)
    arguments: dict[str, Any] = config["init_args"]
    kind = _class_of(str(config["class_path"]))
    generation = issubclass(kind, GenerationDataModule)
    labels = artifact_of(task, folder)
    drawn = folder / DRAWN
    found: dict[str, Path | None] = {"pseudo_labels": None, "synthetic_images": None}
    if labels is not None:
        by_people = pseudo_labels.read(labels).by_people
        if generation or not by_people.all():
            found["pseudo_labels"] = labels
        if by_people.all() or not by_people.any():
            # Batches cannot hold images of both kinds.
            arguments.pop("trusted_share", None)
    if task.drawn and not generation and (drawn / MANIFEST).is_file():
        found["synthetic_images"] = drawn
    for name, path in found.items():
        if path is not None:
            arguments[name] = str(path)
        else:
            for argument in (name, *_NEEDS[name]):
                arguments.pop(argument, None)
    arguments |= {"source": source, "seed": seed}
    return cast("LightningDataModule", _instantiate("data", config))


def artifacts_of(task: FitTask) -> list[str]:
    """Name the folders of a client that a task needs.

    Args:
        task: What is trained.
    """
    labels = {None: [], "all": [PSEUDO_LABELS], "selected": [SELECTED]}[task.pseudo_labels]
    return labels + [DRAWN] * task.drawn


def artifact_of(task: FitTask, folder: Path) -> Path | None:
    """Find the pseudo-labels that a task is to use.

    Args:
        task: What is trained.
        folder: Folder of the client.

    Returns:
        Their folder; None if it asks for none, or the client has none.
    """
    if task.pseudo_labels is None:
        return None
    path = folder / (PSEUDO_LABELS if task.pseudo_labels == "all" else SELECTED)
    return path if (path / MANIFEST).is_file() else None


# ---------------------------------------------------------------- jsonargparse


@cache
def _parser(argument: str) -> ArgumentParser:
    know_short_names()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(_BASES[argument], argument, required=True)
    return parser


def _class_of(class_path: str) -> type[Any]:
    """The class that a path, dotted or short, names."""
    module, _, name = class_path.rpartition(".")
    for package in [module] if module else PACKAGES:
        try:
            kind: type[Any] = getattr(import_module(package), name)
        except (ImportError, AttributeError):
            continue
        return kind
    msg = f"Expected the `class_path` of a module or of data, got {class_path!r}; name a class with its module."
    raise ValueError(msg)


def _instantiate(argument: str, config: Mapping[str, Any]) -> object:
    parser, base = _parser(argument), _BASES[argument]
    try:
        parsed = parser.parse_object({argument: dict(config)})
    except ArgumentError as error:
        msg = f"Expected `{argument}` to be a {base.__name__} with its arguments. {error}"
        raise ValueError(msg) from error
    try:
        return parser.instantiate(parsed)[argument]
    except ValueError as error:
        root = as_it_was(error)
        if root is error:
            raise
        raise root from None


def _config(config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """A copy with the client's folder in it; without a folder, arguments that name it are left out."""
    arguments = dict(config.get("init_args") or {})
    if folder is None:
        kept = {name: value for name, value in arguments.items() if not _names_client(value)}
    else:
        kept = {name: _in_folder(value, str(folder)) for name, value in arguments.items()}
    return {"class_path": config["class_path"], "init_args": kept}


def _names_client(value: Any) -> bool:  # noqa: ANN401 - plain values of any kind
    if isinstance(value, Mapping):
        return any(_names_client(part) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_names_client(part) for part in value)
    return isinstance(value, str) and CLIENT in value


def _in_folder(value: Any, folder: str) -> Any:  # noqa: ANN401 - plain values of any kind
    if isinstance(value, Mapping):
        return {name: _in_folder(part, folder) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in_folder(part, folder) for part in value]
    return value.replace(CLIENT, folder) if isinstance(value, str) else value
