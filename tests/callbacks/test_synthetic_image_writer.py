"""Pairs and images of classes, drawn at the end of a fit or in predict: the same files however often it is killed, and
on any number of processes."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from drawing_runs import (
    CLASSES,
    REQUEST,
    START,
    ClassPainter,
    Ones,
    Painter,
    files,
    fit,
    killed,
    painter,
    predict,
    ramps,
    trainer,
)
from jsonargparse import ArgumentParser
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # publishes no types
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import SyntheticImageWriter
from callbacks.drawn_sheet import class_sheet
from datamodules import DrawRequest, SamplingDataModule
from datamodules.synthetic_images import read, weights_sha256


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "pairs"
    fit(folder)
    return folder


def test_files_and_what_they_say(undisturbed: Path) -> None:
    names = [f"{kind}/{seed:09d}.png" for kind in ("images", "masks") for seed in range(3, 14)]
    assert sorted(files(undisturbed)) == sorted([*names, "manifest.json", "metadata.parquet"])
    expected = Painter().draw({"seed": torch.arange(3, 14), "image_size": 6})
    for i, seed in enumerate(range(3, 14)):
        with Image.open(undisturbed / f"images/{seed:09d}.png") as image:
            assert image.mode == "RGB"
            # One step of training has made 1/4 a 3/8; 0.375 * 255 = 95.6 and 0.875 * 255 = 223.1.
            assert np.unique(np.asarray(image)).tolist() == [96, 223]
        with Image.open(undisturbed / f"masks/{seed:09d}.png") as mask:
            assert mask.mode == "L"
            assert np.asarray(mask).tolist() == expected["mask"][i].tolist()
    rows = pq.read_table(undisturbed / "metadata.parquet").to_pylist()
    assert [row["seed"] for row in rows] == list(range(3, 14))
    assert rows[4] == {
        "file_name": "images/000000007.png",
        "mask_file_name": "masks/000000007.png",
        "seed": 7,
        "confidence": 0.0,
    }
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["weights"] == weights_sha256(Painter(0.375))
    assert manifest["class_names"] == ["background", "square"]
    assert manifest["counts"] == {"images": 11}
    assert manifest["fingerprint"] == "f" * 64
    assert manifest["request"]["num_steps"] == 4


@pytest.mark.parametrize(
    ("run", "request_", "ground", "above", "place"),
    [
        (fit, REQUEST, 0.25, None, "images"),
        (predict, CLASSES, 0.375, None, "square"),
        (predict, CLASSES, 0.375, 0, "shards"),
    ],
)
def test_a_kill_while_drawing_and_the_same_command_give_the_same_files(
    tmp_path: Path, run: Callable[..., object], request_: DrawRequest, ground: float, above: int | None, place: str
) -> None:
    folder = tmp_path / "drawn"
    run(tmp_path / "undisturbed", request=request_, shards_above=above)
    done = killed(folder, request_.num_blocks, run, folder, painter(request_, ground, seconds=0.15), request_, above)
    # As a kill inside a write would have left them: an image or a shard without its part, and a temporary.
    first_missing = next(s for s in request_.seeds(done) if not request_.has_classes or request_.label(s) == 1)
    half = f"{done:06d}.tar" if place == "shards" else f"{first_missing:09d}.png"
    (folder / place / half).write_bytes(b"half")
    (folder / place / f".{'0' * 32}.tmp").write_bytes(b"half")

    again = painter(request_, ground)
    run(folder, again, request_, above)
    assert files(folder) == files(tmp_path / "undisturbed")
    assert not [path for path in folder.rglob("*") if path.is_dir() and path.name == "parts"]
    drawn = [asked["seed"] for asked in again.asked[1 if run is fit else 0 :]]  # a fit begins with a trial
    assert drawn == [list(request_.seeds(block)) for block in range(done, request_.num_blocks)]


def test_two_processes_draw_what_one_draws(tmp_path: Path, undisturbed: Path) -> None:
    two: dict[str, Any] = {"strategy": f"ddp_{START}", "devices": 2}
    fit(tmp_path / "fit", Painter(0.25), **two)
    assert files(tmp_path / "fit") == files(undisturbed)
    # 11 images in blocks of 8: one process has more to do than the other; in blocks of 16 one has nothing to do.
    for kind, size, above in ((REQUEST, 8, 0), (REQUEST, 16, None), (CLASSES, 4, None), (CLASSES, 3, 0)):
        request = replace(kind, batch_size=size)
        predict(tmp_path / f"one{size}", request=request, shards_above=above)
        predict(tmp_path / f"two{size}", request=request, shards_above=above, **two)
        assert files(tmp_path / f"two{size}") == files(tmp_path / f"one{size}")
    loose, packed = (read(tmp_path / place, "classes") for place in ("two4", "two3"))
    assert [row.seed for row in packed.rows] == sorted([*range(3, 17, 2), *range(4, 12, 2)])
    assert [packed.bytes_of(row) for row in packed.rows] == [loose.bytes_of(row) for row in loose.rows]
    assert packed.manifest["shards"] == 4


class Killed(Exception):
    """Stands for a kill inside the process."""


class Mortal(Painter):
    """Draws some batches, then no more."""

    def __init__(self, lives: int, **options: float) -> None:
        super().__init__(**options)
        self.lives = lives

    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        if not self.lives:
            raise Killed
        self.lives -= 1
        return super().draw(request)


def test_predict_goes_on_where_it_stopped(tmp_path: Path) -> None:
    predict(tmp_path / "whole")
    with pytest.raises(Killed):
        predict(tmp_path / "pairs", Mortal(3, ground=0.375))
    assert len(list((tmp_path / "pairs" / "parts").iterdir())) == 3
    module = Painter(0.375)
    writer = predict(tmp_path / "pairs", module)
    assert files(tmp_path / "pairs") == files(tmp_path / "whole")
    assert [asked["seed"] for asked in module.asked] == [[9, 10], [11, 12], [13]]
    assert module.asked[0] == {"seed": [9, 10], "image_size": 6, "sampler": "heun", "num_steps": 4}
    assert writer.artifacts == [str(tmp_path / "pairs")]


def test_fit_and_predict_draw_the_same_pairs(tmp_path: Path, undisturbed: Path) -> None:
    predict(tmp_path / "pairs")
    ours, theirs = files(tmp_path / "pairs"), files(undisturbed)
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing == {"manifest.json"}  # without a checkpoint, predict knows nothing of the training data
    assert json.loads(ours["manifest.json"]) == json.loads(theirs["manifest.json"]) | {"fingerprint": None}


class Recorded(pl.Callback):
    """What `lightning fit` adds to every checkpoint."""

    def __init__(self, **more: str) -> None:
        self.record = {"config_hash": "c" * 64}
        self.more = more

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint |= self.record | {"fingerprint": "f" * 64} | self.more


class Relabelled(Ones):
    """Its images are known by themselves, too, as those of a ClassificationDataModule."""

    images_fingerprint = "i" * 64


@pytest.mark.parametrize(("request_", "expected"), [(CLASSES, "i" * 64), (REQUEST, "f" * 64)])
def test_images_of_classes_belong_to_images_and_pairs_to_their_split(
    tmp_path: Path, request_: DrawRequest, expected: str
) -> None:
    writer = SyntheticImageWriter(str(tmp_path / "fitted"), request_)
    saver = ModelCheckpoint(tmp_path, filename="last")
    recorded = Recorded(images_fingerprint="i" * 64)
    trainer(writer, saver, recorded, enable_checkpointing=True).fit(painter(request_), Relabelled())
    known: dict[str, Any] = {"num_steps": 4, "class_names": ["background", "square"]}
    data = SamplingDataModule(
        request_.num_images, 2, 6, 3, 2, images_per_class=request_.images_per_class, guidance=request_.guidance, **known
    )
    again = SyntheticImageWriter(str(tmp_path / "predicted"))
    trainer(again).predict(painter(request_), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert files(tmp_path / "predicted") == files(tmp_path / "fitted")
    assert json.loads((tmp_path / "fitted/manifest.json").read_text())["fingerprint"] == expected


def test_a_checkpoint_says_what_was_trained_on(tmp_path: Path) -> None:
    writer = SyntheticImageWriter(str(tmp_path / "fitted"), REQUEST)
    saver = ModelCheckpoint(tmp_path, filename="last")
    trainer(writer, saver, Recorded(), enable_checkpointing=True).fit(Painter(), Ones())
    data = SamplingDataModule(11, 2, 6, 3, 2, num_steps=4, class_names=["background", "square"])
    again = SyntheticImageWriter(str(tmp_path / "predicted"))
    trainer(again).predict(Painter(), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert files(tmp_path / "predicted") == files(tmp_path / "fitted")
    manifest = read(tmp_path / "predicted").manifest
    assert (manifest["config_hash"], manifest["fingerprint"]) == ("c" * 64, "f" * 64)

    # Going on with a fit that has ended trains nothing; it only draws.
    resumed = SyntheticImageWriter(str(tmp_path / "resumed"), REQUEST)
    module = Painter()
    trainer(resumed, Recorded()).fit(module, Ones(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert float(module.weight) == 0.375
    assert files(tmp_path / "resumed") == files(tmp_path / "fitted")


def test_finished_pairs_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path)
    before = files(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    # A kill between the manifest and the tidying up leaves this.
    (tmp_path / "drawing.json").write_bytes(before["manifest.json"])
    (tmp_path / "parts").mkdir()
    with caplog.at_level("INFO"):
        fit(tmp_path)
        writer = predict(tmp_path / "of predict")
        writer = predict(tmp_path / "of predict")
    assert files(tmp_path / "of predict").keys() == before.keys()
    assert {name: data for name, data in files(tmp_path).items() if not name.startswith("of")} == before
    assert not (tmp_path / "parts").exists()
    assert all(path.stat().st_mtime_ns == t for path, t in times.items() if path.is_file())
    assert caplog.text.count("nothing was left to draw") == 2
    assert writer.artifacts == [str(tmp_path / "of predict")]


def test_other_pairs_are_not_mixed(tmp_path: Path) -> None:
    fit(tmp_path / "a")
    with pytest.raises(ValueError, match=r"`output_dir`.* weights: \w{12} -> \w{12}\. Choose another folder"):
        fit(tmp_path / "a", Painter(0.5))
    with pytest.raises(ValueError, match=r"drawn: fingerprint: f{12} -> null; weights: \w{12} -> \w{12}"):
        predict(tmp_path / "a", Painter(0.5))
    module = Painter()
    with pytest.raises(ValueError, match=r"request\.num_steps: 4 -> 5"):
        fit(tmp_path / "a", module, replace(REQUEST, num_steps=5))
    assert not module.asked, "this could have been known before the training"
    with pytest.raises(ValueError, match=r"request\.first_seed: 3 -> 4"):
        predict(tmp_path / "a", request=replace(REQUEST, first_seed=4))
    with pytest.raises(ValueError, match=r"fingerprint: ffffffffffff -> eeeeeeeeeeee"):
        trainer(SyntheticImageWriter(str(tmp_path / "a"), REQUEST)).fit(Painter(), Ones("e" * 64))
    with pytest.raises(Killed):
        fit(tmp_path / "b", Mortal(3))
    with pytest.raises(ValueError, match=r"begun: weights"):
        fit(tmp_path / "b", Painter(0.5))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"kind": "fit"}')
    with pytest.raises(ValueError, match=r"`output_dir` to be a folder of its own, but .*run holds a 'fit'"):
        fit(tmp_path / "run")
    (tmp_path / "mine" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds images and neither drawing\.json nor manifest\.json"):
        fit(tmp_path / "mine")


class Particular(Mortal):
    """Draws other pairs from the same weights."""

    def __init__(self, schedule: str, lives: int = 99) -> None:
        super().__init__(lives)
        self.schedule = schedule

    def meaning(self) -> dict[str, Any]:
        return {"process": {"schedule": self.schedule}}


def test_the_same_weights_in_another_process_are_another_origin(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path / "a", Particular("cosine", 3))
    with pytest.raises(ValueError, match=r"process\.schedule: cosine -> linear"):
        fit(tmp_path / "a", Particular("linear"))
    fit(tmp_path / "a", Particular("cosine"))
    manifest = read(tmp_path / "a").manifest
    assert manifest["drawn_with"] == {"precision": "32-true", "process": {"schedule": "cosine"}}


def test_a_folder_that_the_fit_could_not_use_is_refused_before_it(tmp_path: Path) -> None:
    one, other, module = Recorded(), Recorded(), Painter()
    trainer(SyntheticImageWriter(str(tmp_path / "a"), REQUEST), one).fit(Painter(), Ones())
    other.record = {"config_hash": "d" * 64}
    with pytest.raises(ValueError, match=r"`output_dir` .* to be empty, or to hold pairs drawn by this fit"):
        trainer(SyntheticImageWriter(str(tmp_path / "a"), REQUEST), other).fit(module, Ones())
    assert not module.asked
    run = trainer(SyntheticImageWriter(str(tmp_path), REQUEST), default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"`output_dir` to be a folder of its own, got the directory of the run"):
        run.fit(module, Ones())


class Dice(Painter):
    """Uses the global generator to draw, and notes its state in training."""

    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        torch.rand(1)
        return super().draw(request)

    def training_step(self, batch: Tensor) -> Tensor:
        self.state = torch.get_rng_state()
        return super().training_step(batch)


def test_the_trial_before_the_fit_changes_nothing(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [SyntheticImageWriter(str(tmp_path), REQUEST)]):
        module = Dice()
        module.train()
        module.body.eval()
        torch.manual_seed(7)
        trainer(*callbacks).fit(module, Ones())
        states.append(module.state)
        assert module.training
        assert not module.body.training
    assert torch.equal(*states)
    assert module.modes == {False}
    assert module.asked[0] == {"seed": [3], "image_size": 6, "sampler": "heun", "num_steps": 1}


class Silent(pl.LightningModule):
    """Draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained = False

    def training_step(self, batch: Tensor) -> Tensor:
        self.trained = True
        return self.weight * batch.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Careless(Painter):
    """Draws something else than it was asked for."""

    def __init__(self, **changes: Tensor) -> None:
        super().__init__()
        self.changes = changes

    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        drawn = super().draw(request) | self.changes
        return {name: value for name, value in drawn.items() if len(value)}


