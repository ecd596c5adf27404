"""Noise processes: which noise a network sees, and how its output becomes an estimate of the clean image.

Every process here speaks the variance-exploding coordinates of Karras et al., "Elucidating the Design Space
of Diffusion-Based Generative Models" (arXiv 2206.00364): x_sigma = x + sigma * eps with x in [-1, 1] and
eps ~ N(0, I). A denoiser is then, whatever the process (equation 7 there),

    D(x_sigma; sigma) = c_skip(sigma) * x_sigma + c_out(sigma) * F(c_in(sigma) * x_sigma, c_noise(sigma)),

and a variance-preserving x_t = sqrt(abar_t) * x + sqrt(1 - abar_t) * eps is the same image in other units:
x_t = c_in * x_sigma with sigma = sqrt((1 - abar_t) / abar_t).

Time 0 means sigma = 0: the clean image itself, exactly, in training, fine-tuning and prediction. This is one
convention for all processes, and neither of the common ones (the first DDPM step has sigma = 0.01, EDM
starts at sigma_min = 0.002):

- `VPProcess` (vp_noise.py) prepends t = 0 with abar = 1 to the usual table, so the steps of the table are
  t = 1, ..., T; `VPSDEProcess`, in continuous time, has t = 0 anyway. Where the network predicts the noise, the
  coefficients are c_skip = 1 and c_out = 0 there, so the image passes unchanged, and the image weight is 0.
- `EDMProcess` takes the limit of its coefficients: c_skip = 1 and c_out = 0, so the image passes unchanged;
  the network is told the smallest noise it knows, c_noise = ln(sigma_min) / 4; the image weight, which
  grows without bound as sigma falls, is 0, since nothing is left to denoise.

A network's other outputs (a mask) are read off F directly and are defined at every sigma, 0 included.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class NoiseProcess(nn.Module, ABC):
    """Noise levels in training and the coefficients of the denoiser that goes with them.

    All coefficients take sigmas of any shape and return float32 tensors of that shape; arithmetic is in
    float64. There is no state: nothing to save, and casting a model to 16 bits does not touch the tables.

    Attributes:
        sigma_min: Smallest positive noise level of the process.
        sigma_max: Largest noise level of the process.
        clean_share: See Args.

    Args:
        sigma_min: Smallest positive noise level.
        sigma_max: Largest noise level.
        clean_share: Probability that `sample_sigma` returns a clean image's sigma = 0, on top of what the
            process itself draws.

    Raises:
        ValueError: If not 0 < sigma_min < sigma_max, or if `clean_share` is not a probability.
    """

    def __init__(self, sigma_min: float, sigma_max: float, clean_share: float = 0.0) -> None:
        """Check and keep what all processes share."""
        super().__init__()
        if not 0 < sigma_min < sigma_max < float("inf"):
            msg = (
                f"Expected 0 < `sigma_min` < `sigma_max`, got {sigma_min} and {sigma_max}. "
                f"The clean image, sigma = 0, belongs to every process anyway."
            )
            raise ValueError(msg)
        if not 0 <= clean_share <= 1:
            msg = f"Expected `clean_share` to be a probability in [0, 1], got {clean_share}."
            raise ValueError(msg)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.clean_share = clean_share

    @abstractmethod
    def c_skip(self, sigma: Tensor) -> Tensor:
        """Weight of the noisy image in the denoised one."""

    @abstractmethod
    def c_out(self, sigma: Tensor) -> Tensor:
        """Weight of the network's image output in the denoised image."""

    @abstractmethod
    def c_in(self, sigma: Tensor) -> Tensor:
        """Scale of the noisy image on its way into the network."""

    @abstractmethod
    def c_noise(self, sigma: Tensor) -> Tensor:
        """Number that tells the network the noise level."""

    @abstractmethod
    def image_weight(self, sigma: Tensor) -> Tensor:
        """Weight of a sample's squared image error in the training loss."""

    @abstractmethod
    def level(self, sigma: Tensor) -> Tensor:
        """Map noise levels to [0, 1], increasing: 0 is the clean image, 1 is `sigma_max` and above."""

    @abstractmethod
    def sigma_at(self, level: Tensor | float) -> Tensor:
        """Invert `level`.

        Args:
            level: Levels in [0, 1]; values outside are clipped. A number gives a 0-dimensional tensor.

        Returns:
            The noise levels, exactly 0 at level 0.
        """

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """Noise levels of a sampler.

        Args:
            num_steps: Steps of the sampler, at least 1.

        Returns:
            num_steps + 1 decreasing levels, from `sigma_max` to exactly 0.
        """

    @abstractmethod
    def settings(self) -> dict[str, str | float]:
        """Return what decides how a network's input and output are read: a checkpoint means nothing without it."""

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw n float64 sigmas from the process alone, without `clean_share`."""

    def sample_sigma(
        self,
        n: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the noise levels of a training batch.

        Args:
            n: Number of levels.
            generator: Source of randomness, torch's global one by default. The draws are made on its
                device, so a CPU generator gives the same levels whatever `device` is.
            device: Where to put the result; by default where the draws are made.

        Returns:
            Float32 levels, [n].
        """
        at = generator.device if generator is not None else torch.device(device or "cpu")
        sigma = self._draw(n, generator, at)
        # Drawn at any share, so that the share does not shift the stream of the generator.
        clean = torch.rand(n, generator=generator, device=at) < self.clean_share
        return torch.where(clean, 0.0, sigma).to(device=device or at, dtype=torch.float32)


