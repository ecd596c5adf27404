"""One image is the same to the last bit, drawn alone or among 64, with classes and guidance."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.diffusion import (
    SAMPLERS,
    EDMProcess,
    GuidedDenoiser,
    NoiseProcess,
    SamplerName,
    VPProcess,
    VPSDEProcess,
    in_fixed_batches,
    sample,
    sampler_sigmas,
    seeded_generators,
    seeded_noise,
)


class ConvDenoiser(nn.Module):
    """A small convolutional denoiser with classes; `sizes` of the batches it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.classes = nn.Embedding(11, 16)
        self.sizes: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        self.sizes.append(len(x))
        assert label is not None
        hidden: Tensor = self.first(x / (1 + sigma[:, None, None, None]))
        hidden = torch.tanh(hidden + self.classes(label)[:, :, None, None])
        maps: Tensor = self.last(hidden)
        return maps


def draw(name: SamplerName, seeds: list[int], guidance: float = 0.0) -> Tensor:
    sigmas = EDMProcess().sigmas(4)
    generators = seeded_generators(seeds)
    label = torch.tensor(seeds) % 10
    denoiser = in_fixed_batches(GuidedDenoiser(ConvDenoiser(), guidance, 10))
    return sample(name, denoiser, sigmas[0] * seeded_noise(generators, (3, 12, 12)), sigmas, generators, label)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_an_image_alone_is_that_in_a_batch_of_64(name: SamplerName, guidance: float) -> None:
    together = draw(name, list(range(64)), guidance)
    for seed in (0, 13, 63):
        assert torch.equal(draw(name, [seed], guidance)[0], together[seed])
    assert torch.equal(draw(name, [5, 40, 7], guidance), together[[5, 40, 7]])
    assert not torch.equal(together[3], together[13])


@pytest.mark.parametrize(("images", "size", "sizes"), [(1, 8, [8]), (8, 8, [8]), (9, 8, [8, 8]), (3, 2, [2, 2])])
def test_every_batch_has_the_size_asked_for(images: int, size: int, sizes: list[int]) -> None:
    denoiser = ConvDenoiser()
    x, sigma, label = torch.randn(images, 3, 5, 5), torch.rand(images), torch.randint(10, (images,))
    got = in_fixed_batches(denoiser, size)(x, sigma, label)
    assert denoiser.sizes == sizes
    # Noise levels and labels stay with their images.
    torch.testing.assert_close(got, denoiser(x, sigma, label))


def test_images_without_classes() -> None:
    def halve(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is None
        assert len(x) == 4
        return x / 2 + sigma[:, None, None, None]

    x, sigma = torch.randn(6, 1, 2, 2), torch.rand(6)
    torch.testing.assert_close(in_fixed_batches(halve, 4)(x, sigma), x / 2 + sigma[:, None, None, None])
    with pytest.raises(ValueError, match=r"`size` to be at least 1, got 0"):
        in_fixed_batches(halve, 0)


@pytest.mark.parametrize("process", [VPProcess("cosine"), VPProcess("scaled_linear"), VPSDEProcess()])
@pytest.mark.parametrize("name", SAMPLERS)
def test_second_order_samplers_of_vp_processes_keep_to_visible_noise(name: SamplerName, process: NoiseProcess) -> None:
    sigmas = sampler_sigmas(process, name, 20)
    assert len(sigmas) == 21
    assert sigmas[-1] == 0
    if name in ("heun", "dpmpp_2m"):
        assert float(sigmas[0]) == pytest.approx(min(process.sigma_max, 80))
        assert float(sigmas[-2]) == pytest.approx(process.sigma_min)
        # Equal steps of sigma^(1 / 7).
        steps = (sigmas[:-1].double() ** (1 / 7)).diff()
        torch.testing.assert_close(steps, steps[:1].expand(19), rtol=1e-4, atol=0)
    else:
        assert torch.equal(sigmas, process.sigmas(20))


@pytest.mark.parametrize("name", SAMPLERS)
def test_edm_has_levels_of_its_own(name: SamplerName) -> None:
    assert torch.equal(sampler_sigmas(EDMProcess(sigma_max=120), name, 9), EDMProcess(sigma_max=120).sigmas(9))