def test_modules_that_cannot_draw_are_refused_before_the_training(tmp_path: Path) -> None:
    module = Silent()
    with pytest.raises(TypeError, match=r"method draw\(request\), got Silent"):
        fit(tmp_path, module)
    assert not module.trained
    mask = torch.zeros(1, 6, 6, dtype=torch.int64)
    cases: list[tuple[dict[str, Tensor], type[Exception], str]] = [
        ({"confidence": torch.ones(0)}, TypeError, r"the tensors image, mask, confidence, seed, but got \['image'"),
        ({"mask": mask + 2}, ValueError, "masks of ids from 0 to 1, but got 2 to 2"),
        ({"image": torch.full((1, 3, 6, 6), torch.nan)}, ValueError, r"finite numbers, but got others for .* \[3\]"),
        ({"image": torch.ones(1, 3, 5, 5)}, ValueError, r"`image` \[1, 3, 6, 6\].*but got \[1, 3, 5, 5\]"),
        ({"seed": torch.tensor([4])}, ValueError, r"seeds that it was asked for, but got \[4\] for \[3\]"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            fit(tmp_path, Careless(**changes))
    assert not files(tmp_path)


def test_nothing_is_drawn_by_dry_or_unfinished_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path / "dry", fast_dev_run=True)
        timer = Timer(timedelta(seconds=0))
        trainer(SyntheticImageWriter(str(tmp_path / "late"), REQUEST), timer, max_epochs=5).fit(Painter(), Ones())
        trainer(SyntheticImageWriter(str(tmp_path / "none"))).fit(Silent(), Ones())
    assert not list(tmp_path.iterdir())
    assert "nothing is drawn (a dry run)" in caplog.text
    assert "nothing is drawn (max_time is over: go on with the fit first)" in caplog.text


def test_a_prediction_that_was_cut_short_is_not_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        writer = predict(tmp_path, limit_predict_batches=2)
    assert not (tmp_path / "manifest.json").exists()
    assert not writer.artifacts
    assert "is not finished, 4 of 6 blocks are missing" in caplog.text
    predict(tmp_path)
    assert len(read(tmp_path).rows) == 11


def test_predict_of_something_else(tmp_path: Path) -> None:
    requests: Any = [REQUEST.batch(0)]
    with pytest.raises(TypeError, match=r"`request` and `leave_out\(blocks\)`, got NoneType; use SamplingDataModule"):
        trainer(SyntheticImageWriter(str(tmp_path))).predict(Painter(), DataLoader(requests, batch_size=None))

    class Segmenter(Painter):
        def predict_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            return batch

    images: Any = [{"image": torch.zeros(3, 2, 2)}]
    trainer(SyntheticImageWriter(str(tmp_path))).predict(Segmenter(), DataLoader(images))
    assert not files(tmp_path)


def test_picture_of_the_first_pairs(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "logs", name="", version="")
    fit(tmp_path / "pairs", request=replace(REQUEST, num_images=19), logger=logger)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert events.Tags()["images"] == ["drawn/pairs"]
    (picture,) = events.Images("drawn/pairs")
    # 16 of 19 in four rows of four pairs: 6 px become 132, and a gap of 4.
    assert (picture.width, picture.height) == (8 * 136 + 4, 24 + 4 * 136)
    assert picture.step == 1


def test_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screens: list[io.StringIO] = []

    def console(stderr: bool) -> Console:
        screens.append(io.StringIO())
        return Console(file=screens[-1], force_terminal=stderr, width=120)

    monkeypatch.setattr("callbacks.fit_end.Console", console)
    fit(tmp_path / "shown", Painter(seconds=0.05), enable_progress_bar=True)
    fit(tmp_path / "hidden")
    shown, hidden = (screen.getvalue() for screen in screens)
    assert "drawing pairs" in shown
    assert "11/11" in shown
    assert "images/s" in shown
    assert hidden == ""


def test_from_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.Callback, "callback")
    arguments = {"output_dir": "pairs", "request": {"num_images": 5, "image_size": 8, "sampler": "ancestral"}}
    config = {"callback": {"class_path": "callbacks.SyntheticImageWriter", "init_args": arguments}}
    writer = parser.instantiate(parser.parse_object(config)).callback
    assert isinstance(writer, SyntheticImageWriter)
    assert writer.request == DrawRequest(5, 8, sampler="ancestral")
    assert writer.output_dir == Path("pairs")
    assert writer.shards_above == 50_000
    with pytest.raises(ValueError, match=r"`shards_above` to be at least 0, or left empty .*, but got -1"):
        SyntheticImageWriter("pairs", shards_above=-1)
    arguments["request"] = {"num_images": 5, "image_size": 8, "sampler": "magic"}
    with pytest.raises(SystemExit):
        parser.parse_object(config)


