"""From settings to modules and data: the same weights everywhere, and each client's own artifacts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ssl_toys import ToyNet

from datamodules import ArraySource, GenerationDataModule, SemiSupervisedDataModule, pseudo_labels
from datamodules.pseudo_labels import LabelTable, Origin
from federated.roles import build, build_data, build_module, build_source, role_of
from federated.settings import Role, Settings
from federated.tasks import FitTask
from federated.weights import network_state
from lightning_modules import NoisyLabelClassifier, SSLClassifier

NAMES = ["a", "b", "c"]
TOY = {"class_path": "ssl_toys.ToyNet", "init_args": {"num_inputs": 36, "width": 4}}
MODEL = {"class_path": "SSLClassifier", "init_args": {"network": TOY, "method": {"class_path": "Supervised"}}}
PLAIN = FitTask("plain")
SELECTED = FitTask("selected", pseudo_labels="selected")


def data_role(kind: str = "SemiSupervisedDataModule", **arguments: Any) -> Role:
    return Role(MODEL, {"class_path": kind, "init_args": {"batch_size": 4, **arguments}})


def source() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 6), dtype=np.uint8)
    return ArraySource(images, np.array([0, 1, 2, 0, 1, -1, -1, -1, -1]), class_names=NAMES)


def write(folder: Path, rows: range) -> None:
    """Pseudo-labels of some images; the first five are people's."""
    data = SemiSupervisedDataModule(source(), batch_size=4)
    data.setup("fit")
    keys = data.label_dataloader().dataset.keys  # type: ignore[attr-defined]  # an ImagesToLabel
    splits = np.array([0 if row < 5 else 1 for row in rows])
    table = LabelTable([keys[row] for row in rows], np.array(rows) % 3, np.ones(len(rows), np.float32), splits)
    made: dict[str, Any] = {"made_with": {"true_labels": True}, "selection": {}, "fingerprint": data.images_fingerprint}
    pseudo_labels.write(folder, table, Origin(tuple(NAMES), **made))


def test_first_weights_are_the_same_everywhere(tmp_path: Path) -> None:
    role = data_role()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        module = build_module(role, 3, tmp_path / str(seed), seed=7)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(network_state(module))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = network_state(build_module(role, 3, tmp_path, seed=8))
    assert not torch.equal(other["head.weight"], states[0]["head.weight"])


def test_classes_are_those_of_the_data(tmp_path: Path) -> None:
    module = build_module(data_role(), 5, tmp_path, 0)
    assert isinstance(module, SSLClassifier)
    assert isinstance(module.network, ToyNet)
    assert (module.num_classes, module.network.head.out_features) == (5, 5)
    given = Role({**MODEL, "init_args": {**MODEL["init_args"], "num_classes": 4}}, {})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"`model\.init_args\.num_classes` to be the data's, got 4 .* 5 from"):
        build_module(given, 5, tmp_path, 0)


def test_the_folder_stands_for_client_and_a_server_does_without(tmp_path: Path) -> None:
    transition = {"class_path": "ConfusionTransition", "init_args": {"counts": "{client}/selected/manifest.json"}}
    net = {"class_path": "NoisyResNet", "init_args": {"in_channels": 1, "widths": [4], "blocks": [1], "embed_dim": 4}}
    arguments = {"network": net, "transition": transition}
    noisy = Role({"class_path": "NoisyLabelClassifier", "init_args": arguments}, {})
    settings = Settings({"class_path": "x"}, data_role(), noisy_classifier=noisy)
    task = FitTask("noisy", "noisy_classifier")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "selected" / "manifest.json")):
        build_module(role_of(settings, task), 3, tmp_path, 0)
    module, data = build(settings, task, None, NAMES, tmp_path)
    assert isinstance(module, NoisyLabelClassifier)
    assert (data, module.num_classes) == (None, 3)
    # What the settings say is not written into.
    assert arguments["transition"]["init_args"] == {"counts": "{client}/selected/manifest.json"}


def test_data_take_the_artifacts_of_the_task_that_are_there(tmp_path: Path) -> None:
    role = data_role(min_confidence=0.5, synthetic_share=0.5)
    without = build_data(role, SELECTED, source(), tmp_path, 3)
    assert isinstance(without, SemiSupervisedDataModule)
    assert (without.mix.is_plain, without.seed) == (True, 3)
    write(tmp_path / "selected", range(8))
    found = build_data(role, SELECTED, source(), tmp_path, 3)
    found.setup("fit")
    assert isinstance(found, SemiSupervisedDataModule)
    assert (found.mix.pseudo_labels, found.mix.min_confidence) == (str(tmp_path / "selected"), 0.5)
    assert found.num_labeled == 8
    others = [build_data(role, task, source(), tmp_path, 3) for task in (PLAIN, FitTask("all", pseudo_labels="all"))]
    assert all(isinstance(other, SemiSupervisedDataModule) and other.mix.is_plain for other in others)


def test_batches_are_not_asked_for_two_kinds_where_there_is_one(tmp_path: Path) -> None:
    role, kept = data_role("GenerationDataModule", trusted_share=0.5), data_role()
    shares = []
    for name, rows in (("both", range(7)), ("people", range(5)), ("guessed", range(5, 9))):
        folder = tmp_path / name
        write(folder / "selected", rows)
        found = build_data(role, SELECTED, source(), folder, 0)
        assert isinstance(found, GenerationDataModule)
        assert found.pseudo_labels == str(folder / "selected")
        shares.append(found.trusted_share)
        # A classifier has people's labels from the source, and is not to look for others where there are none.
        classifier = build_data(kept, SELECTED, source(), folder, 0)
        assert isinstance(classifier, SemiSupervisedDataModule)
        assert classifier.mix.is_plain == (name == "people")
    assert shares == [0.5, None, None]
    plain = build_data(role, PLAIN, source(), tmp_path, 0)
    assert isinstance(plain, GenerationDataModule)
    assert (plain.pseudo_labels, plain.trusted_share) == (None, None)


def test_a_site_has_images_of_its_own() -> None:
    arguments = {"num_train": 30, "num_test": 10, "noise": 0.1}
    settings = Settings({"class_path": "HardDigitsSource", "init_args": arguments}, data_role())
    found = build_source(settings, {"num_test": 20})
    assert list(found.read().roles).count("test") == 20
    assert settings.source["init_args"] == arguments
    with pytest.raises(ValueError, match=r"`source` to be a ImageSource with its arguments(.|\n)*nowhere"):
        build_source(settings, {"nowhere": 1})


def test_mistakes_are_named(tmp_path: Path) -> None:
    settings = Settings({"class_path": "x"}, data_role())
    with pytest.raises(ValueError, match="settings with a `generator` for the step 'draws', got none"):
        role_of(settings, FitTask("draws", "generator"))
    with pytest.raises(ValueError, match="Expected the `class_path` of a module or of data, got 'Unknown'"):
        build_module(Role({"class_path": "Unknown"}, {}), 3, tmp_path, 0)
    wrong = {**MODEL, "init_args": {**MODEL["init_args"], "netwrok": 1}}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"`model` to be a LightningModule with its arguments(.|\n)*netwrok"):
        build_module(Role(wrong, {}), 3, tmp_path, 0)
