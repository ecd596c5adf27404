"""Pseudo-labels of a client: written, chosen among, and taken up by the data of the next steps."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pytorch_lightning as pl
import torch
from ssl_toys import ToyNet
from tiny_nets import tiny_trainer
from torch import Tensor

from datamodules import ArraySource, GenerationDataModule, SemiSupervisedDataModule, pseudo_labels
from datamodules.classification.client_part import ClientPart
from datamodules.pseudo_labels import SPLITS
from federated.counting import count_guesses
from federated.labelling import label_images, select_labels
from federated.selection import THRESHOLDS, cuts, keep
from federated.settings import Selection
from lightning_modules import SSLClassifier
from lightning_modules.diffusion.transition import ConfusionTransition
from lightning_modules.ssl.supervised import Supervised

Int64Array = npt.NDArray[np.int64]

CLASSES = 3
SIDE = 6
LABELED = 6  # the first ones, of the classes 0 and 1
IMAGES = 30
TRUTH = np.concatenate([np.arange(LABELED) % 2, np.arange(IMAGES - LABELED) % CLASSES])


class Client(ArraySource):
    """Images of noise; the client has labels of two classes of three."""

    is_part = True

    def __init__(self, labeled: int = LABELED) -> None:
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE), dtype=np.uint8)
        given = np.where(np.arange(IMAGES) < labeled, TRUTH, -1)
        super().__init__(images, given, class_names=["a", "b", "c"], hidden_labels=TRUTH)


def classifier(seed: int = 0) -> SSLClassifier:
    torch.manual_seed(seed)
    net = ToyNet(SIDE**2, CLASSES, 16)
    with torch.no_grad():
        net.head.weight.mul_(16)  # sure of some images, unsure of others
    return SSLClassifier(net, Supervised(), CLASSES, optimizer=partial(torch.optim.SGD, lr=0.1))


def ready(labeled: int = LABELED, **options: Any) -> SemiSupervisedDataModule:
    data = SemiSupervisedDataModule(ClientPart(Client(labeled)), batch_size=4, steps_per_epoch=None, **options)
    data.setup("fit")
    return data


def label(folder: Path, module: pl.LightningModule | None = None, labeled: int = LABELED) -> Path:
    """Pseudo-labels of the client in a folder of that name."""
    target = folder / "pseudo_labels"
    label_images(module or classifier(), ready(labeled), target, tiny_trainer(folder))
    return target


def confusion(seed: int = 0) -> Int64Array:
    counts = np.random.default_rng(seed).integers(0, 20, (len(THRESHOLDS), CLASSES, CLASSES))
    return np.cumsum(counts[::-1], axis=0)[::-1].astype(np.int64)


def by_row(folder: Path) -> dict[int, tuple[int, float, str]]:
    table = pseudo_labels.read(folder).table
    splits = [SPLITS[split] for split in table.splits]
    rows = [int(key.split("/")[1]) for key in table.keys.to_pylist()]
    return dict(zip(rows, zip(table.labels.tolist(), table.confidence.tolist(), splits, strict=True), strict=True))


def test_people_keep_their_labels_and_the_classifier_gives_the_others(tmp_path: Path) -> None:
    module = classifier()
    found = by_row(label(tmp_path, module))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE), dtype=np.uint8))
    with torch.no_grad():
        p = module.network.eval()(images[:, None].float() / 255).softmax(1)
    assert sorted(found) == list(range(IMAGES))
    for row, (given, sure, split) in found.items():
        if row < LABELED:
            assert (given, sure, split) == (TRUTH[row], 1.0, "labeled")
        else:
            assert (given, split) == (int(p[row].argmax()), "unlabeled")
            assert sure == pytest.approx(float(p[row].max()), abs=1e-5)
    # Classes that are missing altogether are no error, and hidden labels are not looked at.
    assert [given for given, _, _ in found.values()][LABELED:] != TRUTH[LABELED:].tolist()


def test_labels_of_the_same_weights_stay_and_others_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = label(tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in target.iterdir()}
    label(tmp_path)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in target.iterdir()} == before

    # Killed while it writes: what is there does not count as finished, and the next time it is.
    def dies(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, "manifest_bytes", dies)
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path, classifier(1))
    with pytest.raises(FileNotFoundError, match="not finished"):
        pseudo_labels.read(target)
    label(tmp_path, classifier(1))
    other = label(tmp_path / "other", classifier(1))
    assert (other / "manifest.json").read_bytes() == (target / "manifest.json").read_bytes()
    assert (target / "manifest.json").read_bytes() != before["manifest.json"][0]


@pytest.mark.parametrize(
    "rule",
    [
        Selection("ratio"),
        Selection("client_ratio"),
        Selection("threshold", min_precision=0.34),
        Selection("fixed", min_confidence=0.5),
    ],
)
def test_selected_labels_are_those_of_the_rule_and_of_people(tmp_path: Path, rule: Selection) -> None:
    source, counts = label(tmp_path), confusion()
    every = by_row(source)
    rows = [row for row in sorted(every) if row >= LABELED]
    labels = np.array([every[row][0] for row in rows])
    cut = cuts(rule, counts, count_guesses(source, CLASSES))
    chosen = keep(rule, counts, cut, labels, np.array([every[row][1] for row in rows]))
    wanted = {*range(LABELED), *(row for row, stays in zip(rows, chosen, strict=True) if stays)}
    assert select_labels(source, tmp_path / "selected", rule, counts, cut) == len(wanted) - LABELED
    assert by_row(tmp_path / "selected") == {row: every[row] for row in wanted}
    assert LABELED < len(wanted) < IMAGES

    # The next steps take it up: the generator also trusts people's labels, the classifier trains on all of them.
    path = str(tmp_path / "selected")
    generation = GenerationDataModule(ClientPart(Client()), batch_size=4, pseudo_labels=path)
    generation.setup("fit")
    assert generation.num_images == len(wanted)
    trusted = torch.cat([batch["trusted"] for batch in generation.train_dataloader()])
    assert 0 < int(trusted.sum()) < len(trusted)
    assert ready(pseudo_labels=path).num_labeled == len(wanted)

    # T of all clients, rows = true classes.
    transition = ConfusionTransition(f"{path}/manifest.json", prior=0.0, diagonal_prior=0.0).matrix(CLASSES)
    expected = torch.from_numpy(counts[0] / counts[0].sum(1, keepdims=True))
    torch.testing.assert_close(transition, expected.double())


def test_labels_of_another_client_are_refused(tmp_path: Path) -> None:
    source = label(tmp_path)
    elsewhere = np.zeros((IMAGES, SIDE, SIDE), dtype=np.uint8)
    other = SemiSupervisedDataModule(ArraySource(elsewhere, TRUTH), pseudo_labels=str(source))
    with pytest.raises(ValueError, match="Expected `pseudo_labels`"):
        other.setup("fit")


def test_where_nothing_is_kept_nothing_is_left(tmp_path: Path) -> None:
    source = label(tmp_path, labeled=0)
    target, sure = tmp_path / "selected", Selection("fixed", min_confidence=0.5)
    low, high = np.full(CLASSES, 0.5), np.full(CLASSES, 1.0)
    assert select_labels(source, target, sure, confusion(), low) > 0
    assert target.is_dir()
    never = Selection("fixed", min_confidence=1.0)
    assert select_labels(source, target, never, confusion(), high) == 0
    assert not target.exists()
    # With people's labels these remain.
    assert select_labels(label(tmp_path / "a"), target, never, confusion(), high) == 0
    assert sorted(by_row(target)) == list(range(LABELED))


def test_folders_of_others_and_wrong_counts_are_refused(tmp_path: Path) -> None:
    source = label(tmp_path)
    with pytest.raises(ValueError, match="`confusion` of the 3 classes"):
        select_labels(source, tmp_path / "selected", Selection(), np.zeros((7, 4, 4), dtype=np.int64), np.ones(4))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"kind": "synthetic_images"}')
    with pytest.raises(ValueError, match="Expected a folder of its own for pseudo-labels"):
        label_images(classifier(), ready(), foreign, tiny_trainer(tmp_path))
    with pytest.raises(ValueError, match="Expected a folder of its own for pseudo-labels"):
        select_labels(source, foreign, Selection(), confusion(), np.ones(CLASSES))
    bare = label(tmp_path / "bare", labeled=0)
    with pytest.raises(ValueError, match="Expected a folder of its own for pseudo-labels"):
        select_labels(bare, foreign, Selection("fixed", min_confidence=1.0), confusion(), np.ones(CLASSES))
    assert (foreign / "manifest.json").is_file()
    (source / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="not finished"):
        select_labels(source, tmp_path / "selected", Selection(), confusion(), np.ones(CLASSES))


def test_what_a_module_predicts_is_checked(tmp_path: Path) -> None:
    class Diverged(SSLClassifier):
        def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
            found = super().predict_step(batch, batch_idx)
            return {**found, "confidence": found["confidence"] * float("nan")}

    module = Diverged(ToyNet(SIDE**2, CLASSES), Supervised(), CLASSES, optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="Expected finite probabilities"):
        label(tmp_path, module)
    assert not (tmp_path / "pseudo_labels").exists()
