"""Pairs of an image and its mask, drawn by a network that denoises the one and predicts the other."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_modules.diffusion.denoisers import JointDenoiser, PairDenoiser
from lightning_modules.diffusion.fixed_batches import in_fixed_batches
from lightning_modules.diffusion.sampler_levels import sampler_sigmas
from lightning_modules.diffusion.samplers import sample, seeded_generators, seeded_noise
from lightning_modules.mask_losses import MaskLoss, mask_probabilities


def draw_pairs(
    denoiser: JointDenoiser,
    request: Mapping[str, Any],
    num_classes: int,
    mask_loss: MaskLoss,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Run the reverse process on z = (x, y), driven by E[z | x_t] (Sauvalle & Salzmann 2024, arXiv 2408.03433).

    Only the image enters the network, so the mask's path follows the image's: it may start anywhere (here at 0), and it
    ends at the mask of the image that was drawn, provided that images determine their masks. Where they do not, it ends
    at the class probabilities given the image.

    Args:
        denoiser: The network and its noise process.
        request: `seed` [B], `image_size`, `sampler` and `num_steps`.
        num_classes: Mask channels of the network.
        mask_loss: The loss these were trained with, which says what they mean.
        device: Where the network is.

    Returns:
        Images [B, C, H, W] in [0, 1] and class probabilities [B, K, H, W].
    """
    size = int(request["image_size"])
    sigmas = sampler_sigmas(denoiser.process, request["sampler"], int(request["num_steps"]))
    generators = seeded_generators(request["seed"])
    channels = denoiser.image_channels
    eps = seeded_noise(generators, (channels, size, size), device=device)
    z = torch.cat([sigmas[0] * eps, eps.new_zeros(len(eps), num_classes, size, size)], 1)
    pair = PairDenoiser(denoiser, partial(mask_probabilities, kind=mask_loss))
    z = sample(request["sampler"], in_fixed_batches(pair), z, sigmas, generators)
    return ((z[:, :channels] + 1) / 2).clamp(0, 1), z[:, channels:]
