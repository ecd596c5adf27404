"""Samplers against exact solutions, against DDIM written in its own coordinates, and one image at a time."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from tiny_nets import tiny_unet
from torch import Tensor, nn

from lightning_modules.diffusion import (
    SAMPLERS,
    EDMProcess,
    JointDenoiser,
    PairDenoiser,
    SamplerName,
    VPProcess,
    sample,
    sample_ancestral,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
    seeded_generators,
    seeded_noise,
)
from lightning_modules.diffusion.sampler_steps import Denoiser

STD = 0.7


def gaussian(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """E[x | x_sigma] of x ~ N(0, STD^2)."""
    return STD**2 / (STD**2 + sigma[:, None, None, None] ** 2) * x


def two_points(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """E[x | x_sigma] of x = 1 or -1, pushed off the optimum so that no step is trivial."""
    return torch.tanh(x / (0.3 + sigma[:, None, None, None] ** 2))


def start(
    seeds: Sequence[int], sigmas: Tensor, channels: int = 3, size: int = 8
) -> tuple[Tensor, list[torch.Generator]]:
    generators = seeded_generators(seeds)
    return sigmas[0] * seeded_noise(generators, (channels, size, size), dtype=torch.float64), generators


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(sample_euler, 1), (sample_heun, 2), (sample_dpmpp_2m, 2)],
    ids=["euler", "heun", "dpmpp_2m"],
)
def test_order_of_convergence_on_gaussian_data(sampler: Callable[..., Tensor], order: int) -> None:
    # The exact ODE keeps x / sqrt(STD^2 + sigma^2). The step to sigma = 0 is of first order for all samplers:
    # a tiny sigma_min takes it out of the comparison.
    process = EDMProcess(sigma_min=1e-5, sigma_max=20)
    errors = []
    for steps in (40, 80, 160):
        sigmas = process.sigmas(steps)
        x, _ = start([0], sigmas)
        exact = x * STD / math.sqrt(STD**2 + float(sigmas[0]) ** 2)
        errors.append(float((sampler(gaussian, x, sigmas) / exact - 1).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ancestral_is_ddim_in_variance_preserving_coordinates(eta: float) -> None:
    sigmas = VPProcess().sigmas(12)
    x, generators = start([1, 2], sigmas)
    abar = 1 / (1 + sigmas.double() ** 2)
    z = abar[0].sqrt() * x
    noises = seeded_generators([1, 2])
    seeded_noise(noises, x.shape[1:])
    for i, (a, b) in enumerate(pairwise(abar)):
        denoised = two_points(z / a.sqrt(), sigmas[i].double().expand(2))
        eps = (z - a.sqrt() * denoised) / (1 - a).sqrt()
        sd = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        if eta == 1:
            # DDPM has its own way to write the mean: equation 7 of arXiv 2006.11239 with beta = 1 - a / b.
            mean = (b.sqrt() * (1 - a / b) * denoised + (a / b).sqrt() * (1 - b) * z) / (1 - a)
        else:
            mean = b.sqrt() * denoised + (1 - b - sd**2).clamp(min=0).sqrt() * eps
        z = mean + sd * (seeded_noise(noises, x.shape[1:], dtype=z.dtype) if sd > 0 else 0)
    got = sample_ancestral(two_points, x, sigmas, generators, eta=eta)
    torch.testing.assert_close(got, z, rtol=1e-9, atol=1e-9)


def test_ancestral_without_noise_is_euler() -> None:
    sigmas = EDMProcess().sigmas(9)
    x, generators = start([1, 2], sigmas)
    euler = sample_euler(two_points, x, sigmas)
    torch.testing.assert_close(sample_ancestral(two_points, x, sigmas, None, eta=0.0), euler, rtol=0, atol=0)
    assert not torch.equal(sample_ancestral(two_points, x, sigmas, generators, eta=0.1), euler)


def test_churn_of_zero_or_outside_its_range_is_no_churn() -> None:
    sigmas = EDMProcess().sigmas(9)
    x, generators = start([1, 2], sigmas)
    plain = sample_heun(two_points, x, sigmas)
    torch.testing.assert_close(sample_heun(two_points, x, sigmas, generators), plain, rtol=0, atol=0)
    outside = sample_heun(two_points, x, sigmas, generators, s_churn=9, s_tmin=81)
    torch.testing.assert_close(outside, plain, rtol=0, atol=0)
    assert not torch.equal(sample_heun(two_points, x, sigmas, generators, s_churn=9), plain)


def test_churn_raises_the_levels_in_its_range() -> None:
    sigmas, seen = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0]), []

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        seen.append(float(sigma[0]))
        return gaussian(x, sigma)

    x, generators = start([1], sigmas)
    sample_heun(denoiser, x, sigmas, generators, s_churn=1, s_tmin=1.5, s_tmax=4)
    assert seen == pytest.approx([8, 4, 5, 2, 2.5, 1, 1])
    seen.clear()
    sample_heun(denoiser, x, sigmas, generators, s_churn=100)
    assert seen[::2] == pytest.approx([level * math.sqrt(2) for level in (8, 4, 2, 1)])


@pytest.mark.parametrize(("s_noise", "std"), [(1.0, STD), (0.0, None)])
def test_churn_keeps_the_distribution(s_noise: float, std: float | None) -> None:
    sigmas = EDMProcess(sigma_max=20).sigmas(60)
    x, generators = start([1, 2], sigmas, size=64)
    got = float(sample_heun(gaussian, x, sigmas, generators, s_churn=40, s_noise=s_noise).std())
    if std is None:
        # Without the noise that the raised levels promise, too much is removed.
        assert got < 0.7 * STD
    else:
        assert got == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name: SamplerName) -> None:
    sigmas, seeds = EDMProcess().sigmas(12), [3, 1, 4, 1, 5, 9, 2, 6] * 4
    x, generators = start(seeds, sigmas)
    batch = sample(name, two_points, x.float(), sigmas, generators)
    for row in (0, 5, 31):
        x, generators = start([seeds[row]], sigmas)
        alone = sample(name, two_points, x.float(), sigmas, generators)
        torch.testing.assert_close(alone[0], batch[row], rtol=0, atol=0)
    torch.testing.assert_close(batch[1], batch[3], rtol=0, atol=0)
    assert not torch.equal(batch[0], batch[1])


def test_stochastic_samplers_draw_anew_in_every_step() -> None:
    # With a denoiser that always says 0, ancestral is a weighted sum of its noises.
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0])
    x, generators = start([7], sigmas, channels=1, size=64)
    states: list[Tensor] = []

    def zero(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        states.append(x)
        return torch.zeros_like(x)

    sample_ancestral(zero, x, sigmas, generators)
    noises = [x / 4, *(after - before / 4 for before, after in pairwise(states))]
    correlation = torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))
    # Three standard deviations of 4096 pixels.
    torch.testing.assert_close(correlation, torch.eye(3, dtype=torch.float64), rtol=0, atol=3 / 64)
    assert [float(state.std()) for state in states] == pytest.approx([4, 2, 1], rel=0.05)


def test_seeded_noise() -> None:
    noise = seeded_noise([5, 0, 2**32 - 1], (2, 3, 4))
    assert noise.shape == (3, 2, 3, 4)
    torch.testing.assert_close(seeded_noise(torch.tensor([0, 5]), (2, 3, 4)), noise[[1, 0]], rtol=0, atol=0)
    generators = seeded_generators([5, 0])
    torch.testing.assert_close(seeded_noise(generators, (2, 3, 4)), noise[:2], rtol=0, atol=0)
    # The generators have gone on; other types have the same values.
    assert not torch.equal(seeded_noise(generators, (2, 3, 4)), noise[:2])
    wide = seeded_noise([5, 0], (2, 3, 4), dtype=torch.float64)
    torch.testing.assert_close(wide, noise[:2].double(), rtol=0, atol=0)
    many = seeded_noise(range(500), (3, 8, 8))
    assert float(many.mean()) == pytest.approx(0, abs=3 / math.sqrt(many.numel()))
    assert float(many.std()) == pytest.approx(1, abs=0.01)


def test_noise_leaves_the_global_generator_alone() -> None:
    sigmas = EDMProcess().sigmas(4)
    state = torch.get_rng_state()
    x, generators = start([0, 1], sigmas)
    sample_ancestral(gaussian, x, sigmas, generators)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_label_steps_and_calls(name: SamplerName) -> None:
    sigmas, label = VPProcess().sigmas(5), torch.tensor([2, 7])
    calls: list[tuple[Tensor, Tensor | None]] = []
    steps: list[int] = []
    estimates: list[Tensor] = []

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        calls.append((sigma, label))
        return gaussian(x, sigma)

    def on_step(step: int, estimate: Tensor) -> None:
        steps.append(step)
        estimates.append(estimate)

    x, generators = start([0, 1], sigmas)
    drawn = sample(name, denoiser, x, sigmas, generators, label, on_step)
    assert steps == [1, 2, 3, 4, 5]
    torch.testing.assert_close(estimates[-1], drawn, rtol=0, atol=0)
    assert len(calls) == (9 if name == "heun" else 5)
    for sigma, given in calls:
        assert given is label
        assert sigma.shape == (2,)
        assert sigma[0] == sigma[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_denoiser_gets_the_type_of_the_state_and_precise_levels(dtype: torch.dtype) -> None:
    sigmas = VPProcess().sigmas(4)

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        assert x.dtype == dtype
        assert sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert sigma[0] in sigmas
        return gaussian(x, sigma)

    x, generators = start([0], sigmas)
    for name in SAMPLERS:
        assert sample(name, denoiser, x.to(dtype), sigmas, generators).dtype == dtype


def test_the_state_does_not_lose_digits_in_many_steps() -> None:
    sigmas = VPProcess().sigmas(1000)
    x = start([0], sigmas)[0].float()

    def zero(state: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        want = x.double() * sigma.double() / sigmas[0].double()
        torch.testing.assert_close(state, want.float(), rtol=1.2e-7, atol=0)
        return torch.zeros_like(state)

    sample_euler(zero, x, sigmas)


def test_no_gradients_are_kept() -> None:
    net = nn.Conv2d(3, 3, 1)

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        maps: Tensor = net(x)
        return maps

    x, generators = start([0], torch.tensor([2.0, 0.0]))
    for name in SAMPLERS:
        drawn = sample(name, denoiser, x.float(), torch.tensor([2.0, 1.0, 0.0]), generators)
        assert not drawn.requires_grad


def first_channel(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    return x[:, :1]


BAD_SIGMAS = [
    torch.tensor([1.0, 2.0, 0.0]),
    torch.tensor([2.0, 2.0, 0.0]),
    torch.tensor([2.0, 1.0]),
    torch.tensor([0.0]),
    torch.tensor([]),
    torch.tensor([[2.0, 0.0]]),
    torch.tensor([math.nan, 0.0]),
    torch.tensor([math.inf, 0.0]),
    torch.tensor([1.0, 0.0, -1.0]),
    torch.arange(20.0),
]


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_levels_and_states(name: SamplerName) -> None:
    generators, good = seeded_generators([0]), torch.tensor([2.0, 1.0, 0.0])
    x = torch.zeros(1, 3, 4, 4)
    for sigmas in BAD_SIGMAS:
        with pytest.raises(ValueError, match=r"`sigmas` to be 2 or more decreasing noise levels that end in 0"):
            sample(name, gaussian, x, sigmas, generators)
    with pytest.raises(ValueError, match=r"`x` of shape \[B, C, H, W\] and a floating type, got \[3, 4, 4\]"):
        sample(name, gaussian, x[0], good, generators)
    with pytest.raises(ValueError, match=r"`x` of shape .*torch.int64"):
        sample(name, gaussian, x.long(), good, generators)
    with pytest.raises(ValueError, match=r"`denoiser` to return .* \[1, 3, 4, 4\], got \[1, 1, 4, 4\]"):
        sample(name, first_channel, x, good, generators)


def test_bad_options() -> None:
    sigmas, x = torch.tensor([2.0, 1.0, 0.0]), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`generators` with 2 .* got 1"):
        sample_ancestral(gaussian, x, sigmas, seeded_generators([0]))
    with pytest.raises(ValueError, match=r"`generators` with 2 .* got 0"):
        sample_ancestral(gaussian, x, sigmas, None)
    with pytest.raises(ValueError, match=r"`generators` with 2 .* got 0"):
        sample_heun(gaussian, x, sigmas, s_churn=1)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"`eta` in \[0, 1\]"):
            sample_ancestral(gaussian, x, sigmas, seeded_generators([0, 1]), eta=eta)
    with pytest.raises(ValueError, match=r"`s_churn` to be 0 or more and finite, got -1"):
        sample_heun(gaussian, x, sigmas, s_churn=-1)
    with pytest.raises(ValueError, match=r"`s_noise` to be 0 or more and finite, got nan"):
        sample_heun(gaussian, x, sigmas, s_noise=math.nan)
    with pytest.raises(ValueError, match=r"sampler among \['ancestral', 'dpmpp_2m', 'euler', 'heun'\], got 'ddim'"):
        sample("ddim", gaussian, x, sigmas, [])  # type: ignore[arg-type]  # the wrong name is the point
    # PyTorch would take the same images for 0 and 2^32.
    for seeds in ([-1], [2**32], [0.5], [[1, 2]]):
        with pytest.raises(ValueError, match=r"`seeds` to be a list of integers from 0 to 2\^32 - 1"):
            seeded_generators(torch.tensor(seeds))
    with pytest.raises(ValueError, match=r"`seeds` to hold at least one"):
        seeded_noise([], (3, 4, 4))


def pair_denoiser(clip: bool = True) -> PairDenoiser:
    torch.manual_seed(0)
    joint = JointDenoiser(tiny_unet(5, dropout=0.0).eval(), EDMProcess())
    return PairDenoiser(joint, lambda mask: mask.softmax(1), clip)


def test_pairs_are_the_image_and_the_probabilities_of_the_joint_denoiser() -> None:
    denoiser, sigma = pair_denoiser(), torch.tensor([0.5, 3.0])
    z = 3 * seeded_noise([0, 1], (5, 8, 8))
    image, mask = denoiser.joint.joint(z[:, :3], sigma)
    assert (image.abs() > 1).any()
    want = torch.cat([image.clamp(-1, 1), mask.softmax(1)], 1)
    torch.testing.assert_close(denoiser(z, sigma), want, rtol=0, atol=0)
    torch.testing.assert_close(pair_denoiser(clip=False)(z, sigma)[:, :3], image, rtol=0, atol=0)
    # The mask part of z has no way in.
    z[:, 3:] = 100
    torch.testing.assert_close(denoiser(z, sigma), want, rtol=0, atol=0)


def test_pairs_of_a_network_are_drawn() -> None:
    denoiser: Denoiser = pair_denoiser()
    sigmas = EDMProcess().sigmas(5)
    for name in SAMPLERS:
        x, generators = start([0, 1], sigmas, channels=5)
        drawn = sample(name, denoiser, x.float(), sigmas, generators)
        image, mask = drawn[:, :3], drawn[:, 3:]
        assert image.abs().max() <= 1
        torch.testing.assert_close(mask.sum(1), torch.ones(2, 8, 8))


def test_bad_pairs() -> None:
    denoiser = pair_denoiser()
    with pytest.raises(ValueError, match=r"`x` of shape \[1, 5, 8, 8\], an image and the mask of 2 classes"):
        denoiser(torch.zeros(1, 4, 8, 8), 1.0)
    with pytest.raises(ValueError, match=r"`x` of shape \[B, 3, H, W\], got \[1, 2, 8, 8\]"):
        denoiser(torch.zeros(1, 2, 8, 8), 1.0)
    with pytest.raises(ValueError, match=r"`label` to be None"):
        denoiser(torch.zeros(1, 5, 8, 8), 1.0, torch.zeros(1))
    with pytest.raises(ValueError, match=r"`joint` with `image_channels` above 0"):
        PairDenoiser(JointDenoiser(nn.Conv2d(3, 2, 1), EDMProcess(), 0), nn.Softmax(1))
