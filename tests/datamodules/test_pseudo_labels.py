"""The PseudoLabels artifact, and generators' data that take their labels from it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_data import write_classes
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import ArraySource, FolderSource, GenerationDataModule
from datamodules.classification.contents import ImageSource
from datamodules.pseudo_labels import KIND, SPLITS, LabelTable, Origin, read, write

_NAMES = ("cat", "dog", "owl")
_KEYS = [f"images/{number:02d}.png" for number in range(9)]
_IMAGES = np.random.default_rng(1).integers(0, 256, (30, 4, 4), dtype=np.uint8)


def rows(order: npt.NDArray[np.int64] | None = None, top: bool = False) -> LabelTable:
    order = np.arange(9) if order is None else order
    generator = np.random.default_rng(0)
    confidence = generator.random(9, dtype=np.float32)
    best = generator.integers(0, 3, (9, 2)), generator.random((9, 2), dtype=np.float32)
    return LabelTable(
        [_KEYS[row] for row in order],
        (np.arange(9) % 3)[order],
        confidence[order],
        np.asarray([0, 1, 1, 2, 1, 1, 1, 3, 1])[order],
        best[0][order] if top else None,
        best[1][order] if top else None,
    )


def shuffled() -> npt.NDArray[np.int64]:
    return np.random.default_rng(5).permutation(9)


@pytest.mark.parametrize("top", [False, True])
def test_written_and_read(tmp_path: Path, top: bool) -> None:
    origin = Origin(_NAMES, "fine", "weights", "hash", {"views": 2})
    write(tmp_path / "made/labels", rows(shuffled(), top), origin)
    found, wanted = read(tmp_path / "made/labels"), rows(top=top)
    assert found.table.keys.to_pylist() == _KEYS
    for name in ("labels", "confidence", "splits", "top_labels", "top_confidence"):
        ours, theirs = getattr(wanted, name), getattr(found.table, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert np.array_equal(ours, theirs)
    assert found.table.labels.dtype == np.int64
    assert found.table.confidence.dtype == np.float32
    manifest = json.loads((tmp_path / "made/labels/manifest.json").read_text())
    assert manifest == found.manifest
    assert manifest["kind"] == KIND
    assert manifest["class_names"] == list(_NAMES)
    assert (manifest["fingerprint"], manifest["weights"], manifest["config_hash"]) == ("fine", "weights", "hash")
    assert manifest["made_with"] == {"views": 2}
    assert manifest["counts"]["images"] == 9
    assert manifest["counts"]["classes"] == [3, 3, 3]
    assert manifest["counts"]["splits"] == {"labeled": 1, "unlabeled": 6, "val": 1, "test": 1}


def test_other_tools_read_the_table(tmp_path: Path) -> None:
    write(tmp_path, rows(top=True), Origin(_NAMES))
    (file,) = tmp_path.glob("*.parquet")
    table = pq.read_table(file).to_pydict()
    assert list(table) == ["key", "label", "confidence", "split", "top_label", "top_confidence"]
    assert table["key"] == _KEYS
    assert table["split"][:4] == ["labeled", "unlabeled", "unlabeled", "val"]
    assert table["top_label"] == np.asarray(rows(top=True).top_labels).tolist()


def test_the_same_labels_are_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for number, order in enumerate((np.arange(9), shuffled())):
        folder = tmp_path / str(number)
        write(folder, rows(order), Origin(_NAMES))
        write(folder, rows(order), Origin(_NAMES))
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"manifest.json", "pseudo_labels.parquet"}
    other = replace(rows(), labels=np.zeros(9, dtype=np.int64))
    write(tmp_path / "0", other, Origin(_NAMES))
    assert read(tmp_path / "0").table.labels.tolist() == [0] * 9


def test_a_writer_that_is_killed_leaves_nothing_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, rows(), Origin(_NAMES))

    def killed(head: object, matrices: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("datamodules.pseudo_labels.manifest_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, replace(rows(), labels=np.zeros(9, dtype=np.int64)), Origin(_NAMES))
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json: it is not finished; label the images first"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(8, dtype=np.int64)}, "columns of one length, .* labels 8, confidence 9"),
        ({"top_labels": np.zeros((9, 2), dtype=np.int64)}, "`top_labels` and `top_confidence` together"),
        ({"keys": [*_KEYS[:8], _KEYS[0]]}, r"one pseudo-label an image, .* 'images/00.png' and 0 more come twice"),
        ({"keys": [*_KEYS[:8], None]}, "a key each .* but 1 have none"),
        ({"labels": np.arange(9)}, "`label` is from 0 to 2 .* got 3 for 'images/03.png' and 5 more out of range"),
        ({"labels": np.full(9, -1)}, "`label` is from 0 to 2"),
        ({"confidence": np.full(9, np.nan, dtype=np.float32)}, "`confidence` is from 0 to 1 .* got nan"),
        ({"confidence": np.full(9, 1.5, dtype=np.float32)}, r"`confidence` is from 0 to 1 .* got 1\.5"),
        ({"splits": np.full(9, 4)}, "`split` is from 0 to 3"),
        (
            {"top_labels": np.full((9, 1), 3), "top_confidence": np.zeros((9, 1), dtype=np.float32)},
            r"`top_label` is from 0 to 2 .* got \[3\]",
        ),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "labels", replace(rows(), **change), Origin(_NAMES))
    assert not (tmp_path / "labels").exists()


def test_nothing_is_no_artifact(tmp_path: Path) -> None:
    empty = LabelTable([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="but there are none; label some images"):
        write(tmp_path, empty, Origin(_NAMES))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "synthetic_images"}')
    with pytest.raises(ValueError, match=r"a folder of its own .* holds a 'synthetic_images'; choose another"):
        write(tmp_path, rows(), Origin(_NAMES))
    with pytest.raises(ValueError, match=r"a folder of kind 'pseudo_labels', but .* says 'synthetic_images'"):
        read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def _no_table(folder: Path) -> None:
    (folder / "pseudo_labels.parquet").unlink()


def _other_bytes(folder: Path) -> None:
    (folder / "pseudo_labels.parquet").write_bytes(b"PAR1")


def _damaged(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _nameless(folder: Path) -> None:
    _edit(folder, class_names=None)


def _fewer_classes(folder: Path) -> None:
    _edit(folder, class_names=["cat"])


def _other_table(folder: Path) -> None:
    _retable(folder, pa.table({"key": ["a"], "label": ["b"]}))


def _empty_cell(folder: Path) -> None:
    columns = {"key": ["a", "b"], "label": [0, None], "confidence": [0.5, 0.5], "split": ["val", "val"]}
    _retable(folder, pa.table(columns))


def _unknown_split(folder: Path) -> None:
    _retable(folder, pa.table({"key": ["a"], "label": [0], "confidence": [0.5], "split": ["dev"]}))


def _edit(folder: Path, **entries: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **entries}))


def _retable(folder: Path, table: pa.Table) -> None:
    pq.write_table(table, folder / "pseudo_labels.parquet")
    digest = hashlib.sha256((folder / "pseudo_labels.parquet").read_bytes()).hexdigest()
    _edit(folder, table_sha256=digest)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_no_table, FileNotFoundError, "with its table, but there is no"),
        (_other_bytes, ValueError, r"is not the table that manifest\.json beside it tells of; copy the folder again"),
        (_damaged, ValueError, "a JSON object in .* but it is damaged"),
        (_nameless, ValueError, "has no `class_names`"),
        (_fewer_classes, ValueError, "`label` is from 0 to 0 in .* got 1"),
        (_other_table, ValueError, "a table of key, label, confidence, split, but .* is none"),
        (_empty_cell, ValueError, "`label` is from 0 to 2 in .* got -1 for 'b'"),
        (_unknown_split, ValueError, "`split` is from 0 to 3 in .* got -1 for 'a'"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage: Callable[[Path], None], kind: type[Exception], message: str) -> None:
    write(tmp_path, rows(), Origin(_NAMES))
    damage(tmp_path)
    with pytest.raises(kind, match=message):
        read(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is no folder; label the images first"):
        read(tmp_path / "nothing")


def test_other_classes_and_images_are_refused(tmp_path: Path) -> None:
    write(tmp_path, rows(), Origin(_NAMES, "fine"))
    found = read(tmp_path)
    found.require(_NAMES, "fine")
    found.require(_NAMES)
    with pytest.raises(ValueError, match=r"classes of the data \(cat, owl, dog\), but those in .* are cat, dog, owl"):
        found.require(("cat", "owl", "dog"), "fine")
    with pytest.raises(ValueError, match=r"are of other images \(fingerprint fine\): .* Label the images anew"):
        found.require(_NAMES, "coarse")
    write(tmp_path, rows(), Origin(_NAMES))
    with pytest.raises(ValueError, match="are of data that they do not name"):
        read(tmp_path).require(_NAMES, "fine")


def test_rows_are_found_by_key(tmp_path: Path) -> None:
    write(tmp_path, rows(), Origin(_NAMES))
    found = read(tmp_path)
    assert found.rows_of([_KEYS[4], "nobody", _KEYS[0]]).tolist() == [4, -1, 0]
    assert found.strangers(_KEYS[1:]) == _KEYS[:1]
    assert found.strangers([], most=2) == _KEYS[:2]


# ---------------------------------------------------------------- as labels to train on


def source(hidden: int = 0) -> ArraySource:
    """Twenty-four images to train on, of which three have labels; six to test on."""
    labels = np.full(24, -1)
    labels[:3] = [0, 1, 2]
    return ArraySource(
        _IMAGES[:24], labels, _IMAGES[24:], [0, 1, 2] * 2, _NAMES, hidden_labels=np.where(labels < 0, hidden, -1)
    )


def label_all(folder: Path, kept: slice = slice(None), **changes: Any) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Write pseudo-labels of that source, in any order; returns the keys and the labels."""
    data = GenerationDataModule(source())
    data.setup()
    keys = source().read().keys[:24]
    labels = np.random.default_rng(2).permutation(np.arange(24) % 3)
    order = np.random.default_rng(3).permutation(24)[kept]
    confidence = np.linspace(0, 1, 24, dtype=np.float32)
    table = LabelTable([keys[row] for row in order], labels[order], confidence[order], np.ones(len(order), np.int64))
    write(folder, replace(table, **changes), Origin(_NAMES, data.images_fingerprint))
    return [*keys], labels


