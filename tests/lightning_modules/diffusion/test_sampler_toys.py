"""Samplers on data whose denoiser is known in closed form: do pairs (image, mask) follow their joint law?

Every pixel of these "images" is one sample: its first channels are x, the others its mask y, and all processes
are seen in variance-exploding coordinates, x_sigma = x + sigma * eps. The denoisers return E[(x, y) | x_sigma],
which is what a network learns, and never look at the y of the state (arXiv 2408.03433).
"""

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion import (
    SAMPLERS,
    EDMProcess,
    NoiseProcess,
    SamplerName,
    VPProcess,
    sample,
    seeded_generators,
    seeded_noise,
)
from lightning_modules.diffusion.sampler_steps import Denoiser

VP, EDM = VPProcess(), EDMProcess()
# At least 250 calls of the denoiser each.
RUNS: list[tuple[SamplerName, NoiseProcess, int]] = [
    ("euler", VP, 250),
    ("heun", EDM, 126),
    ("ancestral", EDM, 250),
]
ALL: list[tuple[SamplerName, NoiseProcess, int]] = [(name, p, 250) for name in SAMPLERS for p in (VP, EDM)]


def draw(
    denoiser: Denoiser,
    channels: int,
    run: tuple[SamplerName, NoiseProcess, int],
    size: int = 64,
    images: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Initial state and samples, [N, channels] each, one row per pixel."""
    name, process, steps = run
    generators, sigmas = seeded_generators(range(images)), process.sigmas(steps)
    noise = sigmas[0] * seeded_noise(generators, (channels, size, size), dtype=dtype)
    z = sample(name, denoiser, noise, sigmas, generators)
    return noise.movedim(1, -1).reshape(-1, channels), z.movedim(1, -1).reshape(-1, channels)


def over_pixels(sigma: Tensor) -> Tensor:
    return sigma[:, None, None, None]


def half_normal(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """Toy A: x ~ N(0, 1), y = [x > 0]."""
    x, sigma = x[:, :1], over_pixels(sigma)
    variance = 1 + sigma**2
    return torch.cat([x / variance, torch.special.ndtr(x / (sigma * variance.sqrt()))], 1)


class Mixture:
    """Toy B: x ~ sum_k weights_k N(means_k, std^2 I), y_j = [x_j > threshold]."""

    weights, std, threshold = torch.tensor([0.5, 0.3, 0.2]), 0.4, 0.3
    means = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0, 1.0, 1.0, 0.5], [-1.0, -1.0, -0.5, 1.5]])

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """E[x | x_sigma] and P(y_j = 1 | x_sigma) as means over the components."""
        x, variance = x[:, None, :4], over_pixels(sigma)[:, None] ** 2
        offset = x - self.means[:, :, None, None]
        total = self.std**2 + variance
        log_weights = self.weights.log()[:, None, None] - offset.square().sum(2) / (2 * total[:, 0])
        share = log_weights.softmax(1)[:, :, None]
        mean = self.means[:, :, None, None] + self.std**2 / total * offset
        mask = torch.special.ndtr((mean - self.threshold) / (self.std**2 * variance / total).sqrt())
        return torch.cat([(share * mean).sum(1), (share * mask).sum(1)], 1)


@pytest.mark.parametrize("run", ALL, ids=lambda run: f"{run[0]}-{type(run[1]).__name__}")
def test_a_normal_image_and_its_sign(run: tuple[SamplerName, NoiseProcess, int]) -> None:
    start, z = draw(half_normal, 2, run)
    x, y = z.unbind(1)
    n = len(z)
    assert abs(float(x.mean())) < 3 / math.sqrt(n)
    assert float(x.std()) == pytest.approx(1, abs=0.03)
    assert float(((y > 0.5) != (x > 0)).float().mean()) < 1e-3
    assert float((y > 0.5).float().mean()) == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(n))
    if run[0] != "ancestral":
        # The exact ODE scales x, so the sign of the noise is the mask.
        want = start[:, 0] / math.sqrt(1 + float(run[1].sigmas(1)[0]) ** 2)
        torch.testing.assert_close(x, want, rtol=0.03, atol=1e-6)
        assert float(((y > 0.5) != (start[:, 0] > 0)).float().mean()) < 1e-3


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{type(run[1]).__name__}")
def test_b_mixture_of_images_with_a_mask_per_pixel(run: tuple[SamplerName, NoiseProcess, int]) -> None:
    toy = Mixture()
    _, z = draw(toy, 8, run)
    x, y = z[:, :4], z[:, 4:]
    n = len(x)
    assert n >= 20_000
    component = torch.cdist(x, toy.means).argmin(1)
    share = component.bincount(minlength=3) / n
    assert ((share - toy.weights).abs() < 3 * (toy.weights * (1 - toy.weights) / n).sqrt()).all()
    for k in range(3):
        assert float((x - toy.means[k])[component == k].std()) == pytest.approx(toy.std, rel=0.03)
    assert float(((y > 0.5) != (x > toy.threshold)).float().mean()) < 1e-3
    # Not only does the mask fit the image: each pixel's marginal is that of the data.
    want = toy.weights @ torch.special.ndtr((toy.means - toy.threshold) / toy.std)
    assert (((y > 0.5).float().mean(0) - want).abs() < 3 * (want * (1 - want) / n).sqrt()).all()


@pytest.mark.parametrize("run", ALL, ids=lambda run: f"{run[0]}-{type(run[1]).__name__}")
def test_c_finite_data_come_back_as_exact_pairs(run: tuple[SamplerName, NoiseProcess, int]) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    pairs = torch.cat([x, torch.nn.functional.one_hot(labels).double()], 1)

    def toy(z: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        distance = (z[:, None, :3] - x[:, :, None, None]).square().sum(2)
        weights = (-distance / (2 * over_pixels(sigma) ** 2)).softmax(1)
        return torch.einsum("bnhw,nc->bchw", weights, pairs)

    _, z = draw(toy, 6, run, size=16, images=4, dtype=torch.float64)
    nearest = torch.cdist(z[:, :3], x).argmin(1)
    torch.testing.assert_close(z, pairs[nearest], rtol=0, atol=0)
    count = nearest.bincount(minlength=6)
    assert (count > 0).all()


@pytest.mark.parametrize("run", ALL, ids=lambda run: f"{run[0]}-{type(run[1]).__name__}")
def test_d_a_random_mask_comes_back_as_its_mean(run: tuple[SamplerName, NoiseProcess, int]) -> None:
    # y is the component of x ~ N(-1, 1) / 2 + N(1, 1) / 2: the image does not determine it.
    def toy(z: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        x, variance = z[:, :1], over_pixels(sigma) ** 2
        y = torch.sigmoid(2 * x / (1 + variance))
        return torch.cat([(x + variance * (2 * y - 1)) / (1 + variance), y], 1)

    _, z = draw(toy, 2, run, dtype=torch.float64)
    x, y = z.unbind(1)
    n, last = len(z), float(run[1].sigmas(run[2])[-2])
    # y belongs to the x before the last step, which moves 2x / (1 + variance) by at most 2 * variance.
    assert float((y - 1 / (1 + torch.exp(-2 * x))).abs().max()) <= last**2 / 2
    assert float(((y > 0.1) & (y < 0.9)).double().mean()) == pytest.approx(0.53, abs=0.02)
    assert float(y.mean()) == pytest.approx(0.5, abs=3 * float(y.std()) / math.sqrt(n))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", [VP, EDM], ids=["vp", "edm"])
def test_the_initial_mask_does_not_matter_and_the_last_estimate_is_returned(
    name: SamplerName, process: NoiseProcess
) -> None:
    estimates: list[Tensor] = []
    toy = Mixture()

    def denoiser(z: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        estimates.append(toy(z, sigma))
        return estimates[-1]

    sigmas, drawn = process.sigmas(20), []
    for mask_scale in (0.0, 1.0, 50.0):
        generators = seeded_generators([4, 5])
        z = sigmas[0] * seeded_noise(generators, (8, 6, 6))
        z[:, 4:] *= mask_scale
        drawn.append(sample(name, denoiser, z, sigmas, generators))
        torch.testing.assert_close(drawn[-1], estimates[-1], rtol=0, atol=0)
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=0, atol=0)
    # The estimates themselves have changed on the way.
    assert not torch.equal(estimates[0][:, 4:], estimates[-1][:, 4:])
