"""Changed settings train those steps again that depend on them, and no others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_federation import CLASSIFIER, GENERATOR, toy

from datamodules.partition import ClientSplit
from federated.identity import step_identity
from federated.settings import Communication, Confusion, Deployment, Drawing, Privacy, Selection, Settings
from federated.tasks import FitTask

TASKS = {
    "classifier": FitTask("classifier"),
    "fold": FitTask("cross_fit_0", fold=0),
    "all": FitTask("all_pseudo_labels", pseudo_labels="all"),
    "selected": FitTask("selected", pseudo_labels="selected"),
    "noisy": FitTask("noisy_classifier", "noisy_classifier", pseudo_labels="selected"),
    "generator": FitTask("generator", "generator", pseudo_labels="selected"),
    "drawn": FitTask("drawn", drawn=True),
    "both": FitTask("selected_and_drawn", pseudo_labels="selected", drawn=True),
}
EVERY = set(TASKS)


def identities(settings: Settings) -> dict[str, str]:
    return {name: step_identity(settings, task) for name, task in TASKS.items()}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"classifier": replace(CLASSIFIER, rounds=9)}, EVERY),
        ({"confusion": Confusion(folds=3)}, EVERY - {"classifier"}),
        ({"selection": Selection("fixed")}, {"selected", "noisy", "generator", "drawn", "both"}),
        ({"noisy_classifier": replace(CLASSIFIER, epochs=2)}, {"noisy", "generator", "drawn", "both"}),
        ({"generator": replace(GENERATOR, rounds=9)}, {"generator", "drawn", "both"}),
        ({"drawing": Drawing(ratio=2.0)}, {"drawn", "both"}),
        ({"drawing": Drawing(min_gate_rate=0.5)}, set()),
        ({"seed": 1}, EVERY),
        ({"split": ClientSplit(num_clients=4)}, EVERY),
        ({"source": {"class_path": "DigitsSource"}}, EVERY),
        ({"privacy": Privacy(1.0, 1.0)}, EVERY),
        ({"communication": Communication(fraction=0.5)}, EVERY),
        ({"communication": Communication(min_clients=3, timeout=9.0, wait=9.0)}, set()),
        ({"arms": ["drawn"], "central": None, "engine": "deployment", "deployment": Deployment("host:1")}, set()),
        ({"run_dir": "elsewhere"}, set()),
    ],
)
def test_a_change_concerns_the_steps_that_depend_on_it(change: dict[str, Any], changed: set[str]) -> None:
    plain = toy(Path("run"), noisy_classifier=CLASSIFIER, drawing=Drawing())
    before, after = identities(plain), identities(replace(plain, **change))
    assert len(set(before.values())) == len(TASKS)
    assert {name for name in TASKS if before[name] != after[name]} == changed
