"""Drawn and pseudo-labelled images in the labelled stream of the semi-supervised datamodule."""

import io
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from drawing_runs import ramps
from PIL import Image
from tiny_nets import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import ArraySource, DrawRequest, FolderSource, LabelNoise, SemiSupervisedDataModule, semi_supervised
from datamodules.classification.streams import Pool, Quota, StreamSampler
from datamodules.pseudo_labels import LabelTable, Origin, write
from datamodules.synthetic_images import ClassRow, Drawing, SyntheticImages
from datamodules.synthetic_images import Origin as DrawnFrom
from lightning_modules import SSLClassifier
from lightning_modules.ssl.base import Method
from lightning_modules.ssl.dividemix import DivideMix
from lightning_modules.ssl.label_propagation import LabelPropagation
from lightning_modules.ssl.simmatch import SimMatch

NAMES = ("ant", "bee", "cow")
SIDE, TRAIN, TEST = 6, 30, 6
TRUTH = np.arange(TRAIN + TEST) % 3


def source(hidden: bool = False) -> ArraySource:
    """Image i is grey of level 4 i and of class i mod 3; with `hidden` only the first 12 have a label."""
    images = np.broadcast_to(4 * np.arange(TRAIN + TEST, dtype=np.uint8)[:, None, None], (TRAIN + TEST, SIDE, SIDE))
    train, test = np.split(images, [TRAIN])
    labels = np.where(np.arange(TRAIN) < 12, TRUTH[:TRAIN], -1) if hidden else TRUTH[:TRAIN]
    wrong = (TRUTH[:TRAIN] + 1) % 3 if hidden else None
    return ArraySource(train, labels, test, TRUTH[TRAIN:], NAMES, hidden_labels=wrong)


def module(**arguments: Any) -> SemiSupervisedDataModule:
    settings = {"labels_per_class": 2, "batch_size": 8, "unlabeled_ratio": 1, "steps_per_epoch": 4, "weak": "crop"}
    data = SemiSupervisedDataModule(**{"source": source(), **settings, **arguments})
    data.declare_views(("plain",), ("plain",))
    return data


def ready(**arguments: Any) -> SemiSupervisedDataModule:
    data = module(**arguments)
    data.setup("fit")
    return data


IMAGES = ready().images_fingerprint


def draw(folder: Path, counts: list[int], side: int = SIDE, shards_above: int | None = None, **origin: Any) -> Path:
    """Draw grey ramps (see `ramps`) of each class; seeds and classes make them all different."""
    request = DrawRequest(
        None, image_size=side, first_seed=7, batch_size=4, images_per_class=counts, num_classes=len(counts)
    )
    drawing = Drawing(folder, request, shards_above)
    known: dict[str, Any] = {"num_classes": 3, "class_names": NAMES, "fingerprint": IMAGES} | origin
    drawing.begin(DrawnFrom(request, "w" * 64, **known))
    for block in range(request.num_blocks):
        asked = request.batch(block)
        image = ramps(asked["seed"], asked["label"], side)[:, None] / 255
        drawing.write(block, {"image": image, "label": asked["label"], "seed": asked["seed"]})
    assert drawing.finish()
    return folder


def guess(folder: Path, labels: Iterable[int], confidence: Iterable[float], **origin: Any) -> Path:
    """Write pseudo-labels of all training images of the source."""
    keys = ready()._ready().keys[:TRAIN]
    table = LabelTable(
        list(keys),
        np.asarray(list(labels)),
        np.asarray(list(confidence), dtype=np.float32),
        np.ones(TRAIN, dtype=np.int64),
    )
    write(folder, table, Origin(**{"class_names": NAMES, "fingerprint": IMAGES, "weights": "w"} | origin))
    return folder


def sorted_by_seed(counts: list[int]) -> list[tuple[int, int]]:
    """(seed, class) of what `draw` makes."""
    return sorted((7 + 3 * j + c, c) for c, count in enumerate(counts) for j in range(count))


