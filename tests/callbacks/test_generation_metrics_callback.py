"""Drawn images compared with real ones by a callback: what is logged, what is kept, what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from board import board_trainer, pictures
from jsonargparse import ArgumentParser
from safetensors.torch import load_file
from tiny_nets import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks import GenerationMetrics, MetricsReport
from datamodules.loading import EvalSampler
from lightning_modules.metrics import (
    ClassificationAccuracyScore,
    ClassifierScore,
    FrechetDistance,
    LabelConsistency,
    ManifoldMetrics,
)
from lightning_modules.metrics.manifold import prdc

K = 3


def picture_of(label: Tensor, seed: Tensor) -> Tensor:
    """A grey image [B, 1, 4, 4] whose row `label` is bright, with noise of the seed."""
    noise = torch.stack([torch.rand(4, 4, generator=torch.Generator().manual_seed(int(s))) for s in seed])
    return (0.5 * noise + 0.5 * torch.eye(4)[label][:, :, None])[:, None]


class Numbered(Dataset[dict[str, Tensor]]):
    """Images numbered from 0 whose labels cycle; one that is asked for as a filler is a filler."""

    def __init__(self, size: int, first: int) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        i = key if isinstance(key, int) else -1
        label = torch.tensor(max(i, 0) % K)
        image = picture_of(label[None], torch.tensor([self.first + i]))[0]
        return {"image": image, "label": label, "index": torch.tensor(i)}


class Rows(pl.LightningDataModule):
    """Training, validation and test images, and the training images in order."""

    num_classes = K
    class_names = ("top", "middle", "bottom")
    image_size = 4
    image_channels = 3
    source: object = None

    def __init__(self, fingerprint: str | None = "f" * 64, val: int = 0) -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.val = val
        self.read = {"train": 0, "test": 0}

    def loader(self, size: int, first: int) -> DataLoader[dict[str, Tensor]]:
        data = Numbered(size, first)
        return DataLoader(data, batch_size=8, sampler=EvalSampler(size))

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.loader(8, 1000)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        return self.loader(self.val, 2000) if self.val else []

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        self.read["test"] += 1
        return self.loader(31, 3000)

    def sweep_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        self.read["train"] += 1
        return self.loader(25, 1000)


class Generator(pl.LightningModule):
    """Draws what it is asked for, or the next class."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.wrong = wrong
        self.asked: list[dict[str, Any]] = []

    def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
        self.asked.append({**request, "training": self.training, "grad": torch.is_grad_enabled()})
        label = (request["label"] + self.wrong) % K
        return {"image": picture_of(label, request["seed"]), "label": request["label"], "seed": request["seed"]}

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        return None

    def test_step(self, batch: dict[str, Tensor]) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RowMeans(nn.Module):
    """The means of the rows, and which of the first three is brightest."""

    name = "rows"
    num_features = 4

    def __init__(self, fingerprint: str = "w1") -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.seen = 0

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(image)
        features = image.mean((1, 3))
        return features, (100 * features[:, :K]).softmax(1)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, K))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.body(image)
        return logits


def compare(extractor: nn.Module | None = None, **options: Any) -> GenerationMetrics:
    metrics = [
        FrechetDistance(),
        FrechetDistance(per_class=True),
        ManifoldMetrics(3, chunk_size=5),
        ClassifierScore(),
        LabelConsistency(),
        ClassificationAccuracyScore(Flat(), steps=40, batch_size=16, learning_rate=0.05),
    ]
    settings: dict[str, Any] = {"images_per_class": 12, "num_steps": 2, "batch_size": 7, "metrics": metrics}
    return GenerationMetrics(extractor or RowMeans(), **settings | options)


def features(size: int, first: int) -> Tensor:
    labels = torch.arange(size) % K
    return RowMeans().forward(picture_of(labels, torch.arange(first, first + size)))[0]


