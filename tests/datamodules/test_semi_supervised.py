"""Training streams, views and labels of the semi-supervised datamodule."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import ArraySource, DigitsSource, LabelNoise, LongTail, SemiSupervisedDataModule
from datamodules.classification.streams import Pool, StreamName, StreamSampler

TrainingBatch = dict[str, dict[str, Tensor]]


def digits(**arguments: Any) -> SemiSupervisedDataModule:
    settings = {"labels_per_class": 4, "batch_size": 8, "unlabeled_ratio": 3, "steps_per_epoch": 5, "weak": "crop"}
    data = SemiSupervisedDataModule(**{**settings, **arguments})
    data.setup("fit")
    return data


def batches(data: SemiSupervisedDataModule, epoch: int = 0) -> list[TrainingBatch]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, StreamSampler)
    loader.sampler.set_epoch(epoch)
    return [cast("TrainingBatch", data.on_after_batch_transfer(batch, 0)) for batch in loader]


def same(first: object, second: object) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)


def test_a_batch_has_what_the_method_declared() -> None:
    data = digits()
    data.declare_views(("weak", "weak", "plain"), ("weak", "strong", "strong"))
    made = batches(data)
    assert len(made) == 5
    for batch in made:
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        assert set(labeled) == {"image", "weak_2", "plain", "label", "index", "true_label"}
        assert set(unlabeled) == {"weak", "strong", "strong_2", "index", "true_label"}
        assert labeled["image"].shape == (8, 1, 8, 8)
        assert unlabeled["strong_2"].shape == (24, 1, 8, 8)
        for view in (labeled["image"], unlabeled["strong"]):
            assert view.dtype == torch.float32
            assert 0 <= float(view.min()) <= float(view.max()) <= 1
        assert not torch.equal(unlabeled["strong"], unlabeled["strong_2"])


def test_what_the_numbers_mean() -> None:
    data = digits()
    source = DigitsSource().read()
    assert (data.num_labeled, data.num_unlabeled, data.counts["test"]) == (40, 1297, 500)
    assert (data.num_classes, data.image_channels, data.class_names) == (10, 1, tuple("0123456789"))
    data.declare_views(("plain",), ("plain",))
    assert source.images is not None
    train = np.flatnonzero(np.asarray(source.roles) == "train")
    for batch in batches(data):
        index = batch["unlabeled"]["index"].numpy()
        wanted = torch.from_numpy(source.images[train[index]]).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(batch["unlabeled"]["plain"], wanted)
        assert batch["unlabeled"]["true_label"].tolist() == source.labels[train[index]].tolist()
        labeled = batch["labeled"]
        assert torch.equal(labeled["label"], labeled["true_label"])
        assert torch.equal(data.labels_of("labeled")[labeled["index"]], labeled["label"])
    given = data.labels_of("unlabeled")
    assert Counter(given[given >= 0].tolist()) == dict.fromkeys(range(10), 4)
    truth = torch.from_numpy(source.labels[train])
    assert torch.equal(given[given >= 0], truth[given >= 0])


def test_sweeps_show_every_training_image_once() -> None:
    data = digits(eval_batch_size=100)
    for split, size in (("labeled", 40), ("unlabeled", 1297)):
        name = cast("StreamName", split)
        swept = list(data.sweep_dataloader(name))
        assert torch.cat([batch["index"] for batch in swept]).tolist() == list(range(size))
        assert torch.equal(torch.cat([batch["label"] for batch in swept]), data.labels_of(name))
        assert swept[0]["image"].dtype == torch.float32


@pytest.mark.parametrize("augment", ["batch", "workers"])
def test_batches_are_functions_of_seed_and_epoch(augment: str) -> None:
    first = batches(digits(augment=augment), 3)
    torch.manual_seed(7)
    again = digits(augment=augment)
    batches(again, 0)
    assert same(first, batches(again, 3))
    assert not same(first, batches(again, 2))
    assert not same(first, batches(digits(augment=augment, seed=1), 3))


def test_all_images_are_seen_equally_often() -> None:
    data = digits(batch_size=64, unlabeled_ratio=1, steps_per_epoch=7)
    seen = Counter(
        int(index) for epoch in range(3) for batch in batches(data, epoch) for index in batch["labeled"]["index"]
    )
    assert len(seen) == 40
    assert max(seen.values()) - min(seen.values()) <= 1


def drawn(pools: dict[StreamName, Pool], epoch: int, world: int = 1, rank: int = 0) -> Iterator[dict[str, list[int]]]:
    sampler = StreamSampler(pools, 6, 5, world, rank)
    sampler.set_epoch(epoch)
    for key in sampler:
        yield {name: part.index.tolist() for name, part in key.items()}


def test_ranks_share_one_stream() -> None:
    alone = list(drawn({"labeled": Pool(7, 6), "unlabeled": Pool(50, 10)}, 2))
    shares = [list(drawn({"labeled": Pool(7, 3), "unlabeled": Pool(50, 5)}, 2, 2, rank)) for rank in (0, 1)]
    for whole, left, right in zip(alone, *shares, strict=True):
        for name, indices in whole.items():
            assert [indices[0::2], indices[1::2]] == [left[name], right[name]]


def test_selection_begins_with_the_next_epoch() -> None:
    data = digits(batch_size=10)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, StreamSampler)
    running = iter(loader)
    next(running)
    data.select("labeled", torch.tensor([3, 3, 5]))
    rest = {int(index) for batch in running for index in batch["labeled"]["index"]}
    assert not rest <= {3, 5}
    loader.sampler.set_epoch(1)
    chosen = Counter(int(index) for batch in loader for index in batch["labeled"]["index"])
    assert chosen.keys() == {3, 5}
    assert chosen[3] == pytest.approx(2 * chosen[5], abs=3)
    data.select("labeled", None)
    loader.sampler.set_epoch(0)
    assert len({int(index) for batch in loader for index in batch["labeled"]["index"]}) == 40
    with pytest.raises(ValueError, match=r"`indices` to be at least one index from 0 to 39 \(40 labeled images\)"):
        data.select("labeled", torch.tensor([40]))
    with pytest.raises(ValueError, match="`indices`"):
        data.select("unlabeled", torch.tensor([], dtype=torch.int64))


def test_a_method_without_unlabelled_views_gets_none() -> None:
    data = digits()
    data.declare_views(("weak",), ())
    assert all(batch.keys() == {"labeled"} for batch in batches(data))


def test_unknown_views() -> None:
    data = digits()
    with pytest.raises(ValueError, match=r"`labeled` to name views out of \('plain'.*got 'blurred'"):
        data.declare_views(("blurred",), ())
    with pytest.raises(ValueError, match="`labeled` or `unlabeled` to name a view"):
        data.declare_views((), ())
    probing = digits(strong="ctaugment")
    probing.declare_views(("weak", "probe"), ("weak", "strong"))
    with pytest.raises(ValueError, match=r"`unlabeled` to name views out of .*got 'probe'"):
        probing.declare_views(("weak",), ("probe",))
    assert {"probe", "probe_ops", "probe_bins"} <= batches(probing)[0]["labeled"].keys()


def poisoned(hidden: int) -> list[TrainingBatch]:
    contents = DigitsSource().read()
    assert contents.images is not None
    rng = np.random.default_rng(0)
    given = np.where(np.arange(len(contents.labels)) < 60, contents.labels, -1)
    source = ArraySource(
        contents.images,
        given,
        class_names=list("0123456789"),
        hidden_labels=rng.integers(0, 10, len(given)) if hidden else contents.labels,
    )
    data = digits(source=source, labels_per_class=3, val_share=0.1, label_noise=LabelNoise("symmetric", 0.3))
    return [*batches(data), {"sweep": {"label": data.labels_of("unlabeled")}}]


def test_hidden_labels_reach_reports_only() -> None:
    clean, wrong = poisoned(0), poisoned(1)
    differs = [
        not torch.equal(a["unlabeled"].pop("true_label"), b["unlabeled"].pop("true_label"))
        for a, b in zip(clean[:-1], wrong[:-1], strict=True)
    ]
    assert all(differs)
    assert same(clean, wrong)


def test_noise_spares_test_images_and_the_record_of_the_truth() -> None:
    data = digits(label_noise=LabelNoise("symmetric", 1.0), val_share=0.2)
    for batch in batches(data):
        assert not (batch["labeled"]["label"] == batch["labeled"]["true_label"]).any()
    contents = DigitsSource().read()
    truth = contents.labels[np.asarray(contents.roles) == "test"]
    tested = torch.cat([batch["label"] for batch in data.test_dataloader()])
    assert tested.tolist() == truth.tolist()
    clean = digits(val_share=0.2)
    validated = [next(iter(cast("DataLoader[dict[str, Tensor]]", one.val_dataloader()))) for one in (data, clean)]
    assert torch.equal(validated[0]["image"], validated[1]["image"])
    assert not (validated[0]["label"] == validated[1]["label"]).any()


def test_unlabelled_images_without_the_labelled_ones() -> None:
    data = digits(include_labeled=False, val_share=0.1)
    assert data.counts == {"labeled": 36, "unlabeled": 1257, "val": 4, "test": 500}
    assert int(data.labels_of("unlabeled").max()) == -1
    everything = digits(labels_per_class=None, include_labeled=False)
    assert everything.num_unlabeled == 0
    with pytest.raises(ValueError, match=r"Expected images without a label.*`include_labeled: true`"):
        everything.train_dataloader()


def test_long_tails() -> None:
    tail = LongTail(gamma_labeled=10, gamma_unlabeled=20, reverse_unlabeled=True)
    data = digits(labels_per_class=20, imbalance=tail, include_labeled=False)
    assert Counter(data.labels_of("labeled").tolist()) == {label: round(20 * 10 ** (-label / 9)) for label in range(10)}
    data.declare_views(("plain",), ("plain",))
    assert data._data is not None
    sizes = np.bincount(data._data.truth[torch.from_numpy(data._data.split.unlabeled)].numpy(), minlength=10)
    assert sizes[9] / sizes[0] == pytest.approx(20, rel=0.1)
    assert (np.diff(sizes) > 0).all()


def test_fingerprint_follows_images_uses_and_labels() -> None:
    prints = [
        digits().fingerprint,
        digits(labels_seed=1).fingerprint,
        digits(label_noise=LabelNoise("symmetric", 0.5)).fingerprint,
        digits(val_share=0.1).fingerprint,
    ]
    assert len(set(prints)) == 4
    assert digits(seed=5, batch_size=3).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 20, "labels_per_class": 2}, "only one of the arguments `num_labels` and `labels_per_class`"),
        ({"labels_per_class": 0}, "`labels_per_class` to be at least 1"),
        ({"labels_per_class": 500}, "`labels_per_class` to be at most .*got 500, and class '0' has 128"),
        ({"labels_per_class": None, "num_labels": 9}, "`num_labels` to be at least 10, one for each class.*got 9"),
        ({"labels_per_class": None, "num_labels": 1298}, "`num_labels` to be at most 1297"),
        ({"val_share": 1.0}, r"`val_share` to be in \[0, 1\)"),
        ({"val_share": 0.9}, "`val_share` to leave a labelled image of each of 10 classes.*would empty a class"),
        ({"batch_size": 0}, "`batch_size` to be at least 1"),
        ({"unlabeled_ratio": 0}, "`unlabeled_ratio` to be at least 1"),
        ({"steps_per_epoch": 0}, "`steps_per_epoch` to be at least 1"),
        ({"image_size": 0}, "`image_size` to be at least 1"),
        ({"seed": -1}, "`seed` to be at least 0"),
        ({"labels_seed": -1}, "`labels_seed` to be at least 0"),
        ({"augment": "later"}, "`augment` to be"),
        ({"on_bad_file": "ignore"}, "`on_bad_file` to be"),
        ({"max_bad_share": 2.0}, "`max_bad_share` to be in"),
        ({"cache_megabytes": -1}, "`cache_megabytes` to be at least 0"),
        ({"labels_per_class": None, "num_labels": 20, "imbalance": LongTail(10)}, "with `gamma_labeled`"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**arguments)


def test_images_are_read_in_setup_only() -> None:
    with pytest.raises(RuntimeError, match="Call `setup` before"):
        SemiSupervisedDataModule().train_dataloader()


class Recorder(pl.LightningModule):
    """Writes down what it is trained on, and trains a little."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.seen: list[TrainingBatch] = []

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return nn.functional.cross_entropy(self.layer(batch["labeled"]["image"].flatten(1)), batch["labeled"]["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 1, "augment": "workers", "batch_size": 2}])
def test_a_resumed_fit_sees_what_it_would_have_seen(tmp_path: Path, arguments: dict[str, Any]) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, Recorder]:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = pl.Trainer(
            default_root_dir=tmp_path, max_epochs=epochs, enable_checkpointing=False, **cast("dict[str, Any]", quiet)
        )
        torch.manual_seed(0)
        recorder = Recorder()
        trainer.fit(recorder, datamodule=digits(steps_per_epoch=2, **arguments), ckpt_path=checkpoint)
        return trainer, recorder

    whole = fit(3)[1]
    half = fit(1)[0]
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    resumed = fit(3, tmp_path / "half.ckpt")[1]
    assert same(cast("list[object]", whole.seen[2:]), cast("list[object]", resumed.seen))
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


class Looker(pl.LightningModule):
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return batch


def test_a_trainer_predicts_test_images_and_those_of_a_folder(tmp_path: Path) -> None:
    for level in (0, 255):
        Image.new("L", (8, 8), level).save(tmp_path / f"{level}.png")
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    for folder, count in ((None, 500), (str(tmp_path), 2)):
        data = SemiSupervisedDataModule(predict_images=folder, eval_batch_size=300)
        found = cast("list[dict[str, Tensor]]", pl.Trainer(**quiet).predict(Looker(), datamodule=data))
        assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(count))
    assert found[0]["image"].mean((1, 2, 3)).tolist() == [0, 1]
    assert found[0]["label"].tolist() == [-1, -1]
