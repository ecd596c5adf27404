"""Labels that people gave among pseudo-labels: which they are, and how many of them a training batch holds."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import ArraySource, GenerationDataModule
from datamodules.classification.streams import Pool, Quota, StreamSampler
from datamodules.pseudo_labels import SPLITS, LabelTable, Origin, write

Batch = dict[str, Tensor]
N = 30
_IMAGES = np.random.default_rng(1).integers(0, 256, (N + 6, 5, 5), dtype=np.uint8)
_LABELS = np.random.default_rng(2).permutation(np.arange(N) % 3)
# People labelled seven images, two of which were held out to validate the module on.
_HELD_OUT = [3, 20]
_PEOPLE = [1, 3, 8, 12, 20, 21, 29]
_IS_PEOPLE = torch.isin(torch.arange(N), torch.tensor(_PEOPLE))


def label(folder: Path, people: Sequence[int] = _PEOPLE, true_labels: bool = True) -> Path:
    """Write pseudo-labels of all images to train on, in any order."""
    data = GenerationDataModule(_source())
    data.setup()
    splits = np.full(N, SPLITS.index("unlabeled"))
    splits[list(people)] = SPLITS.index("labeled")
    splits[[row for row in people if row in _HELD_OUT]] = SPLITS.index("val")
    order = np.random.default_rng(3).permutation(N)
    keys = _source().read().keys
    confidence = np.linspace(0, 1, N, dtype=np.float32)
    table = LabelTable([keys[row] for row in order], _LABELS[order], confidence[order], splits[order])
    origin = Origin(data.class_names, data.images_fingerprint, made_with={"true_labels": true_labels})
    write(folder, table, origin)
    return folder


def _source() -> ArraySource:
    return ArraySource(_IMAGES[:N], np.where(_IS_PEOPLE, _LABELS, -1), _IMAGES[N:], [0, 1, 2] * 2, "abc")


def ready(folder: Path, **options: Any) -> GenerationDataModule:
    chosen: dict[str, Any] = {"batch_size": 10, "steps_per_epoch": 6, "trusted_share": 0.4}
    data = GenerationDataModule(_source(), pseudo_labels=str(folder), **chosen | options)
    data.setup()
    return data


def batches(data: GenerationDataModule, epoch: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, StreamSampler)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    return len(first) == len(second) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(("size", "share", "count"), [(10, 0.4, 4), (10, 0.94, 9), (8, 0.3, 2)])
def test_each_batch_has_its_share_of_what_people_labelled(tmp_path: Path, size: int, share: float, count: int) -> None:
    for batch in batches(ready(label(tmp_path), batch_size=size, trusted_share=share)):
        assert batch["index"].shape == (size,)
        assert int(batch["trusted"].sum()) == count
        assert torch.equal(batch["trusted"], _IS_PEOPLE[batch["index"]])
        assert torch.equal(batch["label"], torch.from_numpy(_LABELS)[batch["index"]])
        assert torch.equal(batch["image"], torch.from_numpy(_IMAGES)[batch["index"]][:, None].float() / 255)


def test_images_of_one_kind_come_equally_often(tmp_path: Path) -> None:
    made = batches(ready(label(tmp_path), steps_per_epoch=14))
    seen = Counter(torch.cat([batch["index"] for batch in made]).tolist())
    # 56 places for 7 images, 84 for the 23 others.
    assert {seen[row] for row in _PEOPLE} == {8}
    assert {seen[row] for row in range(N) if row not in _PEOPLE} == {3, 4}


def test_a_resumed_fit_sees_what_it_would_have_seen(tmp_path: Path) -> None:
    label(tmp_path)
    going = ready(tmp_path, shift=1)
    epochs = [batches(going, epoch) for epoch in range(3)]
    assert same(epochs[2], batches(ready(tmp_path, shift=1), 2))
    assert not same(epochs[1], epochs[2])
    assert not same(epochs[2], batches(ready(tmp_path, shift=1, seed=1), 2))


def test_two_ranks_share_what_one_has(tmp_path: Path) -> None:
    whole = ready(label(tmp_path))
    half = ready(tmp_path, batch_size=5)
    dataset = half.train_dataloader().dataset
    pool = Pool(N, 5, quota=Quota(np.asarray(_PEOPLE), 2))
    shares = []
    for rank in range(2):
        sampler = StreamSampler({"labeled": pool}, 6, half.seed, 2, rank)
        sampler.set_epoch(1)
        shares.append([dataset[key] for key in sampler])
    for batch, *parts in zip(batches(whole, 1), *shares, strict=True):
        assert [int(part["trusted"].sum()) for part in parts] == [2, 2]
        # Those of people come last; each rank has every second image of each kind.
        for name in ("index", "label", "trusted"):
            rest, fixed = batch[name][:6], batch[name][6:]
            for rank, part in enumerate(parts):
                assert torch.equal(part[name], torch.cat([rest[rank::2], fixed[rank::2]]))


def test_without_a_share_chance_decides_and_they_are_told(tmp_path: Path) -> None:
    label(tmp_path / "a")
    label(tmp_path / "b", true_labels=False)
    told, nobody = (batches(ready(tmp_path / name, trusted_share=None)) for name in "ab")
    for batch, other in zip(told, nobody, strict=True):
        assert torch.equal(batch["trusted"], _IS_PEOPLE[batch["index"]])
        # The module's own labels took the place of theirs.
        assert not bool(other["trusted"].any())
        assert torch.equal(batch["index"], other["index"])
    assert len({int(batch["trusted"].sum()) for batch in told}) > 1
    plain = GenerationDataModule(_source(), batch_size=4)
    plain.setup()
    assert "trusted" not in batches(plain)[0]


def test_they_are_told_of_images_that_are_kept_by_index(tmp_path: Path) -> None:
    data = ready(label(tmp_path), flip=True)
    full = batches(data, 1)
    data.leave_out_images()
    for batch, before in zip(batches(data, 1), full, strict=True):
        assert batch.keys() == {"label", "index", "trusted", "flip"}
        assert all(torch.equal(values, before[name]) for name, values in batch.items())


def test_images_that_are_left_out_or_held_out_do_not_shift_them(tmp_path: Path) -> None:
    label(tmp_path)
    for options in ({"min_confidence": 0.25}, {"val_share": 0.3}):
        data = ready(tmp_path, **options)
        assert data.num_images < N
        (sweep,) = data.sweep_dataloader()
        assert "trusted" not in sweep
        every = torch.from_numpy(_IMAGES[:N])[:, None].float() / 255
        rows = [int((every == image).flatten(1).all(1).nonzero()) for image in sweep["image"]]
        for batch in batches(data):
            assert int(batch["trusted"].sum()) == 4
            assert batch["trusted"].tolist() == [rows[i] in _PEOPLE for i in batch["index"].tolist()]


@pytest.mark.parametrize("share", [0.0, 0.04, 0.96, 1.0, -0.5])
def test_shares_that_leave_one_kind_out(share: float) -> None:
    with pytest.raises(ValueError, match=rf"some images of both kinds, but got {share} with folder"):
        GenerationDataModule(_source(), pseudo_labels="folder", batch_size=10, trusted_share=share)
    with pytest.raises(ValueError, match="`trusted_share` only with `pseudo_labels`"):
        GenerationDataModule(_source(), batch_size=10, trusted_share=0.5)


@pytest.mark.parametrize(("people", "true_labels", "count"), [(_PEOPLE, False, 0), ([], True, 0), (range(N), True, N)])
def test_a_share_of_labels_that_are_all_of_one_kind(
    tmp_path: Path, people: Sequence[int], true_labels: bool, count: int
) -> None:
    data = ready(label(tmp_path, people, true_labels))
    with pytest.raises(ValueError, match=rf"they gave {count} of the {N} in .*; write them with `true_labels`, or"):
        data.train_dataloader()
