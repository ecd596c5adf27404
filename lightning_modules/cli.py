"""The command line: `lightning`, `fewlight` and `python -m lightning_modules` all end up in `main`."""

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_modules.lightning_cli import FewlightCLI

_HELP = """\
usage: lightning [-h] [--version] {fit,validate,test,predict} ...

Train, test and use the modules of fewlight. What a run is made of stands in a YAML file.

  lightning fit      --config configs/hybrid_lesions.yaml       train, then test
  lightning test     --config CONFIG [--ckpt_path FILE]         test a checkpoint, print and write its metrics
  lightning validate --config CONFIG [--ckpt_path FILE]         the same on the validation split
  lightning predict  --config CONFIG [--ckpt_path FILE]         write predictions

options of every command:
  --config FILE          a run, as YAML; repeatable, later ones win
  --overlay FILE         a --config merged last that also reaches the earlier stages; repeatable
  --print_config         print the merged configuration and run nothing
  --KEY VALUE            any entry of the configuration, wherever it stands: --data.init_args.labels_seed 1

options of fit:
  --ckpt_path last       go on from the last checkpoint of this run, from the start where there is none
  --stages null          run this fit alone, not the `stages` its config lists

`lightning fit --help` lists everything; `lightning fit --model.help CLASS` the arguments of a module.
Another package may own the script called lightning: `fewlight` and `python -m lightning_modules` are the same.
"""


def main(args: list[str] | None = None) -> "FewlightCLI | None":
    """Run the command line.

    Args:
        args: The arguments; None takes them from sys.argv.

    Returns:
        The CLI object, with `trainer`, `model` and `datamodule`, when `args` were given. None when they came from
        sys.argv (a console script would print what it is given and exit with 1), and after `--help` or `--version`.

    Raises:
        SystemExit: The arguments cannot be parsed (code 2), or an earlier stage failed (its code).

    Example:
        >>> from lightning_modules.cli import main
        >>> main(["--version"])  # doctest: +ELLIPSIS
        fewlight ...
    """
    argv = sys.argv[1:] if args is None else list(args)
    # Answered here, before anything heavy is imported.
    if argv == ["--version"]:
        print(f"fewlight {version('fewlight')}")
        return None
    if not argv or argv[0] in {"-h", "--help"}:
        print(_HELP, end="")
        return None
    from lightning_modules.lightning_cli import run

    cli = run(argv)
    return None if args is None else cli
