"""The five steps of a run, as the server conducts them.

1. Clients train a classifier on their few labels.
2. It labels their other images. Its errors are counted on labels that it was not trained on, summed over clients such
   that nobody sees those of one, and decide which pseudo-labels a client keeps.
3. Clients train a generator on labels and kept pseudo-labels.
4. Each draws the classes that it has no labels of; the classifier says which of the images it keeps.
5. Clients train classifiers on all that, for comparison with step 1.

The steps are those of Wang et al. 2025 (arXiv 2501.02219) as far as its abstract and figures tell; the rules of
selection, of amounts and of the gate are fewlight's own.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.serverapp import Grid
from torch import Tensor

from callbacks.drawn_sheet import shown_classes
from callbacks.sampling import Draws
from datamodules.atomic import write_json_atomically
from datamodules.draw_request import DrawRequest
from federated.checkpoint import CHECKPOINT, write_checkpoint
from federated.cohort import Cohort
from federated.identity import step_identity
from federated.report import Report
from federated.roles import build, role_of
from federated.rounds import Finished, RoundReport, train_together
from federated.selection import cuts, precision
from federated.settings import Arm, Settings
from federated.table import DrawnFacts, Row, SelectionFacts, with_missing_clients
from federated.tasks import FitTask
from federated.weights import load_network_state, network_state, trained_names
from lightning_modules.checkpoints import file_sha256

Int64Array = npt.NDArray[np.int64]

# Lines that a step says in all, at most.
_LINES = 6
# A confidence that nothing has; JSON knows no infinity.
_NONE = 2.0
# Images of a class to look at.
_SAMPLES = 10
_ARMS: dict[Arm, FitTask] = {
    "labels": FitTask("labels"),
    "all_pseudo_labels": FitTask("all_pseudo_labels", pseudo_labels="all"),
    "selected": FitTask("selected", pseudo_labels="selected"),
    "drawn": FitTask("drawn", drawn=True),
    "selected_and_drawn": FitTask("selected_and_drawn", pseudo_labels="selected", drawn=True),
}


class Steps:
    """Conducts a run; each step that was finished before is not repeated.

    Args:
        grid: Reaches the clients.
        settings: The run.

    Raises:
        TimeoutError: Too few clients connect.
        RuntimeError: Too few clients answer.
        ValueError: Clients do not fit together, or none has labels.
    """

    def __init__(self, grid: Grid, settings: Settings) -> None:
        self.settings = settings
        self.run_dir = Path(settings.run_dir).expanduser()
        self.report = Report(self.run_dir, settings.config_hash())
        self.cohort = Cohort(grid, settings.communication)
        self.rows: list[Row] = []
        # The label histogram, once it is summed, and of how many clients.
        self.histogram: Int64Array = np.zeros(0, dtype=np.int64)
        self.counted = 0

    @property
    def _names(self) -> tuple[str, ...]:
        return self.cohort.class_names

    def run(self) -> None:
        """Conduct all steps, and report."""
        self.histogram = self.cohort.total("labels")
        self.counted = len(self.cohort.members)
        classifier, confusion = self._classifier()
        self._label(classifier, confusion)
        may_draw = self.settings.generator is not None and self._draw(classifier)
        for arm in self.settings.arms:
            if _ARMS[arm].drawn and not may_draw:
                self.rows.append(Row(arm, None, None, "not trained: the classifier does not know the drawn images"))
            else:
                self._arm(arm, classifier)
        self.rows = with_missing_clients(self.rows)

    # ---------------------------------------------------------------- the steps

    def _classifier(self) -> tuple[Finished, Int64Array]:
        """Steps 1 and 2a: the classifier, and counts [T, K, K] of its errors on labels that it was not trained on."""
        plan = self.settings.confusion
        if plan.kind == "held_out":
            task = FitTask("classifier", fold=0)
            first = self._train(task)
            return first, self.cohort.total("confusion", task, first.weights)
        first = self._train(FitTask("classifier"))
        counts = []
        for fold in range(plan.folds):
            task = FitTask(f"cross_fit_{fold}", fold=fold)
            counts.append(self.cohort.total("confusion", task, self._train(task).weights))
        return first, np.sum(counts, axis=0)

    def _label(self, classifier: Finished, confusion: Int64Array) -> None:
        """Step 2b: pseudo-labels, and which of them are kept."""
        task = FitTask("classifier")
        self.cohort.ask("query.label", {}, task, classifier.weights)
        rule = self.settings.selection
        cut = np.minimum(cuts(rule, confusion, self.cohort.total("confidences")), _NONE)
        self.cohort.ask("query.select", {"confusion": confusion.tolist(), "cuts": cut.tolist()})
        counts = self.cohort.total("selection")
        self.report.confusion(confusion[0], self._names)
        self.report.selection(counts, self._names)
        self._say(SelectionFacts.of(counts).sentence())
        content = {
            "kind": "federated_pseudo_labels",
            "class_names": list(self._names),
            "confusion": confusion[0].tolist(),
            "precision": precision(confusion[0], rule.smoothing).tolist(),
            "rule": asdict(rule),
            "cuts": cut.tolist(),
            "counts": counts.tolist(),
        }
        self._write("pseudo_labels", content)

    def _draw(self, classifier: Finished) -> bool:
        """Steps 3 and 4: the generator, and the images that clients lack; whether they may be trained on."""
        frozen = None
        if self.settings.noisy_classifier is not None:
            task = FitTask("noisy_classifier", "noisy_classifier", pseudo_labels="selected")
            frozen = self._train(task).weights
        task = FitTask("generator", "generator", pseudo_labels="selected")
        generator = self._train(task, frozen)
        about = {"histogram": self.histogram.tolist(), "num_clients": self.counted}
        self.cohort.ask("query.draw", about, task, generator.weights, classifier.weights)
        counts = self.cohort.total("drawn")
        self.report.drawn(counts, self._names)
        self._sample(task, generator)
        facts = DrawnFacts.of(counts)
        rate, least = facts.rate() or 0.0, self.settings.drawing.least_gate_rate(self.cohort.num_classes)
        allowed = facts.kept > 0 and (not self.settings.drawing.gate or rate >= least)
        refused = f"; below {least:.0%} nothing is trained on them (`drawing.min_gate_rate`)"
        self._say(facts.sentence() + ("" if allowed else refused))
        content = {"kind": "federated_drawn", "gate_rate": rate, "allowed": allowed, "counts": counts.tolist()}
        self._write("drawn_images", content)  # `drawn` is the folder of the arm
        return allowed

    def _arm(self, arm: Arm, classifier: Finished) -> None:
        """Step 5: one of the classifiers that are compared."""
        done = arm == "labels" and self.settings.confusion.kind == "cross_fit"
        finished = classifier if done else self._train(_ARMS[arm])
        last = finished.history[-1]
        worst = min(last.per_client.values(), default=None)
        self.rows.append(Row(arm, last.accuracy, worst, clients=last.per_client))
        counts = self.cohort.total("test_confusion", _ARMS[arm], finished.weights)
        self.report.confusion(counts, self._names, of=f"test images, {arm.replace('_', ' ')}")

    # ---------------------------------------------------------------- their parts

    def _train(self, task: FitTask, frozen: Mapping[str, Tensor] | None = None) -> Finished:
        """Let the clients train a network, or take the one that they trained before."""
        folder = self.run_dir / task.name
        module, _ = build(self.settings, task, None, self._names, folder)
        rounds = role_of(self.settings, task).rounds

        def seen(found: RoundReport) -> None:
            if not self.report.round(task.name, found):
                return
            if found.number % math.ceil(rounds / _LINES) == 0 or found.number == rounds:
                known = "" if found.accuracy is None else f", test accuracy {found.accuracy:.3f}"
                loss = f", loss {fmean(found.losses.values()):.3f}" if found.losses else ""
                self._say(f"{task.name}: round {found.number} of {rounds}{loss}{known}")

        identity = step_identity(self.settings, task)
        finished = train_together(
            self.cohort.grid,
            self.settings,
            task,
            network_state(module),
            folder,
            identity,
            frozen,
            seen,
            parameters=trained_names(module),
            clients={member.node_id: member.client for member in self.cohort.members},
        )
        load_network_state(module, finished.weights)
        write_checkpoint(module, folder / CHECKPOINT)
        content = {"kind": "federated_fit", "identity": identity, "rounds": len(finished.history)}
        self._write(task.name, content | {"sha256": file_sha256(folder / CHECKPOINT), "checkpoint": CHECKPOINT})
        return finished

    def _sample(self, task: FitTask, generator: Finished) -> None:
        """Draw some images of each class to look at."""
        how, count = self.settings.drawing, self.cohort.num_classes
        shown = shown_classes(range(count))
        request = DrawRequest(
            None,
            self.cohort.members[0].image_shape[-1],
            batch_size=how.batch_size,
            sampler=how.sampler,
            num_steps=how.num_steps,
            images_per_class=[_SAMPLES if number in shown else 0 for number in range(count)],
            num_classes=count,
            guidance=how.guidance,
        )
        module, _ = build(self.settings, task, None, self._names, self.run_dir / task.name)
        load_network_state(module, generator.weights)
        if not isinstance(module, Draws):
            msg = f"Expected a `generator` with a method draw(request), got {type(module).__name__}; use TDSMDiffusion."
            raise TypeError(msg)
        drawn = [module.draw(request.batch(block)) for block in range(request.num_blocks)]
        images, labels = (torch.cat([part[name] for part in drawn]) for name in ("image", "label"))
        self.report.samples(images, labels, self._names)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        folder = self.run_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / "manifest.json", dict(content))

    def _say(self, line: str) -> None:
        print(line, flush=True)
