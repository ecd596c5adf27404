import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as T

from datamodules.views.batch_ops import apply_operations, cut_holes, shift_images
from datamodules.views.policies import KIND_OF, KINDS, Shift

FILL = 0.5
BILINEAR = InterpolationMode.BILINEAR
FILTERS = (
    Image.Resampling.LANCZOS,
    Image.Resampling.BICUBIC,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
    Image.Resampling.HAMMING,
    Image.Resampling.NEAREST,
)


def _bytes(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


def _pillow(image: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Change each channel by Pillow, whose filters treat channels apart."""
    channels = [np.array(change(Image.fromarray(channel.numpy()))) for channel in _bytes(image)]
    return torch.from_numpy(np.stack(channels)).float() / 255


def _filled(image: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Fill by the share of each pixel that comes from outside; torchvision itself counts that share twice."""
    return move(image) + FILL * (1 - move(torch.ones_like(image)))


def _rotated(image: Tensor, degrees: float) -> Tensor:
    return _filled(image, lambda x: T.rotate(x, degrees, BILINEAR))


def _moved(image: Tensor, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    degrees = [math.degrees(math.atan(rate)) for rate in shear]
    return _filled(image, lambda x: T.affine(x, 0.0, list(shift), 1.0, degrees, BILINEAR, center=[0.0, 0.0]))


def _rescaled(image: Tensor, margin: float, kind: int) -> Tensor:
    side = image.shape[-1]
    box = (margin * side, margin * side, (1 - margin) * side, (1 - margin) * side)
    return _pillow(image, lambda pil: pil.crop(box).resize((side, side), FILTERS[kind]))


def _gaussian(image: Tensor, deviation: float) -> Tensor:
    blurred = gaussian_filter(image.double().numpy(), (0, deviation, deviation), mode="nearest", truncate=3.0)
    return torch.from_numpy(blurred).float()


def _blend(other: Tensor, image: Tensor, weight: float) -> Tensor:
    return weight * image + (1 - weight) * other


# Kind, range of strengths, the same on one image, tolerance.
ORACLES: dict[str, tuple[float, float, Callable[[Tensor, float, float], Tensor], float]] = {
    "identity": (0, 1, lambda x, v, w: x, 0),
    "brightness": (0, 2, lambda x, v, w: T.adjust_brightness(x, v), 1e-5),
    "color": (0, 2, lambda x, v, w: T.adjust_saturation(x, v), 1e-5),
    "contrast": (0, 2, lambda x, v, w: T.adjust_contrast(x, v), 1e-5),
    "sharpness": (0, 2, lambda x, v, w: T.adjust_sharpness(x, v), 1e-5),
    "posterize": (1, 9, lambda x, v, w: T.posterize(_bytes(x), int(v)).float() / 255, 1e-6),
    "solarize": (0, 1, lambda x, v, w: T.solarize(x, v), 1e-6),
    "autocontrast": (0, 0, lambda x, v, w: T.autocontrast(x), 1e-5),
    "equalize": (0, 0, lambda x, v, w: T.equalize(_bytes(x)).float() / 255, 1e-6),
    "invert": (0, 1, lambda x, v, w: _blend(T.invert(x), x, v), 1e-6),
    "smooth": (0, 1, lambda x, v, w: _blend(_pillow(x, lambda p: p.filter(ImageFilter.SMOOTH)), x, v), 1.01 / 255),
    "blur": (0, 1, lambda x, v, w: _blend(_pillow(x, lambda p: p.filter(ImageFilter.BLUR)), x, v), 1.01 / 255),
    "rotate": (-45, 45, lambda x, v, w: _rotated(x, v), 2e-3),
    "shear_x": (-0.3, 0.3, lambda x, v, w: _moved(x, shear=(v, 0.0)), 2e-3),
    "shear_y": (-0.3, 0.3, lambda x, v, w: _moved(x, shear=(0.0, v)), 2e-3),
    "translate_x": (-0.3, 0.3, lambda x, v, w: _moved(x, shift=(-round(v * x.shape[-1]), 0)), 2e-3),
    "translate_y": (-0.3, 0.3, lambda x, v, w: _moved(x, shift=(0, -round(v * x.shape[-1]))), 2e-3),
    # Pillow rounds to 8 bits between and after the two directions.
    "rescale": (0, 0.25, lambda x, v, w: _rescaled(x, v, int(6 * w)), 2.01 / 255),
    "hue": (-0.5, 0.5, lambda x, v, w: T.adjust_hue(x, v), 1e-5),
    "gaussian": (0.1, 3, lambda x, v, w: _gaussian(x, v), 1e-5),
}


def images(count: int, channels: int, side: int, seed: int = 0) -> Tensor:
    """Blobs with noise, some of low contrast, in steps of 1/255."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noisy = smooth * torch.rand(count, 1, 1, 1, generator=generator) + 0.1 * torch.rand(
        smooth.shape, generator=generator
    )
    return (noisy.clamp(0, 1) * 255).round() / 255


def strengths(kind: str, count: int, seed: int = 0) -> Tensor:
    low, high = ORACLES[kind][:2] if kind in ORACLES else (0.0, 0.5)
    values = torch.rand(count, 1, 3, generator=torch.Generator().manual_seed(seed + 7))
    values[..., 0] = low + (high - low) * values[..., 0]
    if kind == "posterize":
        values[..., 0] = values[..., 0].floor().clamp(1, 8)
    return values


@pytest.mark.parametrize("side", [8, 17, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", sorted(ORACLES))
def test_each_operation_is_that_of_torchvision_or_pillow(kind: str, channels: int, side: int) -> None:
    x = images(12, channels, side)
    values = strengths(kind, len(x))
    result = apply_operations(x, torch.full((len(x), 1), KIND_OF[kind]), values, FILL)
    oracle, tolerance = ORACLES[kind][2:]
    expected = torch.stack([oracle(image, v[0, 0].item(), v[0, 1].item()) for image, v in zip(x, values, strict=True)])
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=0)


def test_every_operation_has_an_oracle() -> None:
    assert {*ORACLES, "cutout"} == set(KINDS)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_the_others_and_stays_as_it_was(channels: int) -> None:
    count = 200
    x = images(count, channels, 20, seed=1)
    before = x.clone()
    kinds = torch.randint(len(KINDS), (count, 3), generator=torch.Generator().manual_seed(2))
    values = torch.stack(
        [
            torch.stack([strengths(KINDS[k], 1, seed=i + j)[0, 0] for j, k in enumerate(row)])
            for i, row in enumerate(kinds.tolist())
        ]
    )
    together = apply_operations(x, kinds, values, FILL)
    alone = [apply_operations(x[i : i + 1], kinds[i : i + 1], values[i : i + 1], FILL) for i in range(count)]
    # Thresholds and whole steps make a jump of a rounding error, so a few pixels may differ.
    assert ((together - torch.cat(alone)).abs() > 1e-5).float().mean() < 1e-3
    assert torch.equal(x, before)
    assert together.min() >= 0
    assert together.max() <= 1


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_constant_images_give_numbers(kind: str, level: float) -> None:
    x = torch.full((4, 3, 20, 20), level)
    x += torch.tensor([0, 1e-7, 1e-5, 0])[:, None, None, None] * torch.rand(
        4, 3, 20, 20, generator=torch.Generator().manual_seed(0)
    )
    x = x.clamp(0, 1)
    result = apply_operations(x, torch.full((4, 1), KIND_OF[kind]), strengths(kind, 4), FILL)
    assert result.isfinite().all()
    assert result.min() >= 0
    assert result.max() <= 1
    if kind in ("autocontrast", "equalize"):
        # Noise below 8 bits is not blown up.
        torch.testing.assert_close(result, x)


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_shifts_are_those_of_a_padded_array(pad: int) -> None:
    x = images(30, 3, 9)
    generator = torch.Generator().manual_seed(0)
    flip = torch.rand(30, generator=generator) < 0.5
    top, left = torch.randint(2 * pad + 1, (2, 30), generator=generator)
    result = shift_images(x, Shift(flip, top, left), pad)
    for i, image in enumerate(x.numpy()):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        expected = padded[:, top[i] : top[i] + 9, left[i] : left[i] + 9]
        np.testing.assert_array_equal(result[i].numpy(), expected[:, :, ::-1] if flip[i] else expected)


def test_holes_cover_the_pixels_whose_centres_are_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    hole = torch.rand(50, 3, generator=generator)
    result = cut_holes(torch.zeros(50, 1, 8, 8), hole, 1.0)
    for image, (side, row, column) in zip(result, hole.tolist(), strict=True):
        for y in range(8):
            for x in range(8):
                inside = max(abs((y + 0.5) / 8 - row), abs((x + 0.5) / 8 - column)) < side / 2
                assert image[0, y, x] == float(inside)
    kinds = torch.full((50, 1), KIND_OF["cutout"])
    assert torch.equal(apply_operations(torch.zeros(50, 1, 8, 8), kinds, hole[:, None], 1.0), result)
