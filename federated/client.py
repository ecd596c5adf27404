"""One client: its images, what it trains, and the counts that it gives away; without Flower."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning import Trainer
from torch import Tensor

from callbacks.fit_end import working
from datamodules.artifact_files import MANIFEST
from datamodules.classification.base import ClassificationDataModule
from datamodules.classification.client_part import ClientPart
from datamodules.classification.contents import Contents, ImageSource
from federated.checkpoint import write_checkpoint
from federated.counting import (
    Predicted,
    count_by_confidence,
    count_confusion,
    count_guesses,
    count_labels,
    count_selection,
)
from federated.drawing import draw_classes, drawn_counts, wanted
from federated.labelling import label_images, select_labels
from federated.local_fit import Epochs, fit, make_trainer, quietly
from federated.provenance import Provenance
from federated.roles import (
    DRAWN,
    PSEUDO_LABELS,
    SELECTED,
    artifact_of,
    artifacts_of,
    build_data,
    build_module,
    build_source,
    role_of,
)
from federated.settings import Settings
from federated.task_parts import TaskParts
from federated.tasks import FitTask
from federated.weights import load_network_state, network_state
from lightning_modules.checkpoints import file_sha256, state_sha256
from lightning_modules.ssl_data import FeedsMethods

Int64Array = npt.NDArray[np.int64]

NOISY_CLASSIFIER = "noisy_classifier.ckpt"
_CLASSIFIER = FitTask("classifier")
# Tasks whose module and images are kept; a step asks for those of one task again and again.
_KEPT = 2
# What is counted of which artifact.
_COUNTED = {"confidences": PSEUDO_LABELS, "selection": SELECTED, "drawn": DRAWN}


@dataclass(frozen=True)
class Description:
    """What a client says of itself.

    Attributes:
        client: Its number.
        class_names: Names of the classes.
        image_shape: Channels, height and width of its images.
        images: How many it has to train on.
        labeled: How many of them have a label.
        tested: How many it has to test on.
    """

    client: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    images: int
    labeled: int
    tested: int


@dataclass(frozen=True)
class Trained:
    """What a round of training gave.

    Attributes:
        weights: The network's weights.
        count: Labelled images that it was trained on, pseudo-labelled and drawn ones included.
        loss: The mean loss; 0 where nothing was trained on.
    """

    weights: dict[str, Tensor]
    count: int
    loss: float


@dataclass(frozen=True)
class Evaluated:
    """What a test gave.

    Attributes:
        correct: Images that were recognised.
        count: All images.
    """

    correct: int
    count: int


class Client:
    """A client of a federated run.

    What it does in a round is a function of the settings, its number, the round, the weights that it is sent, and the
    artifacts in its folder. It keeps images and modules in memory from one round to the next, to be quick, and nothing
    that a new process would lack.

    Args:
        settings: The run.
        number: Its number, from 0.
        source: Images; None builds the settings' source.
        folder: Its folder; None is the one below the run's.
    """

    def __init__(
        self, settings: Settings, number: int, source: ImageSource | None = None, folder: Path | None = None
    ) -> None:
        self.settings = settings
        self.number = number
        self.source = build_source(settings, {}) if source is None else source
        self.folder = Path(settings.run_dir).expanduser() / "clients" / f"{number:02d}" if folder is None else folder
        self._provenance = Provenance(self.folder, settings.config_hash())
        self._built: dict[tuple[object, ...], TaskParts] = {}
        self._trainers: dict[str, Trainer] = {}
        self._contents: Contents | None = None
        self._frozen: str | None = None

    # ---------------------------------------------------------------- what it has

    def describe(self) -> Description:
        """Say what it has."""
        contents = self._read()
        role = role_of(self.settings, _CLASSIFIER)
        with quietly():
            data = build_data(role, _CLASSIFIER, self._part(None), self.folder, self._seed("data"))
        side = int(data.image_size) if isinstance(data, ClassificationDataModule) else 0
        roles = np.asarray(contents.roles)
        return Description(
            client=self.number,
            class_names=tuple(self.source.class_names),
            image_shape=(self.source.image_channels, side, side),
            images=int((roles == "train").sum()),
            labeled=int(self.counts("labels").sum()),
            tested=int((roles == "test").sum()),
        )

    def counts(self, what: str, task: FitTask | None = None, weights: Mapping[str, Tensor] | None = None) -> Int64Array:
        """Count something that the server is told only the sum of.

        Args:
            what: `labels` [K], see `count_labels`; `confusion` [T, K, K] on the labels that the task holds out, see
                `count_by_confidence`; `confidences` [E, K], see `count_guesses`; `test_confusion` [K, K] on the test
                images, see `count_confusion`; `selection` [K, 5], see `count_selection`; `drawn` [K, 2], see
                `drawn_counts`.
            task: The classifier that errors are of.
            weights: Its weights.

        Returns:
            The counts, not negative.

        Raises:
            ValueError: There is nothing of that name, or task or weights are missing.
            FileNotFoundError: Nothing was labelled or drawn yet in this run.
        """
        names = len(self.source.class_names)
        if what in _COUNTED:
            self._provenance.require([_COUNTED[what]])
        if what == "labels":
            return count_labels(self._read(), names)
        if what == "confidences":
            return count_guesses(self.folder / PSEUDO_LABELS, names)
        if what == "selection":
            return count_selection(self.folder / PSEUDO_LABELS, self.folder / SELECTED, self._read(), names)
        if what == "drawn":
            return drawn_counts(self.folder / DRAWN, names)
        if what not in ("confusion", "test_confusion") or task is None or weights is None:
            msg = (
                "Expected `what` to be labels, confidences, selection, drawn, or, with task and weights, confusion or "
                f"test_confusion, got {what!r}."
            )
            raise ValueError(msg)
        if what == "test_confusion":
            return count_confusion(self._predicted(task, weights, "test"), names)
        return count_by_confidence(self._predicted(task, weights, "val"), names)

    # ---------------------------------------------------------------- rounds

    def train(
        self,
        task: FitTask,
        number: int,
        weights: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor] | None = None,
    ) -> Trained:
        """Train for a round.

        Args:
            task: What is trained.
            number: The round, from 1.
            weights: The network's weights, as the server has them.
            frozen: Weights of the noisy classifier's network, for a generator that uses it; see NOISY_CLASSIFIER.

        Returns:
            The new weights; those that it got, and a count of 0, if it has nothing to train on.

        Raises:
            ValueError: Weights, module or data do not fit.
            FileNotFoundError: It lacks what it should have labelled or drawn for the task in this run.
            FloatingPointError: The loss is not finite.
        """
        self._provenance.require(artifacts_of(task))
        role = role_of(self.settings, task)
        epochs = Epochs((number - 1) * role.epochs, role.epochs, role.rounds * role.epochs)
        built = self._of(task)
        count = built.count
        if not count:
            return Trained(dict(weights), 0, 0.0)
        if frozen is not None:
            self._freeze(frozen)
        module = built.for_fit(weights)
        if isinstance(built.data, FeedsMethods):
            # What a method chose in the round before is forgotten with the method.
            for split in ("labeled", "unlabeled"):
                built.data.select(split, None)
        fitted = fit(module, built.data, epochs, self._seed(task.name), role.trainer)
        return Trained(network_state(module), count, fitted.loss)

    def evaluate(self, task: FitTask, weights: Mapping[str, Tensor]) -> Evaluated:
        """Test on its test images.

        Args:
            task: The classifier.
            weights: The network's weights.
        """
        found = self._predicted(task, weights, "test")
        return Evaluated(int((found.label == found.truth).sum()), len(found.truth))

    # ---------------------------------------------------------------- artifacts

    def label(self, task: FitTask, weights: Mapping[str, Tensor]) -> None:
        """Label its images, and write that into its folder.

        Args:
            task: The classifier.
            weights: The network's weights.
        """
        built = self._of(replace(task, fold=None))
        with quietly(), self._provenance.made(PSEUDO_LABELS):
            module, trainer = built.for_evaluation(weights), self._trainer(task)
            label_images(module, built.classes, self.folder / PSEUDO_LABELS, trainer)

    def select(self, confusion: Int64Array, cut: npt.NDArray[np.float64]) -> None:
        """Choose which of its pseudo-labels it trains on, and write them into its folder.

        Args:
            confusion: Errors of the classifier over all clients [T, K, K], see `counts`.
            cut: How sure pseudo-labels have to be [K], see `selection.cuts`.

        Raises:
            FileNotFoundError: Nothing was labelled yet in this run.
        """
        self._provenance.require([PSEUDO_LABELS])
        with self._provenance.made(SELECTED):
            select_labels(self.folder / PSEUDO_LABELS, self.folder / SELECTED, self.settings.selection, confusion, cut)

    def draw(
        self,
        task: FitTask,
        weights: Mapping[str, Tensor],
        gate_weights: Mapping[str, Tensor] | None,
        histogram: Int64Array,
        num_clients: int,
    ) -> None:
        """Draw images of the classes that it lacks, and write those that the classifier agrees with into its folder.

        Args:
            task: The generator.
            weights: The network's weights.
            gate_weights: Those of the classifier; needed where the settings have a gate.
            histogram: Labelled images of each class over all clients [K].
            num_clients: Number of these.

        Raises:
            ValueError: The classifier's weights are missing.
        """
        how = self.settings.drawing
        if how.gate and gate_weights is None:
            msg = (
                "Expected the weights of the classifier to choose drawn images, got none; or set `drawing.gate` false."
            )
            raise ValueError(msg)
        own = self.counts("labels")
        numbers = wanted(histogram, own, num_clients, how.ratio, how.fill, how.max_per_class)
        with quietly():
            plain = self._of(_CLASSIFIER)
            gate = plain.for_evaluation(gate_weights) if how.gate and gate_weights is not None else None
            # What training takes from the client's folder is no part of it: who selected nothing has none of that.
            generator = build_module(role_of(self.settings, task), len(own), None, self.settings.seed)
            load_network_state(generator, weights)
            data, trainer = plain.classes, self._trainer(task)
            with self._provenance.made(DRAWN):
                draw_classes(generator, gate, data, self.folder / DRAWN, self.number, numbers, how, trainer)

    def _freeze(self, frozen: Mapping[str, Tensor]) -> None:
        """Write a finished noisy classifier as the checkpoint that generators read."""
        path = self.folder / NOISY_CLASSIFIER
        task = FitTask("noisy_classifier", "noisy_classifier", pseudo_labels="selected")
        digest = state_sha256(frozen, str(self._artifacts(task)))
        if digest == self._frozen and path.is_file():
            return
        role = role_of(self.settings, task)
        module = build_module(role, len(self.source.class_names), self.folder, self.settings.seed)
        if getattr(module, "learned", None) is not None:
            msg = (
                "Expected a `noisy_classifier` with a known `transition`, got one that learns it, which clients do not "
                "exchange; give ConfusionTransition(counts={client}/selected/manifest.json)."
            )
            raise ValueError(msg)
        load_network_state(module, frozen)
        write_checkpoint(module, path)
        self._frozen = digest

    # ---------------------------------------------------------------- their parts

    def _part(self, fold: int | None) -> ClientPart:
        folds = self.settings.confusion.folds
        return ClientPart(self.source, self.number, self.settings.split, fold, folds)

    def _read(self) -> Contents:
        """Its images, none of them decoded and none held out."""
        if self._contents is None:
            self.source.prepare()
            self._contents = replace(self._part(None).read(), images=None)
        return self._contents

    def _artifacts(self, task: FitTask) -> tuple[str | None, ...]:
        """What identifies the artifacts that a task uses; None for those that are not there."""
        folders = (artifact_of(task, self.folder), self.folder / DRAWN if task.drawn else None)
        files = [None if folder is None else folder / MANIFEST for folder in folders]
        return tuple(file_sha256(file) if file is not None and file.is_file() else None for file in files)

    def _of(self, task: FitTask) -> TaskParts:
        """Module and data of a task."""
        key = (task.role, task.fold, *self._artifacts(task))
        if key not in self._built:
            role, seed = role_of(self.settings, task), self.settings.seed
            num_classes = len(self.source.class_names)
            with quietly():
                data = build_data(role, task, self._part(task.fold), self.folder, self._seed("data"))
                data.prepare_data()
                data.setup("fit")
            while len(self._built) >= _KEPT:
                del self._built[next(iter(self._built))]
            self._built[key] = TaskParts(data, lambda: build_module(role, num_classes, self.folder, seed))
        self._built[key] = self._built.pop(key)  # the latest is last
        return self._built[key]

    def _trainer(self, task: FitTask) -> Trainer:
        """A Trainer that says where and how precisely to compute."""
        if task.role not in self._trainers:
            self._trainers[task.role] = make_trainer(role_of(self.settings, task).trainer)
        return self._trainers[task.role]

    def _predicted(self, task: FitTask, weights: Mapping[str, Tensor], split: str) -> Predicted:
        """Classify its test images, or those that a task holds out."""
        empty = np.zeros(0, dtype=np.int64)
        built = self._of(task)
        data = built.classes
        if not data.counts[split]:
            return Predicted(empty, empty, empty.astype(np.float64))
        loader = data.test_dataloader() if split == "test" else data.val_dataloader()
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        with quietly():
            module, trainer = built.for_evaluation(weights), self._trainer(task)
            with working(trainer, module) as device:
                for number, batch in enumerate(loader):
                    found = module.predict_step(trainer.strategy.batch_to_device(batch, device), number)
                    rows.append((batch["label"], found["label"].cpu(), found["confidence"].double().cpu()))
        truth, label, confidence = (torch.cat(parts).numpy() for parts in zip(*rows, strict=True))
        return Predicted(truth, label, confidence)

    def _seed(self, name: str) -> int:
        """A seed of its own for each purpose."""
        text = f"{self.settings.seed}:{name}:{self.number}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
