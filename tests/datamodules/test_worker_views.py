import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules import BatchViews, WorkerViews
from datamodules.ctaugment import RATES_SHAPE
from datamodules.views.batch_ops import apply_operations
from datamodules.views.policies import CTAUGMENT, KIND_OF, RANDAUGMENT
from datamodules.views.worker_ops import OPERATIONS

NAMES = ("plain", "weak", "weak", "strong", "strong")


def picture(channels: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth, because Pillow and torch interpolate differently at steep edges."""
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0].clamp(0, 1)
    return (image * 255).round().to(torch.uint8)


@pytest.mark.parametrize("strong", ["randaugment", "ctaugment", "trivial"])
@pytest.mark.parametrize("channels", [1, 3])
def test_keys_shapes_and_range(strong: Any, channels: int) -> None:  # noqa: ANN401 - a Literal
    image = picture(channels)
    before = image.clone()
    for seed in range(30):
        views = WorkerViews(32, strong=strong)(image, NAMES, seed)
        assert tuple(views) == ("plain", "weak", "weak_2", "strong", "strong_2")
        for view in views.values():
            assert view.shape == image.shape
            assert view.dtype == torch.float32
            assert view.min() >= 0
            assert view.max() <= 1
    assert torch.equal(image, before)
    assert torch.equal(views["plain"], image / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_seeds_decide_and_global_generators_are_left_alone(channels: int) -> None:
    make = WorkerViews(32)
    image = picture(channels)
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002 - must not be used
    first = [make(image, NAMES, seed) for seed in range(16)]
    second = [make(image, NAMES, seed) for seed in range(16)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert pickle.dumps(np.random.get_state()) == before[2]  # noqa: NPY002 - must not be used
    for one, same in zip(first, second, strict=True):
        assert all(torch.equal(view, same[key]) for key, view in one.items())
    assert len({views["strong"].numpy().tobytes() for views in first}) == 16


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 32])
def test_weak_views_are_those_of_batches(side: int, channels: int) -> None:
    image = picture(channels, side)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        expected = BatchViews(side)(image[None] / 255, ("weak", "weak"), generator)
        views = WorkerViews(side)(image, ("weak", "weak"), seed)
        for key, view in views.items():
            assert torch.equal(view, expected[key][0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "low", "high"), sorted({*RANDAUGMENT, *CTAUGMENT}))
def test_each_operation_is_that_of_batches(name: str, low: float, high: float, channels: int) -> None:
    image = picture(channels)
    pixels = image.permute(1, 2, 0).numpy()
    pillow = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    for seed in range(12):
        values = torch.rand(1, 1, 3, generator=torch.Generator().manual_seed(seed))
        values[..., 0] = low + (high - low) * values[..., 0]
        if name == "posterize":
            values[..., 0] = values[..., 0].floor()
        expected = apply_operations(image[None] / 255, torch.tensor([[KIND_OF[name]]]), values, 128 / 255)[0]
        changed = np.array(OPERATIONS[name](pillow, values[0, 0].tolist(), 128)).reshape(pixels.shape)
        difference = (torch.from_numpy(changed).permute(2, 0, 1) / 255 - expected).abs()
        if name in ("rotate", "shear_x", "shear_y"):
            # The rim is mixed with the fill by one and cut by the other.
            assert difference.median() < 1.5 / 255
            assert (difference > 3 / 255).float().mean() < 0.12
        else:
            assert difference.max() < 2.6 / 255


@pytest.mark.parametrize("strong", ["randaugment", "ctaugment"])
def test_strong_views_are_those_of_batches(strong: Any) -> None:  # noqa: ANN401 - a Literal
    image = picture()
    close = []
    for seed in range(60):
        expected = BatchViews(32, strong=strong)(image[None] / 255, ("strong",), torch.Generator().manual_seed(seed))
        view = WorkerViews(32, strong=strong)(image, ("strong",), seed)["strong"]
        close.append((view - expected["strong"][0]).abs().median().item() < 3 / 255)
    # Two operations in a row can enlarge the rounding of the first one.
    assert sum(close) > 0.9 * len(close)


def test_probes_are_those_of_batches() -> None:
    rates = torch.rand(RATES_SHAPE, generator=torch.Generator().manual_seed(0))
    batch, single = BatchViews(32, strong="ctaugment"), WorkerViews(32, strong="ctaugment")
    for views in (batch, single):
        views.share_rates(rates)
    image = picture()
    expected = batch(image[None] / 255, ("weak", "probe"), torch.Generator().manual_seed(3))
    made = single(image, ("weak", "probe"), 3)
    assert tuple(made) == tuple(expected)
    for key in ("probe_ops", "probe_bins"):
        assert torch.equal(made[key], expected[key][0])


class _Rates(Dataset[Tensor]):
    """Views in workers, whose strengths follow a table in shared memory."""

    def __init__(self, rates: Tensor) -> None:
        self.views = WorkerViews(16, strong="ctaugment", cutout=0.0)
        self.views.share_rates(rates)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return self.views(picture(side=16), ("strong",), index)["strong"]


def test_workers_see_the_shared_table_change() -> None:
    rates = torch.ones(RATES_SHAPE)
    rates.share_memory_()  # type: ignore[no-untyped-call] # torch gives no types here
    data = _Rates(rates)
    loader = DataLoader(data, batch_size=8, num_workers=1, persistent_workers=True)
    before = torch.cat(list(loader))
    rates[:, :, 1:] = 0
    after = torch.cat(list(loader))
    assert not torch.equal(before, after)
    assert torch.equal(after, torch.stack([data[i] for i in range(len(data))]))


def test_images_and_names_are_checked() -> None:
    make = WorkerViews(32)
    with pytest.raises(ValueError, match="but got 'probe'"):
        make(picture(), ("probe",), 0)
    with pytest.raises(ValueError, match=r"shape \[1 or 3, 32, 32\], but got \[3, 8, 8\]"):
        make(picture(side=8), ("weak",), 0)
    with pytest.raises(ValueError, match=r"uint8, but got torch.float32"):
        make(picture() / 255, ("weak",), 0)
