"""Variance-preserving noise processes: the tables of DDPM and the stochastic differential equation behind them.

Both mix image and noise as x_t = sqrt(abar_t) * x + sqrt(1 - abar_t) * eps, which is x + sigma * eps in other units
(see `noise.py`), and differ in their times only.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.diffusion.noise import NoiseProcess, require_steps, wide, wide_dtype

Prediction = Literal["x0", "epsilon"]
"""What the network's image output means: the clean image itself, or the noise in the noisy one."""

Schedule = Literal["linear", "scaled_linear", "cosine"]
"""How fast the image fades in the course of time."""

_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last beta of a schedule of 1000 steps."""


class VariancePreserving(NoiseProcess, ABC):
    """What the variance-preserving processes share: the scale of the input and the two ways to read the output.

    With eps_hat the network's output, `epsilon` estimates the image as x_sigma - sigma * eps_hat, and its image weight
    makes the squared error of the image that of the noise, |eps_hat - eps|^2, at every noise level (Ho et al., arXiv
    2006.11239, equation 14).

    Args:
        sigma_min: Smallest positive noise level.
        sigma_max: Largest noise level.
        prediction: What the network's output is.
        clean_share: Probability of a clean image in training, on top of what the process itself draws.

    Raises:
        ValueError: If there is no such prediction, or if `clean_share` is not a probability.
    """

    def __init__(self, sigma_min: float, sigma_max: float, prediction: Prediction, clean_share: float) -> None:
        """Check and keep what both share."""
        super().__init__(sigma_min, sigma_max, clean_share)
        if prediction not in ("x0", "epsilon"):
            msg = f"Expected `prediction` to be 'x0' or 'epsilon', got {prediction!r}."
            raise ValueError(msg)
        self.prediction = prediction

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Return 0 if the network's output is the image, 1 if it is the noise."""
        return torch.full_like(sigma, float(self.prediction == "epsilon"), dtype=torch.float32)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Return 1 if the network's output is the image, -sigma if it is the noise."""
        if self.prediction == "epsilon":
            return -wide(sigma).float()
        return torch.ones_like(sigma, dtype=torch.float32)

    def c_in(self, sigma: Tensor) -> Tensor:
        """Return sqrt(abar) = 1 / sqrt(1 + sigma^2)."""
        return (1 + wide(sigma) ** 2).rsqrt().float()

    def image_weight(self, sigma: Tensor) -> Tensor:
        """Return 1, the plain error of the image, or 1 / sigma^2, the plain error of the noise, and 0 at sigma = 0."""
        if self.prediction == "x0":
            return torch.ones_like(sigma, dtype=torch.float32)
        level = wide(sigma)
        noisy = level > 0
        # Masked before the division, not after: an infinity would come back as NaN in the gradient.
        return torch.where(noisy, torch.where(noisy, level, 1.0) ** -2, 0.0).float()

    def sigma_at(self, level: Tensor | float) -> Tensor:
        """Return sigma at that share of the whole time."""
        return self._sigma_at_level(wide(torch.as_tensor(level))).float()

    @abstractmethod
    def _sigma_at_level(self, level: Tensor) -> Tensor:
        """Return sigma at any share of the whole time, clipped to [0, 1], as wide as `level`."""


