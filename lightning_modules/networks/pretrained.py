"""An ADM UNet as a folder that diffusers reads and writes: config.json beside one safetensors file.

Nothing here unpickles, and nothing is fetched: a folder is read as JSON and as plain tensors, or refused.
"""

import errno
import inspect
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_modules.networks.adm_unet import ADM_OPTIONS
from lightning_modules.networks.tensor_files import differing
from lightning_modules.networks.unet_options import block_types

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"
ABOUT_FILE = "fewlight.json"
"""What diffusers has no place for (classes, losses, noise process); diffusers does not look at it."""

# Argument of ADMUNet -> option of UNet2DModel. The widths and the levels with attention follow from two more.
_COUNTS = {
    "out_channels": "out_channels",
    "in_channels": "in_channels",
    "image_size": "sample_size",
    "layers_per_block": "layers_per_block",
    "head_channels": "attention_head_dim",
    "norm_groups": "norm_num_groups",
}
_FREE = {*_COUNTS.values(), "block_out_channels", "dropout"}

Network = TypeVar("Network", bound=nn.Module)


def read_arguments(folder: str | Path, argument: str = "folder") -> dict[str, Any]:
    """Translate a folder's config.json into the arguments of an `ADMUNet`.

    Args:
        folder: Written by `ADMUNet.save_pretrained`, or by diffusers from a `UNet2DModel` of the same kind.
        argument: The name of the argument that holds the folder, for the errors.

    Raises:
        FileNotFoundError: There is no such folder, or no config in it.
        ValueError: The config is not that of an ADM UNet; names the options that differ.
    """
    if not Path(folder).is_dir():
        msg = (
            f"Expected `{argument}` to be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, but there is none at "
            f"{folder} (looked in {Path.cwd()}); write one with `lightning export` or ADMUNet.save_pretrained."
        )
        raise FileNotFoundError(msg)
    file = Path(folder) / CONFIG_FILE
    config = _read_json(file, argument)
    name = config.get("_class_name")
    if name != "UNet2DModel":
        msg = f"Expected `{argument}` to hold a UNet2DModel, but {file} describes {name}; give another folder."
        raise ValueError(msg)
    defaults = _defaults()
    given = defaults | {key: value for key, value in config.items() if not key.startswith("_")}
    numbers = {ours: _count(given, option, file) for ours, option in _COUNTS.items()}
    widths, kinds, dropout = given["block_out_channels"], given["down_block_types"], given["dropout"]
    if not (isinstance(widths, list | tuple) and widths and all(_is_count(width) for width in widths)):
        raise ValueError(_wrong(file, "block_out_channels", widths, "positive integers, one a level"))
    if not (isinstance(kinds, list | tuple) and len(kinds) == len(widths)):
        raise ValueError(_wrong(file, "down_block_types", kinds, f"{len(widths)} names, one a level"))
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ValueError(_wrong(file, "dropout", dropout, "a number in [0, 1)"))
    attends = [kind == "AttnDownBlock2D" for kind in kinds]
    adm = defaults | ADM_OPTIONS | block_types(attends) | {"attn_norm_num_groups": given["norm_num_groups"]}
    _require_options(given, adm, file, argument)
    side, base = numbers["image_size"], math.gcd(*widths)
    return numbers | {
        "base_channels": base,
        "channel_mult": tuple(width // base for width in widths),
        "attention_resolutions": tuple(side // 2**level for level, attend in enumerate(attends) if attend),
        "dropout": float(dropout),
    }


def read_weights(folder: str | Path, argument: str = "folder") -> dict[str, Tensor]:
    """Read the tensors of a folder, from safetensors only.

    Args:
        folder: As for `read_arguments`.
        argument: Likewise.

    Raises:
        FileNotFoundError: There is no safetensors file in it.
        ValueError: The file is truncated, or is something else.
    """
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        others = sorted(path.name for path in Path(folder).glob("*") if path.name not in {CONFIG_FILE, ABOUT_FILE})
        msg = (
            f"Expected `{argument}` to hold its weights in one {WEIGHTS_FILE}, but {folder} has "
            f"{', '.join(others[:3]) or 'none'}; pickles (.bin) are never opened here and several files not joined: "
            'load them with diffusers and write them again, save_pretrained(folder, max_shard_size="100GB").'
        )
        raise FileNotFoundError(msg)
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        msg = (
            f"Expected `{argument}` to hold a complete {WEIGHTS_FILE}, but {file} cannot be read: {error}; copy or "
            "export it again."
        )
        raise ValueError(msg) from error
    return weights


def read_about(folder: str | Path, argument: str = "folder") -> dict[str, Any]:
    """Read what fewlight.json of a folder says; nothing where there is none, as in a folder of diffusers.

    Args:
        folder: As for `read_arguments`.
        argument: Likewise.

    Raises:
        ValueError: It is not JSON, or its `num_classes` is no number of classes.
    """
    file = Path(folder) / ABOUT_FILE
    about = _read_json(file, argument) if file.is_file() else {}
    if "num_classes" in about and not _is_count(about["num_classes"]):
        raise ValueError(_wrong(file, "num_classes", about["num_classes"], "a positive integer"))
    return about


def with_weights(build: Callable[[], Network], weights: Mapping[str, Tensor], source: str) -> Network:
    """Build a network and fill it, without drawing weights that would be overwritten.

    Args:
        build: Returns the network.
        weights: Names and tensors as in its state dict; they are copied.
        source: Where they came from and the argument that said so, for the error.

    Returns:
        The network on the CPU, in the weights' precision.

    Raises:
        ValueError: Names or shapes are not the network's.
    """
    _defaults()  # imports diffusers: what a library makes while it is imported must not end up on the meta device
    with torch.device("meta"):
        network = build()
    wrong, shapes = differing(network.state_dict(), weights)
    if wrong:
        msg = (
            f"Expected {source} to hold the weights of the network that its configuration describes, but {len(wrong)} "
            f"tensors differ, the first {wrong[0]}: {shapes[0]} there, {shapes[1]} among the weights; export it again."
        )
        raise ValueError(msg)
    dtypes = {value.dtype for value in weights.values()}
    if len(dtypes) == 1 and (dtype := dtypes.pop()).is_floating_point:
        network.to(dtype)
    network.to_empty(device="cpu")
    network.load_state_dict(weights)
    return network


def require_free(folder: str | Path, overwrite: bool, argument: str = "folder") -> Path:
    """Make sure that a folder can be written, or replaced without a loss.

    Args:
        folder: The folder to write.
        overwrite: Whether an exported network in it may be replaced.
        argument: The name of the argument that holds the folder, for the errors.

    Returns:
        Its real path: behind a symbolic link it is the folder that is replaced, not the link.

    Raises:
        FileExistsError: It is a file, is not empty and `overwrite` is off, or holds more than an exported network.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        msg = f"Expected `{argument}` to be a folder, but {target} is a file; choose another name."
        raise FileExistsError(msg)
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if there and not overwrite:
        msg = (
            f"Expected `{argument}` to be new or empty, but {target} holds {', '.join(sorted(there)[:3])}; choose "
            "another folder, or set `overwrite` to replace the network in it."
        )
        raise FileExistsError(msg)
    foreign = sorted(there - {CONFIG_FILE, WEIGHTS_FILE, ABOUT_FILE})
    if foreign:
        msg = (
            f"Expected `{argument}` to hold nothing but an exported network that `overwrite` may replace, but {target} "
            f"holds {', '.join(foreign[:3])}; choose another folder."
        )
        raise FileExistsError(msg)
    return target


def write_pretrained(
    config: str,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder for diffusers, whole or not at all.

    Everything goes into a hidden folder beside the target, is flushed to the disk, and is renamed. Folders cannot be
    exchanged in one step: between two renames the previous one has a hidden name, from which it comes back when the
    second fails.

    Args:
        config: Options of the `UNet2DModel`, as its `to_json_string` gives them.
        weights: Its state dict.
        folder: The folder to write.
        overwrite: Whether an exported network in it may be replaced.
        about: What goes into fewlight.json; no such file if None.

    Raises:
        FileExistsError: See `require_free`.
        OSError: The folder could not be written; what was there still is.
    """
    texts = {CONFIG_FILE: config.strip()}
    if about is not None:
        texts[ABOUT_FILE] = json.dumps(dict(about), indent=2, ensure_ascii=False, allow_nan=False)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    target = require_free(folder, overwrite)
    # Not derived from the name: one that is as long as the file system allows must stay writable.
    temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            (temporary / name).write_text(f"{text}\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        # Recent versions of safetensors write files that only their owner can read.
        shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        _put_in_place(temporary, target)
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None) or errno.EIO
        msg = (
            f"Could not write `folder` {target}: {getattr(error, 'strerror', None) or error}. Make room or permit "
            "writing there, or choose another folder. What was there before still is."
        )
        raise OSError(code, msg) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, target: Path) -> None:
    if not (target.is_dir() and any(target.iterdir())):
        temporary.rename(target)
        return
    previous = target.parent / f".{uuid.uuid4().hex}.previous"
    target.rename(previous)
    try:
        temporary.rename(target)
    except BaseException:
        previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _defaults() -> dict[str, Any]:
    """The options of this version's `UNet2DModel` with their defaults."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    parameters = inspect.signature(UNet2DModel.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def _require_options(given: Mapping[str, Any], adm: Mapping[str, Any], file: Path, argument: str) -> None:
    """Compare every option that is not free; one that this diffusers does not know must at least be off."""
    fixed = given.keys() - _FREE
    wrong = sorted(option for option in fixed & adm.keys() if _plain(given[option]) != _plain(adm[option]))
    unknown = sorted(option for option in fixed - adm.keys() if given[option] not in (None, False))
    if wrong or unknown:
        found = [f"{option} is {_plain(given[option])}, ADM's {_plain(adm[option])}" for option in wrong]
        found += [f"{option} is {_plain(given[option])}, which this diffusers does not know" for option in unknown]
        msg = (
            f"Expected `{argument}` to hold an ADM UNet, but in {file} {'; '.join(found[:3])}; load such a network "
            "with diffusers itself, or give the folder of an ADM UNet."
        )
        raise ValueError(msg)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(given: Mapping[str, Any], option: str, file: Path) -> int:
    value = given[option]
    if not _is_count(value):
        raise ValueError(_wrong(file, option, value, "a positive integer"))
    return int(value)


def _wrong(file: Path, key: str, value: object, expected: str) -> str:
    return f"Expected `{key}` in {file} to be {expected}, got {value!r}; export the network again."


def _read_json(file: Path, argument: str) -> dict[str, Any]:
    if not file.is_file():
        msg = (
            f"Expected `{argument}` to hold {file.name}, but there is none in {file.parent}; give the folder of an "
            "exported network."
        )
        raise FileNotFoundError(msg)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        problem = None if isinstance(content, dict) else f"it holds a {type(content).__name__}"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        content, problem = {}, str(error)
    if problem is not None:
        msg = f"Expected `{argument}` to hold a JSON object, but {file} is none ({problem}); export the network again."
        raise ValueError(msg)
    settings: dict[str, Any] = content
    return settings
