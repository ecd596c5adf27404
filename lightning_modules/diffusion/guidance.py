"""Denoisers made of two others: each pushes an estimate away from that of a worse denoiser."""

import math

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.sampler_steps import Denoiser


class GuidedDenoiser(nn.Module):
    """Classifier-free guidance: D = D_c + s * (D_c - D_null), for the denoisers of class c and of no class.

    Both come from one network, in one pass of twice the batch. The scale s is that of the paper (w there); diffusers
    and others write the same as D_null + guidance_scale * (D_c - D_null), with guidance_scale = 1 + s.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598), equation 6.

    It holds no weights of its own, so one may be built around any denoiser at any time.

    Args:
        denoiser: Called as denoiser(x, sigma, label); it has learned the label "no class" as well.
        scale: s, 0 or more. With 0 the denoiser is called as it is.
        null_label: The label that means "no class".

    Raises:
        ValueError: If `scale` is negative or not finite.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null_label: int) -> None:
        """Keep the parts."""
        super().__init__()
        _require_scale(scale)
        self.denoiser = denoiser
        self.scale = scale
        self.null_label = null_label

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise images of classes.

        Args:
            x: Noisy images, [B, C, H, W].
            sigma: Noise level of each image, [B], or one for all.
            label: Class of each image, [B].

        Returns:
            Denoised images, [B, C, H, W].

        Raises:
            ValueError: If there is no label to be guided by.
        """
        sigma = torch.as_tensor(sigma, device=x.device).expand(len(x))
        if self.scale == 0:
            return self.denoiser(x, sigma, label)
        if label is None:
            msg = f"Expected `label` with a class for each image, got None; guidance of scale {self.scale} needs it."
            raise ValueError(msg)
        labels = torch.cat([label, torch.full_like(label, self.null_label)])
        own, null = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), labels).to(x.dtype).chunk(2)
        return _away(own, null, self.scale)


class AffineDenoiser(nn.Module):
    """The affine score of TDSM: D = (1 + a) * D_tdsm - a * D_noisy.

    D_noisy was trained on the noisy labels as if they were right, so its images of class c are those of a mixture of
    classes; what tells D_tdsm from it is what only images of class c have.

    Source: Na et al., "Label-Noise Robust Diffusion Models" (arXiv 2402.17517), appendix.

    It holds no weights of its own, so one may be built around any two denoisers at any time.

    Args:
        denoiser: Denoiser trained with the noise of its labels in mind.
        noisy: Denoiser trained on the same labels without that. Not called if `scale` is 0.
        scale: a, 0 or more.

    Raises:
        ValueError: If `scale` is negative or not finite.
    """

    def __init__(self, denoiser: Denoiser, noisy: Denoiser, scale: float) -> None:
        """Keep the parts."""
        super().__init__()
        _require_scale(scale)
        self.denoiser = denoiser
        self.noisy = noisy
        self.scale = scale

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise images of classes.

        Args:
            x: Noisy images, [B, C, H, W].
            sigma: Noise level of each image, [B], or one for all.
            label: Class of each image, [B], or None; passed on to both.

        Returns:
            Denoised images, [B, C, H, W].
        """
        sigma = torch.as_tensor(sigma, device=x.device).expand(len(x))
        denoised = self.denoiser(x, sigma, label)
        if self.scale == 0:
            return denoised
        return _away(denoised.to(x.dtype), self.noisy(x, sigma, label).to(x.dtype), self.scale)


def _away(estimate: Tensor, other: Tensor, scale: float) -> Tensor:
    return estimate + scale * (estimate - other)


def _require_scale(scale: float) -> None:
    if not 0 <= scale < math.inf:
        msg = f"Expected `scale` to be 0 or more and finite, got {scale}; 0 leaves the denoiser as it is."
        raise ValueError(msg)
