"""A federated run that is over in seconds: tiny nets, digits, three clients."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Message

from datamodules.partition import ClientSplit
from federated import in_process
from federated.client_app import make_client_app
from federated.server_app import make_server_app
from federated.settings import Central, Communication, Drawing, Role, Settings

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
CLASSIFIER = Role(
    {
        "class_path": "SSLClassifier",
        "init_args": {
            "network": {
                "class_path": "ConvNet",
                "init_args": {"image_size": 8, "widths": [4, 8], "in_channels": 1},
            },
            "method": {"class_path": "Supervised"},
            "optimizer": SGD,
        },
    },
    {"class_path": "SemiSupervisedDataModule", "init_args": {"batch_size": 8, "weak": "none", "steps_per_epoch": 4}},
    rounds=2,
)
GENERATOR = Role(
    {
        "class_path": "TDSMDiffusion",
        "init_args": {
            "weighting": "none",
            "network": {
                "class_path": "MLPDenoiser",
                "init_args": {"image_size": 8, "in_channels": 1, "width": 8, "depth": 1},
            },
            "label_dropout": 0.1,
            "optimizer": SGD,
        },
    },
    {"class_path": "GenerationDataModule", "init_args": {"batch_size": 8, "steps_per_epoch": 2}},
    rounds=2,
    server_ema=0.5,
)


def toy(run_dir: Path, **other: Any) -> Settings:
    """A run of all steps; its classifier knows nothing, so the gate lets everything pass unless told otherwise.

    Args:
        run_dir: Its folder.
        other: Settings that differ.
    """
    source = {"class_path": "HardDigitsSource", "init_args": {"num_train": 240, "num_test": 60, "noise": 0.05}}
    whole = Settings(
        source,
        CLASSIFIER,
        GENERATOR,
        run_dir=str(run_dir),
        split=ClientSplit(num_clients=3, label_share=0.4, alpha_labeled=0.2, alpha_unlabeled=0.5),
        drawing=Drawing(gate=False, num_steps=2, guidance=1.0, candidates=1.0, ratio=0.5),
        arms=["labels", "selected", "drawn", "selected_and_drawn"],
        central=Central(same_labels=False, epochs=1),
        communication=Communication(min_clients=1, wait=0.0),
    )
    return replace(whole, **other)


def run(settings: Settings, lost: Callable[[Message], bool] | None = None) -> dict[str, Any]:
    """Run it in this process.

    Args:
        settings: The run.
        lost: Which messages a client vanishes at.

    Returns:
        Its results.json.
    """
    clients = 1 if settings.split is None else settings.split.num_clients
    in_process.run(make_server_app(settings), make_client_app(settings), clients, lost)
    found: dict[str, Any] = json.loads((Path(settings.run_dir) / "results.json").read_text())
    return found