def test_values_of_a_test_reach_the_report(tmp_path: Path) -> None:
    model = Generator()
    trainer = board_trainer(tmp_path, compare(first_seed=5), MetricsReport())
    trainer.test(model, Rows(), verbose=False)
    found = json.loads((tmp_path / "metrics.json").read_text())
    names = [
        "fid",
        "cw_fid",
        "precision_k3",
        "recall_k3",
        "density_k3",
        "coverage_k3",
        "is",
        "label_consistency",
        "label_consistency_real",
    ]
    assert set(found) == {*(f"test_{name}_rows" for name in names), "test_cas_flat"}
    assert found["test_label_consistency_rows"] == found["test_label_consistency_real_rows"] == 1
    assert found["test_cas_flat"] > 0.9
    expected = prdc(features(31, 3000), features(36, 5), 3)
    assert found["test_coverage_k3_rows"] == pytest.approx(expected[3].item())
    # Image j of class c has the seed first_seed + j * K + c, and no image is asked for twice.
    assert torch.cat([asked["seed"] for asked in model.asked]).tolist() == list(range(5, 41))
    assert torch.cat([asked["label"] for asked in model.asked]).tolist() == [i % K for i in range(36)]
    first = {name: model.asked[0][name] for name in ("image_size", "sampler", "num_steps", "guidance")}
    assert first == {"image_size": 4, "sampler": "heun", "num_steps": 2, "guidance": 0.0}
    assert not any(asked["training"] or asked["grad"] for asked in model.asked)
    # Three rows of a name and eight images.
    assert pictures(tmp_path)["drawn/test"][0].shape == (24 + 3 * 68, 9 * 68 + 4, 3)


def test_images_of_the_wrong_class_show_in_values_of_classes_only(tmp_path: Path) -> None:
    found = []
    for wrong in (False, True):
        trainer = tiny_trainer(tmp_path, callbacks=[compare()])
        trainer.test(Generator(wrong), Rows(), verbose=False)
        found.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    right, wrong_ones = found
    assert wrong_ones["test_label_consistency_rows"] == 0
    assert wrong_ones["test_cas_flat"] < 0.1
    assert wrong_ones["test_cw_fid_rows"] > 10 * right["test_cw_fid_rows"]
    assert wrong_ones["test_fid_rows"] < 3 * right["test_fid_rows"]


@pytest.mark.parametrize("val", [0, 6])
def test_a_fit_compares_every_few_epochs(tmp_path: Path, val: int) -> None:
    model, extractor = Generator(), RowMeans()
    callback = compare(extractor, every_n_epochs=2, when="val", shown=2)
    trainer = board_trainer(tmp_path, callback, max_epochs=3)
    trainer.fit(model, Rows(val=val))
    assert set(pictures(tmp_path)["drawn/val"]) == {2, 3}
    assert len(model.asked) == 1 + 2 * 6  # the first is the trial before the fit
    # The real images are looked at once.
    assert extractor.seen == 31 + 2 * 36
    assert "val_fid_rows" in trainer.callback_metrics
    trainer.test(model, Rows(), verbose=False)
    assert len(model.asked) == 1 + 2 * 6
    assert not any(name.startswith("test") for name in trainer.callback_metrics)


def test_comparing_does_not_change_the_training(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [compare()]):
        torch.manual_seed(0)
        trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_epochs=2)
        model = Generator()
        trainer.fit(model, Rows())
        weights.append((model.weight.item(), torch.rand(1).item()))
    assert weights[0] == weights[1]


# ---------------------------------------------------------------- what is kept


def judged(path: Path, data: Rows, extractor: RowMeans, **options: Any) -> tuple[int, float]:
    """How many real images the extractor was given, and what came of it."""
    callback = compare(extractor, metrics=[FrechetDistance()], cache_dir=str(path), shown=0, **options)
    trainer = tiny_trainer(path, callbacks=[callback])
    trainer.test(Generator(), data, verbose=False)
    return extractor.seen - 36, trainer.callback_metrics["test_fid_rows"].item()


def looked_at(path: Path, data: Rows, extractor: RowMeans, **options: Any) -> int:
    return judged(path, data, extractor, **options)[0]


def test_features_of_real_images_are_computed_once_for_data_split_and_weights(tmp_path: Path) -> None:
    count, value = judged(tmp_path, Rows(), RowMeans())
    assert count == 31
    (kept,) = tmp_path.glob("rows_test_*.safetensors")
    assert judged(tmp_path, Rows(), RowMeans()) == (0, value)
    assert looked_at(tmp_path, Rows("e" * 64), RowMeans()) == 31
    assert looked_at(tmp_path, Rows(), RowMeans("w2")) == 31
    assert looked_at(tmp_path, Rows(), RowMeans(), reference="train") == 25
    grey = Rows()
    grey.image_channels = 1
    assert looked_at(tmp_path, grey, RowMeans()) == 31
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert not list(tmp_path.glob(".*.tmp"))
    # A file of something else, or half of one, is written anew.
    others = [path for path in tmp_path.glob("rows_test_*") if path != kept]
    whole = kept.read_bytes()
    for spoiled in (others[0].read_bytes(), whole[:100]):
        kept.write_bytes(spoiled)
        assert judged(tmp_path, Rows(), RowMeans()) == (31, value)
        assert kept.read_bytes() == whole


