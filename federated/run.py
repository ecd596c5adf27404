"""A run from its first to its last line, on the server."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from callbacks.client_classes import draw_client_classes
from callbacks.drawing import Pixels
from datamodules.atomic import write_json_atomically
from datamodules.classification.client_part import ClientPart
from datamodules.classification.contents import Contents
from datamodules.partition import ClientSplit
from federated.central import train_centrally
from federated.roles import build_source
from federated.settings import Settings
from federated.steps import Steps
from federated.table import Row
from lightning_modules.stages import only_one_fit

Int64Array = npt.NDArray[np.int64]


def conduct(grid: Grid, settings: Settings) -> None:
    """Conduct all steps, compare with training in one place, and report.

    A run that was interrupted goes on where it stopped: at the last finished round of the step it was in.

    Args:
        grid: Reaches the clients.
        settings: The run.

    Raises:
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
        steps.rows += _central(settings, steps.cohort.class_names)
        steps.report.finish(steps.rows)
        manifest = {
            "kind": "federated",
            "config_hash": settings.config_hash(),
            "class_names": list(steps.cohort.class_names),
            "clients": [member.client for member in steps.cohort.members],
        }
        write_json_atomically(run_dir / "manifest.json", manifest)


def _central(settings: Settings, class_names: tuple[str, ...]) -> list[Row]:
    """Training in one place, where the images were dealt out from one place."""
    if settings.central is None or settings.split is None:
        return []
    rows = []
    if settings.central.same_labels:
        accuracy = train_centrally(settings, "same_labels", class_names, Path(settings.run_dir) / "central_same_labels")
        rows.append(Row("central, same labels", accuracy, None, ""))
    if settings.central.all_labels:
        accuracy = train_centrally(settings, "all_labels", class_names, Path(settings.run_dir) / "central_all_labels")
        rows.append(Row("central, all labels", accuracy, None, ""))
    return rows


def _who_holds_what(settings: Settings, split: ClientSplit) -> Pixels:
    """A picture of what the clients of a data set that was dealt out have."""
    source = build_source(settings, {})
    parts = [ClientPart(source, client, split).read() for client in range(split.num_clients)]
    classes = len(source.class_names)
    labeled, unlabeled = (
        np.stack([_histogram(part, classes, given=given) for part in parts]) for given in (True, False)
    )
    return draw_client_classes(labeled, unlabeled, source.class_names)


def _histogram(part: Contents, classes: int, given: bool) -> Int64Array:
    """Training images of each class whose label the client has, or has not."""
    has = np.ones(len(part.keys), dtype=bool) if part.given is None else part.given
    rows = (np.asarray(part.roles) == "train") & (has == given) & (part.labels >= 0)
    return np.bincount(part.labels[rows], minlength=classes).astype(np.int64)
