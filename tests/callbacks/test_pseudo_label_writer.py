"""Pseudo-labels of all images to train on, as a fit's end and predict write them."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pytorch_lightning as pl
import torch
from board import pictures
from drawing_runs import START, files
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.loggers import TensorBoardLogger
from tiny_nets import tiny_trainer
from torch import Tensor, nn

from callbacks import PseudoLabelWriter
from callbacks.class_counts import draw_class_counts
from callbacks.pseudo_label_selection import Selection, precision_of
from datamodules import ArraySource, GenerationDataModule, SemiSupervisedDataModule
from datamodules.pseudo_labels import SPLITS, Origin, is_written, read
from datamodules.synthetic_images import weights_sha256

N, K = 90, 3
_NAMES = ("ant", "bee", "cow")
_IMAGES = np.random.default_rng(1).integers(0, 256, (N + 6, 5, 5), dtype=np.uint8)
_GIVEN = np.where(np.arange(N) % 6 == 0, np.arange(N) // 6 % K, -1)


def probabilities() -> npt.NDArray[np.float32]:
    """What the module says of each image: class 2 is rare, and no two are equally sure."""
    generator = np.random.default_rng(4)
    logits = generator.normal(size=(N, K)) * 2 + np.asarray([0.8, 0.3, -0.6])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.asarray(p, dtype=np.float32)


P = probabilities()


class Lookup(pl.LightningModule):
    """Says of each image what a table has, once it has been trained."""

    def __init__(self, confusion: Tensor | None = None, without: str = "", seconds: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("table", torch.from_numpy(P.copy()))
        self.table: Tensor
        self.counts, self.without, self.seconds = confusion, without, seconds
        self.modes: list[bool] = []

    def training_step(self, batch: Mapping[str, Any]) -> Tensor:
        image: Tensor = batch["labeled"]["image"]
        return -self.weight * len(image)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        assert float(self.weight) > 0, "it has not been trained"
        time.sleep(self.seconds)
        self.modes.append(self.training)
        p = self.table[batch["index"]]
        confidence, label = p.max(1)
        found = {"probabilities": p, "label": label, "confidence": confidence, "index": batch["index"]}
        return {name: value for name, value in found.items() if name != self.without}

    def label_confusion(self) -> Tensor | None:
        return self.counts


class Crowded(Lookup):
    """Takes images for something else in other company, as batch sizes do to the last bits of a network's output."""

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        found = super().predict_step(batch, batch_idx)
        return found | {"confidence": found["confidence"] / (1 + batch["index"].sum() % 7)}


class Recorded(pl.Callback):
    """What `lightning fit` adds to every checkpoint."""

    def __init__(self) -> None:
        self.record = {"config_hash": "c" * 64}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint |= self.record


def data(hidden: int = 0, given: npt.NDArray[np.int64] = _GIVEN, **options: Any) -> SemiSupervisedDataModule:
    source = ArraySource(
        _IMAGES[:N], given, _IMAGES[N:], np.arange(6) % K, _NAMES, hidden_labels=np.where(given < 0, hidden, -1)
    )
    made = SemiSupervisedDataModule(
        source, batch_size=4, steps_per_epoch=1, eval_batch_size=16, **{"val_share": 0.2, **options}
    )
    made.declare_views(("plain",), ())
    return made


