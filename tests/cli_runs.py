"""Tiny runs for tests of the command line."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tiny_autoencoders import tiny_autoencoder

NETWORK = {
    "class_path": "ADMUNet",
    "init_args": {
        "image_size": 16,
        "base_channels": 8,
        "channel_mult": [1, 2],
        "layers_per_block": 1,
        "attention_resolutions": [8],
        "head_channels": 8,
        "norm_groups": 4,
    },
}


# Arguments that make networks tiny; those that a network does not have are left out.
_SMALLER: dict[str, dict[str, Any]] = {
    "UViT": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "ClassUNet": {
        "base_channels": 8,
        "channel_mult": [1, 1],
        "attention_resolutions": [],
        "layers_per_block": 1,
        "norm_groups": 4,
    },
    "NoisyResNet": {"widths": [4, 8], "blocks": [1, 1], "strides": [1, 2], "embed_dim": 8},
    "WideResNet": {"depth": 10, "widen": 1, "width": 4},
    "ViTEncoder": {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "TimmClassifier": {"name": "resnet18", "pretrained": False},
    "KLAutoencoder": {"block_out_channels": [4, 8], "layers_per_block": 1, "norm_groups": 2},
}


def smaller(network: dict[str, Any]) -> dict[str, Any]:
    """What to merge into the configuration of a network so that it becomes tiny."""
    name = network["class_path"].rpartition(".")[2]
    return {"class_path": name, "init_args": _SMALLER[name]}


def small_model(resolved: dict[str, Any], autoencoder: Path | None = None) -> dict[str, Any]:
    """What to merge into the arguments of a model so that its networks become tiny.

    Args:
        resolved: The configuration of a fit.
        autoencoder: A folder for a tiny autoencoder, for a model that works in the latents of a published one.
    """
    arguments = resolved["model"]["init_args"]
    parts = [name for name in ("network", "classifier", "encoder") if arguments.get(name) is not None]
    model: dict[str, Any] = {name: smaller(arguments[name]) for name in parts}
    if autoencoder is not None:
        tiny_autoencoder().vae.save_pretrained(autoencoder)
        model["latent"] = {"init_args": {"folder": str(autoencoder)}}
        for name in {"network", "classifier"} & set(parts):
            inner = {**model[name]["init_args"], "in_channels": 2}
            model[name]["init_args"] = inner | ({"image_size": 8} if name == "network" else {})
    return model


def has_published_autoencoder(resolved: dict[str, Any]) -> bool:
    """Whether a model works in the latents of an autoencoder that was not trained here."""
    latent = resolved["model"]["init_args"].get("latent") or {}
    return (latent.get("init_args") or {}).get("folder") is not None


def small_data(resolved: dict[str, Any]) -> dict[str, Any]:
    """What to merge into the arguments of classification data so that a step takes no time."""
    arguments = resolved["data"]["init_args"]
    small = {"batch_size": 4, "unlabeled_ratio": 2, "steps_per_epoch": 1, "num_workers": 0}
    data: dict[str, Any] = {name: value for name, value in small.items() if name in arguments}
    source = arguments["source"] or {"class_path": "DigitsSource"}
    if source["class_path"].endswith("ImageNetSource"):
        data["image_size"] = 16
    if "root" in source.get("init_args", {}) and "labels_per_class" in arguments:
        data["labels_per_class"] = 2
    return data


def small_writers(resolved: dict[str, Any]) -> list[dict[str, Any]]:
    """The callbacks of a fit without those that measure drawn images; two tiny images are drawn of each class."""
    kept = []
    for callback in copy.deepcopy(resolved["trainer"]["callbacks"] or []):
        request = callback.get("init_args", {}).get("request")
        if request is not None and request.get("images_per_class") is not None:
            request |= {"images_per_class": 2, "num_steps": 1, "batch_size": 8}
            request |= {"num_classes": 3, "image_size": 16} if request["num_classes"] == 1000 else {}
        if not callback["class_path"].endswith("GenerationMetrics"):
            kept.append(callback)
    return kept


def write_overlay(file: Path, model: dict[str, Any], data: dict[str, Any], **trainer: Any) -> Path:
    """Write an overlay for a fit on one CPU."""
    overlay = {
        "model": {"init_args": model},
        "data": {"init_args": data},
        "trainer": {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true", **trainer},
    }
    file.write_text(yaml.safe_dump(overlay))
    return file


def tiny_generator(classifier_from: str, latents_from: str | None = None) -> dict[str, Any]:
    """TDSMDiffusion of digits, or of their latents; what it starts from."""
    size, channels = (8, 1) if latents_from is None else (4, 2)
    network = {"image_size": size, "patch_size": 2, "in_channels": channels, **_SMALLER["UViT"]}
    judge = {"in_channels": channels, **_SMALLER["NoisyResNet"]}
    arguments: dict[str, Any] = {
        "network": {"class_path": "UViT", "init_args": network},
        "classifier": {"class_path": "NoisyResNet", "init_args": judge},
        "classifier_from": classifier_from,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    }
    if latents_from is not None:
        autoencoder = {"in_channels": 1, "latent_channels": 2, **_SMALLER["KLAutoencoder"]}
        latent = {"network": {"class_path": "KLAutoencoder", "init_args": autoencoder}, "init_from": latents_from}
        arguments["latent"] = {"class_path": "LatentSpace", "init_args": latent}
    return {"class_path": "TDSMDiffusion", "init_args": arguments}


def config(name: str, **changes: Any) -> dict[str, Any]:
    """A fit of 2 epochs with 4 steps each on generated lesions, written under ${runs}/<name>."""
    content: dict[str, Any] = {
        "model": {
            "class_path": "HybridSegmentation",
            "init_args": {
                "network": copy.deepcopy(NETWORK),
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
                "ema_decay": 0.9,
            },
        },
        "data": {
            "class_path": "GeneratedLesionsDataModule",
            "init_args": {"image_size": 16, "num_images": 24, "num_labels": 16, "batch_size": 4, "val_share": 0.0},
        },
        "trainer": {
            "default_root_dir": f"${{runs}}/{name}",
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = content
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return content


def write(folder: Path, name: str, **changes: Any) -> Path:
    """Write the config of a run as YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config(name, **changes)))
    return file


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a launcher may have left in it."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    kept = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("FEWLIGHT_")}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def lightning(*args: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_modules", *map(str, args)],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
