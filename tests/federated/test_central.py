"""Training in one place: on the labels that all clients have together, or on all, once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.classification.client_part import ClientPart
from datamodules.classification.hard_digits import HardDigitsSource
from datamodules.partition import ClientSplit
from federated.central import train_centrally
from federated.client import Client
from federated.settings import Central, Role, Settings

PLAIN = {"num_train": 300, "num_test": 100, "noise": 0.0, "shift": 0, "flip_contrast": False}
SOURCE = HardDigitsSource(300, 100, 0.0, 0, flip_contrast=False)
NAMES = SOURCE.class_names
SPLIT = ClientSplit(num_clients=5, label_share=0.2, alpha_labeled=0.3, alpha_unlabeled=0.3, seed=2)


def digits(folder: Path, **changes: Any) -> Settings:
    """Digits, and a small network that learns most of them in seconds."""
    model = {
        "class_path": "SSLClassifier",
        "init_args": {
            "network": {
                "class_path": "ConvNet",
                "init_args": {"image_size": 8, "widths": [8, 16], "in_channels": 1},
            },
            "method": {"class_path": "Supervised"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        },
    }
    data = {
        "class_path": "SemiSupervisedDataModule",
        "init_args": {"image_size": 8, "batch_size": 8, "weak": "none", "steps_per_epoch": None},
    }
    settings = Settings(
        source={"class_path": "HardDigitsSource", "init_args": PLAIN},
        classifier=Role(model, data, trainer={"accelerator": "cpu"}),
        run_dir=str(folder),
        split=SPLIT,
        central=Central(epochs=8),
    )
    return replace(settings, **changes)


def found(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def labelled(part: ClientPart) -> set[str]:
    contents = part.read()
    given = np.ones(len(contents.keys), dtype=bool) if contents.given is None else contents.given
    usable = (np.asarray(contents.roles) == "train") & given
    return {key for key, own in zip(contents.keys, usable.tolist(), strict=True) if own}


def test_one_client_has_the_labels_that_all_have_together() -> None:
    one = labelled(ClientPart(SOURCE, 0, replace(SPLIT, num_clients=1)))
    parts = [labelled(ClientPart(SOURCE, number, SPLIT)) for number in range(SPLIT.num_clients)]
    assert len(one) == sum(map(len, parts)) == 60
    assert one == set.union(*parts)


def test_a_training_in_one_place_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = digits(tmp_path)
    folder = tmp_path / "central_same_labels"
    accuracy = train_centrally(settings, "same_labels", NAMES, folder)
    content = found(folder)
    assert (content["labels"], content["tested"]) == (60, 100)
    assert accuracy is not None
    assert accuracy == content["correct"] / 100
    assert accuracy > 0.3  # chance is 0.1

    class Trains(Exception):
        """A training began."""

    def refuse(*_: object, **__: object) -> None:
        raise Trains

    monkeypatch.setattr(Client, "train", refuse)
    # How many clients there are and how they train together makes no difference to it.
    other = replace(settings, split=replace(SPLIT, num_clients=3), classifier=replace(settings.classifier, rounds=3))
    assert train_centrally(other, "same_labels", NAMES, folder) == accuracy
    for changed in (digits(tmp_path, central=Central(epochs=9)), digits(tmp_path, seed=1)):
        with pytest.raises(Trains):
            train_centrally(changed, "same_labels", NAMES, folder)
    with pytest.raises(Trains):
        train_centrally(settings, "all_labels", NAMES, folder)


def test_all_labels_are_those_of_all_training_images(tmp_path: Path) -> None:
    accuracy = train_centrally(digits(tmp_path, central=Central(epochs=1)), "all_labels", NAMES, tmp_path / "all")
    assert (found(tmp_path / "all")["labels"], found(tmp_path / "all")["tested"]) == (300, 100)
    assert accuracy == found(tmp_path / "all")["correct"] / 100


@pytest.mark.parametrize("missing", ["split", "central"])
def test_there_has_to_be_one_place(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=f"`{missing}`"):
        train_centrally(digits(tmp_path, **{missing: None}), "same_labels", NAMES, tmp_path / "central")
