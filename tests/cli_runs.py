"""Tiny runs for tests of the command line."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

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