def test_images_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = TensorBoardLogger(tmp_path / "logs", name="", version="")
    with caplog.at_level("INFO"):
        fit(tmp_path / "drawn", request=CLASSES, logger=logger)
    folders = {"background": range(3, 17, 2), "square": range(4, 12, 2)}
    names = [f"{folder}/{seed:09d}.png" for folder, seeds in folders.items() for seed in seeds]
    packed = tmp_path / "packed"
    fit(packed, request=CLASSES, shards_above=10)
    assert sorted(files(packed)) == ["manifest.json", "metadata.parquet", *(f"shards/{b:06d}.tar" for b in range(6))]
    assert np.array_equal(class_sheet(packed), class_sheet(tmp_path / "drawn"))
    assert sorted(files(tmp_path / "drawn")) == sorted([*names, "manifest.json", "metadata.parquet"])
    for label, (folder, seeds) in enumerate(folders.items()):
        for seed in seeds:
            with Image.open(tmp_path / "drawn" / folder / f"{seed:09d}.png") as image:
                assert image.mode == "L"
                expected = ramps(torch.tensor([seed]), torch.tensor([label]), 6)[0]
                assert np.asarray(image).tolist() == expected.tolist()
    assert "drawing 11 of 11 images of 6 px (heun, 4 steps)" in caplog.text
    assert "pairs" not in caplog.text
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert events.Tags()["images"] == ["drawn/classes"]
    (picture,) = events.Images("drawn/classes")
    # A name and seven or four images of 6 px that become 66, with a gap of 4.
    assert (picture.width, picture.height) == (8 * 70 + 4, 24 + 2 * 70)


