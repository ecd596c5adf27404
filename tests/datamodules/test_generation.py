"""Training batches, given labels and flips of the datamodule that generators learn from."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fake_data import write_classes
from tiny_nets import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import ArraySource, DigitsSource, FolderSource, GenerationDataModule, LabelNoise, LongTail
from datamodules import generation as generation_file
from datamodules.classification.contents import Contents, ImageSource
from datamodules.classification.streams import Pool, StreamSampler
from datamodules.label_noise import NoiseKind

Batch = dict[str, Tensor]
_COLOUR = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)


def digits(**arguments: Any) -> GenerationDataModule:
    data = GenerationDataModule(**{"batch_size": 64, **arguments})
    data.setup("fit")
    return data


def batches(data: GenerationDataModule, epoch: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, StreamSampler)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def column(made: list[Batch], name: str) -> Tensor:
    return torch.cat([batch[name] for batch in made])


def evaluated(loader: DataLoader[Batch] | list[DataLoader[Batch]]) -> list[Batch]:
    assert isinstance(loader, DataLoader)
    return list(loader)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(first, second, strict=True)
    )


def true_labels(role: str) -> Tensor:
    contents = DigitsSource().read()
    return torch.from_numpy(contents.labels[np.asarray(contents.roles) == role])


def pixels(role: str) -> Tensor:
    contents = DigitsSource().read()
    assert contents.images is not None
    return torch.from_numpy(contents.images[np.asarray(contents.roles) == role]).permute(0, 3, 1, 2).float() / 255


def test_a_batch_is_images_with_given_labels() -> None:
    data = digits()
    made = batches(data)
    assert len(made) == len(data.train_dataloader()) == 1297 // 64
    for batch in made:
        assert set(batch) == {"image", "label", "index"}
        assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
        assert batch["image"].shape == (64, 1, 8, 8)
        assert torch.equal(batch["image"], pixels("train")[batch["index"]])
        assert torch.equal(batch["label"], true_labels("train")[batch["index"]])
    assert (data.num_classes, data.image_channels, data.image_size) == (10, 1, 8)
    assert data.class_names == tuple("0123456789")
    assert data.counts == {"train": 1297, "val": 0, "test": 500}
    assert data.num_images == 1297
    assert data.class_counts.tolist() == [int((true_labels("train") == label).sum()) for label in range(10)]
    assert data.val_dataloader() == []


def test_no_image_comes_twice_before_all_have_come() -> None:
    data = digits()
    stream = torch.cat([column(batches(data, epoch), "index") for epoch in range(3)])
    for start in range(0, len(stream) - 1297, 1297):
        assert sorted(stream[start : start + 1297].tolist()) == list(range(1297))
    # One batch of more than all images: still of its size, and as equal as can be.
    (batch,) = batches(digits(batch_size=2000))
    counts = Counter(batch["index"].tolist())
    assert len(batch["index"]) == 2000
    assert set(counts.values()) == {1, 2}


def test_epochs_have_as_many_batches_as_asked_for() -> None:
    data = digits(steps_per_epoch=3, batch_size=10)
    assert [len(batches(data, epoch)) for epoch in (0, 5)] == [3, 3]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_fit_sees_what_it_would_have_seen(num_workers: int) -> None:
    options = {"flip": True, "label_noise": LabelNoise(), "steps_per_epoch": 4, "num_workers": num_workers}
    going = digits(**options)
    loader = going.train_dataloader()
    assert isinstance(loader.sampler, StreamSampler)
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        epochs.append(list(loader))
    torch.manual_seed(7)
    resumed = digits(**options)
    assert same(epochs[2], batches(resumed, 2))
    assert not same(epochs[1], epochs[2])
    assert not same(epochs[2], batches(digits(**options, seed=1), 2))


def test_ranks_share_one_stream_and_its_flips() -> None:
    data = digits(flip=True, shift=1, batch_size=10, steps_per_epoch=3)
    whole = batches(data, 2)
    dataset = data.train_dataloader().dataset
    shares = []
    for rank in range(2):
        sampler = StreamSampler({"labeled": Pool(1297, 5)}, 3, data.seed, 2, rank)
        sampler.set_epoch(2)
        shares.append([dataset[key] for key in sampler])
    for batch, left, right in zip(whole, *shares, strict=True):
        for name, values in batch.items():
            assert torch.equal(values[0::2], left[name])
            assert torch.equal(values[1::2], right[name])
        assert not set(left["index"].tolist()) & set(right["index"].tolist())


def test_ranks_take_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_file, "world", lambda: (4, 1))
    assert len(digits().train_dataloader()) == 1297 // (4 * 64)


def test_flips_are_told_and_done() -> None:
    made = batches(digits(flip=True))
    flip, image, index = (column(made, name) for name in ("flip", "image", "index"))
    assert flip.dtype == torch.bool
    # 1280 fair coins: five standard deviations are 0.07.
    assert 0.43 < float(flip.float().mean()) < 0.57
    original = pixels("train")[index]
    assert torch.equal(image[~flip], original[~flip])
    assert torch.equal(image[flip], original[flip].flip(-1))
    first, second = (column(batches(digits(flip=True), epoch), "flip") for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_images_are_shifted_by_chance() -> None:
    made = batches(digits(shift=1))
    image, index = column(made, "image"), column(made, "index")
    padded = torch.nn.functional.pad(pixels("train")[index], (1, 1, 1, 1), mode="reflect")
    crops = torch.stack([padded[..., top : top + 8, left : left + 8] for top in range(3) for left in range(3)])
    fits = (crops == image).flatten(2).all(2)  # [9, N]; a digit may fit at two places
    assert bool(fits.any(0).all())
    once = fits[:, fits.sum(0) == 1].float().mean(1)
    assert float((once - 1 / 9).abs().max()) < 0.05
    with pytest.raises(ValueError, match="`shift` below `image_size` 8, but got 8"):
        digits(shift=8)
    with pytest.raises(ValueError, match=r"`shift` 0 for images that are encoded once .* got 1"):
        digits(shift=1).leave_out_images()


def test_images_can_be_left_out() -> None:
    data = digits(flip=True)
    with_images = batches(data)
    data.leave_out_images()
    without = batches(data)
    assert set(without[0]) == {"label", "index", "flip"}
    assert same(without, [{name: batch[name] for name in ("label", "index", "flip")} for batch in with_images])
    late = digits()
    loader = late.train_dataloader()
    late.leave_out_images()
    assert set(next(iter(loader))) == {"label", "index"}


def test_sweeps_show_every_training_image_once_and_as_it_is() -> None:
    data = digits(flip=True, label_noise=LabelNoise(), eval_batch_size=500, val_share=0.1)
    for loader in (data.sweep_dataloader(), data.predict_dataloader()):
        swept = list(loader)
        assert column(swept, "index").tolist() == list(range(data.num_images))
        made = batches(data)
        index, flip = column(made, "index"), column(made, "flip")
        assert torch.equal(column(swept, "image")[index][~flip], column(made, "image")[~flip])
        assert torch.equal(column(swept, "label")[index], column(made, "label"))


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_noise_is_what_the_transition_matrix_says(kind: NoiseKind) -> None:
    noise = LabelNoise(kind, 0.4, pairs="mnist")
    data = digits(label_noise=noise)
    swept = list(data.sweep_dataloader())
    truth, given = true_labels("train"), column(swept, "label")
    matrix = data.transition_matrix
    assert matrix is not None
    assert torch.equal(matrix, noise.matrix(10))  # type: ignore[arg-type]  # neither kind is without a matrix
    share = torch.zeros(10, 10, dtype=torch.float64)
    share.index_put_((truth, given), torch.ones(1, dtype=torch.float64), accumulate=True)
    # About 130 images a class: five standard deviations of a share are at most 0.22.
    assert float((share / share.sum(1, keepdim=True) - matrix).abs().max()) < 0.22
    expected = float(1 - matrix.diagonal()[truth].mean())
    # 1297 coins: five standard deviations.
    assert float((truth != given).float().mean()) == pytest.approx(expected, abs=0.07)
    assert data.class_counts.tolist() == torch.bincount(given, minlength=10).tolist()


def test_noise_has_a_seed_of_its_own() -> None:
    def labels(noise_seed: int, seed: int = 0) -> Tensor:
        return column(list(digits(label_noise=LabelNoise(seed=noise_seed), seed=seed).sweep_dataloader()), "label")

    assert torch.equal(labels(0), labels(0, seed=3))
    assert not torch.equal(labels(0), labels(1))


def test_transition_is_the_identity_without_noise_and_unknown_with_images_in_it() -> None:
    clean = GenerationDataModule().transition_matrix
    assert clean is not None
    assert torch.equal(clean, torch.eye(10, dtype=torch.float64))
    assert digits(label_noise=LabelNoise("instance", 0.2)).transition_matrix is None


def test_labels_are_noisy_in_validation_and_true_in_test() -> None:
    data = digits(val_share=0.3, label_noise=LabelNoise(rate=0.5))
    assert data.counts == {"train": 908, "val": 389, "test": 500}
    tested = evaluated(data.test_dataloader())
    assert torch.equal(column(tested, "label"), true_labels("test"))
    assert torch.equal(column(tested, "image"), pixels("test"))
    held_out = evaluated(data.val_dataloader())
    clean = evaluated(digits(val_share=0.3).val_dataloader())
    assert torch.equal(column(held_out, "image"), column(clean, "image"))
    wrong = (column(held_out, "label") != column(clean, "label")).float().mean()
    # 389 coins: four standard deviations.
    assert 0.4 < float(wrong) < 0.6
    # In proportion: a class of n images has 0.3 n of them, within one.
    whole = torch.bincount(true_labels("train"))
    assert float((torch.bincount(column(clean, "label")) - 0.3 * whole).abs().max()) <= 1.5
    assert data.fingerprint != digits(val_share=0.3).fingerprint
    assert data.fingerprint != digits(val_share=0.3, split_seed=1, label_noise=LabelNoise(rate=0.5)).fingerprint
    assert data.images_fingerprint == digits().images_fingerprint


def test_labels_of_validation_images_of_the_source_are_given_ones_too(tmp_path: Path) -> None:
    root = write_classes(tmp_path)
    (root / "test").rename(root / "val")

    def labels(noise: LabelNoise | None) -> tuple[Tensor, Tensor]:
        data = digits(source=FolderSource(str(root)), image_size=8, label_noise=noise)
        return column(list(data.sweep_dataloader()), "label"), column(evaluated(data.val_dataloader()), "label")

    # Every label goes to the next class, whatever chance says.
    shifted = LabelNoise("asymmetric", 1.0, pairs={0: 1, 1: 2, 2: 0})
    for true, given in zip(labels(None), labels(shifted), strict=True):
        assert len(true) == 18
        assert torch.equal(given, (true + 1) % 3)


def test_labels_to_test_on_have_a_fingerprint_of_their_own() -> None:
    def found(tested: list[int], noise: LabelNoise | None = None) -> GenerationDataModule:
        images, labels = _COLOUR[..., 0], [0, 1] * 10
        data = GenerationDataModule(ArraySource(images[:20], labels, images[20:], tested), label_noise=noise)
        data.setup()
        return data

    data, noisy, corrected = found([0, 1, 0, 1]), found([0, 1, 0, 1], LabelNoise(rate=0.3)), found([0, 1, 1, 0])
    assert data.test_fingerprint == noisy.test_fingerprint != corrected.test_fingerprint
    assert data.images_fingerprint == corrected.images_fingerprint


def test_an_unequal_choice_of_images() -> None:
    data = digits(imbalance=LongTail(gamma_labeled=10.0))
    counts = data.class_counts.tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] / counts[-1] == pytest.approx(10, rel=0.1)


def test_hidden_labels_are_never_looked_at() -> None:
    labels = np.asarray([0, 1] * 6 + [-1] * 12)
    seen = []
    for poison in (0, 1):
        hidden = np.where(labels < 0, poison, -1)
        source = ArraySource(_COLOUR, labels, _COLOUR[:4], [0, 1, 0, 1], hidden_labels=hidden)
        data = digits(source=source, batch_size=4, val_share=0.2, label_noise=LabelNoise(rate=0.2))
        assert data.num_images + data.counts["val"] == 12
        seen.append([*batches(data), *evaluated(data.val_dataloader()), *data.sweep_dataloader()])
    assert same(*seen)


def test_folders_of_classes(tmp_path: Path) -> None:
    source = FolderSource(str(write_classes(tmp_path)))
    data = digits(source=source, image_size=16, batch_size=6, flip=True)
    assert data.class_names == ("benign", "malignant", "other")
    assert data.counts == {"train": 18, "val": 0, "test": 18}
    made = batches(data)
    assert sorted(column(made, "index").tolist()) == list(range(18))
    swept = list(data.sweep_dataloader())
    assert column(swept, "label").tolist() == [0] * 6 + [1] * 6 + [2] * 6
    index, flip, image = (column(made, name) for name in ("index", "flip", "image"))
    mirrored = torch.where(flip[:, None, None, None], image.flip(-1), image)
    assert torch.equal(mirrored, column(swept, "image")[index])
    decoding = digits(source=source, image_size=16, batch_size=6, flip=True, cache_megabytes=0)
    assert same(batches(decoding), made)


class _Recorder(pl.LightningModule):
    """Keeps the indices of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch["index"].tolist())
        return self.weight.sum() * batch["image"].mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: _Recorder, folder: Path, epochs: int, checkpoint: Path | None = None) -> pl.Trainer:
    trainer = tiny_trainer(folder, max_epochs=epochs, num_sanity_val_steps=0)
    data = GenerationDataModule(steps_per_epoch=3, val_share=0.1, batch_size=16)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return trainer


