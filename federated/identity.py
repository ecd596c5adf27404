"""What the weights of a step depend on: rounds that were trained for something else are not gone on with."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from federated.roles import role_of
from federated.settings import Settings
from federated.tasks import FitTask


def step_identity(settings: Settings, task: FitTask) -> str:
    """Identify all settings that the weights of a step depend on, those of the steps before it included.

    Clients that come and go do not make it another step: a run goes on without one that has gone.

    Args:
        settings: The run.
        task: The step.

    Returns:
        SHA-256.

    Raises:
        ValueError: The run has no such role.
    """
    s = settings
    earlier: dict[str, Any] = {}
    guesses, chooses = bool(task.pseudo_labels or task.drawn), task.pseudo_labels == "selected" or task.drawn
    if task.fold is not None or guesses:
        earlier["confusion"] = asdict(s.confusion)
    if guesses:
        earlier["classifier"] = asdict(s.classifier)
    if chooses:
        earlier["selection"] = asdict(s.selection)
    if task.drawn or task.role == "generator":
        earlier["noisy_classifier"] = _plain(s.noisy_classifier)
    if task.drawn:
        earlier["generator"] = _plain(s.generator)
        # Whether drawn images are trained on at all, not what is drawn.
        earlier["drawing"] = {name: value for name, value in asdict(s.drawing).items() if name != "min_gate_rate"}
    content = {
        "task": asdict(task),
        "role": asdict(role_of(s, task)),
        "earlier": earlier,
        "source": s.source,
        "split": _plain(s.split),
        # Who is waited for may be changed to go on without a client that has gone.
        "fraction": s.communication.fraction,
        "privacy": _plain(s.privacy),
        "seed": s.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(part: Any) -> dict[str, Any] | None:  # noqa: ANN401 - any of the dataclasses of the settings
    return None if part is None else asdict(part)
