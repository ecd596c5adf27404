"""JointDenoiser against the posterior mean of Gaussian data, for networks whose optimal output is known."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_modules.diffusion import EDMProcess, JointDenoiser, NoiseProcess, VPProcess, takes_time

STD = 0.7
SIGMA_DATA = 0.5


class OptimalVP(nn.Module):
    """E[x | x_t] for x ~ N(0, STD^2) from DDPM's own loop over its betas, and constants as a mask."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        image = torch.empty_like(x)
        for i, steps in enumerate(t.round().long().tolist()):
            abar = 1.0
            for step in range(steps):
                abar *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
            image[i] = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar) * x[i]
        return torch.cat([image, torch.full_like(x[:, :2], 3.0)], 1)


class OptimalEDM(nn.Module):
    """The F that makes equation 7 of arXiv 2206.00364 the posterior mean of x ~ N(0, STD^2)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = (4 * t.double()).exp()[:, None, None, None]
        variance = sigma**2 + SIGMA_DATA**2
        noisy = x.double() * variance.sqrt()
        best = STD**2 / (STD**2 + sigma**2) * noisy
        image = (best - SIGMA_DATA**2 / variance * noisy) * variance.sqrt() / (sigma * SIGMA_DATA)
        return torch.cat([image, torch.full_like(image[:, :2], 3.0)], 1).float()


class Affine(nn.Module):
    """A trainable network with a time input."""

    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        maps: Tensor = self.conv(x)
        return maps + 0 * t[:, None, None, None].to(maps.dtype)


class Segmenter(nn.Module):
    """A network without a time input, with an optional argument."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.cat([x, x[:, :1]], 1) * scale


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        output: Tensor = self.module(*args)
        return output


@pytest.mark.parametrize(("process", "network"), [(VPProcess(), OptimalVP()), (EDMProcess(SIGMA_DATA), OptimalEDM())])
def test_gaussian_posterior_mean(process: NoiseProcess, network: nn.Module) -> None:
    denoiser = JointDenoiser(network, process)
    # Times of the VP table, so that the reference needs no interpolation.
    sigma = VPProcess().sigma_at(torch.tensor([1, 100, 400, 700]) / 1000)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * (STD**2 + sigma**2).sqrt().view(
        -1, 1, 1, 1
    )
    want = STD**2 / (STD**2 + sigma.view(-1, 1, 1, 1) ** 2) * x
    torch.testing.assert_close(denoiser(x, sigma), want, rtol=1e-4, atol=1e-5)
    image, mask = denoiser.joint(x, sigma)
    torch.testing.assert_close(image, denoiser(x, sigma), rtol=0, atol=0)
    # The mask output is passed on as it is.
    assert mask.shape == (4, 2, 2, 2)
    assert (mask == 3.0).all()


def test_edm_returns_clean_images_unchanged_whatever_the_network_says() -> None:
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    network = Affine()
    image, mask = JointDenoiser(network, EDMProcess()).joint(x, 0.0)
    torch.testing.assert_close(image, x, rtol=0, atol=0)
    torch.testing.assert_close(mask, network(2 * x, torch.zeros(2))[:, 3:])


def test_vp_gives_clean_images_to_the_network_as_they_are() -> None:
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    network = Affine()
    image, mask = JointDenoiser(network, VPProcess()).joint(x, torch.zeros(2))
    torch.testing.assert_close(torch.cat([image, mask], 1), network(x, torch.zeros(2)), rtol=0, atol=0)


@pytest.mark.parametrize("process", [VPProcess(), EDMProcess()])
def test_one_sigma_for_all_equals_one_each(process: NoiseProcess) -> None:
    denoiser, x = JointDenoiser(Affine(), process), torch.randn(3, 3, 2, 2)
    want = denoiser(x, torch.full((3,), 0.8))
    for sigma in (0.8, torch.tensor(0.8), torch.tensor([0.8])):
        torch.testing.assert_close(denoiser(x, sigma), want, rtol=0, atol=0)


def test_image_and_mask_heads_do_not_share_gradients() -> None:
    for part, own, other in ((0, slice(0, 3), slice(3, 5)), (1, slice(3, 5), slice(0, 3))):
        network = Affine()
        output = JointDenoiser(network, EDMProcess()).joint(torch.randn(2, 3, 4, 4), 0.5)[part]
        torch.autograd.backward(output.square().sum())
        gradient = network.conv.weight.grad
        assert gradient is not None
        assert gradient[own].any()
        assert not gradient[other].any()


def test_precision_of_inputs_and_weights() -> None:
    process = EDMProcess()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert JointDenoiser(Affine(), process)(x, torch.tensor([0.3, 2.0], dtype=torch.float64)).dtype == x.dtype
    half = JointDenoiser(Affine().bfloat16(), process)(x.bfloat16(), 0.3)
    assert half.dtype == torch.float32


def test_networks_without_time_take_clean_images_only() -> None:
    denoiser = JointDenoiser(Segmenter(), VPProcess(), image_channels=0)
    x = torch.randn(2, 3, 4, 4)
    image, mask = denoiser.joint(x, torch.zeros(2))
    assert image.shape == (2, 0, 4, 4)
    torch.testing.assert_close(mask, torch.cat([x, x[:, :1]], 1), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"`sigma` to be 0, got up to 0.5: Segmenter has no time input"):
        denoiser.joint(x, torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match=r"`image_channels` above 0 to denoise"):
        denoiser(x, 0.0)


def test_takes_time() -> None:
    assert takes_time(Affine())
    assert not takes_time(Segmenter())
    assert not takes_time(nn.Sequential(nn.Conv2d(3, 3, 1)))
    for network, expected in ((Affine(), True), (Segmenter(), False)):
        compiled = torch.compile(network)
        for wrapped in (AveragedModel(network), Wrapper(network), Wrapper(Wrapper(network)), compiled):
            assert isinstance(wrapped, nn.Module)
            assert takes_time(wrapped) is expected
    with pytest.raises(TypeError, match=r"`network` with forward\(x, t\) or forward\(x\), got ModuleList"):
        takes_time(nn.ModuleList())


@pytest.mark.parametrize(
    ("image_channels", "shape", "sigmas", "match"),
    [
        (3, (2, 1, 4, 4), 2, r"`x` of shape \[B, 3, H, W\], got \[2, 1, 4, 4\]"),
        (0, (3, 4, 4), 3, r"`x` of shape \[B, C, H, W\]"),
        (3, (2, 3, 4, 4), 3, r"`sigma` of shape \[\] or \[2\], one per image, got \[3\]"),
    ],
)
def test_bad_inputs(image_channels: int, shape: tuple[int, ...], sigmas: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        JointDenoiser(Affine(), VPProcess(), image_channels).joint(torch.zeros(shape), torch.zeros(sigmas))


def test_other_bad_arguments() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"output of `network` to be \[1, 3 \+ K, 4, 4\], got \[1, 2, 4, 4\]"):
        JointDenoiser(Affine(2), VPProcess()).joint(x, 0.0)
    with pytest.raises(ValueError, match=r"`label` to be None"):
        JointDenoiser(Affine(), VPProcess())(x, 0.0, torch.zeros(1))
    with pytest.raises(ValueError, match=r"`image_channels` to be 0 or more, got -1"):
        JointDenoiser(Affine(), VPProcess(), -1)
