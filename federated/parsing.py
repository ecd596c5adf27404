"""From the words of a command line to the settings of a run."""

from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import Path_fr
from pytorch_lightning import LightningDataModule, LightningModule

from datamodules.classification.contents import ImageSource
from federated.checks import check
from federated.settings import Role, Settings
from lightning_modules.command_line import know_short_names, overlays_last, read_mapping, refuse

_HELP = """\
Train a classifier and a generator across clients that may not share images, and compare what each step gains.

`lightning federate --config configs/federated_digits.yaml` runs all of it in this process. `--engine simulation` deals
the clients out to processes with Flower and Ray, `--engine deployment` speaks to SuperNodes. The same command goes on
where an interrupted run stopped. Any entry of the configuration can be set: `--classifier.rounds 20`,
`--split.alpha_labeled 0.1`, `--vars.lr 0.03`.
"""


def _copy(member: Field[Any]) -> Any:  # noqa: ANN401 - typeshed takes a field for the value it stands for
    return field(default=member.default, default_factory=member.default_factory)


# A Role whose classes, and their arguments, are looked at while parsing.
_TYPED: dict[str, type[Any]] = {"model": LightningModule, "data": LightningDataModule}
_ParsedRole = make_dataclass(
    "Role",
    [(member.name, _TYPED.get(member.name, member.type), _copy(member)) for member in fields(Role)],
    namespace={"__doc__": Role.__doc__},
)


def read(words: Sequence[str]) -> Settings:
    """Read the settings of a run.

    `--config`, `--overlay`, `base`, `vars` and `${...}` are those of `lightning fit`.

    Args:
        words: A command line behind `federate`.

    Returns:
        The settings, with full class paths and without variables.

    Raises:
        SystemExit: There is something wrong in it (code 2), or it asked for help or the configuration (code 0).
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    know_short_names()
    ordered = overlays_last(["federate", *words])[1:]
    absent = _absent(ordered)
    parser = _parser(absent)
    found = parser.parse_args(ordered)
    whole = yaml.safe_load(parser.dump(found, skip_link_targets=False, skip_unset=False, skip_validation=True))
    plain = {member.name: None if member.name in absent else whole[member.name] for member in fields(Settings)}
    try:
        settings = Settings.from_plain(plain)
        check(settings)
    except ValueError as error:
        refuse(str(error))
    return settings


def _absent(words: Sequence[str]) -> set[str]:
    """Parts that a run does without.

    Told apart before parsing, so that an error in one that is there names the argument, not all that the part might
    have been.
    """
    optional = {member.name: member.default is None for member in fields(Settings) if type(None) in _kinds(member)}
    for name, is_null in _mentions(words):
        if name in optional:
            optional[name] = is_null
    return set() if "--help" in words or "-h" in words else {name for name, absent in optional.items() if absent}


def _mentions(words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Parts that files and flags set, in the order in which they are merged, and whether to null."""
    for place, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        given = value if equals else "".join(words[place + 1 : place + 2])
        if name == "config":
            content: Mapping[str, Any] = read_mapping(given) if Path(given).is_file() else {}
            yield from ((part, said is None) for part, said in content.items())
        elif word.startswith("--"):
            yield name.partition(".")[0], "." not in name and given == "null"


def _kinds(member: Field[Any]) -> tuple[Any, ...]:
    """The types of a part: those of a union, or the only one."""
    return get_args(member.type) if type(None) in get_args(member.type) else (member.type,)


def _parser(absent: set[str]) -> ArgumentParser:
    usage = "lightning federate --config FILE [--KEY VALUE ...]"
    parser = ArgumentParser("lightning federate", usage=usage, description=_HELP, parser_mode="omegaconf+")
    parser.add_argument("--config", action="config", help="A run, as YAML; repeatable, later ones win.")
    parser.add_argument("--runs", type=str, default="runs", help="Folder for ${runs} in the configs.")
    parser.add_argument("--base", type=str | None, default=None, help="In a file: the YAML it is merged after.")
    parser.add_argument("--vars", type=dict[str, Any], default={}, help="Values for ${vars.name}; merged by name.")
    parser.add_argument("--overlay", type=list[Path_fr] | None, default=None, help="YAML merged last; repeatable.")
    parser.add_argument("--stage_vars", type=dict[str, Any], default={}, help=SUPPRESS)
    about = {part.arg_name: part.description for part in parse_docstring(Settings.__doc__ or "").params}
    roles = []
    for member in fields(Settings):
        kind = _kinds(member)[0]
        more: dict[str, Any] = {}
        if member.name == "source":
            kind, more = ImageSource, {"required": True}
        elif member.name in absent:
            # Null at last: what files before had there is looked at by nobody.
            kind, more = dict[str, Any] | None, {"default": None}
        elif kind is Role:
            kind = _ParsedRole
            roles.append(member.name)
        elif member.default_factory is not MISSING:
            more = {"default": member.default_factory()}
        else:
            more = {"default": member.default}
        parser.add_argument(f"--{member.name}", type=kind, help=about[member.name], **more)
    for role in roles:
        # The number of classes comes from the source.
        target = f"{role}.model.init_args.num_classes"
        parser.link_arguments(f"{role}.data.num_classes", target, apply_on="instantiate")
    return parser
