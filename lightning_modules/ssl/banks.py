"""What is remembered of single images."""

import torch
from torch import Tensor


def newest(index: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Where in a batch each image of the data is last.

    An image can be in a batch twice. Writing both into a bank has no defined order on a GPU, and then the banks of
    different processes part; with this the later one counts.

    Args:
        index: Number of each image of the batch [B], in [0, size).
        size: Images in the data.
        valid: Which of the batch to look at [B]; None is all.

    Returns:
        Places in the batch [size], -1 for images that are not in it.
    """
    place = torch.arange(len(index), device=index.device)
    if valid is not None:
        place = torch.where(valid, place, -1)
    return place.new_full((size,), -1).scatter_reduce(0, index, place, "amax")
