"""Requests for a generator's `predict`: which images to draw."""

from collections.abc import Collection
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from datamodules.draw_request import DrawRequest, SamplerName
from datamodules.loading import world

Request = dict[str, Any]


class SamplingDataModule(pl.LightningDataModule):
    """Asks a module for (image, mask) pairs or images of classes; what it draws is written by SyntheticImageWriter.

    A batch is a block of a DrawRequest: `seed` int64 [B], `image_size`, `sampler` and `num_steps`, with classes also
    `label` int64 [B] and `guidance`. Under DDP each process takes whole blocks, so an image is drawn in the same batch
    on any number of devices.

    Args:
        num_images: Number of pairs; left out (None) for images of classes.
        num_classes: Number of classes of the module, for pairs background included; the command line gives it to the
            module.
        image_size: Side of the images in pixels; the one that the module was trained with, unless its network takes
            others.
        first_seed: The smallest seed; the others count on from it, see DrawRequest.
        batch_size: Images drawn at once, on each device.
        sampler: How the reverse process is integrated: euler (DDIM), heun and dpmpp_2m (DPM-Solver++, second order,
            multistep) solve its ODE, ancestral its SDE.
        num_steps: Steps of the sampler.
        class_names: Names of the classes, for pairs background first; those of images are their folders. None takes
            what the checkpoint says.
        images_per_class: Number of images of each class, 0 for none, or one number for all of them; None draws pairs.
        guidance: Weight of classifier-free guidance for images of classes; 0 is none.

    Attributes:
        request: All of the above that decides what is drawn.

    Raises:
        ValueError: An argument is out of range, or two of them contradict each other.
    """

    def __init__(
        self,
        num_images: int | None,
        num_classes: int,
        image_size: int,
        first_seed: int = 0,
        batch_size: int = 32,
        sampler: SamplerName = "heun",
        num_steps: int = 50,
        class_names: list[str] | None = None,
        images_per_class: int | list[int] | None = None,
        guidance: float = 0.0,
    ) -> None:
        """Check the arguments."""
        super().__init__()
        classes = None if images_per_class is None else num_classes
        self.request = DrawRequest(
            num_images,
            image_size,
            first_seed,
            batch_size,
            sampler,
            num_steps,
            images_per_class,
            classes,
            guidance,
        )
        if classes is None and not 2 <= num_classes <= 255:
            msg = f"Expected argument `num_classes` to be from 2 to 255, background included, but got {num_classes}."
            raise ValueError(msg)
        if class_names is not None and len(class_names) != num_classes:
            first = ", background first" if classes is None else ""
            msg = (
                f"Expected argument `class_names` to name {num_classes} classes (`num_classes`{first}), but "
                f"got {len(class_names)}: {class_names}. Leave it out to take what the checkpoint says."
            )
            raise ValueError(msg)
        self.num_classes = num_classes
        self.class_names = None if class_names is None else tuple(class_names)
        self._left_out: frozenset[int] = frozenset()
        # There may be more devices than blocks, and nothing in drawing waits for other devices.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def leave_out(self, blocks: Collection[int]) -> None:
        """Do not ask for these blocks: they have been drawn before.

        Args:
            blocks: Their numbers.
        """
        self._left_out = frozenset(blocks)

    def predict_dataloader(self) -> DataLoader[Request]:
        """Return this process's requests."""
        world_size, rank = world()
        own = [b for b in range(rank, self.request.num_blocks, world_size) if b not in self._left_out]
        requests = Requests(self.request, own)
        # They are this process's own already, and Lightning leaves a DistributedSampler as it is.
        whole: DistributedSampler[Request] = DistributedSampler(requests, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(requests, batch_size=1, sampler=whole, collate_fn=_only)


class Requests(Dataset[Request]):
    """Some blocks of a request.

    Args:
        request: The whole request.
        blocks: Which blocks, in order.
    """

    def __init__(self, request: DrawRequest, blocks: list[int]) -> None:
        """Remember both."""
        self.request = request
        self.blocks = blocks

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> Request:
        """Return one block, see `DrawRequest.batch`."""
        return self.request.batch(self.blocks[index])


def _only(requests: list[Request]) -> Request:
    return requests[0]
