"""Pairs of an image and its mask, drawn by a network that denoises the one and predicts the other."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_modules.diffusion.denoisers import JointDenoiser, PairDenoiser
from lightning_modules.diffusion.noise import NoiseProcess, VPProcess, karras_sigmas
from lightning_modules.diffusion.samplers import Denoiser, SamplerName, sample, seeded_generators, seeded_noise
from lightning_modules.mask_losses import MaskLoss, mask_probabilities

CHUNK = 8
"""Images that go through the network at once."""


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
    sigmas = _sigmas(denoiser.process, request["sampler"], int(request["num_steps"]))
    generators = seeded_generators(request["seed"])
    channels = denoiser.image_channels
    eps = seeded_noise(generators, (channels, size, size), device=device)
    z = torch.cat([sigmas[0] * eps, eps.new_zeros(len(eps), num_classes, size, size)], 1)
    pair = PairDenoiser(denoiser, partial(mask_probabilities, kind=mask_loss))
    z = sample(request["sampler"], _in_chunks(pair), z, sigmas, generators)
    return ((z[:, :channels] + 1) / 2).clamp(0, 1), z[:, channels:]


def _in_chunks(denoiser: Denoiser) -> Denoiser:
    """Call a denoiser with CHUNK images at a time, the last ones filled up."""

    def denoise(x: Tensor, sigma: Tensor, label: Tensor | None = None, /) -> Tensor:
        # Convolutions round differently in batches of another size, at the sixth digit, but alike at every place in a
        # batch of one size: so an image is the same to the last bit whatever it is drawn with.
        chunks = -(-len(x) // CHUNK)
        filler = chunks * CHUNK - len(x)
        xs = torch.cat([x, x[:1].expand(filler, *x.shape[1:])]).chunk(chunks)
        levels = torch.cat([sigma, sigma[:1].expand(filler)]).chunk(chunks)
        parts = [denoiser(*part, label) for part in zip(xs, levels, strict=True)]
        return torch.cat(parts)[: len(x)]

    return denoise


def _sigmas(process: NoiseProcess, sampler: SamplerName, num_steps: int) -> Tensor:
    """The noise levels of a sampler: the process's own, but for Heun's method in a variance-preserving one.

    Its trapezoids in sigma go wrong in steps as long as such a process makes them at its noisy end (a cosine schedule
    starts above 10^4); beyond 80 there is nothing to be seen of an image in [-1, 1].
    """
    if sampler != "heun" or not isinstance(process, VPProcess):
        return process.sigmas(num_steps)
    return karras_sigmas(num_steps, process.sigma_min, min(process.sigma_max, 80.0))