def test_in_a_trainer_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    module, resumed = _Recorder(), _Recorder()
    fit(module, tmp_path, 2).save_checkpoint(tmp_path / "two.ckpt")
    alone = digits(steps_per_epoch=3, val_share=0.1, batch_size=16)
    order = [[batch["index"].tolist() for batch in batches(alone, epoch)] for epoch in range(3)]
    assert module.seen == order[0] + order[1]
    assert module.validated == [*range(alone.counts["val"])] * 2
    fit(resumed, tmp_path, 3, tmp_path / "two.ckpt")
    assert resumed.seen == order[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be at least 1, but got 0"),
        ({"steps_per_epoch": 0}, "`steps_per_epoch` to be at least 1, but got 0"),
        ({"split_seed": -1}, "`split_seed` to be at least 0"),
        ({"seed": -1}, "`seed` to be at least 0"),
        ({"num_workers": -1}, "`num_workers` to be at least 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` to be at least 1"),
        ({"image_size": 0}, "`image_size` to be at least 1"),
        ({"val_share": 1.0}, r"`val_share` to be in \[0, 1\)"),
        ({"imbalance": LongTail(gamma_unlabeled=2.0)}, "`imbalance` without `gamma_unlabeled`, but got 2.0"),
        ({"min_confidence": 1.5}, r"`min_confidence` to be in \[0, 1\], but got 1.5"),
        ({"min_confidence": 0.5}, "`pseudo_labels` with `min_confidence` 0.5, but got none"),
        ({"pseudo_labels": "x", "label_noise": LabelNoise()}, "only one of the arguments `label_noise` and `pseudo_"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationDataModule(**arguments)


def test_a_class_without_an_image_stops() -> None:
    never = ArraySource(_COLOUR, [0, 1] * 12, class_names=["cat", "dog", "owl"])
    with pytest.raises(ValueError, match=r"class 'owl' \(2 of 3 classes\) has none\. .*: cat 12, dog 12, owl 0\."):
        digits(source=never)
    gone = LabelNoise("asymmetric", 1.0, pairs={1: 0})
    source = ArraySource(_COLOUR, [0, 1] * 12, class_names=["cat", "dog"])
    with pytest.raises(ValueError, match=r"'dog' \(1 of 2 classes\) has none\. Lower the rate of.*: cat 24, dog 0\."):
        digits(source=source, label_noise=gone)


class _Misnumbered(ImageSource):
    """A source that does not check its labels itself."""

    native_size = 8

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.asarray(labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("cat", "dog")

    def read(self) -> Contents:
        keys = [str(row) for row in range(len(self.labels))]
        return Contents(keys, self.labels, ["train"] * len(keys), images=_COLOUR[: len(keys)])


@pytest.mark.parametrize("wrong", [2, -2])
def test_labels_that_are_no_classes_stop(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"Expected labels from 0 to 1 .* but got {wrong} for 3 and 1 more"):
        digits(source=_Misnumbered([0, 1, 0, wrong, 1, wrong]))


def test_what_cannot_be_shown() -> None:
    with pytest.raises(RuntimeError, match="Call `setup`"):
        GenerationDataModule().train_dataloader()
    with pytest.raises(ValueError, match=r"There are no test images in .* Add some"):
        digits(source=ArraySource(_COLOUR, [0, 1] * 12)).test_dataloader()
    with pytest.raises(FileNotFoundError, match="Expected argument `root` to be a folder"):
        GenerationDataModule(FolderSource("/nowhere"), image_size=8).check()
    GenerationDataModule().check()
