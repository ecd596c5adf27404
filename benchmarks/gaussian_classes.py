"""Classes that are normal distributions, so that posterior and clean denoisers of noisy images are known exactly."""

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.noise import NoiseProcess


class GaussianClasses:
    """Equally frequent classes N(mean_i, diag(std^2)) of vectors.

    Args:
        mean: Means, [K, D].
        std: Standard deviations of each class, [D].
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std

    def draw(self, label: Tensor) -> Tensor:
        """Vectors [B, D] of these classes [B], from torch's global generator."""
        return self.mean[label] + self.std * torch.randn(len(label), len(self.std))

    def log_posterior(self, z: Tensor, sigma: Tensor) -> Tensor:
        """Log p(class | vector + sigma eps) [B, K] of noisy vectors [B, D] at noise levels [B]."""
        precision = 1 / (self.std**2 + sigma[:, None] ** 2)
        distance = -2 * (z * precision) @ self.mean.T + precision @ (self.mean**2).T  # less z^2, the same for all
        return (-0.5 * distance).log_softmax(1)

    def denoised(self, z: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """E[vector | noisy vector, class], [B, D]."""
        keep = self.std**2 / (self.std**2 + sigma[:, None] ** 2)
        return keep * z + (1 - keep) * self.mean[label]


class KnownPosterior(nn.Module):
    """The exact posterior of images made of `GaussianClasses`, in the place of a classifier of noisy images.

    Args:
        classes: The classes.
        process: Noise process; EDM's coefficients are undone.
        basis: Orthonormal columns [C * H * W, D] that make images of vectors; None if an image is its vector.
        beside: A classifier that runs as well and is not listened to: what it costs, with a posterior that is known.
    """

    def __init__(
        self, classes: GaussianClasses, process: NoiseProcess, basis: Tensor | None, beside: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.classes, self.process, self.basis, self.beside = classes, process, basis, beside
        self.num_classes = len(classes.mean)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits [B, K] from c_in x [B, C, H, W] and t = ln(sigma) / 4 [B]."""
        if self.beside is not None:
            self.beside(x, t)
        sigma = (4 * t).exp()
        z = x.flatten(1) / self.process.c_in(sigma)[:, None]
        return self.classes.log_posterior(z if self.basis is None else z @ self.basis, sigma)
