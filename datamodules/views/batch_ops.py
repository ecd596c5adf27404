"""Augmentations of whole batches, with a strength of its own for every image, on any device.

Pixel operations are those of Pillow and torchvision, in float: only `posterize` and `equalize`, which are defined on
8-bit values, round to them. Images that share an operation are computed together, and nothing loops over images.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.views.crops import Crop
from datamodules.views.policies import AFFINE, KIND_OF, KINDS, MIXTURES, Shift

_LUMINANCE = (0.2989, 0.587, 0.114)
# Pillow's resampling filters in the order of CTAugment, as half widths in pixels.
_FILTER_SUPPORT = (3.0, 2.0, 1.0, 0.5, 1.0, 0.5)


def shift_images(images: Tensor, shift: Shift, pad: int) -> Tensor:
    """Mirror and crop each image of a batch, padded by reflection.

    Args:
        images: Images [B, C, H, W].
        shift: What is done to each.
        pad: Pixels of padding on every side.

    Returns:
        Images of the same shape.
    """
    height, width = images.shape[2:]
    rows = _reflected(shift.top[:, None] + torch.arange(height) - pad, height)
    columns = _reflected(shift.left[:, None] + torch.arange(width) - pad, width)
    columns = torch.where(shift.flip[:, None], columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    flat = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    return images.flatten(2).gather(2, flat[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def _reflected(position: Tensor, size: int) -> Tensor:
    position = position.abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)


def crop_images(images: Tensor, crop: Crop) -> Tensor:
    """Crop each image of a batch, bring it to one size with a triangle filter as Pillow does, and mirror it.

    Args:
        images: Images [B, C, S, S].
        crop: What is cut out of each.

    Returns:
        Images [B, C, size, size].
    """
    side = images.shape[-1]
    rows = _triangles(crop.top, crop.height, side, crop.size)
    columns = _triangles(crop.left, crop.width, side, crop.size)
    columns = torch.where(crop.flip[:, None, None], columns.flip(1), columns)
    rows, columns = (part[:, None].to(images.device, images.dtype) for part in (rows, columns))
    return (rows @ images @ columns.mT).clamp_(0, 1)


def _triangles(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Weights [B, out, in] of the pixels of a line of which a part is brought to another length."""
    scale = (length / size)[:, None, None]
    support = scale.clamp_min(1)  # when it shrinks, the filter widens: no aliasing
    first = start[:, None, None]
    pixel = torch.arange(side) + 0.5
    centre = first + (torch.arange(size) + 0.5)[:, None] * scale
    weights = (1 - (pixel - centre).abs() / support).clamp_min(0)
    weights = weights * ((pixel > first) & (pixel < first + length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def cut_holes(images: Tensor, hole: Tensor, fill: float) -> Tensor:
    """Fill a square of each image (Cutout, T. DeVries and G. W. Taylor, arXiv:1708.04552).

    Args:
        images: Images [B, C, S, S].
        hole: Side and centre (row, column) of each hole as shares of the side [B, 3], on the device of the images; a
            pixel is filled where its centre is inside, and what sticks out of the image is cut off.
        fill: Grey level.

    Returns:
        Images of the same shape.
    """
    height, width = images.shape[2:]
    half = hole[:, :1] / 2
    rows = ((torch.arange(height, device=images.device) + 0.5) / height - hole[:, 1:2]).abs() < half
    columns = ((torch.arange(width, device=images.device) + 0.5) / width - hole[:, 2:3]).abs() < half
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], fill)


def apply_operations(images: Tensor, kinds: Tensor, values: Tensor, fill: float) -> Tensor:
    """Apply a row of operations to each image of a batch.

    Args:
        images: Images [B, C, S, S] in [0, 1], C = 1 or 3.
        kinds: Operations [B, K] as numbers in `policies.KINDS`, on the CPU, applied from left to right.
        values: Their strengths [B, K, 3] on the CPU, as in `policies.Plan`.
        fill: Grey level of what is drawn in from outside.

    Returns:
        Images of the same shape in [0, 1].
    """
    place = torch.arange(len(images))
    for slot in range(kinds.shape[1]):
        # Images are sorted by operation, so that those of one operation are a slice.
        order = kinds[place, slot].argsort(stable=True)
        place = place[order]
        images = images.index_select(0, order.to(images.device))
        counts = torch.bincount(kinds[:, slot], minlength=len(KINDS)).tolist()
        strength = values[place, slot].to(images.device, images.dtype)
        _apply_slices(images, counts, kinds[place, slot].to(images.device), strength, fill)
    return images.index_select(0, place.argsort().to(images.device))