def trained_on(data: GenerationDataModule) -> tuple[Tensor, Tensor]:
    data.setup()
    swept = list(data.sweep_dataloader())
    return torch.cat([batch["image"] for batch in swept]), torch.cat([batch["label"] for batch in swept])


@pytest.mark.parametrize("hidden", [0, 1])
def test_given_labels_are_those_of_the_artifact(tmp_path: Path, hidden: int) -> None:
    _, labels = label_all(tmp_path)
    data = GenerationDataModule(source(hidden), pseudo_labels=str(tmp_path), batch_size=8)
    image, label = trained_on(data)
    assert data.counts == {"train": 24, "val": 0, "test": 6}
    assert label.tolist() == labels.tolist()
    assert torch.equal(image, torch.from_numpy(_IMAGES[:24])[:, None].float() / 255)
    assert data.transition_matrix is None
    assert data.class_counts.tolist() == [8, 8, 8]
    for batch in data.train_dataloader():
        assert torch.equal(batch["label"], label[batch["index"]])
    (tested,) = data.test_dataloader()
    assert tested["label"].tolist() == [0, 1, 2] * 2


def test_only_sure_labels_are_taken(tmp_path: Path) -> None:
    _, labels = label_all(tmp_path)
    data = GenerationDataModule(source(), pseudo_labels=str(tmp_path), min_confidence=0.5)
    image, label = trained_on(data)
    # Confidence rises with the row, from 0 to 1.
    assert label.tolist() == labels[12:].tolist()
    assert torch.equal(image, torch.from_numpy(_IMAGES[12:24])[:, None].float() / 255)
    strict = GenerationDataModule(source(), pseudo_labels=str(tmp_path), min_confidence=0.99)
    with pytest.raises(ValueError, match=r"has none .and 1 more.\. `min_confidence` is 0\.99: lower it, or .*cat \d"):
        strict.setup()


