"""How unsure a segmentation is: per pixel from class probabilities, and one number an image.

Entropies are in nats, so K classes give at most log K.
"""

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy H(p) = -sum_k p_k log p_k of each pixel's class probabilities, with 0 log 0 = 0.

    Args:
        probabilities: [B, K, H, W], non-negative, summing to 1 over the classes; any floating type.

    Returns:
        [B, H, W] float32 in nats, from 0 (one class is certain) to log K (all are alike).

    Raises:
        ValueError: `probabilities` has another shape.
    """
    _require_shape("probabilities", probabilities, "[B, K, H, W]")
    # Rounding may leave a probability just below 0, where entr is -inf, or just above 1, where it is negative.
    terms: Tensor = torch.special.entr(probabilities.float().clamp(0, 1))
    return terms.sum(1)


def jensen_shannon(members: Tensor) -> Tensor:
    """Jensen-Shannon divergence between the members of an ensemble: H(mean_m p_m) - mean_m H(p_m).

    It is the part of the entropy that comes from disagreement: members that are unsure in the same way give 0. LEDM
    (arXiv 2112.03126) takes it as the uncertainty of a pixel.

    Args:
        members: [M, B, K, H, W], the class probabilities of each of the M members.

    Returns:
        [B, H, W] float32 in nats, from 0 (all agree) to the logarithm of the smaller of M and K.

    Raises:
        ValueError: `members` has another shape.
    """
    _require_shape("members", members, "[M, B, K, H, W]")
    # Member by member: an ensemble of ten with 34 classes is large enough without a second copy.
    each = torch.stack([entropy(member) for member in members]).mean(0)
    mixed = entropy(members.mean(0, dtype=torch.float32))
    return (mixed - each).clamp(min=0)


def image_uncertainty(pixel: Tensor, share: float = 0.1) -> Tensor:
    """One uncertainty an image: the mean of its most uncertain pixels, as in LEDM (arXiv 2112.03126).

    Args:
        pixel: [B, H, W], the uncertainty of each pixel.
        share: Share of the pixels that count, in (0, 1]; at least one pixel does.

    Returns:
        [B] float32, in the unit of `pixel`.

    Raises:
        ValueError: `pixel` has another shape, or `share` is out of range.
    """
    _require_shape("pixel", pixel, "[B, H, W]")
    if not 0 < share <= 1:
        msg = f"Expected `share` in (0, 1], got {share}; 0.1 takes the most uncertain tenth of the pixels."
        raise ValueError(msg)
    values = pixel.float().flatten(1)
    return values.topk(max(1, round(share * values.shape[1])), dim=1).values.mean(1)


def image_confidence(probabilities: Tensor) -> Tensor:
    """One confidence an image: the Dice coefficient that its own probabilities promise for its predicted mask.

    For a foreground class with probabilities p and predicted pixels y_hat (those where it is the largest), the soft
    Dice confidence

        2 sum_i p_i y_hat_i / (sum_i p_i + sum_i y_hat_i)

    of Borges, Pacheco & Silva (arXiv 2402.10665), who treat a single class. Here it is averaged over the foreground
    classes that are predicted anywhere in the image. Where none is, Dice says nothing about how sure an empty mask
    is, and the mean probability of the background stands in.

    Args:
        probabilities: [B, K, H, W] with the background as class 0, non-negative, summing to 1 over the classes.

    Returns:
        [B] float32 in [0, 1].

    Raises:
        ValueError: `probabilities` has another shape, or a single class.
    """
    _require_shape("probabilities", probabilities, "[B, K, H, W]")
    classes = probabilities.shape[1]
    if classes < 2:
        msg = f"Expected `probabilities` of at least 2 classes, got {classes}; count the background as class 0."
        raise ValueError(msg)
    p = probabilities.float().clamp(0, 1)
    largest, labels = p.max(1)
    chosen = labels[:, None] == torch.arange(classes, device=p.device).view(1, -1, 1, 1)
    predicted = chosen.sum((2, 3))
    dice = 2 * torch.where(chosen, p, 0.0).sum((2, 3)) / (p.sum((2, 3)) + predicted)
    present = predicted[:, 1:] > 0
    count = present.sum(1)
    mean = torch.where(present, dice[:, 1:], 0.0).sum(1) / count.clamp(min=1)
    # The sums are rounded, and 1.0000001 is no confidence.
    return torch.where(count > 0, mean, largest.mean((1, 2))).clamp(max=1)


def _require_shape(name: str, x: Tensor, shape: str) -> None:
    """Raise unless a tensor is floating, not empty and has as many dimensions as `shape` has letters."""
    if x.ndim != shape.count(",") + 1 or x.numel() == 0 or not x.is_floating_point():
        msg = (
            f"Expected `{name}` to be a floating tensor {shape} that is not empty, got {x.dtype} of shape "
            f"{tuple(x.shape)}; add the dimension that is missing, or convert class ids to probabilities."
        )
        raise ValueError(msg)
