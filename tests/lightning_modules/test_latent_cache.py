"""The cache of latents: what it holds, when it is filled again, and what it refuses."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_autoencoders import tiny_latent_space
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from lightning_modules import LatentSpace
from lightning_modules.latent_cache import LatentCache

N = 11
IMAGES = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Sweep:
    """Batches of four images, backwards and with fillers; counts how often it is asked."""

    def __init__(self, rank: int = 0, world: int = 1, numbers: list[int] | None = None) -> None:
        self.numbers = [*range(N)][::-1][rank::world] if numbers is None else numbers
        self.asked = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.asked += 1
        for start in range(0, len(self.numbers), 4):
            index = torch.tensor([*self.numbers[start : start + 4], -1])
            yield {"image": IMAGES[index], "index": index}


def _ensure(cache: LatentCache, space: LatentSpace, sweep: Sweep, flips: bool = False, data: str = "a") -> LatentCache:
    cache.ensure(space, sweep, N, 8, data, flips)
    return cache


@pytest.fixture
def space(tmp_path: Path) -> LatentSpace:
    return tiny_latent_space(tmp_path / "vae")


def test_moments_are_those_of_direct_encoding(space: LatentSpace, tmp_path: Path) -> None:
    cache = _ensure(LatentCache(tmp_path / "cache"), space, Sweep(), flips=True)
    index = torch.tensor([3, 0, 10, 3])
    flip = torch.tensor([True, False, True, False])
    torch.testing.assert_close(cache.moments(index), space.moments(IMAGES[index]))
    shown = torch.where(flip.view(-1, 1, 1, 1), IMAGES[index].flip(-1), IMAGES[index])
    torch.testing.assert_close(cache.moments(index, flip), space.moments(shown))
    assert not torch.allclose(cache.moments(index, flip), cache.moments(index))
    assert cache.moments(index).dtype == torch.float32


def test_it_is_filled_once_and_mapped(space: LatentSpace, tmp_path: Path) -> None:
    sweep = Sweep()
    first = _ensure(LatentCache(tmp_path / "cache"), space, sweep, flips=True)
    second = _ensure(LatentCache(tmp_path / "cache"), space, sweep)
    assert sweep.asked == 1
    assert all(isinstance(array, np.memmap) for array in second._arrays)
    assert torch.equal(second.moments(torch.arange(N)), first.moments(torch.arange(N)))
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {"moments.npy", "mirrored.npy", "manifest.json", ".lock"}


def test_half_precision_takes_half_the_space(space: LatentSpace, tmp_path: Path) -> None:
    cache = _ensure(LatentCache(tmp_path / "cache", "float16"), space, Sweep())
    direct = space.moments(IMAGES)
    torch.testing.assert_close(cache.moments(torch.arange(N)), direct, atol=1e-3, rtol=1e-3)
    assert (tmp_path / "cache/moments.npy").stat().st_size < direct.numel() * 2 + 200


def test_mirrored_images_are_added_when_they_are_needed(space: LatentSpace, tmp_path: Path) -> None:
    sweep = Sweep()
    cache = _ensure(LatentCache(tmp_path / "cache"), space, sweep)
    flip = torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match="flips=True"):
        cache.moments(torch.tensor([1]), flip)
    _ensure(cache, space, sweep, flips=True)
    assert sweep.asked == 2
    torch.testing.assert_close(cache.moments(torch.tensor([1]), flip), space.moments(IMAGES[1:2].flip(-1)))


@pytest.mark.parametrize("spoilt", ["manifest.json", "moments.npy", "short", "half a manifest"])
def test_a_half_written_cache_is_filled_again(spoilt: str, space: LatentSpace, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    _ensure(LatentCache(folder), space, Sweep())
    if spoilt == "short":
        os.truncate(folder / "moments.npy", 500)
    elif spoilt == "half a manifest":
        (folder / "manifest.json").write_text('{"version": 1,')
    else:
        (folder / spoilt).unlink()
    if spoilt == "manifest.json":  # what a killed process leaves: arrays of the right shape, rows still zero
        np.lib.format.open_memmap(folder / "moments.npy", mode="r+")[:] = 0
    sweep = Sweep()
    cache = _ensure(LatentCache(folder), space, sweep)
    assert sweep.asked == 1
    torch.testing.assert_close(cache.moments(torch.arange(N)), space.moments(IMAGES))


def test_a_sweep_that_breaks_off_leaves_no_manifest(space: LatentSpace, tmp_path: Path) -> None:
    class Breaks(Sweep):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield next(super().__iter__())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _ensure(LatentCache(tmp_path / "cache"), space, Breaks())
    assert not (tmp_path / "cache/manifest.json").exists()
    cache = _ensure(LatentCache(tmp_path / "cache"), space, Sweep())
    torch.testing.assert_close(cache.moments(torch.arange(N)), space.moments(IMAGES))


def test_latents_of_something_else_are_refused_and_kept(space: LatentSpace, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    _ensure(LatentCache(folder), space, Sweep())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = tiny_latent_space(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"the autoencoder differs .*choose another folder, or remove this one"):
        _ensure(LatentCache(folder), other, Sweep())
    with pytest.raises(ValueError, match="the training images differs"):
        _ensure(LatentCache(folder), space, Sweep(), data="b")
    with pytest.raises(ValueError, match=r"precision differs \(float32 there, float16 here\)"):
        _ensure(LatentCache(folder, "float16"), space, Sweep())
    with pytest.raises(ValueError, match="image_size differs"):
        LatentCache(folder).ensure(space, Sweep(), N, 16, "a")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("numbers", "match"),
    [([*range(N - 2)], "2 came never or more than once"), ([*range(N), 3], "1 came never"), ([0, N - 1], "9 came")],
)
def test_a_sweep_that_is_not_one_is_refused(numbers: list[int], match: str, space: LatentSpace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        _ensure(LatentCache(tmp_path / "cache"), space, Sweep(numbers=numbers))
    assert not (tmp_path / "cache/manifest.json").exists()


def test_other_mistakes_are_named(space: LatentSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LatentCache(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="Call `ensure`"):
        cache.moments(torch.tensor([0]))
    with pytest.raises(ValueError, match="one of float32, float16"):
        LatentCache(tmp_path, "int8")  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(ValueError, match="`image_size` 16, got"):
        cache.ensure(space, Sweep(), N, 16, "a")
    with pytest.raises(ValueError, match="one has index 10"):
        cache.ensure(space, Sweep(), N - 1, 8, "a")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="precision float16"):
        _ensure(cache, space, Sweep())
    monkeypatch.undo()
    _ensure(cache, space, Sweep())
    for wrong in (-1, N):
        with pytest.raises(ValueError, match="drop them"):
            cache.moments(torch.tensor([0, wrong]))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="choose another one"):
        _ensure(LatentCache(tmp_path / "file"), space, Sweep())


def test_a_second_run_waits_for_the_first(space: LatentSpace, tmp_path: Path) -> None:
    started, sweeps = threading.Event(), []

    class Slow(Sweep):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            started.set()
            second.start()
            second.join(0.3)
            yield from super().__iter__()

    def other() -> None:
        sweeps.append(Sweep())
        _ensure(LatentCache(tmp_path / "cache"), space, sweeps[0])

    second = threading.Thread(target=other)
    _ensure(LatentCache(tmp_path / "cache"), space, Slow())
    second.join(10)
    assert not second.is_alive()
    assert [sweep.asked for sweep in sweeps] == [0]


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    space = LatentSpace(folder=f"{folder}/vae")
    cache = _ensure(LatentCache(f"{folder}/cache"), space, Sweep(rank, 2), flips=True)
    torch.testing.assert_close(cache.moments(torch.arange(N)), space.moments(IMAGES))
    Path(f"{folder}/rank{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_fill_one_cache(space: LatentSpace, tmp_path: Path) -> None:
    spawn(_one_rank, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call] # torch's
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["shape"] == [N, 4, 4, 4]
    assert manifest["autoencoder"] == space.fingerprint()
