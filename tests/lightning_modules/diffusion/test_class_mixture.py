"""Samplers, guidance and the affine score on classes of which every denoiser is known in closed form.

Every pixel of these "images" is one sample of its image's class, a mixture of two normal distributions in four
dimensions.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from lightning_modules.diffusion import (
    AffineDenoiser,
    EDMProcess,
    GuidedDenoiser,
    NoiseProcess,
    SamplerName,
    VPProcess,
    VPSDEProcess,
    sample,
    sample_dpmpp_2m,
    sample_heun,
    sampler_sigmas,
    seeded_generators,
    seeded_noise,
)
from lightning_modules.diffusion.noise import karras_sigmas

STD = 0.3
SHARES = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.4, 0.6]], dtype=torch.float64)
MEANS = torch.tensor(
    [
        [[1.0, 1.0, -1.0, -1.0], [-1.0, 1.0, 1.0, 0.5]],
        [[-1.0, -1.0, -0.5, 1.5], [1.0, -1.0, 1.0, 1.0]],
        [[0.0, 1.5, 1.0, -1.0], [0.5, -0.5, -1.5, 0.0]],
    ],
    dtype=torch.float64,
)
NULL = 3


def component_weights(mix: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and means of all six components in a mixture of the classes, [B, 6] and [6, 4]."""
    return (mix[:, :, None] * SHARES).flatten(1), MEANS.flatten(0, 1)


def posterior_mean(x: Tensor, sigma: Tensor, mix: Tensor) -> Tensor:
    """E[x | x_sigma] where image b is of class c with probability mix[b, c]."""
    weights, means = component_weights(mix)
    variance = sigma.double()[:, None, None, None, None] ** 2
    offset = x.double()[:, None] - means[:, :, None, None]
    log_share = weights.log()[:, :, None, None, None] - offset.square().sum(2, keepdim=True) / (2 * (STD**2 + variance))
    mean = (log_share.softmax(1) * (means[:, :, None, None] + STD**2 / (STD**2 + variance) * offset)).sum(1)
    return mean.to(x.dtype)


def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """The denoiser of each image's class; of no class with the label NULL."""
    assert label is not None
    table = torch.cat([torch.eye(3, dtype=torch.float64), torch.full((1, 3), 1 / 3, dtype=torch.float64)])
    return posterior_mean(x, sigma, table[label])


def log_density(x: Tensor, sigma: float, mix: Tensor) -> Tensor:
    """Log density of noisy samples [N, 4], up to a constant."""
    weights, means = component_weights(mix[None])
    distance = (x[:, None] - means).square().sum(2)
    return (weights.log() - distance / (2 * (STD**2 + sigma**2))).logsumexp(1)


def start(
    sigmas: Tensor, size: int = 48, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[torch.Generator], Tensor]:
    """Two images of each class, their generators and labels."""
    generators = seeded_generators(range(6))
    noise = seeded_noise(generators, (4, size, size), dtype=dtype)
    return sigmas[0] * noise, generators, torch.arange(3).repeat(2)


def heun_growth(sigmas: Tensor) -> float:
    """What Heun's method makes of the spread of one normal component alone, where the exact ODE gives STD."""
    state, levels = 1.0, sigmas.tolist()
    for sigma, after in pairwise(levels):
        slope = state * sigma / (STD**2 + sigma**2)
        euler = state + (after - sigma) * slope
        state = euler if after == 0 else state + (after - sigma) * (slope + euler * after / (STD**2 + after**2)) / 2
    return state * math.sqrt(STD**2 + levels[0] ** 2) / STD


RUNS: list[tuple[SamplerName, NoiseProcess, int, float]] = [
    # The last number: the largest relative error of a spread, of which 2 % are the noise of some 2000 samples.
    ("heun", VPProcess("cosine", prediction="epsilon"), 25, 0.06),
    ("dpmpp_2m", EDMProcess(), 35, 0.04),
    ("dpmpp_2m", VPSDEProcess(), 35, 0.04),
    ("dpmpp_2m", VPProcess("cosine"), 35, 0.04),
    ("euler", EDMProcess(), 120, 0.05),
    ("euler", VPSDEProcess(), 120, 0.08),
    ("ancestral", EDMProcess(), 120, 0.08),
]


def check_classes(drawn: Tensor, label: Tensor, spread: float, tolerance: float) -> None:
    for c in range(3):
        x = drawn[label == c].movedim(1, -1).flatten(0, -2)
        component = torch.cdist(x, MEANS[c]).argmin(1)
        for k in range(2):
            part, share = x[component == k], float(SHARES[c, k])
            assert len(part) / len(x) == pytest.approx(share, abs=3.3 * math.sqrt(share * (1 - share) / len(x)))
            # The components are 2 to 3 apart. 0.01 of it is the noise of the draw.
            assert (part.mean(0) - MEANS[c, k]).abs().max() < 0.04
            assert float((part - MEANS[c, k]).square().mean().sqrt()) == pytest.approx(spread, rel=tolerance)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{type(run[1]).__name__}")
