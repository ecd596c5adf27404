"""Guidance of 0 changes nothing, and no guidance changes the number of passes or types behind the user's back."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.diffusion import AffineDenoiser, GuidedDenoiser


class Recorder(nn.Module):
    """A denoiser with weights that remembers what it was called with."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.shift = nn.Embedding(5, 3)
        self.dtype = dtype
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls.append((x, sigma, label))
        shift = 0 if label is None else self.shift(label)[:, :, None, None]
        maps: Tensor = self.conv(x) + shift + sigma[:, None, None, None]
        return maps.to(self.dtype)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 3, 6, 6), torch.tensor([0.3, 2.0, 7.0]), torch.tensor([2, 0, 1])


def test_no_guidance_is_the_conditional_denoiser_in_one_pass() -> None:
    denoiser, (x, sigma, label) = Recorder(), batch()
    want = denoiser(x, sigma, label)
    denoiser.calls.clear()
    assert torch.equal(GuidedDenoiser(denoiser, 0.0, 4)(x, sigma, label), want)
    assert [len(call[0]) for call in denoiser.calls] == [3]


def test_guidance_asks_for_both_in_one_pass() -> None:
    denoiser, (x, sigma, label) = Recorder(), batch()
    own, null = denoiser(x, sigma, label), denoiser(x, sigma, torch.full((3,), 4))
    denoiser.calls.clear()
    guided = GuidedDenoiser(denoiser, 1.5, 4)
    # In the words of diffusers, a guidance_scale of 2.5.
    torch.testing.assert_close(guided(x, sigma, label), null + 2.5 * (own - null), rtol=1e-4, atol=1e-5)
    ((images, levels, labels),) = denoiser.calls
    assert images.shape == (6, 3, 6, 6)
    assert torch.equal(levels, sigma.repeat(2))
    assert labels is not None
    assert labels.tolist() == [2, 0, 1, 4, 4, 4]
    torch.testing.assert_close(guided(x, 0.5, label), guided(x, torch.full((3,), 0.5), label))


def test_no_affine_score_is_the_first_denoiser_alone() -> None:
    denoiser, noisy, (x, sigma, label) = Recorder(), Recorder(1), batch()
    for given in (label, None):
        want = denoiser(x, sigma, given)
        assert torch.equal(AffineDenoiser(denoiser, noisy, 0.0)(x, sigma, given), want)
        assert not noisy.calls


def test_16_bit_estimates_are_not_subtracted_as_such() -> None:
    x, sigma, label = batch()
    for guided in (
        GuidedDenoiser(Recorder(dtype=torch.bfloat16), 3.0, 4),
        AffineDenoiser(Recorder(dtype=torch.bfloat16), Recorder(1, torch.bfloat16), 3.0),
    ):
        drawn = guided(x, sigma, label)
        assert drawn.dtype == x.dtype
        assert not torch.equal(drawn, drawn.bfloat16().float())


@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
def test_wrong_scales(scale: float) -> None:
    with pytest.raises(ValueError, match=r"`scale` to be 0 or more and finite, got"):
        GuidedDenoiser(Recorder(), scale, 4)
    with pytest.raises(ValueError, match=r"`scale` to be 0 or more and finite, got"):
        AffineDenoiser(Recorder(), Recorder(), scale)


def test_guidance_needs_a_class() -> None:
    x, sigma, _ = batch()
    with pytest.raises(ValueError, match=r"`label` with a class for each image, got None; guidance of scale 1.0"):
        GuidedDenoiser(Recorder(), 1.0, 4)(x, sigma)
