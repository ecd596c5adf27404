"""Which images a generator is asked for."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

SamplerName = Literal["euler", "heun", "ancestral", "dpmpp_2m"]


@dataclass(frozen=True)
class DrawRequest:
    """Which images to draw, and how: (image, mask) pairs, or images of given classes.

    Pair i has the seed `first_seed` + i. Of K classes, image j of class c has the seed `first_seed` + j * K + c: asking
    for more images of a class adds some and changes none. Images are drawn in blocks of `batch_size`, in the order of
    their seeds; blocks are a function of the request alone, so the files are the same on any number of devices and
    after any interruption.

    Args:
        num_images: Number of pairs; None for images of classes.
        image_size: Side of the images in pixels.
        first_seed: The smallest seed.
        batch_size: Images drawn at once, on each device.
        sampler: How the reverse process is integrated: euler (DDIM), heun and dpmpp_2m (DPM-Solver++, second order,
            multistep) solve its ODE, ancestral its SDE.
        num_steps: Steps of the sampler.
        images_per_class: Number of images of each class, or one number for all of them; None for pairs.
        num_classes: Number K of classes that `images_per_class` is about; None for pairs. SyntheticImageWriter takes a
            missing one from the data when a fit starts; until then such a request names no image.
        guidance: Weight w of classifier-free guidance, D = D_c + w (D_c - D_null) for the denoisers of class c and of
            no class; 0 is none. Only for images of classes.
        only: Seeds of some of these images, the smallest first, where no others are asked for; None asks for all.
            Only for images of classes.

    Raises:
        ValueError: An argument is out of range, or two of them contradict each other.
    """

    num_images: int | None
    image_size: int
    first_seed: int = 0
    batch_size: int = 32
    sampler: SamplerName = "heun"
    num_steps: int = 50
    images_per_class: int | list[int] | None = None
    num_classes: int | None = None
    guidance: float = 0.0
    only: list[int] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if (self.num_images is None) == (self.images_per_class is None):
            msg = (
                "Expected either argument `num_images` (pairs) or argument `images_per_class` (images of classes), but "
                f"got {'neither' if self.num_images is None else 'both'}; give one of them."
            )
            raise ValueError(msg)
        least = {"num_images": 1, "image_size": 1, "first_seed": 0, "batch_size": 1, "num_steps": 1}
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                msg = f"Expected argument `{name}` to be at least {minimum}, but got {value}."
                raise ValueError(msg)
        _require_classes(self.images_per_class, self.num_classes, self.guidance)
        if self.sampler not in get_args(SamplerName):
            names = ", ".join(get_args(SamplerName))
            msg = f"Expected argument `sampler` to be one of {names}, but got {self.sampler!r}."
            raise ValueError(msg)
        if self.only is not None:
            self._require_own(self.only)
        if not self.is_open and self._seeds[-1] >= 2**32:
            # PyTorch reads 32 bits of a seed.
            msg = (
                f"Expected argument `first_seed` to leave the seeds of {self.total} images below 2^32, but got "
                f"{self.first_seed}; start from a smaller one."
            )
            raise ValueError(msg)

    def _require_own(self, only: list[int]) -> None:
        if not self.has_classes or self.is_open:
            msg = f"Expected argument `only` with `images_per_class` and `num_classes`, but got {len(only)} seeds."
            raise ValueError(msg)
        own = set(self._all_seeds)
        strange = [seed for seed in only if seed not in own]
        if strange or not only or any(a >= b for a, b in pairwise(only)):
            what = f"{strange[0]}, which is none of them" if strange else "none" if not only else "some out of order"
            msg = f"Expected argument `only` to be seeds of the request, the smallest first, but got {what}."
            raise ValueError(msg)

    @property
    def is_open(self) -> bool:
        """Whether nobody has said yet how many classes there are."""
        return self.has_classes and self.num_classes is None

    @property
    def has_classes(self) -> bool:
        """Whether images of classes are asked for, instead of pairs."""
        return self.images_per_class is not None

    @property
    def noun(self) -> str:
        """What is drawn, in one word."""
        return "images" if self.has_classes else "pairs"

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of images of each class; empty for pairs."""
        if self.only is not None:
            labels = Counter(map(self.label, self.only))
            return tuple(labels[c] for c in range(self._num_classes))
        return self._asked

    @property
    def _asked(self) -> tuple[int, ...]:
        """Number of images of each class before `only` leaves some out."""
        if isinstance(self.images_per_class, int):
            return (self.images_per_class,) * (self.num_classes or 0)
        return tuple(self.images_per_class or ())

    @property
    def total(self) -> int:
        """Number of images, of all classes together."""
        return len(self._seeds)

    @property
    def num_blocks(self) -> int:
        """How many blocks there are; the last one may be shorter."""
        return -(-self.total // self.batch_size)

    @property
    def _num_classes(self) -> int:
        return len(self._asked)

    @property
    def _seeds(self) -> Sequence[int]:
        return self._all_seeds if self.only is None else self.only

    @cached_property
    def _all_seeds(self) -> Sequence[int]:
        first, counts = self.first_seed, self._asked
        if self.num_images is not None or len(set(counts)) == 1:
            return range(first, first + (self.num_images or sum(counts)))
        return sorted(first + j * len(counts) + c for c, count in enumerate(counts) for j in range(count))

    def seeds(self, block: int) -> Sequence[int]:
        """Return the seeds of a block, the smallest first."""
        return self._seeds[block * self.batch_size : (block + 1) * self.batch_size]

    def block_of(self, seed: int) -> int:
        """Return the number of the block that has a seed of this request."""
        return bisect_left(self._seeds, seed) // self.batch_size

    def label(self, seed: int) -> int:
        """Return the class that a seed of this request stands for; images of classes only."""
        return (seed - self.first_seed) % self._num_classes

    def batch(self, block: int) -> dict[str, Any]:
        """Return a block as what a module's `draw` takes, see `batch_of`.

        Args:
            block: Number of the block, from 0.
        """
        return self.batch_of(self.seeds(block))

    def batch_of(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return images of this request as what a module's `draw` takes.

        Args:
            seeds: Seeds of the request.

        Returns:
            seed int64 [B], image_size, sampler and num_steps; for images of classes also label int64 [B], from 0 to
            K - 1, and guidance.
        """
        how: dict[str, Any] = {"image_size": self.image_size, "sampler": self.sampler, "num_steps": self.num_steps}
        if self.has_classes:
            labels = torch.tensor([self.label(seed) for seed in seeds], dtype=torch.int64)
            how |= {"label": labels, "guidance": self.guidance}
        return {"seed": torch.tensor(list(seeds), dtype=torch.int64), **how}

    def trial(self) -> "DrawRequest":
        """Return the quickest request of this kind: its first image, in one step."""
        quick = replace(self, batch_size=1, num_steps=1, only=None)
        if not self.has_classes:
            return replace(quick, num_images=1)
        first = next(c for c, count in enumerate(self.counts) if count)
        return replace(quick, images_per_class=[int(c == first) for c in range(len(self.counts))])

    def description(self) -> dict[str, Any]:
        """Return what decides the images, for a manifest; equal requests are described alike."""
        known = asdict(self)
        if self.only is None:
            # Folders that were begun before there was `only` go on.
            del known["only"]
        if self.has_classes:
            return known | {"num_images": self.total, "images_per_class": list(self.counts)}
        return {name: known[name] for name in known if name not in ("images_per_class", "num_classes", "guidance")}


def _require_classes(images_per_class: int | list[int] | None, num_classes: int | None, guidance: float) -> None:
    if images_per_class is None:
        given = {"num_classes": num_classes, "guidance": guidance or None}
        for name, value in given.items():
            if value is not None:
                msg = f"Expected argument `{name}` only with `images_per_class`, but got {value}; leave it out."
                raise ValueError(msg)
        return
    if num_classes is None and isinstance(images_per_class, list):
        num_classes = len(images_per_class)
    if num_classes is not None and num_classes < 2:
        msg = f"Expected argument `num_classes` to be at least 2 with `images_per_class`, but got {num_classes}."
        raise ValueError(msg)
    if not (math.isfinite(guidance) and guidance >= 0):
        msg = f"Expected argument `guidance` to be finite and at least 0, but got {guidance}; 0 is no guidance."
        raise ValueError(msg)
    if isinstance(images_per_class, list) and len(images_per_class) != num_classes:
        msg = (
            f"Expected argument `images_per_class` to have one number for each of {num_classes} classes "
            f"(`num_classes`), but got {len(images_per_class)}; give all of them, 0 for none, or one number for all."
        )
        raise ValueError(msg)
    counts = images_per_class if isinstance(images_per_class, list) else [images_per_class]
    if min(counts) < 0 or not any(counts):
        msg = (
            f"Expected argument `images_per_class` to be at least 0, and above 0 for some class, but got "
            f"{images_per_class}; ask for an image at least."
        )
        raise ValueError(msg)
