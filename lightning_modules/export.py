"""From the checkpoint of a fit to a folder that diffusers loads, with what diffusers does not know beside it."""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_modules.checkpoints import load_checkpoint, network_weights
from lightning_modules.diffusion.noise import EDMProcess, NoiseProcess
from lightning_modules.diffusion.vp_noise import VPProcess, VPSDEProcess
from lightning_modules.latent_space import LatentSpace
from lightning_modules.networks.adm_unet import ADMUNet
from lightning_modules.networks.autoencoder import KLAutoencoder
from lightning_modules.networks.pretrained import read_arguments, require_free, with_weights

_NETWORK = "model.init_args.network"
_PROCESS = "model.init_args.process"
# A checkpoint comes from anywhere: nothing it names is imported, these are recognised.
_ADM = re.compile(r"(?:lightning_modules\.(?:networks\.(?:adm_unet\.)?)?)?ADMUNet(?:\.(small|from_pretrained))?")
_PROCESSES: dict[str, type[NoiseProcess]] = {
    "EDMProcess": EDMProcess,
    "VPProcess": VPProcess,
    "VPSDEProcess": VPSDEProcess,
}


def export_checkpoint(ckpt_path: str | Path, output_dir: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the network of a checkpoint for diffusers: its EMA weights where there are any, else the last ones.

    `diffusers.UNet2DModel.from_pretrained(output_dir)` loads the folder without this package,
    `ADMUNet.from_pretrained` and `init_from` take it back.

    Args:
        ckpt_path: Checkpoint that `lightning fit` wrote of a HybridSegmentation with an ADMUNet, or of VAETraining:
            then `diffusers.AutoencoderKL.from_pretrained` and LatentSpace load the folder.
        output_dir: A new or empty folder; it is written whole or not at all.
        overwrite: Replace a network that was exported to it before.

    Returns:
        What fewlight.json in the folder holds. `clean_image` is how the network is called on an image in [0, 1]:
        network(scale * (2 * image - 1), timestep). `outputs` counts its channels, the image's first. There is no such
        file of an autoencoder, whose configuration says all; `latent_channels` tells it.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is damaged, or holds something that is no ADM UNet, or not its configuration.
        OSError: The folder is in use, or cannot be written; what was there still is.
    """
    require_free(output_dir, overwrite, "output_dir")
    checkpoint = load_checkpoint(ckpt_path, "ckpt_path")
    if "autoencoder" in checkpoint.get("meaning", {}):
        return _export_autoencoder(checkpoint, ckpt_path, output_dir, overwrite)
    settings = _settings(checkpoint, ckpt_path)
    num_classes = checkpoint.get("hyper_parameters", {}).get("num_classes")
    others = sorted(name for name in checkpoint["state_dict"] if not name.startswith(("network.", "ema.")))
    if others or not isinstance(num_classes, int):
        msg = (
            f"Expected `ckpt_path` to hold a HybridSegmentation, but {ckpt_path} is of "
            f"{settings.get('model.class_path')}{f' with {others[0]}' if others else ''}, more or other than a UNet; "
            "export the checkpoint that its network came from."
        )
        raise ValueError(msg)
    weights, kind = network_weights(checkpoint, ckpt_path, "ckpt_path")
    try:
        network = with_weights(_builder(settings, ckpt_path), weights, f"`ckpt_path` {ckpt_path}")
        about = {"weights": kind, **_about(checkpoint, settings, num_classes, network)}
    except TypeError as error:
        msg = (
            f"Expected `ckpt_path` to hold arguments of a network and a process of fewlight {version('fewlight')}, but "
            f"those of {ckpt_path} do not fit: {error}; export it with the version that wrote it."
        )
        raise ValueError(msg) from error
    about["class_names"] = checkpoint.get("class_names") or None
    network.save_pretrained(output_dir, overwrite, about)
    return about


def _export_autoencoder(
    checkpoint: Mapping[str, Any], path: str | Path, output_dir: str | Path, overwrite: bool
) -> dict[str, Any]:
    try:
        network = KLAutoencoder(**checkpoint["meaning"]["autoencoder"])
    except TypeError as error:
        msg = (
            f"Expected `ckpt_path` to hold arguments of an autoencoder of fewlight {version('fewlight')}, but those of "
            f"{path} do not fit: {error}; export it with the version that wrote it."
        )
        raise ValueError(msg) from error
    space = LatentSpace(network, str(path))
    space.save_pretrained(output_dir, overwrite)
    return {
        "weights": network_weights(dict(checkpoint), path, "ckpt_path")[1],
        "global_step": checkpoint.get("global_step"),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "image_channels": space.image_channels,
        "latent_channels": space.channels,
    }


def _settings(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The configuration that a checkpoint carries, as `{dotted key: value}`."""
    try:
        settings = json.loads(checkpoint.get("config") or "null")
    except (TypeError, json.JSONDecodeError):
        settings = None
    if not isinstance(settings, dict) or f"{_NETWORK}.class_path" not in settings:
        msg = (
            f"Expected `ckpt_path` to carry the configuration of its network, as `lightning fit` writes it, but {path} "
            "does not (written from Python?); there, call model.ema_network.save_pretrained(folder, "
            'about={"num_classes": K}) instead.'
        )
        raise ValueError(msg)
    return settings


def _builder(settings: Mapping[str, Any], path: str | Path) -> Callable[[], ADMUNet]:
    name = str(settings[f"{_NETWORK}.class_path"])
    known = _ADM.fullmatch(name)
    if known is None:
        msg = (
            f"Expected `ckpt_path` to hold an ADMUNet, which is a UNet2DModel of diffusers, but the network of {path} "
            f"is {name}; use the checkpoint itself for such a network."
        )
        raise ValueError(msg)
    arguments = _init_args(settings, _NETWORK)
    match known.group(1):
        case "small":
            return partial(ADMUNet.small, **arguments)
        case "from_pretrained":
            return partial(ADMUNet, **read_arguments(arguments.get("folder", ""), f"{_NETWORK}.init_args.folder"))
        case _:
            return partial(ADMUNet, **arguments)


def _init_args(settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    start = f"{place}.init_args."
    return {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}


def _about(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], num_classes: int, network: ADMUNet
) -> dict[str, Any]:
    chosen: dict[str, Any] = checkpoint["hyper_parameters"]
    objective = chosen.get("objective", "hybrid")
    process, clean_image = _process(settings)
    return {
        "fewlight": version("fewlight"),
        "config_hash": checkpoint.get("config_hash"),
        "global_step": checkpoint.get("global_step"),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "num_classes": num_classes,
        "image_channels": network.in_channels,
        "outputs": {"image": network.out_channels - num_classes, "mask": num_classes},
        "objective": objective,
        "mask_loss": chosen.get("mask_loss") or ("ce" if objective == "supervised" else "mse"),
        "process": process,
        "clean_image": clean_image,
    }


def _process(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float] | None]:
    """The noise process with its arguments, and how a clean image enters the network; None if it is not ours."""
    name = settings.get(f"{_PROCESS}.class_path")
    arguments = _init_args(settings, _PROCESS)
    if name is None:
        name, defaults = "lightning_modules.VPProcess", inspect.signature(VPProcess).parameters
        arguments = {key: parameter.default for key, parameter in defaults.items()}
    described = {"class_path": name, "init_args": arguments}
    ours = _PROCESSES.get(name.rpartition(".")[2]) if name.startswith("lightning_modules.") else None
    if ours is None:
        return described, None
    process, clean = ours(**arguments), torch.zeros(())
    return described, {"scale": float(process.c_in(clean)), "timestep": float(process.c_noise(clean))}
