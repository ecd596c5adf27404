"""The cache of features: found by contents, filled once, refused when of something else."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.feature_cache import FeatureCache

N = 7
IMAGES = torch.randint(0, 256, (N, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float() / 255


def encode(image: Tensor) -> Tensor:
    return image.flatten(1)[:, ::5]


class Sweep:
    """Batches of three images, backwards and with fillers; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.asked += 1
        for start in range(0, N, 3):
            index = torch.tensor([*[*range(N)][::-1][start : start + 3], -1])
            yield {"image": IMAGES[index], "index": index}


def ensured(
    folder: Path, sweep: Sweep, data: str = "a", encoder: str = "e", features: int = 10, side: int = 4
) -> FeatureCache:
    cache = FeatureCache(folder)
    cache.ensure(encode, encoder, features, sweep, N, side, data, torch.device("cpu"))
    return cache


def test_features_are_found_by_the_contents_of_images(tmp_path: Path) -> None:
    sweep = Sweep()
    ensured(tmp_path, sweep)
    cache = ensured(tmp_path, sweep)
    assert sweep.asked == 1
    asked = torch.stack([IMAGES[4], 1 - IMAGES[4], IMAGES[0], IMAGES[4], IMAGES[6]])
    known, features = cache.look_up(asked)
    assert known.tolist() == [True, False, True, True, True]
    assert torch.equal(features, encode(asked[known]))
    assert all(isinstance(array, np.memmap) for array in cache._arrays)
    assert not cache.look_up(1 - IMAGES)[0].any()
    assert {path.name for path in tmp_path.iterdir()} == {"features.npy", "digests.npy", "manifest.json", ".lock"}


def test_features_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Call `ensure`"):
        FeatureCache(tmp_path).look_up(IMAGES)
    ensured(tmp_path, Sweep())
    again = Sweep()
    with pytest.raises(ValueError, match=r"`feature_cache` .* the features of this run, but the encoder differs"):
        ensured(tmp_path, again, encoder="another")
    with pytest.raises(ValueError, match="the training images differs"):
        ensured(tmp_path, again, data="b")
    with pytest.raises(ValueError, match="the shape differs"):
        ensured(tmp_path, again, features=11)
    with pytest.raises(ValueError, match="image_size differs"):
        ensured(tmp_path, again, side=8)
    assert again.asked == 0


def test_a_half_written_cache_is_filled_again(tmp_path: Path) -> None:
    ensured(tmp_path, Sweep())
    (tmp_path / "digests.npy").unlink()
    sweep = Sweep()
    assert ensured(tmp_path, sweep).look_up(IMAGES)[0].all()
    assert sweep.asked == 1