def test_classes_are_drawn(run: tuple[SamplerName, NoiseProcess, int, float]) -> None:
    name, process, steps, tolerance = run
    sigmas = sampler_sigmas(process, name, steps)
    x, generators, label = start(sigmas)
    check_classes(sample(name, denoiser, x, sigmas, generators, label), label, STD, tolerance)


def test_heun_in_18_steps_has_the_spread_of_its_own_arithmetic() -> None:
    sigmas = karras_sigmas(18, 0.002, 80.0)
    x, generators, label = start(sigmas, size=64)
    growth = heun_growth(sigmas)
    # 18 steps are too few by that much, and no more.
    assert growth == pytest.approx(1.0645, abs=1e-4)
    # Three standard errors of the spread of 4 * 2500 numbers, the smallest component.
    tolerance = 3 / math.sqrt(2 * 10_000)
    check_classes(sample("heun", denoiser, x, sigmas, generators, label), label, growth * STD, tolerance)


def test_dpmpp_2m_converges_with_order_2() -> None:
    x, _, label = start(torch.tensor([20.0]), size=4)

    def levels(steps: int) -> Tensor:
        # All grids share the step to 0, which is of first order.
        return EDMProcess(sigma_min=0.01, sigma_max=20).sigmas(steps).double()

    fine = sample_heun(denoiser, x, levels(1500), label=label)
    errors = [
        float((sample_dpmpp_2m(denoiser, x, levels(n), label=label) - fine).square().mean().sqrt())
        for n in (60, 120, 240)
    ]
    for coarse, finer in pairwise(errors):
        assert math.log2(coarse / finer) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("process", [EDMProcess(), VPProcess("scaled_linear")], ids=["edm", "vp"])
@pytest.mark.parametrize("steps", [1, 2, 12, 30])
def test_dpmpp_2m_is_that_of_diffusers(process: NoiseProcess, steps: int) -> None:
    sigmas = process.sigmas(steps)
    x, _, label = start(sigmas, size=4)
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample", final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    # It works on images of unit variance, and ours on x + sigma * eps.
    scale = (1 + sigmas.double() ** 2).rsqrt()
    z = scale[0] * x
    want: list[Tensor] = []
    for i, t in enumerate(scheduler.timesteps):
        want.append(denoiser(z / scale[i], sigmas[i].expand(6), label))
        z = scheduler.step(want[-1], t, z).prev_sample
    got: list[Tensor] = []
    drawn = sample_dpmpp_2m(denoiser, x, sigmas, label=label, on_step=lambda _, estimate: got.append(estimate))
    # It rounds its state to float32 in every step, at sigma = 80 by 1e-5.
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn, z, rtol=1e-4, atol=1e-4)


def test_guidance_follows_the_gradient_of_the_likelihood() -> None:
    # (D - x) / sigma^2 is the gradient of log p(x_sigma), so guidance adds s times that of log p(c | x_sigma).
    scale, sigma = 1.7, 0.8
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.tensor([0, 1, 2])
    got = GuidedDenoiser(denoiser, scale, NULL)(x, torch.full((3,), sigma), label)
    for c in range(3):
        pixels = x[c].flatten(1).T.clone().requires_grad_()
        own = log_density(pixels, sigma, torch.eye(3, dtype=torch.float64)[c])
        every = log_density(pixels, sigma, torch.full((3,), 1 / 3, dtype=torch.float64))
        (gradient,) = torch.autograd.grad((own + scale * (own - every)).sum(), pixels)
        want = (pixels + sigma**2 * gradient).detach().T.view(4, 5, 5)
        torch.testing.assert_close(got[c], want, rtol=1e-6, atol=1e-6)


def test_guided_images_are_surer_of_their_class() -> None:
    # A class that shares a component with another one: guidance draws less of what both have.
    sigmas = EDMProcess().sigmas(40)
    x, generators, label = start(sigmas, size=32)
    mixes = torch.tensor([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]], dtype=torch.float64)

    def blurred(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is not None
        return posterior_mean(x, sigma, mixes[label])

    def purity(scale: float) -> float:
        guided = GuidedDenoiser(blurred, scale, NULL)
        drawn = sample("dpmpp_2m", guided, x, sigmas, generators, label)[label == 0]
        near = torch.cdist(drawn.movedim(1, -1).flatten(0, -2), MEANS.flatten(0, 1)).argmin(1)
        return float((near < 2).double().mean())

    assert purity(0.0) == pytest.approx(0.6, abs=0.04)
    assert purity(2.0) > 0.75


def test_affine_score_by_its_definition() -> None:
    x, _, label = start(torch.tensor([2.0]), size=4)
    sigma = torch.full((6,), 2.0, dtype=torch.float64)
    noise = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)

    def noisy(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is not None
        return posterior_mean(x, sigma, noise[label])

    got = AffineDenoiser(denoiser, noisy, 0.5)(x, sigma, label)
    torch.testing.assert_close(got, 1.5 * denoiser(x, sigma, label) - 0.5 * noisy(x, sigma, label))
