"""Read checkpoints without running what is in them, and say clearly what is wrong with one that does not fit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.networks.pretrained import WEIGHTS_FILE, read_about, read_arguments, read_weights
from lightning_modules.networks.tensor_files import read_tensor_file


def load_checkpoint(path: str | Path, argument: str) -> dict[str, Any]:
    """Read a Lightning checkpoint with `weights_only=True`: tensors and plain values, never code.

    Args:
        path: The file; or, to start from and not to go on with (`ckpt_path`), the folder of an exported network.
        argument: The name of the argument that holds the path, for the error.

    Returns:
        What the file holds; of a folder, its network and classes as if they stood in a checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint, is truncated, or holds objects that only unpickling could restore.
    """
    file = Path(path)
    if file.is_dir() and argument != "ckpt_path":
        return _exported(file, argument)
    checkpoint = read_tensor_file(file, argument)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        msg = (
            f"Expected `{argument}` to be a Lightning checkpoint with a `state_dict`, got {type(checkpoint).__name__}"
            f" without one in {file}; give a .ckpt file written by `lightning fit`."
        )
        raise ValueError(msg)
    return checkpoint


def require_weights(path: str | Path, argument: str) -> None:
    """Refuse what a fit cannot start from: no checkpoint, and no encoder as others publish them (`encoder_from`).

    Args:
        path: The file, or the folder of an exported network.
        argument: The name of the argument that holds the path.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read.
    """
    if argument == "encoder_from" and Path(path).is_file():
        read_tensor_file(path, argument)
    else:
        load_checkpoint(path, argument)


def _exported(folder: Path, argument: str) -> dict[str, Any]:
    """An exported network as the part of a checkpoint that it came from."""
    read_arguments(folder, argument)
    about = read_about(folder, argument)
    prefix = "ema.module.unet." if about.get("weights") == "EMA" else "network.unet."
    return {
        "state_dict": {f"{prefix}{name}": value for name, value in read_weights(folder, argument).items()},
        "hyper_parameters": {key: about[key] for key in ("num_classes", "objective") if key in about},
    }


def identifying_file(path: Path) -> Path:
    """The file that a path stands for: of an artifact its manifest, of an exported network its weights.

    Args:
        path: A file or a folder.

    Returns:
        The file; of a folder that holds neither, a name that does not exist.
    """
    if not path.is_dir():
        return path
    weights = path / WEIGHTS_FILE
    return weights if weights.is_file() else path / "manifest.json"


def network_weights(checkpoint: dict[str, Any], path: str | Path, argument: str) -> tuple[dict[str, Tensor], str]:
    """Take the network's weights out of a checkpoint: the averaged ones where there are any.

    Args:
        checkpoint: What `load_checkpoint` returned.
        path: Where it came from, for the error.
        argument: The name of the argument that holds the path, for the error.

    Returns:
        The weights without prefix, and which they are: "EMA" or "last".

    Raises:
        ValueError: The checkpoint holds no network.
    """
    state: dict[str, Tensor] = checkpoint["state_dict"]
    for prefix, kind in (("ema.module.", "EMA"), ("network.", "last")):
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if weights:
            return weights, kind
    msg = (
        f"Expected `{argument}` to hold weights named network.* or ema.module.*, but {path} has only "
        f"{sorted(state)[:3]}...; give a checkpoint written by a module of this collection."
    )
    raise ValueError(msg)


def load_network(network: nn.Module, path: str | Path, argument: str) -> str:
    """Copy the weights that a fit ended with, averaged where there are such, into a network.

    Args:
        network: Takes the weights; it is like the one that was trained.
        path: The checkpoint.
        argument: The name of the argument that holds the path, for the error.

    Returns:
        Which weights they are: "EMA" or "last".

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is none, or of another network.
    """
    weights, kind = network_weights(load_checkpoint(path, argument), path, argument)
    wrong = sorted(set(_differing(network.state_dict(), weights)))
    if wrong:
        msg = (
            f"Expected `{argument}` to hold a network like this one, but {len(wrong)} tensors of {path} differ, "
            f"{', '.join(wrong[:3])} first; give the network that the checkpoint was trained with."
        )
        raise ValueError(msg)
    network.load_state_dict(weights)
    return kind


def head_name(network: nn.Module) -> str:
    """The dotted name of a network's last layer: its `head` (ADMUNet) or `segmentation_head` (smp).

    Raises:
        TypeError: The network has neither.
    """
    head = getattr(network, "head", None) or getattr(network, "segmentation_head", None)
    for name, module in network.named_modules():
        if module is head:
            return str(name)
    msg = (
        f"Expected a `network` whose last layer is its attribute `head` or `segmentation_head`, got "
        f"{type(network).__name__}; add a property `head` that returns the layer."
    )
    raise TypeError(msg)


def load_trunk_and_head(
    network: nn.Module, weights: dict[str, Tensor], head: str, keep: int, same_head: bool, path: str | Path
) -> str | None:
    """Copy weights into a network; where the last layers differ, only their first `keep` outputs are.

    Args:
        network: Takes the weights.
        weights: Names and tensors as in the network's state dict.
        head: Dotted name of the last layer in the network.
        keep: Leading output channels (the image's) that mean the same in both.
        same_head: Whether the outputs of the two last layers mean the same, if they are of one size.
        path: Where the weights came from, for the error.

    Returns:
        None when everything was copied, else what became of the last layer.

    Raises:
        ValueError: Anything but the last layer differs.
    """
    own = network.state_dict()
    wrong = _differing(own, weights)
    in_trunk = [n for n in wrong if not (n.startswith(f"{head}.") and n in own and n in weights)]
    if in_trunk:
        msg = (
            f"Expected `init_from` to hold the same network apart from its last layer, but {len(in_trunk)} tensors of "
            f"{path} differ: {_shapes(weights, own, in_trunk)}; give `network` the arguments that the checkpoint was "
            "trained with."
        )
        raise ValueError(msg)
    taken = dict(weights)
    if not same_head:
        wrong = [name for name in own if name.startswith(f"{head}.")]
    for name in wrong:
        rows = min(keep, len(weights[name]), len(own[name]))
        taken[name] = torch.cat([weights[name][:rows].to(own[name]), own[name][rows:]])
    network.load_state_dict(taken)
    if not wrong:
        return None
    old, new = len(weights[wrong[0]]), len(own[wrong[0]])
    return f"replaced, {old} -> {new} output channels, the first {min(keep, old, new)} (image) kept"


def require_same_tensors(own: dict[str, Tensor], theirs: dict[str, Tensor], argument: str = "ckpt_path") -> None:
    """Compare a module's state with that of the checkpoint it is to go on from.

    Args:
        own: The module's state dict.
        theirs: The checkpoint's.
        argument: The name of the argument that holds the checkpoint's path, for the error.

    Raises:
        ValueError: A tensor is missing, too many or of another shape.
    """
    wrong = _differing(own, theirs)
    if wrong:
        msg = (
            f"Expected `{argument}` to hold the same module, but {len(wrong)} tensors differ: "
            f"{_shapes(theirs, own, wrong)}; give `network` the arguments that the checkpoint was trained with."
        )
        raise ValueError(msg)


def _differing(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    wrong = [n for n in own if n not in theirs] + [n for n in theirs if n not in own]
    return wrong + [n for n, value in theirs.items() if n in own and value.shape != own[n].shape]


def _shapes(theirs: dict[str, Tensor], own: dict[str, Tensor], names: list[str]) -> str:
    return ", ".join(f"{n} {_shape(theirs, n)} -> {_shape(own, n)}" for n in names[:3])


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        digest: str = hashlib.file_digest(file, "sha256").hexdigest()
    return digest


def state_sha256(state: Mapping[str, Tensor], about: str) -> str:
    """The SHA-256 of tensors by name and of what stands beside them, as hexadecimal digits.

    Args:
        state: A state dict.
        about: What else decides the outputs.
    """
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