class VPProcess(VariancePreserving):
    """The variance-preserving process of DDPM, in discrete time.

    Times t = 0, 1, ..., T with abar_0 = 1 and abar_t = (1 - beta_1) ... (1 - beta_t). In training t is uniform on
    0, ..., T if the network predicts the image, and on 1, ..., T if it predicts the noise, of which there is none at
    t = 0. Between the table's times, sigma is linear in t.

    Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), equation 4; the cosine schedule
    is equation 17 of Nichol and Dhariwal (arXiv 2102.09672), whose model it is with `epsilon`; the scaled linear one is
    that of Stable Diffusion (Rombach et al., arXiv 2112.10752).

    Args:
        schedule: `linear` raises beta from 1e-4 to 0.02, `scaled_linear` the root of beta from that of 0.00085 to that
            of 0.012 (both for 1000 steps; beta is scaled by 1000 / num_steps otherwise), `cosine` lets abar fall as a
            squared cosine.
        num_steps: T.
        clean_share: Probability of a clean image in training, on top of the 1 / (T + 1) of the process
            itself with `x0`.
        prediction: What the network's image output is: `x0`, the clean image, or `epsilon`, the noise.

    Raises:
        ValueError: If there are too few steps for the schedule, if there is no such schedule or prediction, or if
            `clean_share` is not a probability.
    """

    def __init__(
        self,
        schedule: Schedule = "linear",
        num_steps: int = 1000,
        clean_share: float = 0.0,
        prediction: Prediction = "x0",
    ) -> None:
        """Tabulate the noise levels."""
        abar = _abar_table(schedule, num_steps)
        table = ((1 - abar) / abar).sqrt()
        super().__init__(float(table[1]), float(table[-1]), prediction, clean_share)
        self.schedule = schedule
        self.num_steps = num_steps
        # Not a buffer: `.half()` and its kin would round the table, and a checkpoint has no use for it.
        self._tables = {torch.device("cpu"): table}

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            table = self._tables[torch.device("cpu")]
            self._tables[device] = table.to(device=device, dtype=wide_dtype(device))
        return self._tables[device]

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Return the time t in [0, T], a fraction between the times of the table; T above `sigma_max`."""
        table = self._table(sigma.device)
        sigma = wide(sigma).contiguous()
        above = torch.searchsorted(table, sigma).clamp(1, self.num_steps)
        low, high = table[above - 1], table[above]
        return (above - 1 + (sigma - low) / (high - low)).clamp(0, self.num_steps).float()

    def level(self, sigma: Tensor) -> Tensor:
        """Return t / T."""
        return self.c_noise(sigma) / self.num_steps

    def sigmas(self, num_steps: int) -> Tensor:
        """Return sigma at equally spaced times from T to 0."""
        require_steps(num_steps)
        t = torch.linspace(self.num_steps, 0, num_steps + 1, dtype=torch.float64, device="cpu")
        return self._sigma_at_time(t).float()

    def settings(self) -> dict[str, str | float]:
        """Return the schedule and its length, and the prediction if it is not the image."""
        settings: dict[str, str | float] = {
            "class": "VPProcess",
            "schedule": self.schedule,
            "num_steps": self.num_steps,
        }
        # Checkpoints from before there was a choice say nothing of it.
        return settings if self.prediction == "x0" else settings | {"prediction": self.prediction}

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        first = int(self.prediction == "epsilon")
        t = torch.randint(first, self.num_steps + 1, (n,), generator=generator, device=device)
        return self._table(device)[t]

    def _sigma_at_level(self, level: Tensor) -> Tensor:
        return self._sigma_at_time(level * self.num_steps)

    def _sigma_at_time(self, t: Tensor) -> Tensor:
        table = self._table(t.device)
        t = t.clamp(0, self.num_steps)
        below = t.floor().long().clamp(max=self.num_steps - 1)
        return torch.lerp(table[below], table[below + 1], t - below)


class VPSDEProcess(VariancePreserving):
    """The variance-preserving process in continuous time, with a network that predicts the noise.

    The image fades at the rate beta(t) = beta_min + (beta_max - beta_min) * t, so that

        abar(t) = exp(-B(t)),    B(t) = beta_min * t + (beta_max - beta_min) * t^2 / 2,    sigma(t)^2 = exp(B(t)) - 1.

    In training t is uniform on [t_min, 1]; the network is told 999 * t, so that one with the time embedding of a
    1000-step table reads both alike.

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (arXiv
    2011.13456), equation 11, and appendix C for abar and the smallest time.

    Args:
        beta_min: Rate at t = 0.
        beta_max: Rate at t = 1.
        t_min: Smallest time in training, in (0, 1): the error of the noise has no meaning at t = 0.
        clean_share: Probability of a clean image in training; the process itself never draws one.

    Raises:
        ValueError: If the rates are not positive and rising, if `t_min` is out of range, or if `clean_share` is not a
            probability.
    """

    def __init__(
        self,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        t_min: float = 1e-5,
        clean_share: float = 0.0,
    ) -> None:
        """Check and keep the rates."""
        if not 0 < beta_min <= beta_max < float("inf"):
            msg = f"Expected 0 < `beta_min` <= `beta_max`, got {beta_min} and {beta_max}."
            raise ValueError(msg)
        if not 0 < t_min < 1:
            msg = f"Expected `t_min` in (0, 1), got {t_min}; the smaller, the less noise is seen in training."
            raise ValueError(msg)
        ends = torch.tensor([t_min, 1.0], dtype=torch.float64, device="cpu")
        low, high = _sigma_of_rates(ends, beta_min, beta_max).tolist()
        super().__init__(low, high, "epsilon", clean_share)
        self.beta_min = beta_min
        self.beta_max = beta_max
        self.t_min = t_min

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Return 999 * t."""
        return (999 * self._time(sigma)).float()

    def level(self, sigma: Tensor) -> Tensor:
        """Return t."""
        return self._time(sigma).float()

    def sigmas(self, num_steps: int) -> Tensor:
        """Return sigma at equally spaced times from 1 to 0."""
        require_steps(num_steps)
        return self._sigma_at_level(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")).float()

    def settings(self) -> dict[str, str | float]:
        """Return the rates."""
        return {"class": "VPSDEProcess", "beta_min": float(self.beta_min), "beta_max": float(self.beta_max)}

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        uniform = torch.rand(n, generator=generator, device=device, dtype=wide_dtype(device))
        return self._sigma_at_level(self.t_min + (1 - self.t_min) * uniform)

    def _sigma_at_level(self, level: Tensor) -> Tensor:
        return _sigma_of_rates(level.clamp(0, 1), self.beta_min, self.beta_max)

    def _time(self, sigma: Tensor) -> Tensor:
        faded = (wide(sigma) ** 2).log1p()
        # The positive root of B(t) = faded; written as a sum, it loses no digits at small times.
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * faded).sqrt()
        return (2 * faded / (self.beta_min + root)).clamp(0, 1)