def test_without_a_fingerprint_or_a_folder_nothing_is_written(tmp_path: Path) -> None:
    assert looked_at(tmp_path, Rows(None), RowMeans()) == 31
    assert not list(tmp_path.glob("*.safetensors"))
    trainer = tiny_trainer(tmp_path, callbacks=[compare()])
    trainer.test(Generator(), Rows(), verbose=False)
    assert not list(tmp_path.glob("*.safetensors"))


def test_data_with_a_folder_keep_the_features_there(tmp_path: Path) -> None:
    data = Rows()
    data.source = SimpleNamespace(place=tmp_path)
    trainer = tiny_trainer(tmp_path, callbacks=[compare(metrics=[FrechetDistance()])])
    trainer.test(Generator(), data, verbose=False)
    assert len(list((tmp_path / ".fewlight").glob("rows_test_*.safetensors"))) == 1
    # Where they cannot be kept they are computed all the same.
    data.source = SimpleNamespace(place=tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.fewlight").write_text("in the way")
    trainer.test(Generator(), data, verbose=False)
    assert data.read["test"] == 2 + 2  # the test's own, too
    assert (tmp_path / "other/.fewlight").read_text() == "in the way"


def test_an_image_counts_once(tmp_path: Path) -> None:
    class Twice(Rows):
        def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            return DataLoader(Numbered(31, 3000), batch_size=8, sampler=[*range(31), *range(31)])

    assert judged(tmp_path, Twice(), RowMeans())[0] == 62
    (kept,) = tmp_path.glob("rows_test_*.safetensors")
    found = load_file(kept)
    assert torch.equal(found["features"], features(31, 3000))
    assert found["labels"].tolist() == [i % K for i in range(31)]


def test_a_file_that_may_not_be_read_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError

    monkeypatch.setattr("callbacks.reference_features.Path.is_file", refuse)
    monkeypatch.setattr("callbacks.reference_features.safe_open", refuse)
    assert looked_at(tmp_path, Rows(), RowMeans()) == 31


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Could not write `path`"):
        looked_at(tmp_path / "file", Rows(), RowMeans())


# ---------------------------------------------------------------- processes


def _values(folder: Path, **options: Any) -> dict[str, float]:
    # Blocks of a batch are shared out, so that two processes draw in the order of one.
    trainer = tiny_trainer(folder, callbacks=[compare(cache_dir=str(folder), shown=0), MetricsReport()], **options)
    trainer.test(Generator(), Rows(), verbose=False)
    found: dict[str, float] = json.loads((folder / "metrics.json").read_text())
    return found


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    one = _values(tmp_path / "one", use_distributed_sampler=False)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    two = _values(tmp_path / "two", **options)
    assert two == pytest.approx(one, rel=1e-5)
    # From the file, too.
    assert _values(tmp_path / "two", **options) == pytest.approx(one, rel=1e-5)


# ---------------------------------------------------------------- errors


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`images_per_class` to be at least 1, got 0"):
        compare(images_per_class=0)
    with pytest.raises(ValueError, match="`when` to be one of val, test, both, got 'fit'"):
        compare(when="fit")
    with pytest.raises(ValueError, match="`reference` to be one of train, test, got 'val'"):
        compare(reference="val")
    with pytest.raises(ValueError, match=r"different names, at least one, got \['fid', 'fid'\]"):
        compare(metrics=[FrechetDistance(), FrechetDistance()])
    with pytest.raises(ValueError, match="at least one, got none"):
        compare(metrics=[])
    with pytest.raises(TypeError, match="`metrics` of generation, got Linear"):
        compare(metrics=[nn.Linear(1, 1)])


def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    class Mute(Generator):
        draw = None  # type: ignore[assignment]

    class Nameless(Rows):
        image_size = None  # type: ignore[assignment]

    def setup(callback: GenerationMetrics, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        trainer = tiny_trainer(tmp_path, callbacks=[callback])
        trainer.fit(module, data)

    with pytest.raises(TypeError, match=r"a method draw\(request\), got Mute"):
        setup(compare(), Mute(), Rows())
    with pytest.raises(TypeError, match="a datamodule with image_size for GenerationMetrics, got Nameless"):
        setup(compare(), Generator(), Nameless())
    with pytest.raises(TypeError, match="`extractor` with name, num_features, fingerprint and"):
        setup(compare(Flat()), Generator(), Rows())
    with pytest.raises(ValueError, match="`guidance` to be finite and at least 0"):
        setup(compare(guidance=-1), Generator(), Rows())


def test_a_fit_looks_for_what_its_test_will_need(tmp_path: Path) -> None:
    class Lost(RowMeans):
        @property
        def fingerprint(self) -> str:
            msg = "no weights"
            raise FileNotFoundError(msg)

        @fingerprint.setter
        def fingerprint(self, value: str) -> None:
            """It is none."""

    model = Generator()
    with pytest.raises(FileNotFoundError, match="no weights"):
        tiny_trainer(tmp_path, callbacks=[compare(Lost(), when="test")]).fit(model, Rows())
    assert model.weight == 0
    tiny_trainer(tmp_path, callbacks=[compare(Lost(), when="test")], fast_dev_run=True).fit(model, Rows())
    assert not model.asked


def test_too_few_images_are_refused_before_any_is_drawn(tmp_path: Path) -> None:
    model = Generator()
    trainer = tiny_trainer(tmp_path, callbacks=[compare(images_per_class=1)])
    with pytest.raises(ValueError, match="at least 2 drawn images of every class for `cw_fid`, got 1 of class 0"):
        trainer.test(model, Rows(), verbose=False)
    assert not model.asked


def test_data_without_the_reference(tmp_path: Path) -> None:
    class NoSweep(Rows):
        sweep_dataloader = None  # type: ignore[assignment]

    trainer = tiny_trainer(tmp_path, callbacks=[compare(reference="train")])
    with pytest.raises(
        TypeError, match=r"sweep_dataloader\(\) for GenerationMetrics with `reference` 'train', got NoS"
    ):
        trainer.test(Generator(), NoSweep(), verbose=False)


def test_a_dry_run_draws_one_image(tmp_path: Path) -> None:
    model = Generator()
    tiny_trainer(tmp_path, callbacks=[compare()], fast_dev_run=True).fit(model, Rows())
    assert [(len(asked["seed"]), asked["num_steps"]) for asked in model.asked] == [(1, 1)]


def test_a_module_that_cannot_draw_as_asked_is_not_trained(tmp_path: Path) -> None:
    class Unguided(Generator):
        def draw(self, request: Mapping[str, Any]) -> dict[str, Tensor]:
            msg = "`guidance` 0"
            raise ValueError(msg)

    unguided, model = Unguided(), Generator()
    trainer = tiny_trainer(tmp_path, callbacks=[compare(guidance=1.0)])
    with pytest.raises(ValueError, match="`guidance` 0"):
        trainer.fit(unguided, Rows())
    trainer = tiny_trainer(tmp_path, callbacks=[compare(metrics=[ManifoldMetrics()], images_per_class=1)])
    with pytest.raises(ValueError, match="at least 4 drawn images for `prdc_k3`, got 3"):
        trainer.fit(model, Rows())
    assert unguided.weight == model.weight == 0


def test_it_can_be_written_in_a_config() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=GenerationMetrics)
    network = {"class_path": "lightning_modules.WideResNet", "init_args": {"depth": 10, "widen": 1, "in_channels": 1}}
    extractor = {"network": network, "weights": "runs/clean/last.ckpt", "num_classes": 10}
    metrics = [
        {"class_path": "lightning_modules.FrechetDistance", "init_args": {"per_class": True}},
        {"class_path": "lightning_modules.ManifoldMetrics", "init_args": {"k": 5}},
        {"class_path": "lightning_modules.ClassificationAccuracyScore", "init_args": {"network": network}},
    ]
    settings = {
        "metrics": metrics,
        "extractor": {"class_path": "lightning_modules.ClassifierFeatures", "init_args": extractor},
    }
    config = {"callback": {"class_path": "callbacks.GenerationMetrics", "init_args": settings}}
    found = parser.instantiate_classes(parser.parse_object(config)).callback
    assert [metric.name for metric in found.metrics] == ["cw_fid", "prdc_k5", "cas_wideresnet"]
    assert found.extractor.num_features == 64