def fit(
    folder: Path,
    module: pl.LightningModule | None = None,
    images: pl.LightningDataModule | None = None,
    trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> PseudoLabelWriter:
    writer = PseudoLabelWriter(str(folder), **options)
    tiny_trainer(folder.parent, **{"callbacks": [writer, Recorded()], **(trainer or {})}).fit(
        module or Lookup(), images or data()
    )
    return writer


def naive(
    true_labels: bool = True,
    min_confidence: float = 0.0,
    precision: npt.NDArray[np.float64] | None = None,
    floor: float = 0.0,
) -> list[tuple[str, int, float, str]]:
    """The rows by key, image by image, before anything is balanced."""
    images = data()
    images.setup("fit")
    split = images._ready().split
    rows = []
    for row in range(N):
        use = "labeled" if row in split.labeled else "val" if row in split.val else "unlabeled"
        label, confidence = int(P[row].argmax()), float(P[row].max())
        if true_labels and use != "unlabeled":
            rows.append((f"train/{row:07d}", int(_GIVEN[row]), 1.0, use))
        elif confidence >= min_confidence and (precision is None or precision[label] >= floor):
            rows.append((f"train/{row:07d}", label, confidence, use))
    return rows


def written(folder: Path) -> list[tuple[str, int, float, str]]:
    table = read(folder).table
    columns = table.keys.to_pylist(), table.labels.tolist(), table.confidence.tolist(), table.splits.tolist()
    return [(key, label, sure, SPLITS[split]) for key, label, sure, split in zip(*columns, strict=True)]


@pytest.mark.parametrize("true_labels", [True, False])
def test_rows_and_manifest(tmp_path: Path, true_labels: bool) -> None:
    module = Lookup(torch.arange(9).view(3, 3))
    writer = fit(tmp_path / "labels", module, true_labels=true_labels, top_k=2)
    found = read(tmp_path / "labels")
    assert written(tmp_path / "labels") == naive(true_labels)
    assert writer.artifacts == [str(tmp_path / "labels")]
    assert not any(module.modes)
    # Images that are held out to validate on are among those that people labelled.
    assert {"labeled", "val"} <= {row[3] for row in written(tmp_path / "labels")}
    assert found.of_people.tolist() == (_GIVEN >= 0).tolist()
    assert found.by_people.tolist() == ((_GIVEN >= 0) & true_labels).tolist()
    order = np.argsort(-P, axis=1)[:, :2]
    assert np.array_equal(found.table.top_labels, order)  # type: ignore[arg-type]
    assert np.array_equal(found.table.top_confidence, np.take_along_axis(P, order, 1))  # type: ignore[arg-type]
    manifest = found.manifest
    images = data()
    images.setup("fit")
    assert manifest["fingerprint"] == images.images_fingerprint
    assert manifest["config_hash"] == "c" * 64
    assert manifest["weights"] == weights_sha256(module)
    assert manifest["made_with"] == {
        "precision": "32-true", "true_labels": true_labels, "top_k": 2, "data": images.fingerprint,
    }  # fmt: skip
    assert manifest["selection"] is None
    assert manifest["confusion"] == torch.arange(9).view(3, 3).tolist()
    counted = [row for row in range(N) if not true_labels or _GIVEN[row] < 0]
    expected = np.zeros((K, K))
    for row in counted:
        for i in range(K):
            expected[i, P[row].argmax()] += float(P[row, i])
    assert np.asarray(manifest["expected_confusion"]) == pytest.approx(expected, abs=1e-5)


def test_hidden_labels_are_not_looked_at(tmp_path: Path) -> None:
    for hidden in (0, 2):
        fit(tmp_path / str(hidden), images=data(hidden))
    assert files(tmp_path / "0") == files(tmp_path / "2")
    # Nor are they needed.
    fit(tmp_path / "-1", images=data(-1))
    assert files(tmp_path / "-1") == files(tmp_path / "0")


def test_only_sure_labels(tmp_path: Path) -> None:
    fit(tmp_path / "labels", min_confidence=0.7)
    assert written(tmp_path / "labels") == naive(min_confidence=0.7)
    assert len(written(tmp_path / "labels")) < N
    assert read(tmp_path / "labels").manifest["selection"] == {"min_confidence": 0.7}
    fit(tmp_path / "paper", min_confidence=0.7, true_labels=False)
    assert written(tmp_path / "paper") == naive(False, 0.7)


@pytest.mark.parametrize("options", [{"balance": True}, {"max_per_class": 9}, {"max_per_class": 200, "balance": True}])
@pytest.mark.parametrize("true_labels", [True, False])
def test_so_many_of_each_class(tmp_path: Path, options: dict[str, Any], true_labels: bool) -> None:
    fit(tmp_path / "labels", true_labels=true_labels, **options)
    every = naive(true_labels)
    by_class = {k: [row for row in every if row[1] == k] for k in range(K)}
    rarest = min(map(len, by_class.values()))
    most = min(rarest if options.get("balance") else N, options.get("max_per_class", N))
    expected = []
    for rows in by_class.values():
        people = [row for row in rows if true_labels and row[3] != "unlabeled"]
        others = sorted((row for row in rows if row not in people), key=lambda row: -row[2])
        expected += people + others[: max(most - len(people), 0)]
    assert written(tmp_path / "labels") == sorted(expected)
    assert read(tmp_path / "labels").manifest["selection"] == options


CONFUSION = [[8, 1, 3], [1, 9, 2], [2, 0, 4]]


@pytest.mark.parametrize("kind", ["module", "list", "manifest"])
def test_only_precise_classes(tmp_path: Path, kind: str) -> None:
    precision = precision_of(np.asarray(CONFUSION, dtype=np.float64))
    overall = 21 / 30
    assert precision == pytest.approx([(8 + overall) / 12, (9 + overall) / 11, (4 + overall) / 10])
    (tmp_path / "counts.json").write_text(json.dumps(CONFUSION if kind == "list" else {"confusion": CONFUSION}))
    file = None if kind == "module" else str(tmp_path / "counts.json")
    module = Lookup(torch.tensor(CONFUSION) if kind == "module" else None)
    fit(tmp_path / "labels", module, min_precision=0.6, confusion=file)
    expected = naive(precision=precision, floor=0.6)
    assert written(tmp_path / "labels") == expected
    assert {row[1] for row in expected if row[3] == "unlabeled"} == {0, 1}
    assert read(tmp_path / "labels").manifest["confusion"] == CONFUSION
    # What is left of a class that is not precise does not count as the rarest.
    fit(tmp_path / "balanced", module, min_precision=0.6, confusion=file, balance=True)
    sizes = np.bincount([row[1] for row in written(tmp_path / "balanced")])
    assert sizes[0] == sizes[1] > sizes[2] == 5


def test_a_class_that_nothing_was_taken_for_is_as_precise_as_all() -> None:
    found = precision_of(np.asarray([[4.0, 0.0], [2.0, 0.0]]))
    assert found == pytest.approx([(4 + 4 / 6) / 7, 4 / 6])


def test_balance_is_that_of_the_definition() -> None:
    """Against a loop, with many equally sure images, of which the first stay."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        labels, sure = generator.integers(0, 4, 40), generator.integers(0, 4, 40) / 4
        fixed = generator.random(40) < 0.2
        selection = Selection(0.25, balance=True, max_per_class=int(generator.integers(1, 12)))
        kept = selection.keep(labels, sure, fixed, None)
        left = [row for row in range(40) if fixed[row] or sure[row] >= 0.25]
        guessed = {int(labels[row]) for row in left if not fixed[row]}
        rarest = min(sum(int(labels[row]) == k for row in left) for k in guessed)
        room = {k: min(rarest, selection.max_per_class or 0) for k in range(4)}
        expected = []
        for row in sorted(left, key=lambda row: (not fixed[row], -sure[row], row)):
            if fixed[row] or room[int(labels[row])] > 0:
                expected.append(row)
                room[int(labels[row])] -= 1
        assert np.flatnonzero(kept).tolist() == sorted(expected)


# ---------------------------------------------------------------- when, and how often


def test_predict_and_a_resumed_fit_write_what_the_fit_wrote(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last")
    writer = PseudoLabelWriter(str(tmp_path / "fitted"))
    callbacks = [writer, saver, Recorded()]
    tiny_trainer(tmp_path / "run", callbacks=callbacks, enable_checkpointing=True).fit(Lookup(), data())
    checkpoint: dict[str, Any] = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    again = PseudoLabelWriter(str(tmp_path / "predicted"))
    tiny_trainer(tmp_path, callbacks=[again]).predict(Lookup(), data(predict_split="train"), **checkpoint)
    assert files(tmp_path / "predicted") == files(tmp_path / "fitted")
    assert again.artifacts == [str(tmp_path / "predicted")]
    resumed = PseudoLabelWriter(str(tmp_path / "resumed"))
    tiny_trainer(tmp_path / "run", callbacks=[resumed, Recorded()]).fit(Lookup(), data(), **checkpoint)
    assert files(tmp_path / "resumed") == files(tmp_path / "fitted")


def test_what_joined_the_images_in_a_fit_is_no_matter_to_who_predicts_them(tmp_path: Path) -> None:
    fit(tmp_path / "first")
    joined: dict[str, Any] = {"pseudo_labels": str(tmp_path / "first"), "predict_split": "train"}
    images, module = data(**joined), Lookup()
    fit(tmp_path / "fitted", module, images)
    assert images.counts["pseudo_labeled"] > 0
    tiny_trainer(tmp_path, callbacks=[PseudoLabelWriter(str(tmp_path / "predicted"))]).predict(module, data(**joined))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("fitted", "predicted")]
    # Only `lightning fit` knows of a configuration.
    assert manifests[0] | {"config_hash": None} == manifests[1]


def predict(folder: Path, **options: Any) -> None:
    module = Lookup()
    module.weight.data.fill_(1.0)
    writer = PseudoLabelWriter(str(folder), top_k=1)
    trainer = tiny_trainer(folder.parent, callbacks=[writer], **options)
    trainer.predict(module, data(predict_split="train"), return_predictions=False)


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    two: dict[str, Any] = {"strategy": f"ddp_{START}", "devices": 2}
    fit(tmp_path / "one/labels", Crowded(), min_confidence=0.1)
    fit(tmp_path / "two/labels", Crowded(), min_confidence=0.1, trainer=two)
    assert files(tmp_path / "two/labels") == files(tmp_path / "one/labels")
    predict(tmp_path / "one/predicted")
    predict(tmp_path / "two/predicted", **two)
    assert files(tmp_path / "two/predicted") == files(tmp_path / "one/predicted")


def test_labels_that_are_there_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path / "labels")
    module = Lookup()
    with caplog.at_level("INFO"):
        writer = fit(tmp_path / "labels", module)
    assert not module.modes
    assert writer.artifacts == [str(tmp_path / "labels")]
    assert "are in" in caplog.text
    # Those of other settings, and damaged ones, are replaced.
    fit(tmp_path / "labels", module, top_k=1)
    assert read(tmp_path / "labels").table.top_labels is not None
    (tmp_path / "labels/pseudo_labels.parquet").write_bytes(b"")
    fit(tmp_path / "labels", module, top_k=1)
    assert len(written(tmp_path / "labels")) == N


def test_a_kill_leaves_nothing_finished_and_the_same_command_finishes(tmp_path: Path) -> None:
    fit(tmp_path / "undisturbed")
    context: Any = multiprocessing.get_context(START)
    folder = tmp_path / "labels"
    process = context.Process(target=fit, args=(folder, Lookup(seconds=0.3), data()))
    process.start()
    time.sleep(1.0)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (folder / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="label the images first"):
        read(folder)
    fit(folder)
    assert files(folder) == files(tmp_path / "undisturbed")


class Over(Timer):
    """Says that the time is over."""

    def time_remaining(self, stage: object = None) -> float:
        return 0.0


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"callbacks": [Over("00:00:10:00")]}])
def test_nothing_is_written_before_the_end(tmp_path: Path, options: dict[str, Any]) -> None:
    writer = PseudoLabelWriter(str(tmp_path / "labels"))
    callbacks = [writer, *options.pop("callbacks", [])]
    tiny_trainer(tmp_path, callbacks=callbacks, **options).fit(Lookup(), data())
    assert not (tmp_path / "labels").exists()
    assert writer.artifacts == []


def test_other_predictions_are_none_of_its_business(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Lookup()
    module.weight.data.fill_(1.0)
    with caplog.at_level("INFO"):
        tiny_trainer(tmp_path, callbacks=[PseudoLabelWriter(str(tmp_path / "labels"))]).predict(module, data())
    assert "these are not the images to train on, nothing is written" in caplog.text
    assert not (tmp_path / "labels").exists()


def test_what_is_said_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = TensorBoardLogger(tmp_path / "board", name="", version="")
    with caplog.at_level("INFO"):
        fit(tmp_path / "labels", min_confidence=0.7, trainer={"logger": logger})
    rows = naive(min_confidence=0.7)
    sizes = np.bincount([row[1] for row in rows])
    kept = sum(row[3] == "unlabeled" for row in rows)
    assert f"{len(rows)} images with labels in {tmp_path / 'labels'}, 15 labelled by people" in caplog.text
    assert f"{kept} of 75 pseudo-labels ({kept / 75:.1%} kept)" in caplog.text
    assert f"ant {sizes[0]}, bee {sizes[1]}, cow {sizes[2]}." in caplog.text
    assert list(pictures(tmp_path / "board")) == ["pseudo_labels/classes"]


def test_bars_are_as_high_as_the_counts() -> None:
    picture = draw_class_counts(np.asarray([4, 0]), np.asarray([4, 2]), ["a", "b"], "", ("people", "guessed")).astype(
        int
    )
    green = (picture == np.asarray([27, 120, 55])).all(2)[60:]
    blue = (picture == np.asarray([33, 102, 172])).all(2)[60:]
    heights = [
        (part[:, columns].any(1).sum()) for part in (green, blue) for columns in (slice(64, 340), slice(345, 624))
    ]
    assert heights == pytest.approx([130, 0, 130, 65], abs=2)
    many = np.random.default_rng(0).integers(0, 9, 1000)
    assert draw_class_counts(many, many, [str(k) for k in range(1000)], "", ("a", "b")).shape[1] == 1078


# ---------------------------------------------------------------- what does not fit


class Silent(pl.LightningModule):
    """Cannot tell its confusion."""

    def training_step(self, batch: object) -> None:
        raise AssertionError

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize(
    ("options", "module", "kind", "message"),
    [
        ({"min_precision": 0.5}, Silent, TypeError, r"a method label_confusion\(\) for `min_precision`"),
        ({"confusion": "nowhere.json"}, Lookup, FileNotFoundError, "`confusion` to be a JSON file, but there is none"),
        ({"top_k": 4}, Lookup, ValueError, "`top_k` to be at most 3, the number of classes, got 4"),
        ({"min_precision": 0.5}, Lookup, ValueError, "a confusion matrix for `min_precision`, but the module has none"),
        ({"min_confidence": 0.9999, "true_labels": False}, Lookup, ValueError,
         r"none of 'ant' \(0 of 3 classes\) \(and 2 more\): .* would draw noise for it\. Leave fewer images out "
         r"\(`min_confidence` 0\.9999\), .*: ant 0, bee 0, cow 0\."),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(
    tmp_path: Path,
    options: dict[str, Any],
    module: Callable[[], pl.LightningModule],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        fit(tmp_path / "labels", module(), **options)
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_confidence": 1.5}, r"`min_confidence` to be in \[0, 1\], got 1\.5"),
        ({"min_precision": -0.5}, r"`min_precision` to be in \[0, 1\], got -0\.5"),
        ({"max_per_class": 0}, "`max_per_class` to be at least 1, or left out, got 0"),
        ({"top_k": -1}, "`top_k` to be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PseudoLabelWriter("labels", **options)


@pytest.mark.parametrize(
    "content", ["{", "{}", "[[1, 2], [3, 4]]", '[["a"]]', "[[0,0,0],[0,0,0],[0,0,0]]", "[[-1,0,0]]"]
)
def test_a_confusion_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "counts.json").write_text(content)
    with pytest.raises(ValueError, match="`confusion` to be a JSON file with 3 rows"):
        fit(tmp_path / "labels", confusion=str(tmp_path / "counts.json"))


def test_folders_that_are_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder of its own, got the directory of the run"):
        fit(tmp_path, trainer={"default_root_dir": tmp_path})
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/manifest.json").write_text('{"kind": "fit"}')
    with pytest.raises(ValueError, match="holds a 'fit'; choose another folder"):
        fit(tmp_path / "labels")


@pytest.mark.parametrize("without", ["probabilities", "label", "confidence", "index"])
def test_a_module_that_predicts_something_else(tmp_path: Path, without: str) -> None:
    with pytest.raises(TypeError, match=r"return a dict of probabilities, label, confidence, index, got \['"):
        fit(tmp_path / "labels", Lookup(without=without))


def test_probabilities_that_are_not_finite(tmp_path: Path) -> None:
    module = Lookup()
    module.table[7] = float("nan")
    with pytest.raises(ValueError, match="finite probabilities, got NaN for image 7 and 0 more"):
        fit(tmp_path / "labels", module)


def test_other_classes_than_those_of_the_data(tmp_path: Path) -> None:
    module = Lookup()
    module.table = torch.full((N, 4), 0.25)
    with pytest.raises(ValueError, match=r"labels from 0 to 2 and `probabilities` \[B, 3\], got shape \[16, 4\]"):
        fit(tmp_path / "labels", module)


def test_a_part_of_the_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each of 90 images, got 16 of them and 0 twice; take `limit_predict_batches`"):
        predict(tmp_path / "labels", limit_predict_batches=1)


def test_data_without_such_images(tmp_path: Path) -> None:
    class Other(pl.LightningDataModule):
        class_names = _NAMES

    with pytest.raises(TypeError, match="`label_dataloader\(\)`, got Other; use SemiSupervisedDataModule"):
        fit(tmp_path / "labels", images=Other())


# ---------------------------------------------------------------- what reads them


def test_a_generator_learns_from_a_selection(tmp_path: Path) -> None:
    fit(tmp_path / "labels", min_confidence=0.7)
    source = data().source
    generation = GenerationDataModule(source, pseudo_labels=str(tmp_path / "labels"))
    generation.setup()
    rows = naive(min_confidence=0.7)
    (batch,) = generation.sweep_dataloader()
    assert batch["label"].tolist() == [row[1] for row in rows]
    wanted = torch.from_numpy(_IMAGES[[int(row[0][-7:]) for row in rows]])[:, None].float() / 255
    assert torch.equal(batch["image"], wanted)
    size = int(np.bincount([row[1] for row in rows]).max())
    with pytest.raises(
        ValueError, match=rf"{size + 1} labelled images of every class, but .* has \d+ .*: ant \d+, bee"
    ):
        GenerationDataModule(source, pseudo_labels=str(tmp_path / "labels"), min_per_class=size + 1).setup()


def test_a_manifest_that_was_edited(tmp_path: Path) -> None:
    fit(tmp_path / "labels", min_confidence=0.7)
    path = tmp_path / "labels/manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in (
        ({"selection": "sure ones"}, "`selection` is 'sure ones' instead of null"),
        ({"confusion": [[1, 2], [3, 4]]}, r"`confusion` has shape \[2, 2\] instead of 3 x 3"),
        ({"confusion": "many"}, "`confusion` .* 3 x 3"),
        ({"confusion": [[1, 2, 3], [4, 5, 6], [7, 8, -9]]}, "`confusion` has numbers that are negative or not finite"),
        ({"expected_confusion": [[1, 2, 3], [4, 5, 6], [7, 8]]}, "`expected_confusion` is no 3 x 3 table of numbers"),
        ({"counts": {**manifest["counts"], "images": 3}}, "`counts` are .*'images': 3.*, and the table has "),
        ({"counts": None}, "`counts` are None, and the table has "),
    ):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=rf"as they were written, but in .*manifest\.json {message}"):
            read(tmp_path / "labels")
    path.write_text(json.dumps(manifest))
    origin = Origin(
        *(manifest[name] for name in ("class_names", "fingerprint", "weights", "config_hash", "made_with", "selection"))
    )
    assert is_written(tmp_path / "labels", origin)
    assert not is_written(tmp_path / "labels", replace(origin, config_hash="d" * 64))


def test_of_equally_likely_classes_the_first_is_best(tmp_path: Path) -> None:
    module = Lookup()
    module.table[:, 1:] = module.table[:, :1]
    fit(tmp_path / "labels", module, top_k=3)
    best = read(tmp_path / "labels").table.top_labels
    assert best is not None
    assert best.tolist() == [[0, 1, 2]] * N