def _sigma_of_rates(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    return (beta_min * t + (beta_max - beta_min) * t**2 / 2).expm1().sqrt()


def _abar_table(schedule: Schedule, num_steps: int) -> Tensor:
    """Return abar at t = 0, ..., num_steps in float64, 1 first."""
    require_steps(num_steps)
    scale = 1000 / num_steps
    match schedule:
        case "linear":
            first, last = _BETAS[schedule]
            beta = torch.linspace(scale * first, scale * last, num_steps, dtype=torch.float64, device="cpu")
        case "scaled_linear":
            first, last = _BETAS[schedule]
            beta = scale * torch.linspace(first**0.5, last**0.5, num_steps, dtype=torch.float64, device="cpu") ** 2
        case "cosine":
            s = 0.008
            t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device="cpu")
            falling = torch.cos((t + s) / (1 + s) * torch.pi / 2) ** 2
            # The last ratio is 0, which would leave nothing of the image.
            beta = (1 - falling[1:] / falling[:-1]).clamp(max=0.999)
        case _:
            msg = f"Expected `schedule` to be 'linear', 'scaled_linear' or 'cosine', got {schedule!r}."
            raise ValueError(msg)
    limit = round(1000 * _BETAS[schedule][1]) if schedule in _BETAS else 0
    if num_steps <= limit:
        msg = (
            f"Expected `num_steps` above {limit} for the {schedule} schedule, got {num_steps}: it would remove more "
            f"than the whole image in one step. Use more steps here and fewer in the sampler (`sigmas`)."
        )
        raise ValueError(msg)
    return torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), torch.cumprod(1 - beta, 0)])