def batches(data: SemiSupervisedDataModule, epoch: int = 0) -> list[dict[str, dict[str, Tensor]]]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, StreamSampler)
    loader.sampler.set_epoch(epoch)
    return [cast("dict[str, dict[str, Tensor]]", data.on_after_batch_transfer(batch, 0)) for batch in loader]


def swept(loader: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = list(loader)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def levels(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.int64)


def permutations(size: int, seed: int, salt: int) -> Iterable[int]:
    """A stream, one item after the other."""
    block = 0
    while True:
        yield from np.random.default_rng((seed, block, salt)).permutation(size).tolist()
        block += 1


def taken(stream: Iterable[int], count: int) -> list[int]:
    it = iter(stream)
    return [next(it) for _ in range(count)]


def same(first: object, second: object) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)


# ---------------------------------------------------------------- what joins


def test_sweep_has_people_s_images_then_drawn_then_pseudo_labelled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(semi_supervised, "rank_zero_info", lines.append)
    folder = draw(tmp_path / "drawn", [3, 4, 2])
    guesses = (TRUTH[:TRAIN] + 1) % 3
    sure = np.where(np.arange(TRAIN) % 2, 0.9, 0.4)
    labels = guess(tmp_path / "guessed", guesses, sure)
    plain = ready(val_share=0.5)
    data = ready(
        val_share=0.5,
        synthetic_images=str(folder),
        synthetic_per_class=2,
        synthetic_weight=0.25,
        pseudo_labels=str(labels),
        min_confidence=0.5,
        eval_batch_size=5,
    )
    split = plain._ready().split
    joined = [row for row in split.unlabeled if row not in split.labeled and row % 2]
    wanted = [pair for pair in sorted_by_seed([3, 4, 2]) if pair[0] < 7 + 6]
    found = swept(data.sweep_dataloader("labeled"))
    assert found["origin"].tolist() == [0] * 3 + [1] * 6 + [2] * len(joined)
    assert found["weight"].tolist() == [1.0] * 3 + [0.25] * 6 + [1.0] * len(joined)
    assert found["weight"].dtype == torch.float32
    assert found["index"].tolist() == list(range(data.num_labeled))
    truth = [*TRUTH[split.labeled], *(c for _, c in wanted), *guesses[joined]]
    assert found["label"].tolist() == data.labels_of("labeled").tolist() == truth
    shown = levels(found["image"])[:, 0]
    assert shown[:3, 0, 0].tolist() == [4 * row for row in split.labeled]
    seeds, classes = map(torch.tensor, zip(*wanted, strict=True))
    assert torch.equal(shown[3:9], ramps(seeds, classes, SIDE))
    assert shown[9:, 0, 0].tolist() == [4 * row for row in joined]
    assert data.counts == {**plain.counts, "synthetic": 6, "pseudo_labeled": len(joined)}
    assert lines == [f"labelled stream: 3 real, 6 drawn (2 a class), {len(joined)} pseudo-labelled"]
    given = {row: label for row, label in zip(joined, guesses[joined], strict=True)}
    given |= {row: TRUTH[row] for row in split.labeled}
    assert data.labels_of("unlabeled").tolist() == [given.get(row, -1) for row in split.unlabeled]


