"""The words of a command line, put in the order in which they are to be merged."""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader

# Importing these makes their classes known by short name: `class_path: HybridSegmentation`.
PACKAGES = ("lightning_modules", "datamodules", "callbacks")


def know_short_names() -> None:
    """Import every class that can be configured, so that jsonargparse knows it by its short name."""
    for name in PACKAGES:
        package = import_module(name)
        for attribute in package.__all__:
            getattr(package, attribute)


def as_it_was(error: BaseException) -> BaseException:
    """Find the error of a class's own that jsonargparse retells when it builds objects.

    Args:
        error: What was caught.
    """
    while error.__cause__ is not None and _is_retold(error):
        error = error.__cause__
    return error


def _is_retold(error: BaseException) -> bool:
    """Whether jsonargparse raised an error, about one of our own."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("jsonargparse")


def overlays_last(args: list[str]) -> list[str]:
    """Put every `--overlay FILE` behind the last `--config`, and the other flags behind both.

    A config that names another one as its `base` (relative to itself) is merged after that one. Each overlay becomes a
    `--config` that is merged last, and is also remembered under `overlay`, whence the stages get it. Flags win over
    all files, wherever they stand. `vars` are merged name by name over the files; jsonargparse would replace them as
    a whole. Those given as flags are also remembered under `stage_vars`, beside those that files have there, for the
    stages that have a variable of the name.

    Args:
        args: A sub-command and what follows it.

    Raises:
        SystemExit: An overlay does not exist, a file is not a mapping in YAML, or a flag sets a variable that neither
            a file nor a stage names; with code 2.
    """
    configs: list[str] = []
    overlays: list[str] = []
    flags: list[str] = []
    words = iter(args[1:])
    for word in words:
        name, equals, value = word.partition("=")
        if name in {"--config", "-c", "--overlay"}:
            if not equals and (value := next(words, "")) == "":
                flags.append(word)  # argparse then says that its argument is missing
            else:
                (overlays if name == "--overlay" else configs).append(value)
        else:
            flags.append(word)
    for overlay in overlays:
        if not Path(overlay).is_file():
            refuse(f"expected `--overlay` to be a YAML file, but there is none at {overlay}")
    configs = [file for config in configs for file in _with_bases(config)]
    files = [word for file in (*configs, *overlays) for word in ("--config", file)]
    remembered = [f"--overlay+={Path(overlay).resolve()}" for overlay in overlays]
    values = _merged_vars([*configs, *overlays])
    given = _given_vars(flags)
    known = known_variables([*configs, *overlays])
    for name in given:
        if name not in known:
            refuse(f"expected `--vars.NAME` with a NAME of the configs ({', '.join(sorted(known))}), got {name}")
    passed = _merged_vars([*configs, *overlays], "stage_vars") | given
    if passed:
        remembered.append(f"--stage_vars={json.dumps(passed)}")
    return [args[0], *files, *([f"--vars={json.dumps(values)}"] if values else []), *remembered, *flags]


def known_variables(files: Sequence[str], above: tuple[str, ...] = ()) -> set[str]:
    """Names of the `vars` of configs and of the stages that they list.

    Args:
        files: The configs; without those that are not there, which jsonargparse tells of.
        above: Files whose stages these are.
    """
    whole = [file for config in files for file in _with_bases(config)]
    names = set(_merged_vars(whole))
    for config in whole:
        own = str(Path(config).resolve())
        stages = read_mapping(config).get("stages") if Path(config).is_file() and own not in above else None
        inner = [str(Path(config).parent / str(stage)) for stage in stages] if isinstance(stages, list) else []
        names |= known_variables(inner, (*above, own)) if inner else set()
    return names


def variable_flags(values: Mapping[str, Any]) -> list[str]:
    """Write variables as words of a command line.

    Args:
        values: Their names and values, as YAML has them.
    """
    return [f"--vars.{name}={value if _is_plain(value) else json.dumps(value)}" for name, value in values.items()]


def _is_plain(value: object) -> bool:
    """Whether a value is text that YAML reads as the same text."""
    return isinstance(value, str) and get_loader("yaml")(value) == value


def _given_vars(flags: Sequence[str]) -> dict[str, Any]:
    """Variables that a command line sets one by one."""
    given: dict[str, Any] = {}
    for place, flag in enumerate(flags):
        if flag.startswith("--vars."):
            name, equals, value = flag.removeprefix("--vars.").partition("=")
            text = value if equals else "".join(flags[place + 1 : place + 2])
            try:
                given[name] = get_loader("yaml")(text)
            except yaml.YAMLError:
                given[name] = text
    return given


def _with_bases(config: str, above: tuple[str, ...] = ()) -> list[str]:
    """A config behind the one it is based on, which may be based on a third."""
    if not Path(config).is_file():
        return [config]  # jsonargparse says that there is none
    base = read_mapping(config).get("base")
    if base is None:
        return [config]
    file = str(Path(config).resolve())
    path = Path(file).parent / str(base)
    if file in above:
        refuse(f"expected `base` without a circle, but {config} is based on itself")
    if not path.is_file():
        refuse(f"expected `base` of {config} to be a YAML file, but there is none at {path}")
    return [*_with_bases(str(path), (*above, file)), config]


def read_mapping(file: str) -> dict[str, Any]:
    """Read a config; jsonargparse does not say in which file it stumbled.

    Args:
        file: Its path.

    Raises:
        SystemExit: It is not a mapping in YAML, with code 2.
    """
    try:
        content = get_loader("yaml")(Path(file).read_text())
        problem = None if isinstance(content, dict | None) else f"it holds a {type(content).__name__}"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = str(error)
    if problem is not None:
        refuse(f"expected a YAML file of `key: value` entries at {file}, but {problem}")
    return content or {}


def refuse(problem: str) -> NoReturn:
    """Say what is wrong with a command line and leave with code 2, as argparse does."""
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def _merged_vars(files: list[str], key: str = "vars") -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for file in files:
        if Path(file).is_file():
            values = read_mapping(file).get(key)
            merged |= values if isinstance(values, dict) else {}
    return merged
