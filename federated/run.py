"""A run from its first to its last line, on the server."""

from pathlib import Path

import numpy as np
from flwr.serverapp import Grid

from callbacks.client_classes import draw_client_classes
from callbacks.drawing import Pixels
from datamodules.atomic import write_json_atomically
from datamodules.classification.client_part import ClientPart
from datamodules.partition import ClientSplit
from federated.central import What, train_centrally
from federated.counting import count_labels
from federated.roles import build_source
from federated.settings import Settings
from federated.steps import Steps
from federated.table import Row
from lightning_modules.stages import only_one_fit


def conduct(grid: Grid, settings: Settings) -> None:
    """Conduct all steps, compare with training in one place, and report.

    A run that was interrupted goes on where it stopped: at the last finished round of the step it was in.

    Args:
        grid: Reaches the clients.
        settings: The run.

    Raises:
        TimeoutError: Too few clients connect.
        RuntimeError: Too few clients answer, or the folder is another run's at the moment.
        ValueError: Clients do not fit together, or none has labels.
    """
    run_dir = Path(settings.run_dir).expanduser()
    run_dir.mkdir(parents=True, exist_ok=True)
    with only_one_fit(run_dir):
        write_json_atomically(run_dir / "settings.json", settings.to_plain())
        steps = Steps(grid, settings)
        if settings.split is not None:
            steps.report.client_classes(_who_holds_what(settings, settings.split))
        steps.run()
        steps.rows += _central(settings, run_dir, steps.cohort.class_names)
        steps.report.finish(steps.rows)
        manifest = {
            "kind": "federated",
            "config_hash": settings.config_hash(),
            "class_names": list(steps.cohort.class_names),
            "clients": [member.client for member in steps.cohort.members],
        }
        write_json_atomically(run_dir / "manifest.json", manifest)


def _central(settings: Settings, run_dir: Path, class_names: tuple[str, ...]) -> list[Row]:
    """Training in one place, where the images were dealt out from one place."""
    if settings.central is None or settings.split is None:
        return []
    wanted: list[tuple[What, bool]] = [
        ("same_labels", settings.central.same_labels),
        ("all_labels", settings.central.all_labels),
    ]
    return [
        Row(
            f"central, {what.replace('_', ' ')}",
            train_centrally(settings, what, class_names, run_dir / f"central_{what}"),
        )
        for what, is_wanted in wanted
        if is_wanted
    ]


def _who_holds_what(settings: Settings, split: ClientSplit) -> Pixels:
    """A picture of what the clients of a data set that was dealt out have."""
    source = build_source(settings, {})
    classes = len(source.class_names)
    labeled, unlabeled = [], []
    for client in range(split.num_clients):
        part = ClientPart(source, client, split).read()
        known = (np.asarray(part.roles) == "train") & (part.labels >= 0)
        labeled.append(count_labels(part, classes))
        unlabeled.append(np.bincount(part.labels[known], minlength=classes) - labeled[-1])
    return draw_client_classes(np.stack(labeled), np.stack(unlabeled), source.class_names)
