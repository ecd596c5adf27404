"""What a client has of a data set, and datamodules of clients with few labels or none."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing_runs import ramps
from torch import Tensor

from datamodules import (
    ArraySource,
    ClientPart,
    ClientSplit,
    DrawRequest,
    GenerationDataModule,
    ImageSource,
    LabelNoise,
    SemiSupervisedDataModule,
)
from datamodules.classification.contents import Contents, Role
from datamodules.classification.streams import StreamSampler
from datamodules.partition import client_split, client_tests
from datamodules.pseudo_labels import SPLITS, LabelTable, Origin, write
from datamodules.segmentation.pairs import Problem
from datamodules.synthetic_images import Drawing
from datamodules.synthetic_images import Origin as DrawnFrom

NAMES = ("ant", "bee", "cow")
N, SIDE = 120, 6
ROLES: list[Role] = ["test" if row % 5 == 0 else "val" if row % 7 == 0 else "train" for row in range(N)]
TRUTH = np.random.default_rng(0).integers(0, 3, N)
# Nobody may use every fourth label.
GIVEN = np.arange(N) % 4 != 3
SPLIT = ClientSplit(4, 0.4, 0.5, 0.5, seed=2)


class Mixed(ImageSource):
    """Images of all three roles, of one level each, and labels that are hidden."""

    image_channels = 1
    native_size = SIDE

    class_names = NAMES

    def read(self) -> Contents:
        images = np.broadcast_to(np.arange(N, dtype=np.uint8)[:, None, None, None], (N, SIDE, SIDE, 1))
        problems = [Problem(Path(f"broken/{number}"), "nothing") for number in range(5)]
        return Contents([f"k/{row:03d}" for row in range(N)], TRUTH, ROLES, GIVEN, images, problems=problems)


def parts(split: ClientSplit | None = SPLIT, **options: Any) -> list[Contents]:
    clients = range(1 if split is None else split.num_clients)
    return [ClientPart(Mixed(), client, split, **options).read() for client in clients]


def used(contents: Contents) -> list[tuple[str, str, bool]]:
    """Key, role and whether its label may be used, of each image."""
    assert contents.given is not None
    return list(zip(contents.keys, contents.roles, contents.given.tolist(), strict=True))


def test_clients_share_all_images_but_those_to_validate_on() -> None:
    dealt = [key for contents in parts() for key in contents.keys]
    assert sorted(dealt) == [f"k/{row:03d}" for row in range(N) if ROLES[row] != "val"]
    for contents in parts():
        rows = [int(key[2:]) for key in contents.keys]
        assert rows == sorted(rows)
        assert contents.labels.tolist() == TRUTH[rows].tolist()
        assert contents.images is not None
        assert contents.images[:, 1, 2, 0].tolist() == rows
        assert list(contents.roles) == [ROLES[row] for row in rows]
    assert [len(contents.problems) for contents in parts()] == [2, 1, 1, 1]


def test_labels_are_given_as_the_split_says_and_never_hidden_ones() -> None:
    train = np.array([row for row in range(N) if ROLES[row] == "train"])
    test = np.array([row for row in range(N) if ROLES[row] == "test"])
    usable = np.where(GIVEN[train], TRUTH[train], -1)
    for contents, rows, tested in zip(
        parts(), client_split(usable, SPLIT), client_tests(TRUTH[test], SPLIT), strict=True
    ):
        mine = used(contents)
        labelled = [int(key[2:]) for key, role, given in mine if role == "train" and given]
        assert labelled == train[rows.labeled].tolist()
        assert GIVEN[labelled].all()
        assert [int(key[2:]) for key, role, given in mine if role == "train" and not given] == train[
            rows.unlabeled
        ].tolist()
        assert [int(key[2:]) for key, role, _ in mine if role == "test"] == test[tested].tolist()


@pytest.mark.parametrize("split", [SPLIT, None])
def test_folds_hold_out_each_label_once(split: ClientSplit | None) -> None:
    folds = [parts(split, fold=fold, folds=3) for fold in range(3)]
    for client, whole in enumerate(parts(split)):
        labelled = {key for key, role, given in used(whole) if role == "train" and given}
        held_out: list[str] = []
        for fold in folds:
            mine = fold[client]
            assert mine.keys == whole.keys
            val = {key for key, role, _ in used(mine) if role == "val"}
            held_out += sorted(val)
            for key, role, given in used(mine):
                assert role == "val" if key in val else (key, role, given) in used(whole)
            counts = [sum(mine.labels[mine.keys.index(key)] == label for key in val) for label in range(3)]
            totals = [sum(whole.labels[whole.keys.index(key)] == label for key in labelled) for label in range(3)]
            assert all(abs(count - total / 3) < 1 for count, total in zip(counts, totals, strict=True))
        assert sorted(held_out) == sorted(labelled)


def test_single_labels_of_clients_are_in_different_folds() -> None:
    source = ArraySource(np.zeros((4, SIDE, SIDE), np.uint8), [0, 1, 0, 1], class_names="ab")
    split = ClientSplit(4, 1.0)
    held_out = ["val" in ClientPart(source, client, split, fold=0).read().roles for client in range(4)]
    assert sum(held_out) == 2


def test_a_client_with_images_of_its_own_has_them_all() -> None:
    (mine,) = parts(None)
    kept = [row for row in range(N) if ROLES[row] != "val"]
    assert [int(key[2:]) for key in mine.keys] == kept
    expected = [bool(GIVEN[row]) or ROLES[row] == "test" for row in kept]
    assert [given for _, _, given in used(mine)] == expected
    assert len(mine.problems) == 5


def test_files_are_dealt_out_as_arrays_are() -> None:
    class Files(Mixed):
        def read(self) -> Contents:
            contents = super().read()
            return replace(contents, images=None, paths=[Path(key) for key in contents.keys])

    for client, contents in enumerate(parts()):
        listed = ClientPart(Files(), client, SPLIT).read()
        assert listed.images is None
        assert [str(path) for path in listed.paths or ()] == list(contents.keys)


def test_it_says_what_its_source_says() -> None:
    class Downloaded(Mixed):
        layout = "images/"
        place = Path("somewhere")
        calls: Sequence[str] = ()

        def check(self) -> None:
            self.calls = [*self.calls, "check"]

        def prepare(self) -> None:
            self.calls = [*self.calls, "prepare"]

    source = Downloaded()
    part = ClientPart(source, 1, SPLIT)
    part.check()
    part.prepare()
    assert source.calls == ["check", "prepare"]
    assert (part.class_names, part.place, part.layout) == (NAMES, Path("somewhere"), "images/")
    assert (part.image_channels, part.native_size, part.is_part, source.is_part) == (1, SIDE, True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"client": 4, "split": SPLIT}, "`client` to be from 0 to 3, but got 4"),
        ({"client": -1}, "`client` to be at least 0, but got -1"),
        ({"fold": 2}, r"`fold` to be one of them, counted from 0, but got 2 and 2"),
        ({"folds": 1}, "at least two `folds`.*got 1"),
    ],
)
def test_clients_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClientPart(Mixed(), **arguments)


# ---------------------------------------------------------------- datamodules of clients


def own(labels: Sequence[int], truth: Sequence[int], tests: Sequence[int] = (0, 1, 2)) -> ClientPart:
    """A client with images of level 10, 11, ... and of these labels."""
    images = np.broadcast_to((10 + np.arange(len(labels), dtype=np.uint8))[:, None, None], (len(labels), SIDE, SIDE))
    tested = np.zeros((len(tests), SIDE, SIDE), np.uint8)
    return ClientPart(ArraySource(images, labels, tested, tests, NAMES, hidden_labels=truth))


NONE, ONE, LONE = own([-1] * 5, [0, 1, 1, 1, 2]), own([2], [2], [1]), own([-1], [2], [1])
MISSING = own([1, 1, -1, -1, -1, 2], [1, 1, 2, 1, 0, 2])


def ssl(source: ImageSource, **options: Any) -> SemiSupervisedDataModule:
    settings: dict[str, Any] = {"batch_size": 4, "unlabeled_ratio": 1, "steps_per_epoch": 3, "weak": "crop"}
    data = SemiSupervisedDataModule(source, **settings | options)
    data.setup()
    return data


def swept(batches: Iterable[dict[str, Tensor]], name: str) -> list[int]:
    return [int(value) for batch in batches for value in batch[name] if value >= 0]


@pytest.mark.parametrize("source", [NONE, ONE, LONE, MISSING])
@pytest.mark.parametrize("options", [{}, {"val_share": 0.3}, {"label_noise": LabelNoise("symmetric", 0.5)}])
def test_any_client_is_set_up_labelled_and_tested(source: ClientPart, options: dict[str, Any]) -> None:
    contents = source.read()
    uses = zip(used(contents), contents.labels.tolist(), strict=True)
    train = [label if given else -1 for (_, role, given), label in uses if role == "train"]
    for data in (ssl(source, **options), GenerationDataModule(source, **options)):
        data.setup()
        shown = list(data.label_dataloader())
        assert sum(len(batch["index"]) for batch in shown) == len(train)
        if "label_noise" not in options:
            assert torch.cat([batch["label"] for batch in shown]).tolist() == train
        tested = [int(label) for label, role in zip(contents.labels, contents.roles, strict=True) if role == "test"]
        assert swept(data.test_dataloader(), "label") == tested
        assert data.val_dataloader() == []


@pytest.mark.parametrize("source", [NONE, LONE])
def test_without_labels_nothing_is_trained(source: ClientPart) -> None:
    for data in (ssl(source), GenerationDataModule(source)):
        data.setup()
        with pytest.raises(ValueError, match=r"labelled images to train on, but this part .* has none.*pseudo_labels"):
            data.train_dataloader()
    # What wants no labels goes on.
    data = ssl(source, steps_per_epoch=None)
    data.declare_views((), ("plain",))
    assert len(data.train_dataloader()) == max(len(source.read().keys) - 3, 1) // 4 or 1


def test_one_image_fills_a_batch() -> None:
    data = ssl(ONE)
    data.declare_views(("plain",), ("plain",))
    for raw in data.train_dataloader():
        batch = data.on_after_batch_transfer(raw, 0)
        assert isinstance(batch, dict)
        assert batch["labeled"]["label"].tolist() == [2] * 4
        torch.testing.assert_close(batch["unlabeled"]["plain"], torch.full((4, 1, SIDE, SIDE), 10 / 255))
    generation = GenerationDataModule(ONE, batch_size=4, min_per_class=3)
    generation.setup()
    (only,) = generation.train_dataloader()
    assert only["index"].tolist() == [0] * 4


def test_a_part_that_is_held_out_altogether() -> None:
    data = ssl(ClientPart(ONE.source, fold=0))
    assert data.counts == {"labeled": 0, "unlabeled": 0, "val": 1, "test": 1}
    with pytest.raises(ValueError, match="this part of the data set has none"):
        data.train_dataloader()


def test_enough_labels_of_some_classes_are_validated_on() -> None:
    data = ssl(own([0, 1] * 5, [0, 1] * 5), val_share=0.9)
    assert data.counts == {"labeled": 3, "unlabeled": 3, "val": 7, "test": 3}
    with pytest.raises(ValueError, match=r"class 'cow'.* has none"):
        ssl(own([0, 1] * 5, [0, 1] * 5).source)


# ---------------------------------------------------------------- what joins the labels


def guess(folder: Path, source: ClientPart, labels: Sequence[int], people: Sequence[int], *, left_out: bool) -> str:
    """Write pseudo-labels of the first training images, some of which people labelled."""
    data = GenerationDataModule(source)
    data.setup()
    splits = np.where(np.isin(np.arange(len(labels)), people), SPLITS.index("labeled"), SPLITS.index("unlabeled"))
    confidence = np.ones(len(labels), np.float32)
    table = LabelTable(source.read().keys[: len(labels)], np.asarray(labels), confidence, splits)
    selection = {"rule": "test"} if left_out else None
    made_with = {"true_labels": True}
    write(folder, table, Origin(NAMES, data.images_fingerprint, made_with=made_with, selection=selection))
    return str(folder)


def test_a_generator_learns_from_pseudo_labels_without_all_classes(tmp_path: Path) -> None:
    folder = guess(tmp_path / "some", MISSING, [1, 1, 2, 2], people=[0, 1], left_out=True)
    settings: dict[str, Any] = {"batch_size": 4, "trusted_share": 0.5, "min_per_class": 2}
    data = GenerationDataModule(MISSING, pseudo_labels=folder, **settings)
    data.setup()
    assert data.class_counts.tolist() == [0, 2, 2]
    (batch,) = data.train_dataloader()
    assert batch["trusted"].sum() == 2
    with pytest.raises(ValueError, match="class 'ant'"):
        GenerationDataModule(MISSING.source, pseudo_labels=folder, **settings).setup()
    # One kind of label alone: there is nothing to keep apart.
    for name, source, people, trusted in (("none", NONE, [], 0), ("all", ONE, [0], 4)):
        alone = guess(tmp_path / name, source, [2] * (1 if people else 5), people, left_out=True)
        data = GenerationDataModule(source, pseudo_labels=alone, **settings)
        data.setup()
        (batch,) = data.train_dataloader()
        assert (batch["trusted"].sum(), batch["label"].tolist()) == (trusted, [2] * 4)


def test_pseudo_labels_may_add_nothing(tmp_path: Path) -> None:
    folder = guess(tmp_path / "people", MISSING, [1, 1], people=[0, 1], left_out=True)
    assert ssl(MISSING, pseudo_labels=folder).counts["pseudo_labeled"] == 0
    joined = guess(tmp_path / "more", NONE, [1, 0, 1, 1, 1], people=[], left_out=False)
    data = ssl(NONE, pseudo_labels=joined, steps_per_epoch=None)
    assert (data.counts["labeled"], data.counts["pseudo_labeled"]) == (0, 5)
    assert data.labels_of("labeled").tolist() == [1, 0, 1, 1, 1]
    assert len(data.train_dataloader()) == 1


def draw(folder: Path, source: ClientPart, counts: list[int]) -> str:
    request = DrawRequest(None, image_size=SIDE, batch_size=4, images_per_class=counts, num_classes=3)
    drawing = Drawing(folder, request, None)
    drawing.begin(DrawnFrom(request, "w" * 64, 3, NAMES, ssl(source).images_fingerprint))
    for block in range(request.num_blocks):
        asked = request.batch(block)
        image = ramps(asked["seed"], asked["label"], SIDE)[:, None] / 255
        drawing.write(block, {"image": image, "label": asked["label"], "seed": asked["seed"]})
    assert drawing.finish()
    return str(folder)


def test_drawn_images_take_the_place_of_labels(tmp_path: Path) -> None:
    drawn = draw(tmp_path / "none", NONE, [3, 0, 2])
    data = ssl(NONE, synthetic_images=drawn, synthetic_share=0.5)
    assert (data.counts["labeled"], data.counts["synthetic"]) == (0, 5)
    assert sorted(data.labels_of("labeled").tolist()) == [0, 0, 0, 2, 2]
    assert {int(label) for batch in data.train_dataloader() for label in batch["labeled"]["label"]} == {0, 2}
    # Where there are both, each batch has its share of both.
    data = ssl(MISSING, synthetic_images=draw(tmp_path / "some", MISSING, [3, 0, 0]), synthetic_share=0.5)
    for batch in data.train_dataloader():
        assert int((batch["labeled"]["label"] == 0).sum()) == 2


@pytest.mark.parametrize(("batch_size", "expected"), [(2, 5), (4, 2), (10, 1), (32, 1)])
def test_an_epoch_without_a_length_has_as_many_batches_as_labels_fill(batch_size: int, expected: int) -> None:
    labels = [0, 1, 2] * 3 + [0] + [-1] * 30
    source = own(labels, [label if label >= 0 else 0 for label in labels])
    data = ssl(source, steps_per_epoch=None, batch_size=batch_size)
    loader = data.train_dataloader()
    assert len(loader) == expected
    # Epochs go on where the one before ended: after so many all labelled images were seen equally often.
    seen: list[int] = []
    for epoch in range(10):
        assert isinstance(loader.sampler, StreamSampler)
        loader.sampler.set_epoch(epoch)
        seen += [int(index) for batch in loader for index in batch["labeled"]["index"]]
    assert len(seen) == 10 * expected * batch_size
    assert set(np.bincount(seen, minlength=10)) == {expected * batch_size}
    # Without views of labelled images unlabelled ones count, labelled ones among them.
    data.declare_views((), ("weak",))
    assert len(data.train_dataloader()) == max(40 // batch_size, 1)


def test_an_epoch_has_at_least_one_batch() -> None:
    with pytest.raises(ValueError, match="`steps_per_epoch` to be at least 1, but got 0"):
        SemiSupervisedDataModule(MISSING, steps_per_epoch=0)
