"""Requests for a generator's predict."""

import sys
from typing import Any

import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from datamodules import SamplingDataModule, sampling


def asked(data: SamplingDataModule) -> list[list[int]]:
    return [batch["seed"].tolist() for batch in data.predict_dataloader()]


def test_batches_are_blocks_of_the_request() -> None:
    data = SamplingDataModule(5, 3, 16, first_seed=7, batch_size=2, sampler="euler", num_steps=9)
    batches = list(data.predict_dataloader())
    assert [batch["seed"].tolist() for batch in batches] == [[7, 8], [9, 10], [11]]
    assert batches[0]["seed"].dtype == torch.int64
    assert all((b["image_size"], b["sampler"], b["num_steps"]) == (16, "euler", 9) for b in batches)
    assert data.num_classes == 3
    assert data.class_names is None
    data.leave_out({1})
    assert asked(data) == [[7, 8], [11]]
    data.leave_out({0, 1, 2})
    assert asked(data) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_whole_blocks(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    data = SamplingDataModule(9, 2, 16, batch_size=2)
    whole = asked(data)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(sys.modules["datamodules.sampling"], "world", lambda rank=rank: (world_size, rank))
        parts.append(asked(data))
        # Lightning would shard it once more otherwise.
        assert isinstance(data.predict_dataloader().sampler, DistributedSampler)
    assert [parts[block % world_size][block // world_size] for block in range(5)] == whole
    assert sum(map(len, parts)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "`num_images` to be at least 1"),
        ({"sampler": "magic"}, "`sampler` to be one of"),
        ({"num_classes": 1}, "`num_classes` to be from 2 to 255, background included, but got 1"),
        ({"num_classes": 256}, "`num_classes` to be from 2 to 255"),
        ({"class_names": ["background"]}, r"`class_names` to name 2 classes .* but got 1: \['background'\]"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.SamplingDataModule(**{"num_images": 3, "num_classes": 2, "image_size": 8} | arguments)
