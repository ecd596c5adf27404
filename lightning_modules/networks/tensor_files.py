"""Files of tensors, read without running what is in them."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor


def read_tensor_file(path: str | Path, argument: str) -> object:
    """Read a file that torch wrote, with `weights_only=True`: tensors and plain values, never code.

    Args:
        path: The file.
        argument: The name of the argument that holds the path, for the error.

    Returns:
        What the file holds, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is none of torch's, is truncated, or holds objects that only unpickling could restore.
    """
    file = Path(path)
    if not file.is_file():
        msg = (
            f"Expected `{argument}` to be a checkpoint file, but there is none at {file} (looked in {Path.cwd()}); "
            "run the fit that writes it first, or give the path of an existing one."
        )
        raise FileNotFoundError(msg)
    try:
        # Older files, from before torch wrote zip archives, cannot be mapped into memory.
        content: object = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # torch raises whatever its zip reader and unpickler raise; all mean "not readable"
        msg = (
            f"Expected `{argument}` to be a checkpoint written by a fit (tensors and plain values), but {file} "
            f"cannot be read as one: {type(error).__name__}; give a .ckpt file that was written completely."
        )
        raise ValueError(msg) from error
    return content


def differing(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Compare the names and shapes of two sets of tensors.

    Args:
        own: One set.
        other: The other one.

    Returns:
        Names that only one set has, then those whose shapes differ; and the shapes of the first of them in both sets,
        as text.
    """
    names = sorted(own.keys() ^ other.keys())
    names += sorted(name for name in own.keys() & other.keys() if own[name].shape != other[name].shape)
    first = [str(list(tensors[n].shape)) if n in tensors else "absent" for n in names[:1] for tensors in (own, other)]
    return names, first
