"""What the classifier reaches where all images are in one place: what clients that share nothing are compared with."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.artifact_files import MANIFEST, read_json
from datamodules.atomic import write_json_atomically
from federated.client import Client
from federated.roles import build_module
from federated.settings import Settings
from federated.tasks import FitTask
from federated.weights import network_state

What = Literal["same_labels", "all_labels"]


def train_centrally(settings: Settings, what: What, class_names: Sequence[str], folder: Path) -> float | None:
    """Train the classifier on the images of all clients, as the only client of a single round, and test it.

    The labels that all clients have together do not depend on how many they are, so one client has the same; see
    `client_split`. A finished training is not repeated.

    Args:
        settings: The run; it deals out images of one place (`split`), and has `central`.
        what: `same_labels` has the labels that all clients have together, `all_labels` those of all training images
            that may be used.
        class_names: Names of the classes.
        folder: Where the result is kept.

    Returns:
        Share of all test images that it is right on; None without test images.

    Raises:
        ValueError: There is no one place, or `central` is missing.
    """
    if settings.split is None or settings.central is None:
        missing = "split" if settings.split is None else "central"
        msg = (
            f"Expected settings with a `{missing}` to train in one place, got none; configure it, or leave training in "
            "one place out (`central: null`)."
        )
        raise ValueError(msg)
    alone = replace(
        settings,
        split=replace(
            settings.split,
            num_clients=1,
            label_share=settings.split.label_share if what == "same_labels" else 1.0,
        ),
        classifier=replace(settings.classifier, rounds=1, epochs=settings.central.epochs, server_ema=0.0),
    )
    task = FitTask(f"central_{what}")
    identity = _identity(alone, task)
    manifest = folder / MANIFEST
    found: dict[str, Any] = read_json(manifest, "folder") if manifest.is_file() else {}
    if found.get("identity") != identity:
        client = Client(alone, 0, folder=folder)
        module = build_module(alone.classifier, len(class_names), folder, alone.seed)
        trained = client.train(task, 1, network_state(module))
        tested = client.evaluate(task, trained.weights)
        found = {
            "kind": "federated_central",
            "identity": identity,
            "labels": trained.count,
            "correct": tested.correct,
            "tested": tested.count,
        }
        write_json_atomically(manifest, found)
    return found["correct"] / found["tested"] if found["tested"] else None


def _identity(settings: Settings, task: FitTask) -> str:
    """Hash of all that the result depends on."""
    parts: dict[str, Any] = {
        "task": asdict(task),
        "source": settings.source,
        "classifier": asdict(settings.classifier),
        "split": None if settings.split is None else asdict(settings.split),
        "seed": settings.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
