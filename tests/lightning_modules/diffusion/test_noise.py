"""Noise processes against printed tables, the papers' formulas in plain Python, and their own inverses."""

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_modules.diffusion import EDMProcess, JointDenoiser, NoiseProcess, VPProcess, VPSDEProcess
from lightning_modules.diffusion.vp_noise import Schedule

PROCESSES: list[Callable[..., NoiseProcess]] = [
    VPProcess,
    lambda **k: VPProcess("cosine", 50, **k),
    lambda **k: VPProcess("scaled_linear", prediction="epsilon", **k),
    VPSDEProcess,
    EDMProcess,
]
COEFFICIENTS = ("c_skip", "c_out", "c_in", "c_noise", "image_weight", "level")


def abar_of(process: VPProcess, t: Tensor) -> Tensor:
    sigma = process.sigma_at(t.double() / process.num_steps).double()
    return 1 / (1 + sigma**2)


# 0-based entries of the 1000-step linear DDPM table; t is one more, because t = 0 is the clean image.
@pytest.mark.parametrize(
    ("entry", "abar", "sigma"),
    [(0, 0.9999, 0.0100), (50, 0.969951, 0.176010), (150, 0.785887, 0.521965), (250, 0.521423, 0.958034)],
)
def test_linear_table(entry: int, abar: float, sigma: float) -> None:
    process = VPProcess()
    t = torch.tensor(float(entry + 1))
    assert abar_of(process, t).item() == pytest.approx(abar, abs=1e-6)
    assert process.sigma_at(t / 1000).item() == pytest.approx(sigma, abs=2e-6)
    assert process.c_in(process.sigma_at(t / 1000)).item() == pytest.approx(math.sqrt(abar), abs=1e-6)


def test_linear_table_ends() -> None:
    process = VPProcess()
    assert abar_of(process, torch.tensor(0.0)).item() == 1.0
    assert abar_of(process, torch.tensor(1000.0)).item() == pytest.approx(4.036e-5, rel=1e-3)
    assert process.sigma_min == pytest.approx(math.sqrt(1e-4 / 0.9999))
    assert process.sigma_max == pytest.approx(math.sqrt(1 / 4.036e-5 - 1), rel=1e-3)


@pytest.mark.parametrize("num_steps", [21, 400])
def test_linear_table_by_a_loop(num_steps: int) -> None:
    process, abar = VPProcess(num_steps=num_steps), 1.0
    for t in range(1, num_steps + 1):
        first, last = 0.1 / num_steps, 20 / num_steps
        abar *= 1 - (first + (last - first) * (t - 1) / (num_steps - 1))
        sigma = process.sigma_at(torch.tensor(t / num_steps, dtype=torch.float64)).item()
        assert sigma == pytest.approx(math.sqrt((1 - abar) / abar), rel=1e-5)


