import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import BatchViews
from datamodules.views.policies import KINDS, RANDAUGMENT, ViewSettings, draw_plan

NAMES = ("plain", "weak", "weak", "strong", "strong")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(count, channels, side, side, generator=generator(99))


def distinct(batch: Tensor) -> int:
    return len({image.numpy().tobytes() for image in batch})


@pytest.mark.parametrize("strong", ["randaugment", "ctaugment", "trivial"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 32])
def test_keys_shapes_and_range(strong: Any, channels: int, side: int) -> None:  # noqa: ANN401 - a Literal
    images = pictures(40, channels, side)
    before = images.clone()
    views = BatchViews(side, strong=strong)(images, NAMES, generator())
    assert tuple(views) == ("plain", "weak", "weak_2", "strong", "strong_2")
    for view in views.values():
        assert view.shape == images.shape
        assert view.dtype == torch.float32
        assert view.isfinite().all()
        assert view.min() >= 0
        assert view.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(views["plain"], images)


def test_identical_images_become_different_views() -> None:
    images = pictures(1).expand(16, -1, -1, -1)
    views = BatchViews(32, crop_padding=0.5)(images, ("weak", "weak", "strong", "strong"), generator(1))
    for view in views.values():
        assert distinct(view) == 16
    assert distinct(torch.cat(list(views.values()))) == 64