def test_requests_for_classes_reach_the_module(tmp_path: Path) -> None:
    module = ClassPainter()
    fit(tmp_path / "fit", module, CLASSES)
    how = {"image_size": 6, "sampler": "heun", "guidance": 1.5}
    assert module.asked[0] == {"seed": [3], "label": [0], "num_steps": 1, **how}
    assert module.asked[-2:] == [
        {"seed": [11, 13], "label": [0, 0], "num_steps": 4, **how},
        {"seed": [15], "label": [0], "num_steps": 4, **how},
    ]
    drawn = [(s, c) for asked in module.asked[1:] for s, c in zip(asked["seed"], asked["label"], strict=True)]
    assert drawn == sorted([(3 + 2 * j, 0) for j in range(7)] + [(4 + 2 * j, 1) for j in range(4)])
    # Blocks of another size hold the same images.
    predict(tmp_path / "predicted", request=replace(CLASSES, batch_size=5))
    ours, theirs = files(tmp_path / "predicted"), files(tmp_path / "fit")
    assert {name for name in theirs if ours[name] != theirs[name]} == {"manifest.json"}


def test_more_images_of_a_class_change_none(tmp_path: Path) -> None:
    predict(tmp_path / "few", request=CLASSES)
    predict(tmp_path / "more", request=replace(CLASSES, images_per_class=[8, 9]))
    few, more = files(tmp_path / "few"), files(tmp_path / "more")
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 11
    assert {name: few[name] for name in pictures} == {name: more[name] for name in pictures}
    assert sum(name.endswith(".png") for name in more) == 17


