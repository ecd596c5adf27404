"""Random and focal views: their sizes, shares and colours, and that chance is a function of the draw."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules import BatchViews, DigitsSource, MultiCrop, SemiSupervisedDataModule, WorkerViews
from datamodules.views.batch_ops import crop_images
from datamodules.views.crops import Crop, draw_crop
from datamodules.views.policies import KINDS, ViewSettings, draw_plan

PLAIN: dict[str, Any] = {"flip": False, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
VIEWS = ("random", "random", "focal", "focal")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pictures(count: int, channels: int, side: int) -> Tensor:
    coarse = torch.rand(count, channels, 4, 4, generator=_generator())
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round()


@pytest.mark.parametrize("share", [(0.05, 0.3), (0.3, 1.0)])
def test_crops_are_inside_have_their_share_and_a_moderate_ratio(share: tuple[float, float]) -> None:
    crop = draw_crop(share, 100, 8, True, 4000, _generator())
    for start, length in ((crop.top, crop.height), (crop.left, crop.width)):
        assert start.min() == 0
        assert length.min() >= 1
        assert (start + length).max() == 100
    area, ratio = (crop.height * crop.width).double() / 1e4, (crop.width / crop.height).log()
    assert area.min() > share[0] - 0.01
    assert area.max() < share[1] + 0.01
    assert ratio.abs().max() < np.log(4 / 3) + 0.05
    assert 0.46 < crop.flip.double().mean() < 0.54
    if share[1] < 0.5:  # nothing sticks out, so both are uniform
        assert float(area.mean()) == pytest.approx(sum(share) / 2, abs=0.005)
        assert float(ratio.mean()) == pytest.approx(0, abs=0.015)


def test_what_never_fits_is_the_whole_image() -> None:
    # Of the whole area only a square fits, and hardly any ratio is one.
    crop = draw_crop((1.0, 1.0), 1000, 8, False, 50, _generator())
    whole = (crop.height == 1000) & (crop.width == 1000)
    assert whole.double().mean() > 0.9
    assert not bool(crop.flip.any())


@pytest.mark.parametrize("size", [6, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_those_of_pillow(channels: int, size: int) -> None:
    pictures = _pictures(12, channels, 24)
    crop = draw_crop((0.05, 1.0), 24, size, True, 12, _generator(1))
    made = crop_images(pictures / 255, crop)
    for number, picture in enumerate(pictures.byte()):
        top, left, height, width = (int(part[number]) for part in (crop.top, crop.left, crop.height, crop.width))
        channel = [
            Image.fromarray(part.numpy()[top : top + height, left : left + width]).resize(
                (size, size), Image.Resampling.BILINEAR
            )
            for part in picture
        ]
        expected = torch.from_numpy(np.stack([np.array(part) for part in channel])) / 255
        expected = expected.flip(2) if bool(crop.flip[number]) else expected
        torch.testing.assert_close(made[number], expected, atol=1.6 / 255, rtol=0)


def test_a_crop_of_everything_at_the_same_size_changes_nothing() -> None:
    pictures, zero = torch.rand(3, 1, 9, 9, generator=_generator()), torch.zeros(3, dtype=torch.long)
    whole = Crop(9, zero.bool(), zero, zero, zero + 9, zero + 9)
    torch.testing.assert_close(crop_images(pictures, whole), pictures)


def test_views_have_sizes_of_their_own_and_differ() -> None:
    views = BatchViews(24, crops=MultiCrop(focal_size=9, random_size=16))(
        _pictures(5, 3, 24) / 255, ("plain", *VIEWS), _generator()
    )
    assert {name: view.shape[-1] for name, view in views.items()} == {
        "plain": 24,
        "random": 16,
        "random_2": 16,
        "focal": 9,
        "focal_2": 9,
    }
    assert all(view.min() >= 0 and view.max() <= 1 for view in views.values())
    assert not torch.equal(views["random"], views["random_2"])
    assert not torch.equal(views["focal"], views["focal_2"])


def test_parts_of_a_large_batch_are_the_whole() -> None:
    pictures = _pictures(40, 3, 24) / 255
    views = BatchViews(24, crops=MultiCrop(focal_size=9))
    whole = views(pictures, VIEWS, _generator())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datamodules.views.views._PART_NUMBERS", 3 * 24 * 24 * 7)
        for name, view in views(pictures, VIEWS, _generator()).items():
            torch.testing.assert_close(view, whole[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_of_workers_are_those_of_batches(channels: int) -> None:
    crops = MultiCrop(focal_size=12, random_share=(0.5, 1.0))
    differences = []
    for seed, picture in enumerate(_pictures(40, channels, 24).byte()):
        batch = BatchViews(24, crops=crops)(picture[None] / 255, VIEWS, _generator(seed))
        for name, view in WorkerViews(24, crops=crops)(picture, VIEWS, seed).items():
            assert view.shape == batch[name][0].shape
            differences.append(float((view - batch[name][0]).abs().mean()))
    # Pillow rounds to 8 bits after each of up to six steps, and its Gaussian is three boxes.
    assert np.median(differences) < 2 / 255
    assert np.quantile(differences, 0.95) < 6 / 255


def test_how_often_colours_are_changed() -> None:
    settings = ViewSettings(24, crops=MultiCrop(focal_size=12))
    plan = draw_plan(settings, "focal", 4000, _generator())
    assert plan.kinds is not None
    assert plan.values is not None
    names = np.array(KINDS)[plan.kinds.numpy()]
    jittered = names[:, 0] != "identity"
    assert jittered.mean() == pytest.approx(0.8, abs=0.02)
    assert all(set(row[:4]) == {"brightness", "contrast", "color", "hue"} for row in names[jittered])
    assert len({tuple(row[:4]) for row in names[jittered]}) == 24
    assert (names[:, 4] == "color").mean() == pytest.approx(0.2, abs=0.02)
    assert (names[:, 5] == "gaussian").mean() == pytest.approx(0.5, abs=0.03)
    first = plan.values[..., 0].numpy()
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("hue", -0.1, 0.1)):
        drawn = first[names == name]
        assert drawn.min() == pytest.approx(low, abs=0.01)
        assert drawn.max() == pytest.approx(high, abs=0.01)
    blurred = first[:, 5][names[:, 5] == "gaussian"]
    assert (blurred.min(), blurred.max()) == pytest.approx((0.1, 2.0), abs=0.01)
    assert set(first[:, 4]) == {0.0}  # to grey


def test_without_colours_and_flips_a_view_is_its_crop() -> None:
    crops, pictures = MultiCrop(focal_size=12, **PLAIN), _pictures(6, 3, 24) / 255
    made = BatchViews(24, crops=crops)(pictures, ("focal",), _generator(4))["focal"]
    crop = draw_crop(crops.focal_share, 24, 12, False, 6, _generator(4))
    torch.testing.assert_close(made, crop_images(pictures, crop))


def test_a_stream_of_unlabelled_views_alone_is_a_function_of_the_epoch() -> None:
    def batches(epoch: int) -> list[Mapping[str, Any]]:
        data = SemiSupervisedDataModule(
            DigitsSource(),
            batch_size=4,
            unlabeled_ratio=2,
            steps_per_epoch=2,
            crops=MultiCrop(focal_size=6, flip=False),
        )
        data.setup("fit")
        data.declare_views((), VIEWS)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        return [data.on_after_batch_transfer(batch, 0) for batch in loader]  # type: ignore[misc]

    first, again, later = batches(1), batches(1), batches(2)
    assert all(batch.keys() == {"unlabeled"} for batch in first)
    assert first[0]["unlabeled"]["random"].shape == (8, 1, 8, 8)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(value, other["unlabeled"][name]) for name, value in one["unlabeled"].items())
    assert not torch.equal(first[0]["unlabeled"]["focal"], later[0]["unlabeled"]["focal"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"focal_size": 4}, "`focal_size` to be at least 5 pixels, but got 4"),
        ({"random_size": 2}, "`random_size` to be at least 5 pixels, but got 2"),
        ({"random_share": (0.5, 0.2)}, r"`random_share` to be the least and the largest .*\(0.5, 0.2\)"),
        ({"focal_share": (0.0, 0.2)}, r"`focal_share` to be the least and the largest"),
        ({"jitter": 1.5}, r"`jitter` to be in \[0, 1\], but got 1.5"),
        ({"blur_radius": 0.0}, "`blur_radius` to be positive"),
    ],
)
def test_impossible_crops(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiCrop(**arguments)