def test_nobody_but_the_labelled_stream_sees_what_joined(tmp_path: Path) -> None:
    folder, labels = draw(tmp_path / "drawn", [2, 2, 2]), guess(tmp_path / "guessed", [0] * TRAIN, [1.0] * TRAIN)
    mixed = {"synthetic_images": str(folder), "pseudo_labels": str(labels)}
    plain, data = ready(val_share=0.5), ready(val_share=0.5, **mixed)
    for name in ("val_dataloader", "test_dataloader", "predict_dataloader", "label_dataloader"):
        loaders = [cast("DataLoader[dict[str, Tensor]]", getattr(one, name)()) for one in (plain, data)]
        assert same(*map(swept, loaders))
    seen = [swept(one.sweep_dataloader("unlabeled")) for one in (plain, data)]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in ("image", "index"))
    trained = [[batch["unlabeled"] for batch in batches(one)] for one in (plain, data)]
    assert same(cast("list[object]", trained[0]), cast("list[object]", trained[1]))
    val = set(data._ready().split.val.tolist())
    streams = data._streams()
    assert val
    assert val.isdisjoint(streams.labeled.rows.tolist())
    assert (plain.images_fingerprint, plain.test_fingerprint) == (data.images_fingerprint, data.test_fingerprint)


def test_true_labels_are_in_reports_only(tmp_path: Path) -> None:
    """Image i < 12 has its label; the hidden ones are all wrong, and nothing but `true_label` shows them."""
    labels = guess(tmp_path, TRUTH[:TRAIN], [1.0] * TRAIN)
    data = ready(
        source=source(hidden=True), pseudo_labels=str(labels), synthetic_images=str(draw(tmp_path / "d", [1] * 3))
    )
    found = swept(data.sweep_dataloader("labeled"))
    rows = data._streams().labeled.rows
    own = found["origin"] != 1
    assert torch.equal(found["label"][own], torch.from_numpy(TRUTH[rows[own.numpy()]]))
    for batch in batches(data):
        part = batch["labeled"]
        origin = found["origin"][part["index"]]
        assert (part["true_label"][origin == 1] == -1).all()
        # Hidden labels of pseudo-labelled images are another class than theirs.
        guessed = (origin == 2) & (torch.from_numpy(rows)[part["index"]] >= 12)
        assert torch.equal(part["true_label"][guessed], (part["label"][guessed] + 1) % 3)
        assert part.keys() == {"image", "label", "index", "true_label"}


def test_label_noise_spares_what_joins(tmp_path: Path) -> None:
    noise = LabelNoise("symmetric", 1.0)
    found = swept(ready(synthetic_images=str(draw(tmp_path, [2, 2, 2])), label_noise=noise).sweep_dataloader("labeled"))
    drawn = found["label"][found["origin"] == 1]
    assert drawn.tolist() == [c for _, c in sorted_by_seed([2, 2, 2])]


# ---------------------------------------------------------------- batches


def test_without_arguments_batches_are_what_they_always_were() -> None:
    data = ready()
    split = data._ready().split
    wanted = {
        "labeled": (split.labeled, permutations(6, 0, 2), 8),
        "unlabeled": (split.unlabeled, permutations(len(split.unlabeled), 0, 3), 8),
    }
    for batch in [*batches(data, 0), *batches(data, 1)]:
        for name, (rows, stream, size) in wanted.items():
            index = taken(stream, size)
            part = batch[name]
            assert part["index"].tolist() == index
            image = part["image" if name == "labeled" else "plain"]
            assert levels(image)[:, 0, 0, 0].tolist() == [4 * row for row in rows[index]]
    assert data.counts == {"labeled": 6, "unlabeled": 30, "val": 0, "test": 6}
    assert data.fingerprint == data._ready().fingerprint


def test_all_labelled_images_are_drawn_from_alike(tmp_path: Path) -> None:
    data = ready(synthetic_images=str(draw(tmp_path, [4, 3, 3])))
    stream, every = permutations(16, 0, 2), swept(data.sweep_dataloader("labeled"))
    for batch in [*batches(data, 0), *batches(data, 1)]:
        part, index = batch["labeled"], taken(stream, 8)
        assert part["index"].tolist() == index
        assert torch.equal(part["image"], every["image"][index])
        assert torch.equal(part["label"], every["label"][index])


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.5, 4), (0.8, 6), (0.9, 7)])
def test_a_share_is_exact_in_every_batch(tmp_path: Path, share: float, count: int) -> None:
    """Real and drawn images each have a stream of their own, cut into parts of batches."""
    data = ready(synthetic_images=str(draw(tmp_path, [2, 2, 1])), synthetic_share=share)
    rest, drawn = permutations(6, 0, 2), permutations(5, 0, 4)
    for batch in [*batches(data, 0), *batches(data, 1)]:
        index = taken(rest, 8 - count) + [6 + place for place in taken(drawn, count)]
        assert batch["labeled"]["index"].tolist() == index


