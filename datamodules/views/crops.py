"""Crops of random size and place, of which self-supervised methods compare several of one image."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many
_RATIO = 4 / 3


@dataclass(frozen=True)
class MultiCrop:
    """Random and focal views: crops of an image, enlarged or shrunk to one size each, then changed in colour.

    A random view shows much of an image, a focal view a small part at a smaller size (M. Assran et al., "Masked Siamese
    Networks", arXiv:2204.07141, appendix C; the sizes and shares are theirs for images of 224 pixels). Colours are
    changed as in SimCLR (T. Chen et al., arXiv:2002.05709, appendix A): with probability 0.8 brightness, contrast and
    saturation by a factor 1 +- 0.8 jitter and the hue by +- 0.2 jitter of a turn, in random order.

    Args:
        focal_size: Side of a focal view in pixels.
        random_size: Side of a random view in pixels; None takes that of the images.
        random_share: Least and largest share of the image's area in a random view.
        focal_share: Least and largest share of the image's area in a focal view.
        flip: Mirror every second view, by chance. Digits do not survive it.
        jitter: Strength of the change of colours, in [0, 1]; 0 leaves them.
        grey: Probability that a view loses its colours.
        blur: Probability that a view is blurred.
        blur_radius: Largest deviation of the Gaussian that blurs, in pixels of the view; the least is a twentieth.

    Raises:
        ValueError: An argument is out of range.
    """

    focal_size: int = 96
    random_size: int | None = None
    random_share: tuple[float, float] = (0.3, 1.0)
    focal_share: tuple[float, float] = (0.05, 0.3)
    flip: bool = True
    jitter: float = 0.5
    grey: float = 0.2
    blur: float = 0.5
    blur_radius: float = 2.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, size in (("focal_size", self.focal_size), ("random_size", self.random_size)):
            if size is not None and size < 5:
                msg = f"Expected argument `{name}` to be at least 5 pixels, but got {size}."
                raise ValueError(msg)
        for name, share in (("random_share", self.random_share), ("focal_share", self.focal_share)):
            if not 0 < share[0] <= share[1] <= 1:
                msg = (
                    f"Expected argument `{name}` to be the least and the largest share of the area, in (0, 1], but got "
                    f"{share}."
                )
                raise ValueError(msg)
        for name, number in (("jitter", self.jitter), ("grey", self.grey), ("blur", self.blur)):
            if not 0 <= number <= 1:
                msg = f"Expected argument `{name}` to be in [0, 1], but got {number}."
                raise ValueError(msg)
        if self.blur_radius <= 0:
            msg = (
                f"Expected argument `blur_radius` to be positive, but got {self.blur_radius}; `blur: 0` blurs nothing."
            )
            raise ValueError(msg)


@dataclass(frozen=True)
class Crop:
    """Crops of B images.

    Attributes:
        size: Side of the result in pixels.
        flip: Whether the result is mirrored [B].
        top: First row [B].
        left: First column [B].
        height: Rows [B].
        width: Columns [B].
    """

    size: int
    flip: Tensor
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    def of(self, part: slice) -> "Crop":
        """Give the crops of some of the images."""
        numbers = (self.flip, self.top, self.left, self.height, self.width)
        return Crop(self.size, *(number[part] for number in numbers))


def draw_crop(
    share: tuple[float, float], side: int, size: int, flip: bool, count: int, generator: torch.Generator
) -> Crop:
    """Draw crops of a uniformly random share of the area, with sides in a ratio of 3:4 to 4:3.

    Ratios are uniform in the logarithm. What would stick out of the image is drawn again, ten times at most; then it is
    the whole image.

    Args:
        share: Least and largest share of the area.
        side: Side of the images in pixels.
        size: Side of the result in pixels.
        flip: Mirror every second result, by chance.
        count: Number of images.
        generator: Random numbers, on the CPU; as many are taken whatever they are.
    """
    uniform = torch.rand(count, _TRIES, 2, generator=generator)
    place = torch.rand(3, count, generator=generator)
    area = side * side * (share[0] + uniform[..., 0] * (share[1] - share[0]))
    ratio = torch.exp((2 * uniform[..., 1] - 1) * math.log(_RATIO))
    width, height = ((area * part).sqrt().round().long().clamp_min(1) for part in (ratio, 1 / ratio))
    fits = (width <= side) & (height <= side)
    first = fits.int().argmax(1, keepdim=True)  # of equal values the first
    found = fits.any(1)
    width, height = (torch.where(found, part.gather(1, first)[:, 0], side) for part in (width, height))
    top, left = ((place[i] * (side - part + 1)).long() for i, part in ((0, height), (1, width)))
    mirrored = (place[2] < 0.5) if flip else torch.zeros(count, dtype=torch.bool)
    return Crop(size, mirrored, top, left, height, width)
