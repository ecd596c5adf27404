"""Pseudo-labels of a client: what the classifier takes its images for, and those of them that are kept."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl

from callbacks import fit_end
from callbacks.label_tally import ImagesToLabel, LabelTally
from datamodules import pseudo_labels
from datamodules.artifact_files import MANIFEST
from datamodules.pseudo_labels import LabelTable, Origin
from datamodules.synthetic_images import weights_sha256
from federated.selection import keep, require_shapes
from federated.settings import Selection

Int64Array = npt.NDArray[np.int64]


class LabelledData(Protocol):
    """The data of a client, after `setup`."""

    images_fingerprint: str

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes."""
        ...

    def label_dataloader(self) -> Any:  # noqa: ANN401 - a DataLoader of dicts, whose `dataset` is an ImagesToLabel
        """Return every image to train on once."""
        ...


def label_images(module: pl.LightningModule, data: LabelledData, folder: Path, trainer: pl.Trainer) -> None:
    """Label the images of a client, and write what they are taken for as PseudoLabels.

    Images that people labelled keep these labels, with confidence 1, and are in the artifact as well: a
    GenerationDataModule that is given it trains on all of them. Unlike PseudoLabelWriter it leaves classes without any
    image alone: a client need not have all. A folder that holds these labels is left as it is, another is replaced.

    Args:
        module: The classifier, of which `predict_step` is asked.
        data: The images.
        folder: Where to.
        trainer: Where and how precisely it computes; nothing is run with it.

    Raises:
        TypeError: `predict_step` lacks something.
        ValueError: What it predicts cannot be used, or the folder holds something else.
        OSError: A file could not be written.
    """
    loader = data.label_dataloader()
    images: ImagesToLabel = loader.dataset
    origin = _origin(module, data, images, trainer)
    if pseudo_labels.is_written(folder, origin):
        return
    given = images.labels.cpu().numpy()
    tally = LabelTally(images.labels < 0, len(data.class_names), top_k=0)
    with fit_end.working(trainer, module) as device:
        for number, batch in enumerate(loader):
            tally.add(module, module.predict_step(trainer.strategy.batch_to_device(batch, device), number))
        found = tally.gathered(trainer, device)
    if isinstance(found, str):
        raise ValueError(found)  # noqa: TRY004 - a message instead of rows
    confidence = np.where(given >= 0, 1.0, found.confidence).astype(np.float32)
    labels = np.where(given >= 0, given, found.labels)
    table = LabelTable(list(images.keys), labels, confidence, images.splits)
    pseudo_labels.write(folder, table, origin.with_expected(found.expected_confusion))


def select_labels(
    source: Path, target: Path, rule: Selection, confusion: Int64Array, cut: npt.NDArray[np.float64]
) -> int:
    """Write those pseudo-labels of a client that a rule keeps, and all labels that people gave.

    The manifest has the confusion matrix of all clients, which `ConfusionTransition` reads. It is that of all held-out
    labels, not of those that the rule would keep: it counts more errors than the kept pseudo-labels have.

    Args:
        source: What `label_images` wrote.
        target: Where to; what was there is replaced. Without any label to keep there is nothing afterwards.
        rule: Which are kept.
        confusion: Counts of all clients [T, K, K], see `selection.cuts`.
        cut: What `selection.cuts` told [K].

    Returns:
        How many pseudo-labels are kept.

    Raises:
        FileNotFoundError: `source` is missing or not finished.
        ValueError: It is damaged, `confusion` is not of its classes, or `target` holds something else.
        OSError: A file could not be written.
    """
    found = pseudo_labels.read(source)
    names, table = list(found.manifest["class_names"]), found.table
    require_shapes(confusion)
    if confusion.shape[1:] != (len(names), len(names)):
        msg = (
            f"Expected `confusion` of the {len(names)} classes of {source}, got shape {list(confusion.shape)}; count "
            "the errors of the same classes."
        )
        raise ValueError(msg)
    rows = np.flatnonzero(~found.by_people)
    kept = found.by_people
    kept[rows] = keep(rule, confusion, cut, table.labels[rows], table.confidence[rows])
    if not kept.any():
        _remove(target)
        return 0
    places = np.flatnonzero(kept)
    chosen = LabelTable(table.keys.take(places), table.labels[places], table.confidence[places], table.splits[places])
    known = {name: found.manifest.get(name) for name in ("fingerprint", "weights", "config_hash", "made_with")}
    options = {**(found.manifest.get("selection") or {}), **asdict(rule)}
    expected = found.manifest.get("expected_confusion")
    matrices = {
        "confusion": confusion[0],
        "expected_confusion": None if expected is None else np.asarray(expected, dtype=np.float64),
    }
    pseudo_labels.write(target, chosen, Origin(names, **known, selection=options, **matrices))
    return int(kept[rows].sum())


def _origin(module: pl.LightningModule, data: LabelledData, images: ImagesToLabel, trainer: pl.Trainer) -> Origin:
    meaning: dict[str, Any] = getattr(module, "meaning", dict)()
    # As PseudoLabelWriter has it: `true_labels` says that people's labels are among them.
    made_with = {"precision": str(trainer.precision), **meaning, "true_labels": True, "top_k": 0}
    return Origin(
        tuple(data.class_names),
        data.images_fingerprint,
        weights_sha256(module),
        made_with={**made_with, "data": images.fingerprint},
        selection={"not_in_data": images.left_out} if images.left_out else None,
    )


def _remove(folder: Path) -> None:
    """Remove an artifact: first what makes it count as finished."""
    if folder.is_dir():
        pseudo_labels.require_free(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