def test_pseudo_labelled_images_count_as_real_ones_in_a_share(tmp_path: Path) -> None:
    labels = guess(tmp_path / "guessed", [0] * TRAIN, [1.0] * TRAIN)
    data = ready(synthetic_images=str(draw(tmp_path / "d", [1, 1, 1])), synthetic_share=0.5, pseudo_labels=str(labels))
    origin = swept(data.sweep_dataloader("labeled"))["origin"]
    seen = torch.stack([origin[batch["labeled"]["index"]] for batch in batches(data) + batches(data, 1)])
    assert ((seen == 1).sum(1) == 4).all()
    assert set(seen.flatten().tolist()) == {0, 1, 2}


def test_ranks_share_the_stream_and_its_drawn_part() -> None:
    def drawn(batch_size: int, count: int, ranks: int, rank: int) -> list[list[int]]:
        sampler = StreamSampler(
            {"labeled": Pool(20, batch_size, None, Quota(np.arange(7, 18), count))}, 5, 3, ranks, rank
        )
        sampler.set_epoch(2)
        return [key["labeled"].index.tolist() for key in sampler]

    alone = drawn(16, 6, 1, 0)
    ranks = [drawn(8, 3, 2, rank) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert [whole[0::2], whole[1::2]] == parts
        for part in parts:
            assert sum(7 <= index < 18 for index in part) == 3


def test_selection_with_a_share(tmp_path: Path) -> None:
    data = ready(synthetic_images=str(draw(tmp_path, [2, 2, 2])), synthetic_share=0.5)
    data.select("labeled", torch.tensor([1, 6, 6, 9]))
    seen = torch.stack([batch["labeled"]["index"] for batch in batches(data) + batches(data, 1)])
    assert (seen[:, :4] == 1).all()
    assert set(seen[:, 4:].flatten().tolist()) == {6, 9}
    with pytest.raises(ValueError, match="`indices` to have drawn and other images"):
        data.select("labeled", torch.tensor([0, 1]))


class Recorder(pl.LightningModule):
    """Writes down what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIDE * SIDE, 3)
        self.seen: list[object] = []

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return nn.functional.cross_entropy(self.layer(batch["labeled"]["image"].flatten(1)), batch["labeled"]["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_resumed_fit_sees_what_it_would_have_seen(tmp_path: Path) -> None:
    folder = draw(tmp_path / "drawn", [3, 3, 3])

    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, Recorder]:
        trainer = tiny_trainer(tmp_path, max_epochs=epochs, max_steps=-1)
        torch.manual_seed(0)
        recorder = Recorder()
        data = module(synthetic_images=str(folder), synthetic_share=0.6, steps_per_epoch=2)
        data.declare_views(("weak", "strong"), ("weak",))
        trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint)
        return trainer, recorder

    whole = fit(3)[1]
    fit(1)[0].save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(3, tmp_path / "half.ckpt")[1]
    assert len(whole.seen) == 6
    assert same(whole.seen[2:], resumed.seen)
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


# ---------------------------------------------------------------- decoding


def test_other_sizes_and_colours_are_brought_to_the_source_s(tmp_path: Path) -> None:
    folder = draw(tmp_path / "drawn", [2, 1, 0], side=10)
    shown = []
    for path in sorted(folder.glob("*/*.png"), key=lambda path: path.name):
        with Image.open(path) as image:
            shown.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    grey = swept(ready(synthetic_images=str(folder)).sweep_dataloader("labeled"))["image"][6:]
    assert torch.equal(levels(grey)[:, 0], torch.from_numpy(np.stack(shown)).to(torch.int64))
    root = tmp_path / "photos"
    for split in ("train", "test"):
        for number, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for copy in range(2):
                Image.new("RGB", (6, 6), (50 * number, copy, 9)).save(root / split / name / f"{copy}.png")
    photos: dict[str, Any] = {"source": FolderSource(str(root)), "image_size": SIDE, "labels_per_class": 1}
    data = ready(**photos, synthetic_images=str(folder), synthetic_from_other_data=True)
    colour = swept(data.sweep_dataloader("labeled"))["image"][3:]
    assert torch.equal(colour, grey.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("shards_above", [None, 0])
def test_drawn_images_that_do_not_fit_into_memory_are_decoded_on_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_above: int | None
) -> None:
    folder = draw(tmp_path, [3, 3, 3], shards_above=shards_above)
    opened: list[int] = []
    bytes_of = SyntheticImages.bytes_of

    def counted(images: SyntheticImages[ClassRow], row: ClassRow) -> bytes:
        opened.append(row.seed)
        return bytes_of(images, row)

    monkeypatch.setattr(SyntheticImages, "bytes_of", counted)
    kept, late = (
        ready(synthetic_images=str(folder), synthetic_per_class=2, cache_megabytes=megabytes) for megabytes in (1, 0)
    )
    # Of memory each is opened once, else once to see whether it is a picture; those left out are not opened at all.
    assert sorted(opened) == sorted([*range(7, 13)] * 2)
    assert same(batches(kept)[0], batches(late)[0])
    assert same(*(swept(data.sweep_dataloader("labeled")) for data in (kept, late)))
    assert len(opened) > 12 + 6


def test_workers_read_shards(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "synthetic_images": str(draw(tmp_path, [2, 2, 2], shards_above=0)),
        "cache_megabytes": 0,
        "steps_per_epoch": 2,
    }
    assert same(batches(ready(**settings)), batches(ready(num_workers=1, **settings)))


# ---------------------------------------------------------------- fingerprints and stages


def test_fingerprint_follows_what_joins(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a", [2, 2, 2]), draw(tmp_path / "b", [2, 2, 2], shards_above=0)
    guesses = [guess(tmp_path / str(n), np.roll(TRUTH[:TRAIN], n), [0.5] * 15 + [1.0] * 15) for n in range(2)]
    found = [
        ready(**arguments).fingerprint
        for arguments in (
            {},
            {"synthetic_images": str(first)},
            {"synthetic_images": str(first), "synthetic_per_class": 1},
            {"pseudo_labels": str(guesses[0])},
            {"pseudo_labels": str(guesses[1])},
            {"pseudo_labels": str(guesses[0]), "min_confidence": 0.8},
            {"pseudo_labels": str(guesses[0]), "synthetic_images": str(first)},
        )
    ]
    assert len(set(found)) == len(found)
    # Where and how the same images lie is all one, and so is how often they are seen.
    assert ready(synthetic_images=str(second), synthetic_share=0.5, seed=3).fingerprint == found[1]


def test_folders_are_looked_for_when_a_fit_begins(tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    data = module(synthetic_images=str(folder))
    data.check()
    data.prepare_data()
    data.setup("predict")
    assert len(swept(data.predict_dataloader())["index"]) == TEST
    with pytest.raises(FileNotFoundError, match="`synthetic_images` to be a folder of drawn images"):
        data.setup("fit")
    draw(folder, [1, 1, 1])
    data.setup("fit")
    tested = module(synthetic_images=str(folder))
    tested.setup("test")
    assert tested.fingerprint == data.fingerprint != ready().fingerprint
    assert tested._streams()._store is None


# ---------------------------------------------------------------- methods


class Net(nn.Module):
    """One linear layer, and its input as an embedding."""

    num_features = 6

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Linear(SIDE * SIDE, 6)
        self.head = nn.Linear(6, num_classes)

    def embed(self, image: Tensor) -> Tensor:
        out: Tensor = self.body(image.flatten(1))
        return out

    def classify(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.head(embedding)
        return out

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.embed(image))


@pytest.mark.parametrize(
    "method",
    [
        partial(SimMatch, size=4),
        partial(DivideMix, warmup_epochs=1, memory=2),
        partial(LabelPropagation, warmup_epochs=1, neighbors=3),
    ],
    ids=["simmatch", "dividemix", "label_propagation"],
)
def test_methods_remember_all_labelled_images(tmp_path: Path, method: Callable[[], Method]) -> None:
    drawn, labels = draw(tmp_path / "drawn", [4, 4, 4]), guess(tmp_path / "guessed", TRUTH[:TRAIN], [1.0] * TRAIN)
    data = module(synthetic_images=str(drawn), pseudo_labels=str(labels), steps_per_epoch=2)
    classifier = SSLClassifier(Net(), method(), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.01))
    tiny_trainer(tmp_path, max_epochs=2, max_steps=-1).fit(classifier, datamodule=data)
    assert classifier.num_labeled == 6 + 12 + 24
    assert all(bool(value.isfinite().all()) for value in classifier.state_dict().values())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"synthetic_per_class": 0}, "`synthetic_per_class` to be at least 1, but got 0"),
        ({"synthetic_per_class": -2}, "`synthetic_per_class` to be at least 1, but got -2"),
        ({"synthetic_share": 0.0}, r"`synthetic_share` to be in \(0, 1\)"),
        ({"synthetic_share": 1.0}, r"`synthetic_share` to be in \(0, 1\)"),
        ({"synthetic_share": float("nan")}, r"`synthetic_share` to be in \(0, 1\)"),
        ({"synthetic_share": 0.01}, "0.01 of `batch_size` 8 rounds to 0 drawn ones"),
        ({"synthetic_share": 0.99}, "0.99 of `batch_size` 8 rounds to 8 drawn ones"),
        ({"synthetic_weight": -0.5}, "`synthetic_weight` to be a finite number of at least 0"),
        ({"synthetic_weight": float("inf")}, "`synthetic_weight` to be a finite number of at least 0"),
        ({"min_confidence": 1.5, "pseudo_labels": "x"}, r"`min_confidence` to be in \[0, 1\]"),
        ({"synthetic_images": None, "synthetic_share": 0.5}, "`synthetic_images` with `synthetic_share` 0.5"),
        ({"synthetic_images": None, "synthetic_per_class": 5}, "`synthetic_images` with `synthetic_per_class` 5"),
        ({"synthetic_images": None, "synthetic_weight": 2.0}, "`synthetic_images` with `synthetic_weight` 2"),
        ({"synthetic_images": None, "synthetic_from_other_data": True}, "`synthetic_images` with `synthetic_from_ot"),
        ({"min_confidence": 0.5}, "`pseudo_labels` with `min_confidence` 0.5"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**{"synthetic_images": "drawn", **arguments})


def unfinished(folder: Path) -> Path:
    draw(folder, [1, 1, 1])
    (folder / "manifest.json").rename(folder / "drawing.json")
    return folder


def pairs(folder: Path) -> Path:
    request = DrawRequest(2, image_size=SIDE, batch_size=2)
    drawing = Drawing(folder, request)
    drawing.begin(DrawnFrom(request, "w", 3, NAMES, IMAGES))
    seed = request.batch(0)["seed"]
    grey, none = torch.zeros(2, 1, SIDE, SIDE), torch.zeros(2, SIDE, SIDE, dtype=torch.int64)
    drawing.write(0, {"image": grey, "mask": none, "confidence": torch.ones(2), "seed": seed})
    assert drawing.finish()
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    """Change the manifest by hand."""
    draw(folder, [1, 1, 1])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def relabelled(folder: Path) -> Path:
    """Exchange labels in the table by hand."""
    draw(folder, [1, 1, 1])
    table = pq.read_table(folder / "metadata.parquet")
    place = table.column_names.index("label")
    pq.write_table(table.set_column(place, "label", [[1, 0, 2]]), folder / "metadata.parquet")
    return folder


def cut_short(folder: Path) -> Path:
    draw(folder, [1, 1, 1])
    file = next(folder.glob("bee/*.png"))
    file.write_bytes(file.read_bytes()[:40])
    return folder


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder / "nowhere", FileNotFoundError, "there is none at"),
        (unfinished, FileNotFoundError, "is not finished; run the command that draws it again"),
        (pairs, ValueError, "masks tell no class of an image"),
        (partial(draw, counts=[1, 1, 1], fingerprint="0" * 64), ValueError, "set `synthetic_from_other_data`"),
        (
            partial(draw, counts=[1, 1, 1], class_names=("ant", "cow", "bee")),
            ValueError,
            "are ant, cow, bee; draw",
        ),
        (partial(draw, counts=[1, 1], class_names=None, num_classes=2), ValueError, "are 2 classes without names"),
        (partial(draw, counts=[2, 2, 1]), ValueError, "got 2, and .* has 1 of class 'cow'. Draw more"),
        (partial(edited, counts={"images": 7}), ValueError, "with 7 images, but .* lists 3"),
        (partial(edited, kind="pseudo_labels"), ValueError, "`synthetic_images`"),
        (partial(edited, fingerprint=None), ValueError, "data that it does not name"),
        (relabelled, ValueError, "they disagree about class_names: was one of them changed by hand"),
        (
            partial(draw, counts=[1, 1, 1, 1], class_names=None, num_classes=None),
            ValueError,
            "of the 3 classes of the data, but .* has images of class 3",
        ),
        (cut_short, ValueError, "1 of 3 entries .*\n.*bee/.*cannot be decoded"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, make: Callable[[Path], Path], error: type[Exception], message: str
) -> None:
    folder = make(tmp_path)
    wanted = 2 if "Draw more" in message else None
    with pytest.raises(error, match=message):
        ready(synthetic_images=str(folder), synthetic_per_class=wanted)


def test_images_of_other_data_may_be_taken_knowingly(tmp_path: Path) -> None:
    folder = draw(tmp_path, [1, 1, 1], fingerprint="0" * 64)
    assert ready(synthetic_images=str(folder), synthetic_from_other_data=True).num_labeled == 9


def test_a_picture_that_is_lost_later_is_named(tmp_path: Path) -> None:
    data = ready(synthetic_images=str(draw(tmp_path, [1, 1, 1])), cache_megabytes=0)
    (file,) = tmp_path.glob("cow/*.png")
    empty = io.BytesIO()
    file.write_bytes(empty.getvalue())
    with pytest.raises(ValueError, match=r"cow/000000009\.png: .*cannot be decoded"):
        swept(data.sweep_dataloader("labeled"))


def test_pseudo_labels_that_cannot_be_used(tmp_path: Path) -> None:
    labels = guess(tmp_path / "a", TRUTH[:TRAIN], [0.5] * TRAIN)
    with pytest.raises(ValueError, match=r"`min_confidence` 0\.9, but .* has none of the 24 unlabelled images"):
        ready(pseudo_labels=str(labels), min_confidence=0.9)
    with pytest.raises(ValueError, match="has none of the 0 unlabelled images"):
        ready(pseudo_labels=str(labels), labels_per_class=None)
    with pytest.raises(ValueError, match="`pseudo_labels` of the images of the data"):
        ready(pseudo_labels=str(guess(tmp_path / "b", TRUTH[:TRAIN], [0.5] * TRAIN, fingerprint="0" * 64)))
    with pytest.raises(FileNotFoundError, match="pseudo_labels"):
        ready(pseudo_labels=str(tmp_path / "nowhere"))
