"""Samplers against the stream they are defined by, and where a root is looked for."""

from collections import Counter
from pathlib import Path

import pytest

from datamodules.loading import EvalSampler, MixedTrainSampler, SampleKey, TrainSampler, resolve_root, world


def epoch(sampler: TrainSampler, number: int) -> list[SampleKey]:
    sampler.set_epoch(number)
    return list(sampler)


def test_default_epoch_is_a_permutation() -> None:
    sampler = TrainSampler(7, seed=3)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(key.index for key in first) == sorted(key.index for key in second) == list(range(7))
    assert [key.index for key in first] != [key.index for key in second]
    assert [key.draw for key in first + second] == list(range(14))


@pytest.mark.parametrize("length", [3, 7, 20])
def test_epochs_cut_one_stream(length: int) -> None:
    stream = [key for number in range(7 * 20) for key in epoch(TrainSampler(7, 1, seed=5), number)]
    sampler = TrainSampler(7, length, seed=5)
    assert len(sampler) == length
    for number in (4, 0, 2):
        assert epoch(sampler, number) == stream[number * length : (number + 1) * length]
    # Whatever the length, any 7 aligned positions hold each image once.
    for block in range(20):
        assert sorted(key.index for key in stream[7 * block : 7 * block + 7]) == list(range(7))


def test_ranks_share_the_positions_of_one_process() -> None:
    whole = epoch(TrainSampler(10, 12, seed=1), 3)
    parts = [epoch(TrainSampler(10, 12, seed=1, world_size=3, rank=rank), 3) for rank in range(3)]
    assert [key for group in zip(*parts, strict=True) for key in group] == whole


def test_ranks_take_equally_many_steps_and_lose_no_position() -> None:
    samplers = [TrainSampler(10, 11, seed=1, world_size=3, rank=rank) for rank in range(3)]
    assert [len(sampler) for sampler in samplers] == [4, 4, 4]
    draws = sorted(key.draw for number in range(4) for sampler in samplers for key in epoch(sampler, number))
    assert draws == list(range(48))


@pytest.mark.parametrize(("samples", "world_size"), [(None, 1), (21, 1), (None, 2), (50, 3), (5, 1)])
def test_whole_batches_lose_no_position(samples: int | None, world_size: int) -> None:
    samplers = [
        TrainSampler(20, samples, seed=2, batch_size=8, world_size=world_size, rank=rank) for rank in range(world_size)
    ]
    length = len(samplers[0])
    assert length % 8 == 0 or length < 8
    draws: list[int] = []
    visits = Counter({index: 0 for index in range(20)})
    for number in range(50):
        keys = [key for sampler in samplers for key in epoch(sampler, number)]
        draws += [key.draw for key in keys]
        visits.update(key.index for key in keys)
    assert sorted(draws) == list(range(50 * length * world_size))
    assert max(visits.values()) - min(visits.values()) <= 1


def test_seed_changes_the_order() -> None:
    assert epoch(TrainSampler(20, seed=0), 0) != epoch(TrainSampler(20, seed=1), 0)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.999, 1 / 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_mixture_is_even_on_every_rank(share: float, world_size: int) -> None:
    samplers = [
        MixedTrainSampler(5, 3, share, samples_per_epoch=20, seed=2, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    streams = [[key for number in range(30) for key in epoch(sampler, number)] for sampler in samplers]
    for stream in streams:
        second = [key.index >= 5 for key in stream]
        for length in (1, 4, 7, 16):
            for start in range(len(stream) - length):
                assert abs(sum(second[start : start + length]) - share * length) <= 1
    keys = [key for group in zip(*streams, strict=True) for key in group]
    assert [key.draw for key in keys] == list(range(len(keys)))
    # Each source is a stream of permutations of its own.
    for first, size in ((0, 5), (5, 3)):
        source = [key.index for key in keys if first <= key.index < first + size]
        for start in range(0, len(source) - size + 1, size):
            assert sorted(source[start : start + size]) == list(range(first, first + size))


def test_mixture_keeps_the_order_of_the_first_source() -> None:
    mixed = [key.index for key in epoch(MixedTrainSampler(7, 4, 0.5, samples_per_epoch=28, seed=5), 0)]
    alone = [key.index for key in epoch(TrainSampler(7, 14, seed=5), 0)]
    assert [index for index in mixed if index < 7] == alone
    assert [index >= 7 for index in mixed] == [False, True] * 14


def test_mixture_arguments() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"`share` to be in \(0, 1\), but got"):
            MixedTrainSampler(3, 3, share)
    for sizes in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=r"to be at least 1, but got 0: there is nothing to mix"):
            MixedTrainSampler(*sizes, 0.5)
    assert len(MixedTrainSampler(5, 3, 0.5, batch_size=4)) == 8


@pytest.mark.parametrize("size", [1, 4, 7, 9])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_every_image_once(size: int, world_size: int) -> None:
    samplers = [EvalSampler(size, world_size=world_size, rank=rank) for rank in range(world_size)]
    items = [list(sampler) for sampler in samplers]
    assert len({len(part) for part in items} | {len(sampler) for sampler in samplers}) == 1
    images = [item for part in items for item in part if isinstance(item, int)]
    fillers = [item for part in items for item in part if not isinstance(item, int)]
    assert sorted(images) == list(range(size))
    assert fillers == [SampleKey(-1, 0)] * (-size % world_size)


def test_prediction_is_not_padded() -> None:
    samplers = [EvalSampler(5, pad=False, world_size=2, rank=rank) for rank in range(2)]
    assert [list(sampler) for sampler in samplers] == [[0, 2, 4], [1, 3]]
    assert [len(sampler) for sampler in samplers] == [3, 2]


def test_outside_torch_distributed_there_is_one_rank() -> None:
    assert world() == (1, 0)
    assert EvalSampler(3).num_replicas == 1


def test_sampler_arguments() -> None:
    with pytest.raises(ValueError, match=r"`size` to be at least 1, but got 0"):
        EvalSampler(0)
    with pytest.raises(ValueError, match=r"`samples_per_epoch` to be at least 1, but got 0"):
        TrainSampler(4, 0)
    with pytest.raises(ValueError, match=r"`batch_size` to be at least 1, but got 0"):
        TrainSampler(4, batch_size=0)
    with pytest.raises(ValueError, match=r"`rank` to be in \[0, 2\), but got 2"):
        TrainSampler(4, world_size=2, rank=2)


def test_root_is_looked_for_under_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEWLIGHT_DATA", raising=False)
    assert resolve_root("isic2018") == Path("isic2018")
    monkeypatch.setenv("FEWLIGHT_DATA", "~/data")
    assert resolve_root("isic2018") == tmp_path / "data" / "isic2018"
    assert resolve_root("/else/where") == Path("/else/where")
    assert resolve_root("~/mine") == tmp_path / "mine"