def test_held_out_images_have_pseudo_labels_too(tmp_path: Path) -> None:
    _, labels = label_all(tmp_path)
    data = GenerationDataModule(source(), pseudo_labels=str(tmp_path), val_share=0.25)
    trained_on(data)
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    (held_out,) = loader
    assert len(held_out["label"]) == 6
    every = torch.from_numpy(_IMAGES[:24])[:, None].float() / 255
    for image, label in zip(held_out["image"], held_out["label"], strict=True):
        (row,) = (every == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert int(label) == labels[row]


def test_labels_are_part_of_the_fingerprint_but_not_of_that_of_images(tmp_path: Path) -> None:
    label_all(tmp_path / "a")
    label_all(tmp_path / "b", labels=np.arange(24) % 3)
    made = [GenerationDataModule(source(), pseudo_labels=str(tmp_path / name)) for name in "ab"]
    for data in made:
        data.setup()
    assert made[0].fingerprint != made[1].fingerprint
    assert made[0].images_fingerprint == made[1].images_fingerprint


def refused(folder: Path, images: ImageSource, message: str) -> None:
    data = GenerationDataModule(images, 4, pseudo_labels=str(folder))
    with pytest.raises(ValueError, match=message):
        data.setup()


def test_images_without_a_row_and_rows_without_an_image(tmp_path: Path) -> None:
    keys, _ = label_all(tmp_path / "fewer", slice(20))
    missing = [keys[row] for row in np.random.default_rng(3).permutation(24)[20:]]
    refused(tmp_path / "fewer", source(), f"4 of 24 training images have none, for example {min(missing)}. Label the")
    label_all(tmp_path / "more")
    fewer = ArraySource(_IMAGES[:20], np.arange(20) % 3, class_names=_NAMES)
    refused(tmp_path / "more", fewer, "4 of 24 are for images that are not there, for example train/0000020. Label")
    label_all(tmp_path / "other", keys=[f"other/{number:02d}" for number in range(24)])
    refused(tmp_path / "other", source(), "24 of 24 training images have none, .*, 24 of 24 are for images that are")


def test_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    label_all(tmp_path)
    others = ArraySource(255 - _IMAGES[:24], np.arange(24) % 3, _IMAGES[24:], [0] * 6, _NAMES)
    refused(tmp_path, others, r"of the images of the data \(fingerprint \w{12}\), but those in .* are of other images")
    renamed = ArraySource(_IMAGES[:24], np.arange(24) % 3, _IMAGES[24:], [0] * 6, ("cat", "dog", "cow"))
    refused(tmp_path, renamed, r"classes of the data \(cat, dog, cow\)")


def test_files_that_are_skipped_need_no_label(tmp_path: Path) -> None:
    folders = FolderSource(str(write_classes(tmp_path / "images", 3)))
    (tmp_path / "images/train/benign/photo9.png").write_bytes(b"no picture")
    options: dict[str, Any] = {"image_size": 8, "on_bad_file": "skip", "max_bad_share": 0.2}
    data = GenerationDataModule(folders, **options)
    data.setup()
    keys = [key for key in folders.read().keys if key.startswith("train/") and "photo9" not in key]
    table = LabelTable(keys[::-1], np.arange(9) % 3, np.ones(9, np.float32), np.full(9, SPLITS.index("unlabeled")))
    write(tmp_path / "labels", table, Origin(data.class_names, data.images_fingerprint))
    again = GenerationDataModule(folders, pseudo_labels=str(tmp_path / "labels"), **options)
    _, label = trained_on(again)
    assert label.tolist() == (np.arange(9) % 3)[::-1].tolist()
    moved = tmp_path / "images/train/benign/photo0.png"
    Image.open(moved).save(tmp_path / "images/train/other/photo7.png")
    moved.unlink()
    lost = GenerationDataModule(folders, pseudo_labels=str(tmp_path / "labels"), **options)
    with pytest.raises(ValueError, match=r"1 of 9 training images have none, .* 1 of 9 are for images that are not"):
        lost.setup()
