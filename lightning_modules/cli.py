"""The command line: `lightning`, `fewlight` and `python -m lightning_modules` all end up in `main`."""

import argparse
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_modules.lightning_cli import FewlightCLI

_HELP = """\
usage: lightning [-h] [--version] {fit,validate,test,predict,export,federate} ...

Train, test and use the modules of fewlight. What a run is made of stands in a YAML file.

  lightning fit      --config configs/hybrid_lesions.yaml       train, then test
  lightning test     --config CONFIG [--ckpt_path FILE]         test a checkpoint, print and write its metrics
  lightning validate --config CONFIG [--ckpt_path FILE]         the same on the validation split
  lightning predict  --config CONFIG [--ckpt_path FILE]         write predictions
  lightning export   --ckpt_path FILE --output_dir FOLDER       write a checkpoint's network for diffusers
  lightning federate --config configs/federated_digits.yaml     train across clients that may not share images

options of every command but export:
  --config FILE          a run, as YAML; repeatable, later ones win
  --overlay FILE         a --config merged last that also reaches the earlier stages; repeatable
  --print_config         print the merged configuration and run nothing
  --KEY VALUE            any entry of the configuration, wherever it stands: --data.init_args.labels_seed 1

options of fit:
  --ckpt_path last       go on from the last checkpoint of this run, from the start where there is none
  --stages null          run this fit alone, not the `stages` its config lists

options of export:
  --overwrite true       replace a network that was exported to the folder before

options of federate:
  --engine ENGINE        in_process, simulation (Flower and Ray) or deployment (SuperNodes)

`lightning fit --help` lists everything; `lightning fit --model.help CLASS` the arguments of a module.
Another package may own the script called lightning: `fewlight` and `python -m lightning_modules` are the same.
"""


def main(args: list[str] | None = None) -> "FewlightCLI | None":
    """Run the command line.

    Args:
        args: The arguments; None takes them from sys.argv.

    Returns:
        The CLI object, with `trainer`, `model` and `datamodule`, when `args` were given. None when they came from
        sys.argv (a console script would print what it is given and exit with 1), and after `export`, `federate`,
        `--help` or `--version`.

    Raises:
        SystemExit: The arguments cannot be parsed (code 2), an earlier stage failed (its code), or nothing could be
            exported or trained across clients (code 1).

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
    if argv[0] == "export":
        _export(argv[1:])
        return None
    if argv[0] == "federate":
        # An extra of its own: nothing else here needs the package.
        from federated.command import run as federate

        federate(argv[1:])
        return None
    from lightning_modules.lightning_cli import run

    cli = run(argv)
    return None if args is None else cli


def _export(words: list[str]) -> None:
    """Parse the words after `export`, write the folder, say what is in it."""
    parser = argparse.ArgumentParser("lightning export", description="Write a checkpoint's network for diffusers.")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint that `lightning fit` wrote")
    parser.add_argument("--output_dir", required=True, help="new or empty folder")
    parser.add_argument("--overwrite", choices=("true", "false"), default="false", help="replace an exported network")
    given = parser.parse_args(words)
    from lightning_modules.export import export_checkpoint

    try:
        about = export_checkpoint(given.ckpt_path, given.output_dir, overwrite=given.overwrite == "true")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if "latent_channels" in about:
        name, kind, outputs = "vae", "AutoencoderKL", f"{about['latent_channels']} latent channels"
    else:
        name, kind = "unet", "UNet2DModel"
        outputs = f"{about['outputs']['image']} (image) + {about['outputs']['mask']} (mask) out"
    print(
        f"{given.output_dir}: {about['parameters']:,} parameters, {about['weights']} weights of step "
        f"{about['global_step']}, {about['image_channels']} channels in, {outputs}\n\n"
        f"  from diffusers import {kind}\n"
        f"  {name} = {kind}.from_pretrained({given.output_dir!r}, use_safetensors=True)"
    )