def _apply_slices(images: Tensor, counts: list[int], kinds: Tensor, values: Tensor, fill: float) -> None:
    """Apply one operation to each image, in place; images are sorted by operation, `counts` of each."""
    starts = [sum(counts[:kind]) for kind in range(len(KINDS) + 1)]

    def extent(first: str, last: str) -> slice:
        return slice(starts[KIND_OF[first]], starts[KIND_OF[last] + 1])

    mixed = extent(MIXTURES[0], MIXTURES[-1])
    if mixed.start < mixed.stop:
        images[mixed] = _mixed(images[mixed], counts, values[mixed, 0])
    if counts[KIND_OF["posterize"]]:
        part = extent("posterize", "posterize")
        images[part] = _posterized(images[part], values[part, 0])
    if counts[KIND_OF["solarize"]]:
        part = extent("solarize", "solarize")
        bright = images[part] >= values[part, :1, None, None]
        images[part] = torch.where(bright, 1 - images[part], images[part])
    moved = extent(AFFINE[0], AFFINE[-1])
    if moved.start < moved.stop:
        matrices = affine_matrices(kinds[moved], values[moved, 0], images.shape[-1])
        images[moved] = warp(images[moved], matrices, fill)
    if counts[KIND_OF["cutout"]]:
        part = extent("cutout", "cutout")
        images[part] = cut_holes(images[part], values[part], fill)
    if counts[KIND_OF["rescale"]]:
        part = extent("rescale", "rescale")
        images[part] = rescaled(images[part], values[part, 0], (values[part, 1] * len(_FILTER_SUPPORT)).long())
    if counts[KIND_OF["hue"]]:
        part = extent("hue", "hue")
        images[part] = _turned(images[part], values[part, 0])
    if counts[KIND_OF["gaussian"]]:
        part = extent("gaussian", "gaussian")
        weights = _gaussians(values[part, 0], images.shape[-1])[:, None]
        images[part] = (weights @ images[part] @ weights.mT).clamp_(0, 1)


def _mixed(images: Tensor, counts: list[int], weight: Tensor) -> Tensor:
    """Give w * image + (1 - w) * other, where the operation says what the other image is."""
    groups = torch.split(images, [counts[KIND_OF[name]] for name in MIXTURES])
    # Black is the other image of brightness.
    other = torch.zeros_like(images)
    others = dict(zip(MIXTURES, torch.split(other, [len(group) for group in groups]), strict=True))
    originals = dict(zip(MIXTURES, groups, strict=True))
    if len(originals["color"]):
        others["color"].copy_(_grey(originals["color"]).expand_as(originals["color"]))
    if len(originals["contrast"]):
        others["contrast"].copy_(
            _grey(originals["contrast"]).mean((1, 2, 3), keepdim=True).expand_as(others["contrast"])
        )
    for name in ("sharpness", "smooth"):
        if len(originals[name]):
            others[name].copy_(_smoothed(originals[name]))
    if len(originals["blur"]):
        others["blur"].copy_(_blurred(originals["blur"]))
    if len(originals["invert"]):
        torch.sub(1, originals["invert"], out=others["invert"])
    if len(originals["autocontrast"]):
        others["autocontrast"].copy_(_stretched(originals["autocontrast"]))
    if len(originals["equalize"]):
        others["equalize"].copy_(_equalized(originals["equalize"]))
    return other.lerp_(images, weight[:, None, None, None]).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = _LUMINANCE
    return red * images[:, 0:1] + green * images[:, 1:2] + blue * images[:, 2:3]


def _smoothed(images: Tensor) -> Tensor:
    """Pillow's SMOOTH: 3 x 3 with a centre of 5, over 13; the border is left as it is."""
    result = images.clone()
    inner = result[..., 1:-1, 1:-1]
    inner.mul_(4).add_(_sums(images, 3)).div_(13)
    return result


def _blurred(images: Tensor) -> Tensor:
    """Pillow's BLUR: the mean of the 16 pixels on the rim of 5 x 5; two border pixels are left as they are."""
    result = images.clone()
    result[..., 2:-2, 2:-2] = (_sums(images, 5) - _sums(images[..., 1:-1, 1:-1], 3)).div_(16)
    return result


def _sums(images: Tensor, size: int) -> Tensor:
    """Sums over all squares of `size` pixels; several times as fast as pooling on the CPU."""
    for dimension in (2, 3):
        length = images.shape[dimension] - size + 1
        total = images.narrow(dimension, 0, length) + images.narrow(dimension, 1, length)
        for start in range(2, size):
            total += images.narrow(dimension, start, length)
        images = total
    return images


def _stretched(images: Tensor) -> Tensor:
    """Each channel from 0 to 1; one that is constant in 8 bits stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    constant = high - low < 0.5 / 255
    return (images - low.masked_fill(constant, 0)) / (high - low).masked_fill(constant, 1)


def _equalized(images: Tensor) -> Tensor:
    """Pillow's equalize of each channel: the cumulative histogram in whole steps of (pixels - brightest ones) // 255.

    Where the step is 0, which it always is in images under 256 pixels, the channel stays as it is.
    """
    pixels = images.shape[2] * images.shape[3]
    if pixels <= 255:
        return images
    level = (images * 255).round().long().flatten(2)
    histogram = torch.zeros(*level.shape[:2], 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(2, level, torch.ones_like(level))
    brightest = histogram.gather(2, level.amax(2, keepdim=True))
    step = (pixels - brightest) // 255
    below = histogram.cumsum(2) - histogram
    table = ((below + step // 2) // step.clamp_min(1)).clamp_(0, 255).to(images.dtype) / 255
    return torch.where(step > 0, table.gather(2, level), images.flatten(2)).view_as(images)


def _posterized(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the first bits of the 8-bit values."""
    step = torch.exp2(8 - bits)[:, None, None, None]
    return ((images * 255).round() / step).floor() * step / 255


