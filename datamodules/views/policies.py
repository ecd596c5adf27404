"""What is done to each image, as random numbers: drawn here for batches and for single images alike."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from datamodules.ctaugment import BINS, DEPTH, OPS, bin_probabilities, choose_bins
from datamodules.views.crops import Crop, MultiCrop, draw_crop

WeakName = Literal["flip_crop", "crop", "none"]
StrongName = Literal["randaugment", "ctaugment", "trivial"]

# What can be done to an image. The order puts operations together that are computed together.
# Mixtures w * image + (1 - w) * (what the name says), the value is w:
MIXTURES = (
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "smooth",
    "blur",
    "invert",
    "autocontrast",
    "equalize",
)
AFFINE = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
KINDS = ("identity", *MIXTURES, "posterize", "solarize", *AFFINE, "cutout", "rescale", "hue", "gaussian")
KIND_OF = {name: number for number, name in enumerate(KINDS)}

# RandAugment as FixMatch uses it: K. Sohn et al., "FixMatch", arXiv:2001.07685, Table 12. Brightness, colour, contrast
# and sharpness are the weight of the image against black, grey, its mean grey and a smoothed copy; autocontrast and
# equalize have no strength and replace the image. Rotations are degrees; shears and translations shares of the side.
RANDAUGMENT: tuple[tuple[str, float, float], ...] = (
    ("autocontrast", 0.0, 0.0),
    ("brightness", 0.05, 0.95),
    ("color", 0.05, 0.95),
    ("contrast", 0.05, 0.95),
    ("equalize", 0.0, 0.0),
    ("identity", 0.0, 0.0),
    ("posterize", 4.0, 8.0),
    ("rotate", -30.0, 30.0),
    ("sharpness", 0.05, 0.95),
    ("shear_x", -0.3, 0.3),
    ("shear_y", -0.3, 0.3),
    ("solarize", 0.0, 1.0),
    ("translate_x", -0.3, 0.3),
    ("translate_y", -0.3, 0.3),
)

# CTAugment: value at level 0 and at level 1 of the first parameter, as in the official code (google-research/fixmatch,
# libml/ctaugment.py). Its translations are 0.3 of a pixel, which does nothing; the paper's 0.3 of the side are meant.
_CTAUGMENT: dict[str, tuple[float, float]] = {
    "autocontrast": (1.0, 0.0),
    "blur": (1.0, 0.0),
    "brightness": (0.1, 2.0),
    "color": (0.1, 2.0),
    "contrast": (0.1, 2.0),
    "cutout": (0.0, 0.5),
    "equalize": (1.0, 0.0),
    "invert": (1.0, 0.0),
    "identity": (0.0, 0.0),
    "posterize": (1.0, 8.0),
    "rescale": (0.0, 0.25),
    "rotate": (-45.0, 45.0),
    "sharpness": (0.1, 2.0),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "smooth": (1.0, 0.0),
    "solarize": (0.0, 1.0),
    "translate_x": (-0.3, 0.3),
    "translate_y": (-0.3, 0.3),
}
CTAUGMENT: tuple[tuple[str, float, float], ...] = tuple((name, *_CTAUGMENT[name]) for name, _, _ in OPS)
RESCALE_FILTERS = 6

CROPPED = ("random", "focal")
_JITTER_PROBABILITY = 0.8
_JITTERED = ("brightness", "contrast", "color", "hue")


@dataclass(frozen=True)
class ViewSettings:
    """What views are made of; the arguments of BatchViews and WorkerViews.

    Attributes:
        image_size: Side of the square images in pixels.
        weak: Weak augmentation.
        strong: Strong augmentation.
        num_ops: Operations of a strong view.
        cutout: Largest side of the hole as a share of the image's side.
        crop_padding: Pixels, or a share of the side.
        fill: Grey level of holes and of what lies outside.
        crops: Random and focal views; None has none.
    """

    image_size: int
    weak: WeakName = "flip_crop"
    strong: StrongName = "randaugment"
    num_ops: int = 2
    cutout: float = 0.5
    crop_padding: int | float = 0.125
    fill: float = 0.5
    crops: MultiCrop | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A setting is unknown or out of range.
        """
        for name, value, known in (
            ("weak", self.weak, ("flip_crop", "crop", "none")),
            ("strong", self.strong, ("randaugment", "ctaugment", "trivial")),
        ):
            if value not in known:
                msg = f"Expected argument `{name}` to be one of {known}, but got {value!r}."
                raise ValueError(msg)
        if self.image_size < 5:
            msg = f"Expected argument `image_size` to be at least 5 pixels, but got {self.image_size}."
            raise ValueError(msg)
        if self.num_ops < 1:
            msg = f"Expected argument `num_ops` to be at least 1, but got {self.num_ops}."
            raise ValueError(msg)
        for name, number in (("cutout", self.cutout), ("fill", self.fill)):
            if not 0 <= number <= 1:
                msg = f"Expected argument `{name}` to be in [0, 1], but got {number}."
                raise ValueError(msg)
        if self.crop_padding < 0 or self.pad >= self.image_size:
            msg = (
                "Expected argument `crop_padding` to be pixels (an int) or a share of the side (a float), less than "
                f"the side of {self.image_size} pixels, but got {self.crop_padding!r}."
            )
            raise ValueError(msg)

    @property
    def pad(self) -> int:
        """Pixels that an image may be shifted by at most."""
        if isinstance(self.crop_padding, int):
            return self.crop_padding
        return round(self.crop_padding * self.image_size)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the views that can be made."""
        further = (("probe", self.strong == "ctaugment"), *((name, self.crops is not None) for name in CROPPED))
        return ("plain", "weak", "strong", *(name for name, there in further if there))


@dataclass(frozen=True)
class Shift:
    """Flips and crops of B images.

    Attributes:
        flip: Whether an image is mirrored [B].
        top: First row of the crop in the padded image [B].
        left: First column of the crop in the padded image [B].
    """

    flip: Tensor
    top: Tensor
    left: Tensor


@dataclass(frozen=True)
class Plan:
    """What is done to B images for one view, on the CPU.

    Attributes:
        shift: Flip and crop; None leaves the images where they are.
        kinds: Operations [B, K] as numbers in KINDS.
        values: Their strengths [B, K, 3]. The second and third number are the filter of `rescale`, and the centre
            (row, column) of `cutout` as shares of the side. That of `hue` is a part of a turn, that of `gaussian` a
            deviation in pixels.
        hole: Hole at the end [B, 3]: side and centre (row, column) as shares of the side; None for no hole.
        ops: CTAugment's numbers of the operations [B, K].
        bins: CTAugment's bins [B, K, 2]; -1 for a parameter that an operation lacks.
        crop: Crop that comes before everything else; None for none.
    """

    shift: Shift | None = None
    kinds: Tensor | None = None
    values: Tensor | None = None
    hole: Tensor | None = None
    ops: Tensor | None = None
    bins: Tensor | None = None
    crop: Crop | None = None

    def of(self, part: slice) -> "Plan":
        """Give the plan of some of the images."""

        def cut(numbers: Tensor | None) -> Tensor | None:
            return None if numbers is None else numbers[part]

        shift = self.shift and Shift(self.shift.flip[part], self.shift.top[part], self.shift.left[part])
        crop = self.crop and self.crop.of(part)
        return Plan(shift, cut(self.kinds), cut(self.values), cut(self.hole), cut(self.ops), cut(self.bins), crop)


def _kinds(table: tuple[tuple[str, float, float], ...]) -> Tensor:
    return torch.tensor([KIND_OF[name] for name, _, _ in table])


def _ranges(table: tuple[tuple[str, float, float], ...]) -> Tensor:
    return torch.tensor([[low, high] for _, low, high in table])


_RANDAUGMENT_KINDS, _RANDAUGMENT_RANGES = _kinds(RANDAUGMENT), _ranges(RANDAUGMENT)
_CTAUGMENT_KINDS, _CTAUGMENT_RANGES = _kinds(CTAUGMENT), _ranges(CTAUGMENT)


def _whole(uniform: Tensor, count: int | Tensor) -> Tensor:
    """Whole numbers from 0 to `count` - 1 from uniform ones in [0, 1)."""
    return (uniform * count).long()


def _shift(settings: ViewSettings, uniform: Tensor) -> Shift | None:
    """Flips and crops from uniform numbers [3, B]."""
    if settings.weak == "none":
        return None
    flip = (uniform[0] < 0.5) if settings.weak == "flip_crop" else torch.zeros_like(uniform[0], dtype=torch.bool)
    return Shift(flip, _whole(uniform[1], 2 * settings.pad + 1), _whole(uniform[2], 2 * settings.pad + 1))


def _values(kinds: Tensor, ranges: Tensor, levels: Tensor) -> Tensor:
    """Strengths [B, K, 3] from levels in [0, 1]; only the first one has a range, the others are shares as they are."""
    low, high = ranges.unbind(-1)
    first = low + levels[..., 0] * (high - low)
    bits = torch.minimum((low + levels[..., 0] * (high - low + 1)).floor(), high)
    first = torch.where(kinds == KIND_OF["posterize"], bits, first)
    return torch.cat([first[..., None], levels[..., 1:]], -1)


def _draw_cropped(settings: ViewSettings, crops: MultiCrop, name: str, count: int, generator: torch.Generator) -> Plan:
    """Draw random or focal views: a crop, four changes of colour in random order, grey, blur."""
    side = settings.image_size
    share, size = (
        (crops.random_share, crops.random_size or side) if name == "random" else (crops.focal_share, crops.focal_size)
    )
    crop = draw_crop(share, side, size, crops.flip, count, generator)
    order = torch.rand(count, 4, generator=generator).argsort(1)
    uniform = torch.rand(count, 4, generator=generator)
    chance = torch.rand(count, 4, generator=generator)
    spread = torch.tensor([0.8 * crops.jitter] * 3 + [0.2 * crops.jitter])
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0])
    jittered = torch.tensor([KIND_OF[kind] for kind in _JITTERED])
    values = (middle + (2 * uniform - 1) * spread).gather(1, order)
    on = chance[:, :3] < torch.tensor([_JITTER_PROBABILITY * (crops.jitter > 0), crops.grey, crops.blur])
    last = torch.tensor([KIND_OF["color"], KIND_OF["gaussian"]])
    kinds = torch.cat([jittered[order], last.expand(count, 2)], 1)
    kinds = torch.where(torch.cat([on[:, :1].expand(-1, 4), on[:, 1:]], 1), kinds, KIND_OF["identity"])
    radius = crops.blur_radius * (0.05 + 0.95 * chance[:, 3:])
    first = torch.cat([values, torch.zeros(count, 1), radius], 1)
    return Plan(kinds=kinds, values=torch.stack([first, *[torch.zeros_like(first)] * 2], -1), crop=crop)


def draw_plan(
    settings: ViewSettings, name: str, count: int, generator: torch.Generator, rates: Tensor | None = None
) -> Plan:
    """Draw what is done to each of some images for one view.

    Args:
        settings: What views are made of.
        name: "plain", "weak", "strong", "probe", "random" or "focal".
        count: Number of images B.
        generator: Random numbers, on the CPU.
        rates: CTAugment's table; None draws all bins equally often.

    Returns:
        The plan; its random numbers belong to no other plan and differ from image to image.
    """
    if name == "plain":
        return Plan()
    if name in CROPPED and settings.crops is not None:
        return _draw_cropped(settings, settings.crops, name, count, generator)
    shift = _shift(settings, torch.rand(3, count, generator=generator))
    if name == "weak":
        return Plan(shift)
    depth = {"randaugment": settings.num_ops, "trivial": 1, "ctaugment": DEPTH}[settings.strong]
    uniform = torch.rand(count, depth, 6, generator=generator)
    hole = torch.rand(count, 3, generator=generator)
    hole[:, 0] *= settings.cutout
    if settings.strong != "ctaugment":
        ops = _whole(uniform[..., 0], len(RANDAUGMENT))
        kinds = _RANDAUGMENT_KINDS[ops]
        return Plan(shift, kinds, _values(kinds, _RANDAUGMENT_RANGES[ops], uniform[..., 1:4]), hole)
    ops = _whole(uniform[..., 0], len(OPS))
    kinds = _CTAUGMENT_KINDS[ops]
    probabilities = None if rates is None or name == "probe" else bin_probabilities(rates)
    bins = choose_bins(ops, uniform[..., 4:], probabilities)
    # A uniform place within its bin where there is one; without bins, the number as it was drawn.
    place = uniform[..., 1:3]
    levels = torch.where(bins < 0, place, (bins + place) / BINS[ops].clamp_min(1))
    values = _values(kinds, _CTAUGMENT_RANGES[ops], torch.cat([levels, uniform[..., 3:4]], -1))
    return Plan(shift, kinds, values, None if name == "probe" else hole, ops, bins)