def test_same_seed_same_views_and_no_other_generator() -> None:
    images = pictures(20)
    make = BatchViews(32)
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002 - must not be used
    first, second = make(images, NAMES, generator(3)), make(images, NAMES, generator(3))
    other = make(images, NAMES, generator(4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert pickle.dumps(np.random.get_state()) == before[2]  # noqa: NPY002 - must not be used
    for key, view in first.items():
        assert torch.equal(view, second[key])
        assert key == "plain" or not torch.equal(view, other[key])


def test_a_view_repeats_no_random_number_of_another() -> None:
    source = generator(7)
    settings = ViewSettings(32)
    weak, strong = (draw_plan(settings, name, 4000, source).shift for name in ("weak", "strong"))
    assert weak is not None
    assert strong is not None
    for name, chance in (("flip", 1 / 2), ("top", 1 / 9), ("left", 1 / 9)):
        first, second = getattr(weak, name), getattr(strong, name)
        # Standard deviations: 0.008 and 0.005.
        assert abs((first == second).float().mean() - chance) < 0.03


def test_weak_views_are_mirrored_half_the_time_and_shifted_evenly() -> None:
    shift = draw_plan(ViewSettings(32), "weak", 9000, generator()).shift
    assert shift is not None
    assert abs(shift.flip.float().mean() - 0.5) < 0.02
    for offset in (shift.top, shift.left):
        assert torch.bincount(offset).shape == (9,)
        assert (torch.bincount(offset) - 1000).abs().max() < 150


def test_crop_never_mirrors_and_none_does_nothing() -> None:
    shift = draw_plan(ViewSettings(8, weak="crop"), "weak", 500, generator()).shift
    assert shift is not None
    assert not shift.flip.any()
    assert set(shift.top.tolist()) == {0, 1, 2}
    images = pictures(9)
    assert torch.equal(BatchViews(32, weak="none")(images, ("weak",), generator())["weak"], images)


@pytest.mark.parametrize(("padding", "pad"), [(0.125, 4), (3, 3), (0.0, 0), (0, 0), (0.25, 8)])
def test_crop_padding_is_pixels_or_a_share(padding: float, pad: int) -> None:
    assert ViewSettings(32, crop_padding=padding).pad == pad


def test_operations_are_drawn_evenly_with_replacement_and_uniform_strength() -> None:
    count = 14000
    plan = draw_plan(ViewSettings(32), "strong", count, generator())
    assert plan.kinds is not None
    assert plan.values is not None
    assert plan.hole is not None
    assert abs((plan.kinds[:, 0] == plan.kinds[:, 1]).float().mean() - 1 / 14) < 0.01
    for name, low, high in RANDAUGMENT:
        chosen = plan.values[..., 0][plan.kinds == KINDS.index(name)]
        assert abs(len(chosen) - 2000) < 250
        assert chosen.min() >= low
        assert chosen.max() <= high
        assert abs(chosen.mean() - (low + high) / 2) < 0.06 * (high - low) + 1e-9
        if name == "posterize":
            assert set(chosen.tolist()) == {4, 5, 6, 7, 8}
        elif high > low:
            assert abs(chosen.std() - (high - low) / 12**0.5) < 0.03 * (high - low)
    side = plan.hole[:, 0]
    assert side.max() <= 0.5
    assert abs(side.mean() - 0.25) < 0.01
    assert abs(plan.hole[:, 1:].mean() - 0.5) < 0.01


def test_trivial_is_one_operation_and_num_ops_counts() -> None:
    for settings, depth in ((ViewSettings(32, strong="trivial"), 1), (ViewSettings(32, num_ops=3), 3)):
        plan = draw_plan(settings, "strong", 5, generator())
        assert plan.kinds is not None
        assert plan.kinds.shape == (5, depth)


@pytest.mark.parametrize("numbers", [1, 3 * 32 * 32 * 7])
def test_parts_of_a_large_batch_make_the_same_views(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(30)
    whole = BatchViews(32, strong="ctaugment")(images, (*NAMES, "probe"), generator())
    monkeypatch.setattr("datamodules.views.views._PART_NUMBERS", numbers)
    parts = BatchViews(32, strong="ctaugment")(images, (*NAMES, "probe"), generator())
    assert tuple(parts) == tuple(whole)
    for key, view in whole.items():
        # Thresholds and whole steps make a jump of a rounding error, so a few pixels may differ.
        assert ((parts[key] - view).abs() > 1e-5).float().mean() < 1e-3


def test_an_empty_batch_stays_empty() -> None:
    views = BatchViews(32)(pictures(0), NAMES, generator())
    assert all(view.shape == (0, 3, 32, 32) for view in views.values())


def test_no_hole_without_cutout_and_fill_is_used() -> None:
    images = torch.full((60, 3, 32, 32), 0.25)
    # Flat grey images show holes and what comes from outside only; without them one value an image remains.
    views = BatchViews(32, strong="trivial", cutout=0.0, fill=1.0)(images, ("strong",), generator())["strong"]
    moved = views.flatten(1).amax(1) == 1
    plan = draw_plan(ViewSettings(32, strong="trivial", cutout=0.0), "strong", 60, generator())
    assert plan.kinds is not None
    affine = torch.tensor([KINDS[kind].startswith(("rot", "shear", "trans")) for kind in plan.kinds[:, 0].tolist()])
    assert not (moved & ~affine).any()
    assert moved.sum() > 0.8 * affine.sum()
    assert (BatchViews(32, fill=1.0)(images, ("strong",), generator())["strong"] == 1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 4}, "`image_size` to be at least 5"),
        ({"weak": "mirror"}, "`weak` to be one of"),
        ({"strong": "autoaugment"}, "`strong` to be one of"),
        ({"num_ops": 0}, "`num_ops` to be at least 1"),
        ({"cutout": 1.5}, r"`cutout` to be in \[0, 1\]"),
        ({"fill": -1.0}, r"`fill` to be in \[0, 1\]"),
        ({"crop_padding": 32}, "`crop_padding` to be pixels"),
        ({"crop_padding": -0.1}, "`crop_padding` to be pixels"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchViews(**{"image_size": 32, **settings})


def test_images_and_names_are_checked() -> None:
    make = BatchViews(32)
    assert make.names == ("plain", "weak", "strong")
    with pytest.raises(ValueError, match=r"\('plain', 'weak', 'strong'\), but got 'probe'"):
        make(pictures(2), ("weak", "probe"), generator())
    with pytest.raises(ValueError, match=r"shape \[B, 1 or 3, 32, 32\], but got \[2, 3, 8, 8\]"):
        make(pictures(2, side=8), ("weak",), generator())
    with pytest.raises(ValueError, match="1 or 3"):
        make(pictures(2, channels=4), ("weak",), generator())
    with pytest.raises(ValueError, match=r"torch.uint8; divide by 255"):
        make(pictures(2).byte(), ("weak",), generator())