def test_cosine_table_by_its_formula() -> None:
    process = VPProcess("cosine", 100)
    t = torch.arange(99)
    angle = (t.double() / 100 + 0.008) / 1.008 * math.pi / 2
    want = (angle.cos() / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    torch.testing.assert_close(abar_of(process, t), want, rtol=1e-5, atol=0)
    # beta of the last step is cut at 0.999.
    last = (abar_of(process, torch.tensor(100)) / want[98]).item()
    penultimate = math.cos((0.99 + 0.008) / 1.008 * math.pi / 2) ** 2
    before = math.cos((0.98 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert last == pytest.approx(penultimate / before * 0.001, rel=1e-4)


# Of Stable Diffusion's table, and of abar(t) = exp(-(0.1 t + 9.95 t^2)), computed elsewhere with more digits.
@pytest.mark.parametrize(
    ("process", "level", "abar", "digit"),
    [
        (VPProcess("scaled_linear"), 0.001, 0.99915, 5e-6),
        (VPProcess("scaled_linear"), 0.5, 0.277670, 5e-7),
        (VPProcess("scaled_linear"), 1.0, 0.00466010, 5e-9),
        (VPSDEProcess(), 1e-4, 0.99999, 5e-6),
        (VPSDEProcess(), 0.5, 0.0790638, 5e-8),
        (VPSDEProcess(), 1.0, 4.31857e-5, 5e-11),
    ],
)
def test_printed_values_of_abar(process: NoiseProcess, level: float, abar: float, digit: float) -> None:
    sigma = process.sigma_at(torch.tensor(level, dtype=torch.float64))
    # A float32 sigma has seven digits.
    assert 1 / (1 + sigma.double().item() ** 2) == pytest.approx(abar, abs=digit, rel=2e-7)


def test_scaled_linear_table_by_a_loop() -> None:
    process, abar = VPProcess("scaled_linear", 100), 1.0
    for t in range(1, 101):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * (t - 1) / 99
        abar *= 1 - 10 * root**2
        sigma = process.sigma_at(torch.tensor(t / 100, dtype=torch.float64)).item()
        assert sigma == pytest.approx(math.sqrt((1 - abar) / abar), rel=1e-5)


def test_sde_inverse_against_the_integrated_rate() -> None:
    process = VPSDEProcess(beta_min=0.3, beta_max=11.0)
    for t in (1e-6, 1e-4, 0.02, 0.37, 0.9, 1.0):
        # Simpson's rule is exact for a linear rate.
        integral = t / 6 * (0.3 + 4 * (0.3 + 10.7 * t / 2) + 0.3 + 10.7 * t)
        sigma = torch.tensor(math.sqrt(math.exp(integral) - 1), dtype=torch.float64)
        assert process.level(sigma).item() == pytest.approx(t, rel=1e-6)
        assert process.c_noise(sigma).item() == pytest.approx(999 * t, rel=1e-6)
        assert process.sigma_at(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(sigma.item(), rel=1e-6)
    constant = VPSDEProcess(beta_min=2.0, beta_max=2.0)
    assert constant.level(torch.tensor(math.sqrt(math.e - 1))).item() == pytest.approx(0.5)


def test_sde_draws_times_uniformly() -> None:
    t = VPSDEProcess(t_min=0.2).sample_sigma(20_000, torch.Generator().manual_seed(0))
    t = (VPSDEProcess().level(t).double() - 0.2) / 0.8
    # Kolmogorov-Smirnov, 99.9 % quantile.
    assert (t.sort().values - torch.linspace(0, 1, 20_000)).abs().max() < 1.95 / math.sqrt(20_000)


def test_the_table_tends_to_the_sde() -> None:
    # The rates are those of the linear table with infinitely many steps.
    levels = torch.linspace(0.1, 0.9, 9)
    table, sde = VPProcess(num_steps=100_000).sigma_at(levels), VPSDEProcess().sigma_at(levels)
    torch.testing.assert_close(table, sde, rtol=2e-3, atol=0)


class Constant(nn.Module):
    """A network that always sees the same noise."""

    def __init__(self, eps: Tensor) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.eps


@pytest.mark.parametrize("process", [VPProcess("cosine", prediction="epsilon"), VPSDEProcess()], ids=["iddpm", "sde"])
def test_the_weighted_error_of_the_image_is_that_of_the_noise(process: NoiseProcess) -> None:
    sigma = process.sigma_at(torch.tensor([0.01, 0.1, 0.5, 0.8]))
    x, eps, guess = torch.randn(3, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoised = JointDenoiser(Constant(guess), process)(x + sigma.double()[:, None, None, None] * eps, sigma)
    error = (denoised - x).square().mean((1, 2, 3)) * process.image_weight(sigma)
    torch.testing.assert_close(error, (guess - eps).square().mean((1, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("process", [VPProcess(prediction="epsilon"), VPSDEProcess()], ids=["table", "sde"])
def test_without_noise_there_is_nothing_to_learn_of_it(process: NoiseProcess) -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(JointDenoiser(Constant(torch.randn(2, 3, 4, 4)), process)(x, 0.0), x)
    assert process.image_weight(torch.zeros(2)).tolist() == [0, 0]
    assert process.c_noise(torch.zeros(2)).tolist() == [0, 0]
    assert (process.sample_sigma(4000, torch.Generator().manual_seed(0)) >= process.sigma_min * (1 - 1e-6)).all()


def test_epsilon_draws_every_time_of_the_table_but_0() -> None:
    process = VPProcess(num_steps=30, prediction="epsilon")
    t = process.c_noise(process.sample_sigma(30_000, torch.Generator().manual_seed(0))).round().long()
    counts = np.bincount(t.numpy(), minlength=31)
    assert counts[0] == 0
    # 99.9 % quantile of chi-squared with 29 degrees of freedom.
    assert ((counts[1:] - 1000) ** 2 / 1000).sum() < 58.3


def test_settings_tell_processes_apart_and_stay_as_they_were() -> None:
    assert VPProcess().settings() == {"class": "VPProcess", "schedule": "linear", "num_steps": 1000}
    assert VPProcess(prediction="epsilon").settings() == VPProcess().settings() | {"prediction": "epsilon"}
    assert VPSDEProcess().settings() == {"class": "VPSDEProcess", "beta_min": 0.1, "beta_max": 20.0}


SCHEDULES: list[Schedule] = ["linear", "scaled_linear", "cosine"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_vp_noise_input_is_the_time(schedule: Schedule) -> None:
    process = VPProcess(schedule)
    t = torch.arange(1001)
    sigma = process.sigma_at(t.double() / 1000)
    assert sigma.dtype == torch.float32
    assert (process.c_noise(sigma) - t).abs().max() < 1e-3
    halves = process.c_noise((sigma[1:] + sigma[:-1]) / 2)
    torch.testing.assert_close(halves, t[:-1] + 0.5, atol=2e-3, rtol=0)
    assert process.c_noise(torch.tensor([0.0, 1e9])).tolist() == [0.0, 1000.0]


def test_vp_predicts_the_image() -> None:
    process, sigma = VPProcess(), torch.tensor([0.0, 0.3, 100.0])
    assert process.c_skip(sigma).tolist() == [0, 0, 0]
    assert process.c_out(sigma).tolist() == [1, 1, 1]
    assert process.image_weight(sigma).tolist() == [1, 1, 1]
    torch.testing.assert_close(process.c_in(sigma), torch.tensor([1.0, 1 / math.sqrt(1.09), 1 / math.sqrt(10001)]))


def test_vp_draws_times_uniformly() -> None:
    process = VPProcess(num_steps=30)
    n = 31_000
    sigma = process.sample_sigma(n, torch.Generator().manual_seed(0))
    t = process.c_noise(sigma).round().long()
    torch.testing.assert_close(process.sigma_at(t / 30), sigma, rtol=1e-5, atol=0)
    counts = np.bincount(t.numpy(), minlength=31)
    assert len(counts) == 31
    # 99.9 % quantile of chi-squared with 30 degrees of freedom.
    assert ((counts - n / 31) ** 2 / (n / 31)).sum() < 59.7


# (sigma, c_skip, c_out, c_in, c_noise, weight) for sigma_data = 0.5, by hand from arXiv 2206.00364.
GOLDEN = [
    (0.002, 0.999984, 0.001999984, 1.999984, -1.5536520, 250004.0),
    (0.5, 0.5, 0.35355339, 1.41421356, -0.17328680, 8.0),
    (80.0, 3.9060975e-05, 0.49999023, 0.012499756, 1.0955066, 4.00015625),
]


@pytest.mark.parametrize(("sigma", "c_skip", "c_out", "c_in", "c_noise", "weight"), GOLDEN)
def test_edm_golden_values(
    sigma: float, c_skip: float, c_out: float, c_in: float, c_noise: float, weight: float
) -> None:
    process, at = EDMProcess(), torch.tensor([sigma])
    assert process.c_skip(at).item() == pytest.approx(c_skip, rel=1e-6)
    assert process.c_out(at).item() == pytest.approx(c_out, rel=1e-6)
    assert process.c_in(at).item() == pytest.approx(c_in, rel=1e-6)
    assert process.c_noise(at).item() == pytest.approx(c_noise, rel=1e-6)
    assert process.image_weight(at).item() == pytest.approx(weight, rel=1e-6)


def test_edm_weight_undoes_c_out() -> None:
    process = EDMProcess(sigma_data=0.7)
    sigma = torch.logspace(-4, 3, 50)
    product = process.image_weight(sigma) * process.c_out(sigma) ** 2
    torch.testing.assert_close(product, torch.ones(50), rtol=1e-5, atol=0)


def test_edm_at_zero_is_the_documented_limit() -> None:
    process, zero = EDMProcess(), torch.zeros(1)
    assert process.c_skip(zero).item() == 1.0
    assert process.c_out(zero).item() == 0.0
    assert process.c_in(zero).item() == 2.0
    assert process.c_noise(zero).item() == pytest.approx(math.log(0.002) / 4)
    assert process.image_weight(zero).item() == 0.0


def test_edm_draws_are_lognormal() -> None:
    sigma = EDMProcess(p_mean=-0.5, p_std=0.8).sample_sigma(20_000, torch.Generator().manual_seed(0))
    z = (sigma.double().log() + 0.5) / 0.8
    # Kolmogorov-Smirnov, 99.9 % quantile.
    cdf = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    assert (cdf - torch.linspace(0, 1, 20_000)).abs().max() < 1.95 / math.sqrt(20_000)


def test_edm_steps() -> None:
    got = EDMProcess().sigmas(18)
    want = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0.0]
    torch.testing.assert_close(got, torch.tensor(want))
    # The steps as printed for EDM's default sampler.
    printed = [80.0, 57.586, 40.785, 28.374, 19.352, 12.910]
    assert got[:6].tolist() == pytest.approx(printed, rel=1e-4)
    assert EDMProcess().sigmas(1).tolist() == [80.0, 0.0]


def test_vp_steps_are_equal_in_time() -> None:
    process = VPProcess()
    sigma = process.sigmas(8)
    torch.testing.assert_close(process.c_noise(sigma), torch.linspace(1000, 0, 9), atol=1e-3, rtol=0)


@pytest.mark.parametrize("build", PROCESSES)
def test_shared_contract(build: Callable[..., NoiseProcess]) -> None:
    process = build()
    for steps in (1, 2, 33):
        sigmas = process.sigmas(steps)
        assert len(sigmas) == steps + 1
        assert sigmas[0].item() == pytest.approx(process.sigma_max)
        assert sigmas[-1].item() == 0.0
        assert (sigmas.diff() < 0).all()
        assert sigmas.dtype == torch.float32
    levels = torch.linspace(0, 1, 41)
    sigma = process.sigma_at(levels)
    assert sigma[0].item() == 0.0
    assert sigma[-1].item() == pytest.approx(process.sigma_max)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(process.level(sigma), levels, atol=2e-6, rtol=1e-5)
    assert process.level(torch.tensor([0.0, 1e6])).tolist() == [0.0, 1.0]
    torch.testing.assert_close(process.sigma_at(0.5), sigma[20])
    assert process.sigma_at(torch.tensor([-1.0, 2.0])).tolist() == pytest.approx([0.0, process.sigma_max])


@pytest.mark.parametrize("build", PROCESSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_coefficients_are_finite_float32_of_the_same_shape(
    build: Callable[..., NoiseProcess], dtype: torch.dtype
) -> None:
    process = build()
    sigma = torch.tensor([[0.0, 0.002, 0.5], [3.0, 80.0, 500.0]], dtype=dtype)
    before = sigma.clone()
    for name in COEFFICIENTS:
        value = getattr(process, name)(sigma)
        assert value.shape == sigma.shape
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    torch.testing.assert_close(sigma, before, rtol=0, atol=0)


@pytest.mark.parametrize("build", PROCESSES)
def test_draws(build: Callable[..., NoiseProcess]) -> None:
    def draw(seed: int, clean_share: float = 0.0) -> Tensor:
        return build(clean_share=clean_share).sample_sigma(4000, torch.Generator().manual_seed(seed))

    assert draw(1).dtype == torch.float32
    torch.testing.assert_close(draw(1), draw(1), rtol=0, atol=0)
    assert not torch.equal(draw(1), draw(2))
    some, none = draw(3, 0.25), draw(3)
    clean = (some == 0) & (none != 0)
    expected = 0.25 * (none != 0).sum().item()
    assert abs(clean.sum().item() - expected) < 4 * math.sqrt(expected * 0.75)
    torch.testing.assert_close(some[~clean], none[~clean], rtol=0, atol=0)
    assert not draw(4, 1.0).any()
    torch.manual_seed(5)
    first = build().sample_sigma(3)
    torch.manual_seed(5)
    torch.testing.assert_close(build().sample_sigma(3, device="cpu"), first, rtol=0, atol=0)


def test_edm_never_draws_a_clean_image_by_itself() -> None:
    assert (EDMProcess().sample_sigma(4000, torch.Generator().manual_seed(0)) > 0).all()


@pytest.mark.parametrize("build", PROCESSES)
def test_casting_a_model_leaves_the_process_alone(build: Callable[..., NoiseProcess]) -> None:
    process = build()
    sigma = torch.tensor([0.0, 0.4, 7.0])
    want = process.c_noise(sigma)
    cast = copy.deepcopy(process).half()
    torch.testing.assert_close(cast.c_noise(sigma), want, rtol=0, atol=0)
    assert not process.state_dict()


def test_built_inside_a_device_context() -> None:
    with torch.device("meta"):
        process = VPProcess()
    assert process.sigma_at(torch.tensor(0.251)).item() == pytest.approx(0.958034, abs=2e-6)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: VPProcess(num_steps=20), r"`num_steps` above 20 for the linear schedule, got 20"),
        (lambda: VPProcess(num_steps=0), r"`num_steps` to be at least 1, got 0"),
        (lambda: VPProcess(clean_share=1.5), r"`clean_share` to be a probability in \[0, 1\], got 1.5"),
        (lambda: VPProcess(cast(Any, "square")), r"to be 'linear', 'scaled_linear' or 'cosine', got 'square'"),
        (lambda: VPProcess("scaled_linear", 12), r"`num_steps` above 12 for the scaled_linear schedule, got 12"),
        (lambda: VPProcess(prediction=cast(Any, "v")), r"`prediction` to be 'x0' or 'epsilon', got 'v'"),
        (lambda: VPSDEProcess(beta_min=0.0), r"0 < `beta_min` <= `beta_max`, got 0.0 and 20.0"),
        (lambda: VPSDEProcess(beta_max=0.01), r"`beta_min` <= `beta_max`, got 0.1 and 0.01"),
        (lambda: VPSDEProcess(t_min=0.0), r"`t_min` in \(0, 1\), got 0.0"),
        (lambda: VPSDEProcess(clean_share=2.0), r"`clean_share`"),
        (lambda: VPSDEProcess().sigmas(0), r"`num_steps` to be at least 1, got 0"),
        (lambda: EDMProcess(sigma_min=0.0), r"0 < `sigma_min` < `sigma_max`, got 0.0 and 80.0"),
        (lambda: EDMProcess(sigma_min=90.0), r"`sigma_min` < `sigma_max`, got 90.0"),
        (lambda: EDMProcess(sigma_data=-1.0), r"`sigma_data` to be a positive number, got -1.0"),
        (lambda: EDMProcess(p_std=float("nan")), r"`p_std` to be a positive number, got nan"),
        (lambda: EDMProcess(clean_share=-0.1), r"`clean_share`"),
        (lambda: EDMProcess().sigmas(0), r"`num_steps` to be at least 1, got 0"),
        (lambda: VPProcess().sigmas(0), r"`num_steps` to be at least 1, got 0"),
    ],
)
def test_bad_arguments(build: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
