"""What networks for noisy images share: how the noise level enters, and the checks of their inputs."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, width: int, time_scale: float = 1.0) -> Tensor:
    """Embed numbers as [cos(t f_0), ..., cos(t f_h-1), sin(t f_0), ..., sin(t f_h-1)], f_i = 10000^(-i / h).

    With h = width / 2 this is the embedding of arXiv 1706.03762, section 3.5, cosines first, as diffusion models use
    it for t in 0..1000.

    Args:
        t: Numbers, [B].
        width: Length of an embedding, even.
        time_scale: Multiplies t first. The frequencies are made for numbers up to about 1000; numbers of order 1 would
            move only the first of them.

    Returns:
        Float32, [B, width], whatever autocast says: 16 bits do not tell neighbouring times apart.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = (t.float() * time_scale)[:, None] * torch.exp(index * (-math.log(10000.0) / half))
    return torch.cat([angle.cos(), angle.sin()], 1)


def check_positive(counts: Mapping[str, int]) -> None:
    """Refuse counts below 1.

    Args:
        counts: Name of the argument -> its value.

    Raises:
        ValueError: One is not positive.
    """
    for name, count in counts.items():
        if count < 1:
            msg = f"Expected `{name}` to be at least 1, got {count}."
            raise ValueError(msg)


def check_noisy_images(x: Tensor, t: Tensor, in_channels: int) -> None:
    """Check the shapes of noisy images and of the numbers that tell their noise levels.

    Args:
        x: Images, [B, in_channels, H, W].
        t: One number an image, [B], or one for all, 0-dimensional.
        in_channels: Channels that the network takes.

    Raises:
        ValueError: A shape does not fit.
    """
    if x.ndim != 4 or x.shape[1] != in_channels:
        msg = (
            f"Expected `x` of shape [B, {in_channels}, H, W], got {list(x.shape)}. "
            f"Build the network with a fitting `in_channels`."
        )
        raise ValueError(msg)
    if t.shape not in ((), (x.shape[0],)):
        msg = f"Expected `t` with one number per image, shape [{x.shape[0]}], got {list(t.shape)}."
        raise ValueError(msg)


def require_classes(num_classes: int | None) -> int:
    """Return the number of classes of a network that was told it.

    Args:
        num_classes: K, or None.

    Raises:
        ValueError: It is None.
    """
    if num_classes is None:
        msg = "Expected `num_classes` to be known, got None; call reset_classes(num_classes) first."
        raise ValueError(msg)
    return num_classes


def check_labels(label: Tensor | None, batch: int) -> Tensor:
    """Check that a class-conditional network got one label an image.

    Whether labels lie in range is not asked: on a GPU the answer would stop every step. Who reads labels checks them.

    Args:
        label: Class ids, [B].
        batch: B.

    Returns:
        The labels.

    Raises:
        ValueError: There are no labels, or not one an image.
    """
    if label is None or label.shape != (batch,):
        got = "None" if label is None else list(label.shape)
        msg = f"Expected `label` with one class id per image, shape [{batch}], got {got}."
        raise ValueError(msg)
    return label


def class_rows(num_classes: int, null_class: bool, width: int, like: Tensor) -> nn.Embedding:
    """Build a class table, drawn from N(0, 1).

    Args:
        num_classes: K.
        null_class: One row more, for "no class".
        width: Length of a row.
        like: Decides device and type.

    Raises:
        ValueError: K is not positive.
    """
    check_positive({"num_classes": num_classes})
    return nn.Embedding(num_classes + int(null_class), width, device=like.device, dtype=like.dtype)
