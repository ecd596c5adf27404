"""Pairs drawn by HybridSegmentation, around networks whose reverse process is known."""

from typing import Any, get_args

import pytest
import torch
from tiny_nets import tiny_unet
from torch import Tensor, nn

from datamodules import draw_request
from lightning_modules.diffusion.noise import EDMProcess, NoiseProcess
from lightning_modules.diffusion.samplers import SAMPLERS, SamplerName
from lightning_modules.diffusion.vp_noise import VPProcess
from lightning_modules.hybrid_segmentation import HybridSegmentation, Objective
from lightning_modules.uncertainty import image_confidence


class GaussianPixels(nn.Module):
    """The exact network for independent pixels N(0, s^2) in [-1, 1] units; mask 1 where the channels sum up above 0."""

    out_channels = 5

    def __init__(self, process: NoiseProcess, s: float) -> None:
        super().__init__()
        self.process, self.s = process, s
        self.sigmas = process.sigma_at(torch.linspace(0, 1, 20001))
        self.times = process.c_noise(self.sigmas)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        at = torch.searchsorted(self.times, t[:1].contiguous()).clamp(max=20000)
        sigma = self.sigmas[at].view(-1, 1, 1, 1)
        noisy = x / self.process.c_in(sigma)
        clean = noisy * self.s**2 / (self.s**2 + sigma**2)
        image = (clean - self.process.c_skip(sigma) * noisy) / self.process.c_out(sigma).clamp(min=1e-12)
        deviation = (3 * self.s**2 * sigma**2 / (self.s**2 + sigma**2)).sqrt().clamp(min=1e-6)
        p = torch.special.ndtr(clean.sum(1, keepdim=True) / deviation)
        return torch.cat([image, 1 - p, p], 1)


def _request(seeds: list[int], sampler: SamplerName = "ancestral", **changes: Any) -> dict[str, Any]:
    return {"seed": torch.tensor(seeds), "image_size": 8, "sampler": sampler, "num_steps": 20} | changes


def _model(network: nn.Module, process: NoiseProcess | None = None, **changes: Any) -> HybridSegmentation:
    return HybridSegmentation(network, num_classes=2, process=process, ema_decay=0.0, **changes)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", [VPProcess("cosine"), VPProcess(), EDMProcess()], ids=["cosine", "linear", "edm"])
def test_the_pairs_follow_the_joint_distribution(sampler: SamplerName, process: NoiseProcess) -> None:
    s = 0.25
    model = _model(GaussianPixels(process, s), process)
    drawn = model.draw(_request(list(range(32)), sampler, num_steps=50 if sampler in ("heun", "dpmpp_2m") else 200))
    x = 2 * drawn["image"] - 1
    # 6144 pixels have a standard error of 0.9 %; the rest is what the steps leave out.
    assert x.std().item() == pytest.approx(s, rel=0.06)
    assert x.mean().item() == pytest.approx(0, abs=4 * s / 78)
    truth = (x.sum(1) > 0).long()
    assert (drawn["mask"] == truth).float().mean() > 0.99
    assert drawn["mask"].shape == (32, 8, 8)
    torch.testing.assert_close(drawn["probabilities"].sum(1), torch.ones(32, 8, 8))
    torch.testing.assert_close(drawn["confidence"], image_confidence(drawn["probabilities"]))
    assert drawn["seed"].tolist() == list(range(32))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_pair_depends_on_its_seed_alone(sampler: SamplerName) -> None:
    torch.manual_seed(0)
    model = _model(tiny_unet()).train()
    together = model.draw(_request([*range(11, 0, -1)], sampler, num_steps=5))
    assert model.training
    torch.manual_seed(1)
    for seed in (1, 9):
        alone = model.draw(_request([seed], sampler, num_steps=5))
        row = 11 - seed
        assert torch.equal(alone["image"][0], together["image"][row])
        assert torch.equal(alone["probabilities"][0], together["probabilities"][row])
    assert (together["image"][0] - together["image"][1]).abs().max() > 0.01


def test_predict_draws_requests_and_segments_images() -> None:
    model = _model(tiny_unet())
    request = _request([5, 9])
    torch.testing.assert_close(model.predict_step(request, 0)["image"], model.draw(request)["image"])
    segmented = model.predict_step({"image": torch.rand(2, 3, 8, 8), "index": torch.tensor([4, 5])}, 0)
    assert segmented["mask"].shape == segmented["uncertainty"].shape == (2, 8, 8)
    assert segmented["confidence"].shape == (2,)
    assert segmented["index"].tolist() == [4, 5]


@pytest.mark.parametrize(("objective", "missing"), [("supervised", "no images"), ("generative", "no masks")])
def test_only_a_hybrid_network_draws_pairs(objective: Objective, missing: str) -> None:
    model = _model(tiny_unet(), objective=objective)
    with pytest.raises(
        ValueError,
        match=f"`objective` hybrid to draw pairs, got weights trained with '{objective}', which trains {missing}",
    ):
        model.draw(_request([0]))


def test_probabilities_are_whole_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = _model(tiny_unet(), mask_loss="mse").draw(_request([0, 1], num_steps=3))
    assert drawn["image"].dtype == drawn["probabilities"].dtype == torch.float32
    torch.testing.assert_close(drawn["probabilities"].sum(1), torch.ones(2, 8, 8), atol=1e-6, rtol=0)


def test_data_and_samplers_agree_on_the_names() -> None:
    assert get_args(draw_request.SamplerName) == get_args(SamplerName) == tuple(SAMPLERS)