def test_the_data_say_how_many_classes_there_are(tmp_path: Path) -> None:
    fit(tmp_path / "told", ClassPainter(), replace(CLASSES, images_per_class=3))
    fit(tmp_path / "asked", ClassPainter(), replace(CLASSES, images_per_class=3, num_classes=None))
    assert files(tmp_path / "told") == files(tmp_path / "asked")
    data = Ones()
    data.num_classes = None  # type: ignore[assignment] # data that do not know
    with pytest.raises(ValueError, match="`request` with `num_classes`, or data that know"):
        trainer(
            SyntheticImageWriter(str(tmp_path / "never"), replace(CLASSES, images_per_class=3, num_classes=None))
        ).fit(ClassPainter(), data)


class OddlyNamed(Ones):
    """Has a class that cannot be a folder."""

    class_names = ("T-shirt/top", "square")


class ThreeClasses(Ones):
    """Has more classes than the request."""

    num_classes = 3
    class_names = ("a", "b", "c")


def test_classes_that_cannot_be_drawn_are_refused_before_the_training(tmp_path: Path) -> None:
    module = ClassPainter()
    writer = SyntheticImageWriter(str(tmp_path), CLASSES)
    with pytest.raises(ValueError, match=r"names of folders, but 'T-shirt/top' holds a character"):
        trainer(writer).fit(module, OddlyNamed())
    with pytest.raises(ValueError, match=r"of the 3 classes of the data, but got `num_classes` 2"):
        trainer(writer).fit(module, ThreeClasses())
    odd = SamplingDataModule(None, 2, 6, class_names=["..", "square"], images_per_class=1)
    with pytest.raises(ValueError, match=r"`class_names` that can be names of folders, but '\.\.' begins"):
        trainer(SyntheticImageWriter(str(tmp_path))).predict(module, odd)
    assert not module.asked
    with pytest.raises(TypeError, match=r"the tensors image, label, seed, but got \['confidence', 'image', 'mask'"):
        fit(tmp_path, Painter(), CLASSES)
    with pytest.raises(TypeError, match=r"the tensors image, mask, confidence, seed, but got \['image', 'label'"):
        fit(tmp_path, CarelessClasses(label=torch.tensor([0])), REQUEST)
    cases: list[tuple[dict[str, Tensor], type[Exception], str]] = [
        ({"label": torch.tensor([1])}, ValueError, r"labels that it was asked for, but got \[1\] for \[0\]"),
        ({"seed": torch.tensor([4])}, ValueError, r"seeds that it was asked for, but got \[4\] for \[3\]"),
        ({"image": torch.ones(1, 2, 6, 6)}, ValueError, r"`image` \[1, 1 or 3, 6, 6\], but got \[1, 2, 6, 6\]"),
        ({"image": torch.full((1, 1, 6, 6), torch.inf)}, ValueError, r"finite numbers, but got others for .* \[3\]"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            fit(tmp_path, CarelessClasses(**changes), CLASSES)
    assert not files(tmp_path)


class CarelessClasses(ClassPainter):
    """Draws something else than it was asked for."""

    def __init__(self, **changes: Tensor) -> None:
        super().__init__()
        self.changes = changes

    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        return super().draw({"label": torch.zeros(1), **request}) | self.changes


def test_classes_and_pairs_are_not_mixed(tmp_path: Path) -> None:
    fit(tmp_path / "classes", request=CLASSES)
    fit(tmp_path / "pairs")
    with pytest.raises(
        ValueError, match=r"hold pairs of the same .*request\.guidance: 1\.5 -> null; request\.images_p"
    ):
        fit(tmp_path / "classes")
    with pytest.raises(ValueError, match=r"hold images of the same .*request\.images_per_class: null -> \[7, 4\]"):
        predict(tmp_path / "pairs", request=CLASSES)
    # Any folder would be a class of ImageFolder's.
    (tmp_path / "mine" / "other").mkdir(parents=True)
    for run in (fit, predict):
        with pytest.raises(ValueError, match=r"mine holds other and neither drawing\.json nor manifest\.json"):
            run(tmp_path / "mine", request=CLASSES)


def test_names_come_from_the_checkpoint_or_are_numbers(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last")
    trainer(saver, Named(), enable_checkpointing=True).fit(ClassPainter(), Ones())
    for place, checkpoint, expected in (("a", tmp_path / "last.ckpt", {"owl", "bat"}), ("b", None, {"0", "1"})):
        data = SamplingDataModule(None, 2, 6, images_per_class=1)
        writer = SyntheticImageWriter(str(tmp_path / place))
        trainer(writer).predict(ClassPainter(), data, ckpt_path=checkpoint, weights_only=True)
        assert {path.name for path in (tmp_path / place).iterdir() if path.is_dir()} == expected


class Named(pl.Callback):
    """What a module of ours adds to every checkpoint."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["class_names"] = ["owl", "bat"]
