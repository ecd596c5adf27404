"""A client: what it counts and trains, and that it remembers nothing that a new process would not know."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from datamodules import ArraySource, pseudo_labels
from datamodules.classification.contents import ImageSource
from datamodules.partition import ClientSplit
from federated.client import NOISY_CLASSIFIER, Client
from federated.counting import Predicted, count_by_confidence, count_confusion
from federated.roles import build, build_module
from federated.selection import THRESHOLDS, cuts
from federated.settings import Confusion, Drawing, Role, Selection, Settings
from federated.tasks import FitTask
from federated.weights import network_state
from lightning_modules import TDSMDiffusion

Int64Array = npt.NDArray[np.int64]

SIDE, CLASSES, IMAGES, TESTED = 6, 3, 30, 12
NAMES = ["a", "b", "c"]
TRUTH = np.arange(IMAGES + TESTED) % CLASSES
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
CPU = {"accelerator": "cpu"}
CLASSIFIER = FitTask("classifier")
GENERATOR = FitTask("generator", "generator", pseudo_labels="selected")
NOISY = FitTask("noisy_classifier", "noisy_classifier", pseudo_labels="selected")


def source(labeled: int = 14) -> ArraySource:
    """Bars whose place is the class, in noise; the last ones are test images."""
    images = np.random.default_rng(0).integers(0, 120, (len(TRUTH), SIDE, SIDE), dtype=np.uint8)
    for image, label in zip(images, TRUTH, strict=True):
        image[2 * label : 2 * label + 2] += 100
    given = np.where(np.arange(IMAGES) < labeled, TRUTH[:IMAGES], -1)
    return ArraySource(
        images[:IMAGES], given, images[IMAGES:], TRUTH[IMAGES:], class_names=NAMES, hidden_labels=TRUTH[:IMAGES]
    )


def settings(folder: Path, **changes: Any) -> Settings:
    net = {"class_path": "ssl_toys.ToyNet", "init_args": {"num_inputs": SIDE**2, "width": 8}}
    posterior = {
        "class_path": "NoisyResNet",
        "init_args": {"in_channels": 1, "widths": [4], "blocks": [1], "embed_dim": 4},
    }
    known = {"class_path": "ConfusionTransition", "init_args": {"counts": "{client}/selected/manifest.json"}}
    noisy = {"network": posterior, "transition": known, "optimizer": SGD}
    draws: dict[str, Any] = {"network": {"class_path": "tdsm_toys.ClassPoint", "init_args": {"side": SIDE, "width": 8}}}
    draws |= {"classifier": posterior, "classifier_from": "{client}/noisy_classifier.ckpt", "optimizer": SGD}
    data = {"class_path": "SemiSupervisedDataModule", "init_args": {"batch_size": 4, "steps_per_epoch": None}}
    images = {"class_path": "GenerationDataModule", "init_args": {"batch_size": 4}}

    def model(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"class_path": name, "init_args": arguments}

    learned = {"network": net, "method": {"class_path": "Supervised"}, "optimizer": SGD, "ema_decay": 0.5}
    plain = Settings(
        {"class_path": "given"},
        Role(model("SSLClassifier", learned), data, rounds=3, trainer=CPU),
        Role(model("TDSMDiffusion", draws | {"label_dropout": 0.2}), images, rounds=2, trainer=CPU),
        Role(model("NoisyLabelClassifier", noisy), images, rounds=2, trainer=CPU),
        run_dir=str(folder),
        split=None,
        selection=Selection("ratio"),
        drawing=Drawing(fill="all", candidates=1.0, num_steps=2, guidance=0.0, gate=False),
    )
    return replace(plain, **changes)


def first_weights(run: Settings, task: FitTask = CLASSIFIER) -> dict[str, Tensor]:
    return network_state(build(run, task, None, NAMES, Path("nowhere"))[0])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def labelled(client: Client) -> Int64Array:
    """Let a client label and choose; the matrix that it was told."""
    confusion = np.tile(np.eye(CLASSES, dtype=np.int64) * 4 + 1, (len(THRESHOLDS), 1, 1))
    client.label(CLASSIFIER, first_weights(client.settings))
    select(client, confusion)
    return np.asarray(confusion[0])


def select(client: Client, confusion: Int64Array) -> None:
    client.select(confusion, cuts(client.settings.selection, confusion, client.counts("confidences")))


def test_a_client_keeps_nothing_that_a_new_one_lacks(tmp_path: Path) -> None:
    run = settings(tmp_path)
    client, weights, others = Client(run, 1, source()), first_weights(run), first_weights(run)
    for number in (1, 2):
        assert client.evaluate(CLASSIFIER, weights) == Client(run, 1, source()).evaluate(CLASSIFIER, others)
        trained, anew = (
            client.train(CLASSIFIER, number, weights),
            Client(run, 1, source()).train(CLASSIFIER, number, others),
        )
        assert same(trained.weights, anew.weights)
        assert (trained.count, trained.loss) == (anew.count, anew.loss)
        assert not same(trained.weights, weights)
        weights, others = trained.weights, anew.weights
    # What it is sent stays as it was, and rounds, clients and tasks differ.
    sent = first_weights(run)
    before = {name: value.clone() for name, value in sent.items()}
    once = client.train(CLASSIFIER, 1, sent).weights
    assert same(sent, before)
    assert not same(once, client.train(CLASSIFIER, 2, sent).weights)
    assert not same(once, Client(run, 2, source()).train(CLASSIFIER, 1, sent).weights)


def test_without_labels_nothing_is_trained(tmp_path: Path) -> None:
    run = settings(tmp_path, selection=Selection("fixed", min_confidence=1.0))
    assert run.generator is not None
    counted = {"class_path": "ConfusionTransition", "init_args": {"counts": "{client}/selected/manifest.json"}}
    arguments = {**run.generator.model["init_args"], "transition": counted}
    run = replace(run, generator=replace(run.generator, model={**run.generator.model, "init_args": arguments}))
    client, weights = Client(run, 0, source(labeled=0)), first_weights(run)
    trained = client.train(CLASSIFIER, 1, weights)
    assert same(trained.weights, weights)
    assert (trained.count, trained.loss) == (0, 0.0)
    # Nothing is sure enough to be selected, which is no reason to fail.
    labelled(client)
    assert not (client.folder / "selected").exists()
    assert client.train(GENERATOR, 1, first_weights(run, GENERATOR)).count == 0
    client.draw(GENERATOR, first_weights(run, GENERATOR), None, np.array([2, 0, 1]), 1)
    assert client.counts("drawn").tolist() == [[2, 2], [0, 0], [1, 1]]
    assert client.evaluate(CLASSIFIER, weights).count == TESTED


def test_clients_describe_themselves_and_share_all_images(tmp_path: Path) -> None:
    run = settings(tmp_path, split=ClientSplit(3, 0.5, None, None, 0))
    clients = [Client(run, number, source(IMAGES)) for number in range(3)]
    found = [client.describe() for client in clients]
    assert [(one.client, one.class_names, one.image_shape) for one in found] == [
        (number, tuple(NAMES), (1, SIDE, SIDE)) for number in range(3)
    ]
    totals = [sum(getattr(one, name) for one in found) for name in ("images", "labeled", "tested")]
    assert totals == [IMAGES, IMAGES // 2, TESTED]
    assert sum(client.counts("labels") for client in clients).tolist() == [5, 5, 5]  # type: ignore[union-attr]  # no int
    assert not tmp_path.joinpath("clients").exists()


def test_errors_are_counted_on_what_is_held_out_and_on_test_images(tmp_path: Path) -> None:
    run = settings(tmp_path, confusion=Confusion(folds=2))
    client = Client(run, 0, source())
    weights = client.train(FitTask("c", fold=0), 1, first_weights(run)).weights
    module, _ = build(run, CLASSIFIER, None, NAMES, tmp_path)
    net = module.network
    net.load_state_dict(weights)  # type: ignore[union-attr]
    contents = source().read()
    assert contents.images is not None

    def naive(rows: list[int]) -> tuple[list[list[int]], int]:
        with torch.no_grad():
            pixels = torch.from_numpy(contents.images[rows][..., 0])[:, None].float() / 255  # type: ignore[index]
            guesses = net.eval()(pixels).argmax(1).tolist()  # type: ignore[union-attr]
        counts = [[0] * CLASSES for _ in range(CLASSES)]
        for row, guess in zip(rows, guesses, strict=True):
            counts[contents.labels[row]][guess] += 1
        return counts, sum(guess == contents.labels[row] for row, guess in zip(rows, guesses, strict=True))

    tested, right = naive([row for row, role in enumerate(contents.roles) if role == "test"])
    assert client.counts("test_confusion", CLASSIFIER, weights).tolist() == tested
    found = client.evaluate(CLASSIFIER, weights)
    assert (found.correct, found.count) == (right, TESTED)
    # Each label is held out in one fold.
    folds = [client.counts("confusion", FitTask("c", fold=fold), weights) for fold in range(2)]
    assert (folds[0] + folds[1])[0].tolist() == naive(list(range(14)))[0]
    assert all(0 < fold[0].sum() < 14 for fold in folds)
    # Without a fold nothing is held out.
    assert not client.counts("confusion", CLASSIFIER, weights).any()
    with pytest.raises(ValueError, match="with task and weights, confusion or test_confusion, got 'confusion'"):
        client.counts("confusion")


def test_surer_images_are_among_the_less_sure() -> None:
    found = Predicted(np.array([0, 1, 2, 2]), np.array([0, 2, 2, 0]), np.array([0.55, 0.7, 0.96, 0.4]))
    counts = count_by_confidence(found, 3)
    assert counts.sum((1, 2)).tolist() == [4, 3, 2, 2, 1, 1, 1]
    assert counts[0].tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 1]]
    assert counts[3].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert np.array_equal(count_confusion(found, 3, 0.7), counts[3])


def test_pseudo_labels_are_counted_by_their_class(tmp_path: Path) -> None:
    client = Client(settings(tmp_path), 0, source())
    labelled(client)
    every, kept = (pseudo_labels.read(client.folder / name) for name in ("pseudo_labels", "selected"))
    stays = set(kept.table.keys.to_pylist())
    truth = dict(zip(source().read().keys, TRUTH.tolist(), strict=True))
    wanted = np.zeros((CLASSES, 5), dtype=np.int64)
    for key, label, people in zip(every.table.keys.to_pylist(), every.table.labels, every.by_people, strict=True):
        if not people:
            right = truth[key] == label
            wanted[label] += [1, key in stays, 1, right, right and key in stays]
    found = client.counts("selection")
    assert found.tolist() == wanted.tolist()
    assert found[:, 0].sum() == IMAGES - 14
    assert 0 < found[:, 1].sum() < IMAGES - 14
    task = FitTask("arm", pseudo_labels="selected")
    assert client.train(task, 1, first_weights(client.settings)).count == 14 + found[:, 1].sum()
    # Pseudo-labels that are replaced are taken up.
    select(client, np.ones((len(THRESHOLDS), CLASSES, CLASSES), dtype=np.int64))
    fewer = client.counts("selection")[:, 1].sum()
    assert fewer < found[:, 1].sum()
    assert client.train(task, 1, first_weights(client.settings)).count == 14 + fewer


def test_what_another_run_left_is_not_trained_on(tmp_path: Path) -> None:
    run, task = settings(tmp_path), FitTask("arm", pseudo_labels="selected")
    labelled(Client(run, 0, source()))
    changed = Client(replace(run, selection=Selection("fixed", min_confidence=0.0)), 0, source())
    weights = first_weights(run)
    for fails in (
        lambda: changed.train(task, 1, weights),
        lambda: changed.train(FitTask("arm", drawn=True), 1, weights),
        lambda: changed.counts("selection"),
        lambda: select(changed, np.ones((len(THRESHOLDS), CLASSES, CLASSES), dtype=np.int64)),
    ):
        with pytest.raises(FileNotFoundError, match=r"Expected `.*` of this run in .*, but there is none"):
            fails()
    labelled(changed)
    assert changed.train(task, 1, weights).count == IMAGES
    # Nor does a client go on with its labels alone that has lost what it selected.
    shutil.rmtree(changed.folder / "selected")
    with pytest.raises(FileNotFoundError, match="Expected `selected` of this run"):
        changed.train(task, 2, weights)
    assert changed.train(CLASSIFIER, 2, weights).count == 14


def test_a_generator_takes_the_finished_classifier_of_noisy_images(tmp_path: Path) -> None:
    run = settings(tmp_path)
    client = Client(run, 0, source())
    confusion = labelled(client)
    frozen = client.train(NOISY, 1, first_weights(run, NOISY)).weights
    sent = first_weights(run, GENERATOR)
    trained = client.train(GENERATOR, 1, sent, frozen)
    path = client.folder / NOISY_CLASSIFIER
    module = build_module(run.generator or run.classifier, CLASSES, client.folder, 0)
    assert isinstance(module, TDSMDiffusion)
    module.weighting.prepare(None, (SIDE, 1), module.process, "pixels")
    assert module.weighting.classifier is not None
    assert same(module.weighting.classifier.network.state_dict(), frozen)
    expected = (confusion + 1 / 3 + np.eye(3)) / (confusion.sum(1, keepdims=True) + 2)
    np.testing.assert_allclose(module.weighting.transition.numpy(), expected, rtol=1e-6)
    # It is written when it is another one, and by a client that has none.
    before = path.stat().st_mtime_ns
    assert same(client.train(GENERATOR, 1, sent, frozen).weights, trained.weights)
    assert path.stat().st_mtime_ns == before
    other = {name: value + 1 for name, value in frozen.items()}
    assert not same(client.train(GENERATOR, 1, sent, other).weights, trained.weights)
    path.unlink()
    assert same(Client(run, 0, source()).train(GENERATOR, 1, sent, frozen).weights, trained.weights)


def test_drawn_images_join_the_labels(tmp_path: Path) -> None:
    run = settings(tmp_path)
    client = Client(run, 0, source())
    labelled(client)
    weights = {name: 0.1 * value for name, value in first_weights(run, GENERATOR).items()}
    histogram = client.counts("labels") * 2
    client.draw(GENERATOR, weights, None, histogram, 1)
    counts = client.counts("drawn")
    # Ungated: all that are wanted, as many again as it has labels of each class.
    assert counts.tolist() == [[n, n] for n in client.counts("labels").tolist()]
    task = FitTask("drawn", drawn=True)
    assert client.train(task, 1, first_weights(run)).count == 28
    assert Client(run, 0, source()).train(CLASSIFIER, 1, first_weights(run)).count == 14
    gated = Client(replace(run, drawing=replace(run.drawing, gate=True)), 0, source())
    with pytest.raises(ValueError, match="weights of the classifier to choose drawn images, got none"):
        gated.draw(GENERATOR, weights, None, histogram, 1)


def test_a_learned_transition_is_refused(tmp_path: Path) -> None:
    run = settings(tmp_path)
    frozen = first_weights(run, NOISY)
    role = run.noisy_classifier
    assert role is not None
    arguments = {**role.model["init_args"], "transition": {"class_path": "LearnedTransition"}}
    learns = replace(role, model={**role.model, "init_args": arguments})
    client = Client(replace(run, noisy_classifier=learns), 0, source())
    labelled(client)
    with pytest.raises(ValueError, match="with a known `transition`, got one that learns it"):
        client.train(GENERATOR, 1, first_weights(run, GENERATOR), frozen)


def test_images_are_of_the_source_that_is_given(tmp_path: Path) -> None:
    arguments = {"num_train": 20, "num_test": 5}
    built = Client(settings(tmp_path, source={"class_path": "HardDigitsSource", "init_args": arguments}), 0)
    assert isinstance(built.source, ImageSource)
    assert (built.describe().images, built.folder) == (20, tmp_path / "clients" / "00")
