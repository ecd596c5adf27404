"""What clients draw: how many, which the gate lets through, and what of it is on disk after whatever happens."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tdsm_toys import plain
from tiny_nets import tiny_trainer
from torch import Tensor

from datamodules import ArraySource, SemiSupervisedDataModule, synthetic_images
from datamodules.classification.client_part import ClientPart
from datamodules.drawing import Drawing
from datamodules.partition import ClientSplit
from federated import drawing
from federated.drawing import candidates, draw_classes, drawn_counts, wanted
from federated.settings import Drawing as How
from lightning_modules import TDSMDiffusion

Int64Array = npt.NDArray[np.int64]

CLASSES, SIDE = 3, 6
COUNTS = np.array([4, 0, 7])
HOW = How(candidates=2.0, max_per_class=10, sampler="euler", num_steps=2, guidance=0.0, batch_size=4)


class Sums(pl.LightningModule):
    """Takes an image for the class that the sum of its bytes has as remainder: right in about one of three cases."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"label": (batch["image"] * 255).round().long().sum((1, 2, 3)) % CLASSES}


class Never(Sums):
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"label": torch.ones(len(batch["image"]), dtype=torch.int64)}


class Silent(Sums):
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {}


class Counting:
    """Counts what a generator is asked for."""

    def __init__(self, generator: TDSMDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, original = 0, generator.draw

        def draw(request: Mapping[str, Any]) -> dict[str, Tensor]:
            self.images += len(request["seed"])
            return original(request)

        monkeypatch.setattr(generator, "draw", draw)


@pytest.fixture(scope="module")
def generator() -> TDSMDiffusion:
    return plain(side=SIDE, draw_batch=8)


@pytest.fixture(scope="module")
def data() -> SemiSupervisedDataModule:
    found = client(0)
    found.setup("fit")
    return found


def client(number: int, **options: Any) -> SemiSupervisedDataModule:
    images = np.random.default_rng(0).integers(0, 256, (60, SIDE, SIDE), dtype=np.uint8)
    source = ArraySource(images, np.arange(60) % CLASSES, class_names=["a", "b", "c"])
    split = ClientSplit(num_clients=2, label_share=0.5)
    return SemiSupervisedDataModule(ClientPart(source, number, split), batch_size=4, **options)


def draw(
    generator: pl.LightningModule,
    data: SemiSupervisedDataModule,
    folder: Path,
    gate: pl.LightningModule | None = None,
    number: int = 0,
    counts: Int64Array = COUNTS,
    how: How = HOW,
) -> Int64Array:
    return draw_classes(generator, gate, data, folder, number, counts, how, tiny_trainer(folder.parent))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize("fill", ["missing", "all"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 2.5])
def test_amounts_are_those_of_the_formula(fill: drawing.Fill, ratio: float) -> None:
    generator = np.random.default_rng(0)
    each = generator.integers(0, 9, (5, 4)) * generator.integers(0, 2, (5, 4))
    histogram = each.sum(0)
    for own in each:
        found = wanted(histogram, own, 5, ratio, fill, max_per_class=12)
        size = ratio * histogram.sum() / 5
        for c in range(4):
            lacking = max(0, round(size * (histogram[c] / histogram.sum())) - own[c])
            if fill == "missing" and own[c] > 0:
                lacking = 0
            assert found[c] == min(lacking, 12)
    # A client without labels gets a whole set: the mean client's.
    whole = wanted(histogram, np.zeros(4, dtype=np.int64), 5, 1.0, fill)
    assert whole.sum() == pytest.approx(histogram.sum() / 5, abs=2)


def test_nobody_draws_where_nobody_has_labels() -> None:
    nothing = np.zeros(3, dtype=np.int64)
    assert wanted(nothing, nothing, 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("histogram", "own", "clients", "ratio", "message"),
    [
        ([1, 2], [1], 2, 1.0, "counts of the same classes"),
        ([1, -2], [1, 0], 2, 1.0, "counts of the same classes"),
        ([1, 2], [1, 0], 0, 1.0, "`num_clients` of at least 1"),
        ([1, 2], [1, 0], 1, -1.0, "`ratio` of at least 0"),
    ],
)
def test_amounts_of_nonsense_are_refused(
    histogram: list[int], own: list[int], clients: int, ratio: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wanted(np.array(histogram), np.array(own), clients, ratio)


# ---------------------------------------------------------------- which


def test_no_two_clients_share_a_seed_whatever_they_draw() -> None:
    seen: set[int] = set()
    for number in range(4):
        for counts in ([10, 10, 10], [1, 0, 0], [0, 10, 3]):
            request = candidates(np.array(counts), number, SIDE, HOW)
            seeds = {seed for block in range(request.num_blocks) for seed in request.seeds(block)}
            assert len(seeds) == sum(math.ceil(HOW.candidates * count) for count in counts)
            assert {request.label(seed) for seed in seeds} == {c for c, count in enumerate(counts) if count}
            if counts == [10, 10, 10]:
                own = seeds
            assert seeds <= own
        assert not seen & own
        seen |= own
    with pytest.raises(ValueError, match=r"below 2\^32"):
        candidates(np.array([1, 1, 1]), 2**32 // 60 + 1, SIDE, HOW)
    with pytest.raises(ValueError, match="at most 10 images of a class"):
        candidates(np.array([11, 0, 0]), 0, SIDE, HOW)


def test_the_gate_lets_through_what_a_loop_lets_through(
    generator: TDSMDiffusion, data: SemiSupervisedDataModule, tmp_path: Path
) -> None:
    found = draw(generator, data, tmp_path / "drawn", Sums(), number=1)
    looked = np.zeros(CLASSES, dtype=np.int64)
    kept: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
    for c in range(CLASSES):
        # Image j of class c, one after the other; client 1 begins where client 0 ends for certain.
        for j in range(math.ceil(HOW.candidates * COUNTS[c])):
            if sum(label == c for label, _ in kept.values()) == COUNTS[c]:
                break
            seed = CLASSES * 20 + j * CLASSES + c
            asked = {"seed": torch.tensor([seed]), "label": torch.tensor([c]), "image_size": SIDE}
            image = generator.draw(asked | {"sampler": "euler", "num_steps": 2, "guidance": 0.0})["image"][0, 0]
            pixels = (image * 255).round().to(torch.uint8).numpy()
            looked[c] += 1
            if pixels.astype(np.int64).sum() % CLASSES == c:
                kept[seed] = (c, pixels)
    per_class = [sum(label == c for label, _ in kept.values()) for c in range(CLASSES)]
    assert found.tolist() == [[int(n), k] for n, k in zip(looked, per_class, strict=True)]
    assert 0 < len(kept) < looked.sum()
    artifact = synthetic_images.read(tmp_path / "drawn", "classes")
    assert [(row.seed, row.label) for row in artifact.rows] == [(seed, kept[seed][0]) for seed in sorted(kept)]
    for row in artifact.rows:
        assert np.array_equal(np.asarray(Image.open(artifact.folder / row.file_name)), kept[row.seed][1])
    assert drawn_counts(tmp_path / "drawn", CLASSES).tolist() == found.tolist()


def test_the_size_of_batches_and_other_classes_change_no_image(
    generator: TDSMDiffusion, data: SemiSupervisedDataModule, tmp_path: Path
) -> None:
    first = draw(generator, data, tmp_path / "a", Sums())
    for size in (1, 3, 64):
        again = draw(generator, data, tmp_path / f"{size}", Sums(), how=replace(HOW, batch_size=size))
        assert again.tolist() == first.tolist()
        ours, theirs = contents(tmp_path / "a"), contents(tmp_path / f"{size}")
        assert {k: v for k, v in ours.items() if k != "manifest.json"} == {
            k: v for k, v in theirs.items() if k != "manifest.json"
        }
    alone = draw(generator, data, tmp_path / "alone", Sums(), counts=np.array([0, 0, 7]))
    assert alone.tolist() == [[0, 0], [0, 0], first[2].tolist()]
    own = {k: v for k, v in contents(tmp_path / "a").items() if k.startswith("c/")}
    assert own == {k: v for k, v in contents(tmp_path / "alone").items() if k.endswith(".png")}


def test_without_a_gate_the_first_ones_are_taken_and_clients_differ(
    generator: TDSMDiffusion, data: SemiSupervisedDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(generator, monkeypatch)
    pictures = []
    for number in range(2):
        found = draw(generator, data, tmp_path / f"{number}", number=number)
        assert found.tolist() == [[4, 4], [0, 0], [7, 7]]
        artifact = synthetic_images.read(tmp_path / f"{number}", "classes")
        assert [row.seed - 60 * number for row in artifact.rows] == [0, 2, 3, 5, 6, 8, 9, 11, 14, 17, 20]
        pictures += [artifact.bytes_of(row) for row in artifact.rows]
    assert len(set(pictures)) == len(pictures) == 22
    # No more than a batch too many: candidates are drawn only while they are needed.
    assert counting.images <= 2 * (11 + HOW.batch_size)


# ---------------------------------------------------------------- what it is for


def test_the_client_trains_on_its_images_and_another_one_does_not(
    generator: TDSMDiffusion, data: SemiSupervisedDataModule, tmp_path: Path
) -> None:
    draw(generator, data, tmp_path / "drawn")
    with_drawn = client(0, synthetic_images=str(tmp_path / "drawn"))
    with_drawn.setup("fit")
    assert with_drawn.num_labeled == data.num_labeled + 11
    labels = with_drawn.labels_of("labeled")[data.num_labeled :]
    assert torch.bincount(labels, minlength=CLASSES).tolist() == COUNTS.tolist()
    assert len(next(iter(with_drawn.train_dataloader()))["labeled"]["image"]) == 4
    with pytest.raises(ValueError, match="drawn by a module that was trained on these images"):
        client(1, synthetic_images=str(tmp_path / "drawn")).setup("fit")
    manifest = json.loads((tmp_path / "drawn" / "manifest.json").read_text())
    assert manifest["counts"] == {"images": 11, "classes": {"a": 4, "b": 0, "c": 7}}
    assert manifest["drawn_with"]["wanted"] == COUNTS.tolist()


# ---------------------------------------------------------------- again, and after a kill


def test_what_was_drawn_stays_and_other_images_take_its_place(
    generator: TDSMDiffusion, data: SemiSupervisedDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counting = tmp_path / "drawn", Counting(generator, monkeypatch)
    found = draw(generator, data, folder, Sums())
    before, drawn = contents(folder), counting.images
    assert draw(generator, data, folder, Sums()).tolist() == found.tolist()
    assert counting.images == drawn
    assert contents(folder) == before
    torch.manual_seed(7)
    other = plain(side=SIDE, draw_batch=8)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1)
    draw(other, data, folder, Sums())
    draw(other, data, tmp_path / "fresh", Sums())
    assert contents(folder) == contents(tmp_path / "fresh") != before
    # Lost images are drawn again, although the counts say that they were.
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    draw(other, data, folder, Sums())
    assert contents(folder) == contents(tmp_path / "fresh")
    assert draw(other, data, folder, Sums(), counts=np.zeros(3, dtype=np.int64)).tolist() == [[0, 0]] * 3
    assert not folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.json", "fresh", "fresh.json"]


def test_where_the_gate_takes_none_there_is_none(
    generator: TDSMDiffusion, data: SemiSupervisedDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counting = tmp_path / "drawn", Counting(generator, monkeypatch)
    draw(generator, data, folder)
    first = counting.images
    for _ in range(2):
        assert draw(generator, data, folder, Never()).tolist() == [[8, 0], [0, 0], [14, 0]]
        assert not folder.exists()
    assert drawn_counts(folder, CLASSES)[:, 0].tolist() == [8, 0, 14]
    # The second time nothing was drawn: it is known that nothing is kept.
    assert counting.images == first + 22


@pytest.mark.parametrize("when", ["begins", "writes", "finishes", "moves", "counts"])
def test_a_kill_leaves_nothing_that_counts_and_the_next_run_draws_it(
    generator: TDSMDiffusion,
    data: SemiSupervisedDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    def dies(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "drawn"
    draw(generator, data, folder, Sums(), counts=np.array([1, 1, 1]))
    old = contents(folder)
    owner, name = {
        "begins": (Drawing, "begin"),
        "writes": (Drawing, "write"),
        "finishes": (Drawing, "finish"),
        "moves": (Path, "rename"),
        "counts": (drawing, "write_json_atomically"),
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            draw(generator, data, folder, Sums())
    # What is there is either what was there before, or whole.
    left = synthetic_images.read(folder, "classes")
    assert contents(folder) == old if when != "counts" else len(left.rows) > 3
    if when in ("moves", "counts"):
        with pytest.raises(FileNotFoundError, match="draw the images first"):
            drawn_counts(folder, CLASSES)
    if when == "writes":
        # Whatever comes next removes what the killed run left, even where it draws nothing itself.
        draw(generator, data, folder, counts=np.zeros(3, dtype=np.int64))
        assert [path.name for path in tmp_path.iterdir()] == ["drawn.json"]
    found = draw(generator, data, folder, Sums())
    assert found.tolist() == draw(generator, data, tmp_path / "fresh", Sums()).tolist()
    assert contents(folder) == contents(tmp_path / "fresh")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["drawn", "drawn.json", "fresh", "fresh.json"]


def test_folders_and_modules_of_another_kind_are_refused(
    generator: TDSMDiffusion, data: SemiSupervisedDataModule, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "photo.png").write_bytes(b"mine")
    for counts in (COUNTS, np.zeros(3, dtype=np.int64)):
        with pytest.raises(ValueError, match="Expected a folder of its own for drawn images"):
            draw(generator, data, foreign, counts=counts)
    assert contents(foreign) == {"photo.png": b"mine"}
    with pytest.raises(TypeError, match=r"`generator` with a method draw\(request\), got Sums"):
        draw(Sums(), data, tmp_path / "drawn")
    with pytest.raises(TypeError, match="`predict_step` of Silent"):
        draw(generator, data, tmp_path / "drawn", Silent())
    with pytest.raises(FileNotFoundError, match="draw the images first"):
        drawn_counts(tmp_path / "drawn", CLASSES)
    draw(generator, data, tmp_path / "drawn")
    with pytest.raises(ValueError, match="counts of 4 classes"):
        drawn_counts(tmp_path / "drawn", 4)