class EDMProcess(NoiseProcess):
    """The variance-exploding process and the preconditioning of EDM (arXiv 2206.00364, table 1, last column).

    In training ln(sigma) ~ N(p_mean, p_std^2). The network sees images of unit variance, its image output F
    has a target of unit variance, and `image_weight` makes its squared error count the same at every noise
    level. At sigma = 0 see the convention at the top of this module.

    Args:
        sigma_data: Standard deviation of the images, in [-1, 1] units.
        sigma_min: Smallest positive noise level, for sampling; below it c_noise no longer changes.
        sigma_max: Largest noise level, for sampling.
        p_mean: Mean of ln(sigma) in training.
        p_std: Standard deviation of ln(sigma) in training.
        rho: Exponent that spaces the steps of `sigmas` (equation 5 there) and `level`: larger values spend
            more of them on little noise.
        clean_share: Probability of a clean image in training; the process itself never draws one.

    Raises:
        ValueError: If a noise level or a scale is not positive, or if `clean_share` is not a probability.
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        rho: float = 7.0,
        clean_share: float = 0.0,
    ) -> None:
        """Check and keep the constants."""
        super().__init__(sigma_min, sigma_max, clean_share)
        for name, scale in (("sigma_data", sigma_data), ("p_std", p_std), ("rho", rho)):
            if not 0 < scale < float("inf"):
                msg = f"Expected `{name}` to be a positive number, got {scale}."
                raise ValueError(msg)
        self.sigma_data = sigma_data
        self.p_mean = p_mean
        self.p_std = p_std
        self.rho = rho

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Return sigma_data^2 / (sigma^2 + sigma_data^2)."""
        return (self.sigma_data**2 / self._variance(sigma)).float()

    def c_out(self, sigma: Tensor) -> Tensor:
        """Return sigma * sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return (wide(sigma) * self.sigma_data * self._variance(sigma).rsqrt()).float()

    def c_in(self, sigma: Tensor) -> Tensor:
        """Return 1 / sqrt(sigma^2 + sigma_data^2)."""
        return self._variance(sigma).rsqrt().float()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Return ln(max(sigma, sigma_min)) / 4."""
        return (wide(sigma).clamp(min=self.sigma_min).log() / 4).float()

    def image_weight(self, sigma: Tensor) -> Tensor:
        """Return 1 / c_out^2 = (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2, and 0 at sigma = 0."""
        level = wide(sigma)
        noisy = level > 0
        # Masked before the division, not after: an infinity would come back as NaN in the gradient.
        product = torch.where(noisy, level * self.sigma_data, 1.0)
        return torch.where(noisy, self._variance(sigma) / product**2, 0.0).float()

    def level(self, sigma: Tensor) -> Tensor:
        """Return (sigma / sigma_max)^(1 / rho)."""
        return (wide(sigma) / self.sigma_max).clamp(0, 1).pow(1 / self.rho).float()

    def sigma_at(self, level: Tensor | float) -> Tensor:
        """Return sigma_max * level^rho."""
        return (self.sigma_max * wide(torch.as_tensor(level)).clamp(0, 1).pow(self.rho)).float()

    def sigmas(self, num_steps: int) -> Tensor:
        """Return the steps of equation 5, from sigma_max over sigma_min to 0."""
        return karras_sigmas(num_steps, self.sigma_min, self.sigma_max, self.rho)

    def settings(self) -> dict[str, str | float]:
        """Return the constants of the preconditioning and of the steps."""
        names = ("sigma_data", "sigma_min", "sigma_max", "rho")
        return {"class": "EDMProcess", **{name: float(getattr(self, name)) for name in names}}

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        normal = torch.randn(n, generator=generator, device=device, dtype=wide_dtype(device))
        return (self.p_mean + self.p_std * normal).exp()

    def _variance(self, sigma: Tensor) -> Tensor:
        return wide(sigma) ** 2 + self.sigma_data**2


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Return a sampler's noise levels spaced evenly in sigma^(1 / rho) (arXiv 2206.00364, equation 5).

    Args:
        num_steps: Steps of the sampler, at least 1.
        sigma_min: Last positive level.
        sigma_max: First level.
        rho: The larger, the more of the levels are small.

    Returns:
        num_steps + 1 decreasing float32 levels, from `sigma_max` over `sigma_min` to exactly 0.

    Raises:
        ValueError: If `num_steps` is below 1.
    """
    require_steps(num_steps)
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64, device="cpu")
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    positive = (start + ramp * (end - start)) ** rho
    return torch.cat([positive, positive.new_zeros(1)]).float()


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the type that noise levels are computed in: float64, but float32 on Apple's GPUs, which have no other.

    Args:
        device: Where the levels are.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """Convert noise levels to the type that they are computed in.

    Args:
        x: The levels, of any shape.
    """
    return x.to(wide_dtype(x.device))


def require_steps(num_steps: int) -> None:
    """Refuse a sampler or a schedule without a step.

    Args:
        num_steps: Number of steps.

    Raises:
        ValueError: If it is below 1.
    """
    if num_steps < 1:
        msg = f"Expected `num_steps` to be at least 1, got {num_steps}."
        raise ValueError(msg)
