"""Images of classes, drawn by a conditional denoiser."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.diffusion.denoisers import ClassDenoiser
from lightning_modules.diffusion.fixed_batches import in_fixed_batches
from lightning_modules.diffusion.guidance import GuidedDenoiser
from lightning_modules.diffusion.sampler_levels import sampler_sigmas
from lightning_modules.diffusion.sampler_steps import Denoiser
from lightning_modules.diffusion.samplers import sample, seeded_generators, seeded_noise


def draw_classes(
    denoiser: ClassDenoiser,
    request: Mapping[str, Any],
    shape: tuple[int, int, int],
    at_once: int,
    device: torch.device,
) -> Tensor:
    """Run the reverse process for images of given classes.

    Args:
        denoiser: The network and its noise process.
        request: `seed` and `label` [B], `sampler`, `num_steps`, `guidance` (0 for none; needs a null label).
        shape: [C, H, W] of what is diffused.
        at_once: Images that go through the network together.
        device: Where the network is.

    Returns:
        [B, C, H, W] in the units of the process, an image at about -1 to 1.
    """
    guidance = float(request.get("guidance", 0.0))
    whole: Denoiser = denoiser
    if guidance != 0 and denoiser.null_label is not None:
        whole = GuidedDenoiser(denoiser, guidance, denoiser.null_label)
    sigmas = sampler_sigmas(denoiser.process, request["sampler"], int(request["num_steps"]))
    generators = seeded_generators(request["seed"])
    x = sigmas[0] * seeded_noise(generators, shape, device=device)
    label = request["label"].to(device)
    return sample(request["sampler"], in_fixed_batches(whole, at_once), x, sigmas, generators, label)
