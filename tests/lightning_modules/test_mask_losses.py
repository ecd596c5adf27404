import numpy as np
import pytest
import torch

from lightning_modules.mask_losses import MaskLoss, mask_loss_per_image, mask_probabilities

KINDS: tuple[MaskLoss, ...] = ("mse", "ce", "dice_ce")


def _naive(channels: torch.Tensor, mask: torch.Tensor, kind: str) -> float:
    """One image, pixel by pixel."""
    k = channels.shape[0]
    pixels = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1]) if mask[i, j] != 255]
    p = channels.double().softmax(0).numpy()
    y = np.zeros_like(p)
    for i, j in pixels:
        y[int(mask[i, j]), i, j] = 1
    if kind == "mse":
        c = channels.double().numpy()
        return float(np.mean([(c[a, i, j] - y[a, i, j]) ** 2 for a in range(k) for i, j in pixels]))
    ce = float(np.mean([-np.log(p[int(mask[i, j]), i, j]) for i, j in pixels]))
    if kind == "ce":
        return ce
    dice = []
    for a in range(k):
        both = sum(p[a, i, j] * y[a, i, j] for i, j in pixels)
        either = sum(p[a, i, j] + y[a, i, j] for i, j in pixels)
        dice.append(2 * both / either)
    return ce + 1 - float(np.mean(dice))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_labelled_pixels(kind: MaskLoss) -> None:
    channels = torch.randn(3, 4, 5, 6)
    mask = torch.randint(0, 4, (3, 5, 6))
    mask[1, :2] = 255
    loss = mask_loss_per_image(channels, mask, kind)
    expected = [_naive(c, m, kind) for c, m in zip(channels, mask, strict=True)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["mse", "ce"])
def test_an_unlabelled_image_has_loss_zero_and_no_gradient(kind: MaskLoss) -> None:
    channels = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = mask_loss_per_image(channels, torch.full((1, 4, 4), 255), kind)
    (gradient,) = torch.autograd.grad(loss.sum(), channels)
    assert loss.item() == 0
    assert gradient.abs().max() == 0


def test_probabilities_of_squared_error_channels_are_the_nearest_point_of_the_simplex() -> None:
    channels = 2 * torch.randn(2, 4, 3, 3)
    p = mask_probabilities(channels, "mse")
    torch.testing.assert_close(p.sum(1), torch.ones(2, 3, 3))
    assert p.min() >= 0
    assert torch.equal(p.argmax(1), channels.argmax(1))
    # No random point of the simplex is nearer.
    distance = (p - channels).square().sum(1)
    for point in torch.distributions.Dirichlet(torch.ones(4)).sample((2000,)):
        assert bool(((point.view(1, 4, 1, 1) - channels).square().sum(1) >= distance - 1e-5).all())


def test_a_point_of_the_simplex_stays_where_it_is() -> None:
    p = torch.randn(2, 3, 4, 4).softmax(1)
    torch.testing.assert_close(mask_probabilities(p, "mse"), p)


def test_cross_entropy_channels_are_logits() -> None:
    logits = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(mask_probabilities(logits, "ce"), logits.softmax(1))
