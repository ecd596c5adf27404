"""Which pairs a generator is asked for."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

SamplerName = Literal["euler", "heun", "ancestral"]


@dataclass(frozen=True)
class DrawRequest:
    """Which (image, mask) pairs to draw, and how.

    Pair i has the seed `first_seed` + i. Pairs are drawn in blocks of `batch_size`, block b being the seeds from
    `first_seed` + b * `batch_size` on; blocks are a function of the request alone, so the files are the same on any
    number of devices and after any interruption.

    Args:
        num_images: Number of pairs.
        image_size: Side of the images in pixels.
        first_seed: Seed of the first pair.
        batch_size: Pairs drawn at once, on each device.
        sampler: How the reverse process is integrated: euler (DDIM) and heun solve its ODE, ancestral its SDE.
        num_steps: Steps of the sampler.

    Raises:
        ValueError: An argument is out of range.
    """

    num_images: int
    image_size: int
    first_seed: int = 0
    batch_size: int = 32
    sampler: SamplerName = "heun"
    num_steps: int = 50

    def __post_init__(self) -> None:
        """Check the arguments."""
        least = {"num_images": 1, "image_size": 1, "first_seed": 0, "batch_size": 1, "num_steps": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                msg = f"Expected argument `{name}` to be at least {minimum}, but got {getattr(self, name)}."
                raise ValueError(msg)
        if self.first_seed + self.num_images > 2**32:
            # PyTorch reads 32 bits of a seed.
            msg = (
                f"Expected argument `first_seed` to leave the seeds of {self.num_images} images below 2^32, but got "
                f"{self.first_seed}; start from a smaller one."
            )
            raise ValueError(msg)
        if self.sampler not in get_args(SamplerName):
            names = ", ".join(get_args(SamplerName))
            msg = f"Expected argument `sampler` to be one of {names}, but got {self.sampler!r}."
            raise ValueError(msg)

    @property
    def num_blocks(self) -> int:
        """How many blocks there are; the last one may be shorter."""
        return -(-self.num_images // self.batch_size)

    def seeds(self, block: int) -> range:
        """Return the seeds of a block."""
        first = self.first_seed + block * self.batch_size
        return range(first, min(first + self.batch_size, self.first_seed + self.num_images))

    def batch(self, block: int) -> dict[str, Any]:
        """Return a block as what a module's `draw` takes.

        Args:
            block: Number of the block, from 0.

        Returns:
            seed int64 [B], image_size, sampler and num_steps.
        """
        seeds = torch.tensor(list(self.seeds(block)), dtype=torch.int64)
        how = {"image_size": self.image_size, "sampler": self.sampler, "num_steps": self.num_steps}
        return {"seed": seeds, **how}