def affine_matrices(kinds: Tensor, values: Tensor, side: int) -> Tensor:
    """Say where the pixels of each image come from.

    Args:
        kinds: Operations [n] as numbers in `policies.KINDS`, of those in `policies.AFFINE`.
        values: Degrees against the clock for rotations, shares of the side for the others [n].
        side: Side of the images in pixels.

    Returns:
        Maps [n, 2, 3] in coordinates from -1 to 1, as `affine_grid` takes them.
    """
    degrees, shear_x, shear_y, move_x, move_y = (
        torch.where(kinds == KIND_OF[name], values, torch.zeros_like(values)) for name in AFFINE
    )
    angle = degrees * (math.pi / 180)
    # By whole pixels, which blurs nothing.
    move_x, move_y = ((2 / side) * (side * move).round() for move in (move_x, move_y))
    # Shears leave the upper left corner where it is, as in Pillow and torchvision: x + r y there is x + r y + r here.
    cos, sin = angle.cos(), angle.sin()
    rows = (cos, shear_x - sin, shear_x + move_x, shear_y + sin, cos, shear_y + move_y)
    return torch.stack(rows, 1).view(-1, 2, 3)


def warp(images: Tensor, matrices: Tensor, fill: float) -> Tensor:
    """Move pixels by affine maps, one an image, with bilinear interpolation.

    Args:
        images: Images [n, C, H, W].
        matrices: Maps [n, 2, 3] from where a pixel goes to where it comes from, in coordinates from -1 to 1.
        fill: Grey level outside the images.

    Returns:
        Images of the same shape.
    """
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    # Zeros are what grid_sample sees outside.
    return F.grid_sample(images - fill, grid, padding_mode="zeros", align_corners=False).add_(fill).clamp_(0, 1)


def rescaled(images: Tensor, margin: Tensor, filters: Tensor) -> Tensor:
    """Enlarge the middle of each image to its size, with one of six filters.

    Args:
        images: Images [n, C, S, S].
        margin: What is cut off at each side, as a share of the side [n], below 0.5.
        filters: Filter of each image [n]: Lanczos, bicubic, bilinear, box, Hamming, nearest.

    Returns:
        Images of the same shape in [0, 1].
    """
    weights = _resampling(margin, filters, images.shape[-1])[:, None]
    return (weights @ images @ weights.mT).clamp_(0, 1)


def _resampling(margin: Tensor, filters: Tensor, side: int) -> Tensor:
    """Weights [n, out, in] of the pixels of a line that is cropped and enlarged again."""
    # Pillow crops whole pixels.
    first = (margin * side).round()[:, None, None]
    last = ((1 - margin) * side).round()[:, None, None]
    pixel = torch.arange(side, device=margin.device, dtype=margin.dtype) + 0.5
    source = first + pixel[:, None] * (last - first) / side
    distance = pixel - source
    choice = filters[:, None, None]
    x = distance.abs()
    lanczos = torch.sinc(x) * torch.sinc(x / 3)
    cubic = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    hamming = torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x))
    weights = torch.ones_like(x)
    for number, kernel in ((0, lanczos), (1, cubic), (2, 1 - x), (4, hamming)):
        weights = torch.where(choice == number, kernel, weights)
    support = torch.tensor(_FILTER_SUPPORT, device=margin.device, dtype=margin.dtype)[filters][:, None, None]
    # Half open for the box and the nearest pixel, of which exactly one is inside.
    inside = (distance >= -support) & (distance < support) & (pixel > first) & (pixel < last)
    weights = weights * inside
    return weights / weights.sum(2, keepdim=True)


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue, with saturation and value of HSV as they are; grey stays grey."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    divisor = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixth = sixth + 6 * turns[:, None, None]
    channels = []
    for offset in (5, 3, 1):
        k = (offset + sixth).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1).clamp_(0, 1)


def _gaussians(deviation: Tensor, side: int) -> Tensor:
    """Weights [n, out, in] of the pixels of a blurred line, which goes on outside as it is at its ends."""
    reaches = (3 * deviation + 0.5).floor()[:, None, None]
    reach = int(reaches.max())
    pixel = torch.arange(side, device=deviation.device, dtype=deviation.dtype)
    source = torch.arange(-reach, side + reach, device=deviation.device, dtype=deviation.dtype)
    distance = (source - pixel[:, None]).abs()
    weights = torch.exp(-0.5 * (distance / deviation[:, None, None]).square()) * (distance <= reaches)
    weights = weights / weights.sum(2, keepdim=True)
    inside = weights[..., reach : reach + side].clone()
    inside[..., 0] += weights[..., :reach].sum(2)
    inside[..., -1] += weights[..., reach + side :].sum(2)
    return inside
