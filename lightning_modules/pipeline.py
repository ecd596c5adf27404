"""Which fits come before a fit: stages of a configuration, and rounds of a pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_fr, PositiveInt

from lightning_modules.command_line import known_variables, overlays_last, refuse, variable_flags
from lightning_modules.run_config import config_hash, settings
from lightning_modules.stages import Stage


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that say what comes first.

    Args:
        parser: The parser of a sub-command.
    """
    parser.add_argument("--stages", type=list[Path_fr] | None, default=None, help="Fit configs to run first, in order.")
    parser.add_argument(
        "--overlay",
        type=list[Path_fr] | None,
        default=None,
        help="YAML merged last, here and in the stages; repeatable. In a file it only reaches the stages.",
    )
    parser.add_argument(
        "--stage_vars",
        type=dict[str, Any],
        default={},
        help="Values for the `vars` of stages that have a variable of the name; --vars.NAME adds to them.",
    )
    parser.add_argument(
        "--rounds",
        type=PositiveInt,
        default=1,
        help="How often the stages and this fit follow each other; ${round} and ${previous_round} number them.",
    )
    parser.add_argument("--round", type=PositiveInt, default=1, help="Which round this fit is; set by `rounds`.")
    parser.add_argument("--previous_round", type=int, default=0, help="The one before `round`; set by `rounds`.")


def round_flags(number: int) -> list[str]:
    """Say which round a fit is, in words of a command line.

    Args:
        number: From 1.
    """
    return ["--round", str(number), "--previous_round", str(number - 1)]


def resolved_settings(parser: ArgumentParser, whole: Namespace) -> dict[str, Any]:
    """Return the settings of a parsed command line that its result depends on.

    Args:
        parser: What parsed it.
        whole: What it found.
    """
    dumped = yaml.safe_load(parser.dump(whole, skip_link_targets=True, skip_unset=False, skip_validation=True))
    return settings(dumped[whole.subcommand])


class Pipeline:
    """Resolves the fits that come first, each as its own process will.

    Round r of R runs the stages with ${round} = r and ${previous_round} = r - 1, then the fit itself. A stage that
    mentions neither is the same fit in every round and comes once.

    Args:
        parser: The parser of the whole command line.
        run_dir: Where the last fit writes; None where nothing is fitted.

    Attributes:
        run_dirs: Where all of them write.
        hashes: Those of the stages of the last fit's own round, which go into its hash: a fit is the same however
            many rounds follow it.
    """

    def __init__(self, parser: ArgumentParser, run_dir: Path | None) -> None:
        self._parser = parser
        self._hashes: dict[Path, str | None] = {} if run_dir is None else {run_dir: None}
        self.hashes: list[str] = []

    @property
    def run_dirs(self) -> set[Path]:
        """Where the resolved fits write."""
        return set(self._hashes)

    def stages(self, config: Namespace, words: Sequence[str]) -> list[Stage]:
        """Resolve what a fit's configuration asks for.

        Args:
            config: The configuration of the last fit.
            words: Its command line: a sub-command and what follows it.

        Raises:
            SystemExit: Stages go in a circle, or two fits would write into one place; with code 2.
        """
        found: list[Stage] = []
        one = config.rounds == 1
        for number in [config.round] if one else range(1, config.rounds + 1):
            flags = [] if number == 1 and one else round_flags(number)
            resolved = [self._stage(path, config, (), flags) for path in config.stages or ()]
            self.hashes = [stage.config_hash for stage in resolved]
            if number < config.rounds and words[0] == "fit":  # the words of others are none of a fit
                own = [*words[1:], "--rounds", "1", *round_flags(number), "--ckpt_path", "null"]
                resolved.append(self._resolved(_config_of(words), own, ()))
            places = {stage.run_dir for stage in found}
            found += [stage for stage in resolved if stage.run_dir not in places]
        return found

    def _stage(self, path: Path_fr, parent: Namespace, above: tuple[str, ...], flags: Sequence[str]) -> Stage:
        """Resolve a stage; a pipeline writes below one `runs`."""
        file = str(path.absolute)
        if file in above:
            refuse(f"expected `stages` without a circle, but {file} comes before itself")
        overlays = [str(overlay.absolute) for overlay in parent.overlay or ()]
        arguments = ["--config", file, "--runs", parent.runs]
        for overlay in overlays:
            arguments += ["--overlay", overlay]
        known = known_variables([file, *overlays])
        passed = {name: value for name, value in parent.stage_vars.items() if name in known}
        return self._resolved(Path(str(path)), [*arguments, *variable_flags(passed), *flags], (*above, file))

    def _resolved(self, path: Path, arguments: list[str], above: tuple[str, ...]) -> Stage:
        whole = self._parser.parse_args(overlays_last(["fit", *arguments]))
        config = whole.fit
        flags = round_flags(config.round) if config.round > 1 else []
        earlier = [self._stage(inner, config, above, flags) for inner in config.stages or ()]
        run_dir = Path(config.trainer.default_root_dir).expanduser()
        own_hash = config_hash(resolved_settings(self._parser, whole), [stage.config_hash for stage in earlier])
        if self._hashes.setdefault(run_dir, own_hash) != own_hash:
            refuse(
                f"expected a `trainer.default_root_dir` of its own for every stage, got {run_dir} twice ({path}); "
                "${round} tells rounds apart"
            )
        return Stage(path, run_dir, own_hash, tuple(arguments))


def _config_of(words: Sequence[str]) -> Path:
    """The last config that a command line names."""
    named = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in {"--config", "-c"}:
            named = value if equals else following
    return Path(named or "the last fit")
