"""Lines that say what a stage consumed and made."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.stage_summary import stage_lines


def artifact(folder: Path, **manifest: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder / "manifest.json")


def test_a_generator_on_pseudo_labels(tmp_path: Path) -> None:
    labels = artifact(tmp_path / "classifier" / "labels", kind="pseudo_labels", counts={"images": 1297})
    drawn = artifact(tmp_path / "generator" / "drawn", kind="synthetic_images", counts={"images": 1280})
    weights = str(tmp_path / "noisy" / "checkpoints" / "last.ckpt")
    manifest = {
        "inputs": {labels: "0", weights: "1", str(tmp_path / "names.txt"): "2"},
        "counts": {"train": 1297, "val": 0, "test": 500},
        "checkpoint": {"path": "checkpoints/last.ckpt", "sha256": "3"},
        "global_step": 2000,
        "artifacts": {drawn: "4"},
        "metrics": {
            "val_loss": 0.5,
            "test_loss": 0.25,
            "test_density": 0.1,
            "test_recall/3": 0.3,
            "test_label_consistency_classifier": 0.9375,
            "test_fid_classifier": 12.34567,
            "test_cw_fid_classifier": None,
            "test_confidence": 0.7,
            "test_precision_k3_classifier": 0.6,
        },
    }
    assert stage_lines(tmp_path / "generator", manifest) == [
        f"  consumed: images: train 1,297, test 500; 1,297 pseudo-labels in {tmp_path}/classifier/labels; "
        f"weights {weights}; {tmp_path}/names.txt",
        f"  made: 1,280 images drawn in {tmp_path}/generator/drawn; weights "
        f"{tmp_path}/generator/checkpoints/last.ckpt (step 2,000); test_fid_classifier 12.35, "
        "test_label_consistency_classifier 0.9375, test_loss 0.25, test_density 0.1",
    ]


def test_validation_stands_in_for_a_test(tmp_path: Path) -> None:
    metrics = {"train_loss": 1.0, "val_accuracy_student": 0.5, "val_accuracy": 0.75, "val_f1": 0.7}
    assert stage_lines(tmp_path, {"metrics": metrics}) == [
        "  made: val_accuracy 0.75, val_accuracy_student 0.5, val_f1 0.7"
    ]


@pytest.mark.parametrize(
    "manifest",
    [None, {}, {"inputs": None, "counts": [1], "checkpoint": None, "artifacts": 3, "metrics": {"test_f1": None}}],
)
def test_without_anything_to_say(tmp_path: Path, manifest: dict[str, Any] | None) -> None:
    assert stage_lines(tmp_path, manifest) == []


@pytest.mark.parametrize("content", ['{"kind": "pseudo_labels"', "[]", '{"kind": "fit"}', "\udc80"])
def test_an_artifact_that_says_nothing_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels" / "manifest.json"
    path.parent.mkdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    gone = tmp_path / "gone" / "manifest.json"
    lines = stage_lines(tmp_path, {"inputs": {str(path): "0", str(gone): "1"}})
    assert lines == [f"  consumed: {path.parent}; {gone.parent}"]


def test_an_artifact_without_counts(tmp_path: Path) -> None:
    path = artifact(tmp_path / "labels", kind="pseudo_labels")
    assert stage_lines(tmp_path, {"artifacts": {path: "0"}}) == [f"  made: pseudo-labels in {path[:-14]}"]
