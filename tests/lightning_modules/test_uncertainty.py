"""Uncertainties against closed forms and loops over pixels."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_modules.uncertainty import entropy, image_confidence, image_uncertainty, jensen_shannon


def random_probabilities(*shape: int, seed: int = 0, sharpness: float = 3.0) -> Tensor:
    """Softmax over dimension -3."""
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (sharpness * logits).softmax(-3)


def entropy_of(p: Sequence[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def soft_dice_by_loop(p: Tensor) -> float:
    """Confidence of one image [K, H, W], one pixel at a time."""
    pixels: list[list[float]] = p.flatten(1).T.tolist()
    labels = [max(range(len(pixel)), key=pixel.__getitem__) for pixel in pixels]
    scores = []
    for k in range(1, len(p)):
        if k in labels:
            both = sum(pixel[k] for pixel, label in zip(pixels, labels, strict=True) if label == k)
            scores.append(2 * both / (sum(pixel[k] for pixel in pixels) + labels.count(k)))
    if not scores:
        return sum(max(pixel) for pixel in pixels) / len(pixels)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("classes", [2, 5, 34])
def test_entropy_of_certain_and_of_uniform_pixels(classes: int) -> None:
    certain = torch.zeros(1, classes, 2, 3)
    certain[:, -1] = 1
    assert torch.equal(entropy(certain), torch.zeros(1, 2, 3))
    uniform = torch.full((2, classes, 2, 3), 1 / classes)
    assert torch.allclose(entropy(uniform), torch.tensor(math.log(classes)))


def test_entropy_by_loop_in_every_type() -> None:
    p = random_probabilities(2, 4, 3, 5)
    p[0, :, 0, 0] = torch.tensor([0.0, 0.5, 0.5, 0.0])
    expected = torch.tensor(
        [[[entropy_of(p[b, :, y, x].tolist()) for x in range(5)] for y in range(3)] for b in (0, 1)]
    )
    assert torch.allclose(entropy(p), expected, atol=1e-6)
    assert torch.allclose(entropy(p.double()), expected, atol=1e-6)
    assert entropy(p.bfloat16()).dtype == torch.float32
    assert torch.allclose(entropy(p.bfloat16()), expected, atol=0.02)
    # What rounding leaves below 0 counts as 0, and above 1 as 1.
    assert entropy(torch.tensor([-1e-7, 1.0000001]).view(1, 2, 1, 1)).item() == 0


def test_disagreement_of_certain_members_is_log_two() -> None:
    members = torch.zeros(2, 1, 3, 2, 2)
    members[0, :, 1] = members[1, :, 2] = 1
    assert torch.allclose(jensen_shannon(members), torch.tensor(math.log(2)))
    # Each of as many members as classes has a class of its own.
    each = torch.eye(4).view(4, 1, 4, 1, 1)
    assert jensen_shannon(each).item() == pytest.approx(math.log(4))


def test_members_that_agree_have_no_divergence_however_unsure() -> None:
    one = random_probabilities(2, 3, 4, 4)
    assert jensen_shannon(one[None]).max() < 1e-6
    assert jensen_shannon(one.expand(10, -1, -1, -1, -1)).max() < 1e-6
    assert jensen_shannon(one.expand(10, -1, -1, -1, -1)).min() >= 0


def test_divergence_by_loop() -> None:
    members = random_probabilities(5, 2, 3, 2, 2)
    found = jensen_shannon(members)
    for b in range(2):
        for y in range(2):
            for x in range(2):
                each = members[:, b, :, y, x].double()
                expected = entropy_of(each.mean(0).tolist()) - sum(entropy_of(m.tolist()) for m in each) / 5
                assert found[b, y, x].item() == pytest.approx(expected, abs=1e-6)
    # It does not depend on the order of the members, nor on which class is which.
    assert torch.allclose(jensen_shannon(members.flip(0).flip(2)), found, atol=1e-6)


def test_the_most_uncertain_pixels_count() -> None:
    pixel = torch.stack([torch.arange(30.0).view(5, 6), torch.full((5, 6), 0.25)])
    assert image_uncertainty(pixel).tolist() == [28, 0.25]  # 29, 28 and 27
    assert image_uncertainty(pixel, share=1.0).tolist() == [14.5, 0.25]
    assert image_uncertainty(pixel, share=1e-6).tolist() == [29, 0.25]
    shuffled = pixel.flatten(1)[:, torch.randperm(30, generator=torch.Generator().manual_seed(0))].view(2, 6, 5)
    assert torch.equal(image_uncertainty(shuffled), image_uncertainty(pixel))


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_confidence_by_loop(classes: int) -> None:
    p = random_probabilities(5, classes, 4, 3, seed=classes)
    p[0, 1:] = 0
    p[0, 0] = 1  # certain that there is nothing
    p[1, 0] = 0.75
    p[1, 1:] = 0.25 / (classes - 1)  # nothing predicted, but unsure
    found = image_confidence(p)
    assert found.tolist() == pytest.approx([soft_dice_by_loop(image) for image in p], abs=1e-6)
    assert found[:2].tolist() == [1, 0.75]


def test_confidence_in_closed_form() -> None:
    # Foreground p = 1 on a pixels, 0.8 on b and 0.2 on c: 2 (a + 0.8 b) / (a + 0.8 b + 0.2 c + a + b).
    foreground = torch.tensor([1.0] * 2 + [0.8] * 4 + [0.2] * 6).view(1, 3, 4)
    p = torch.stack([1 - foreground, foreground], 1)
    assert image_confidence(p).item() == pytest.approx(2 * (2 + 3.2) / (2 + 3.2 + 1.2 + 6))
    certain = torch.nn.functional.one_hot(torch.arange(12).view(1, 3, 4) % 3, 3).movedim(-1, 1).float()
    assert image_confidence(certain).item() == 1
    assert image_confidence(certain.half()).dtype == torch.float32


def test_sharper_probabilities_are_more_confident() -> None:
    logits = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    confidences = [image_confidence((sharpness * logits).softmax(1)).item() for sharpness in (0.5, 1, 2, 8, 500)]
    assert confidences == sorted(confidences)
    assert 0 < confidences[0] < 0.7
    assert 0.97 < confidences[-1] <= 1


def test_wrong_inputs() -> None:
    p = random_probabilities(2, 3, 4, 4)
    for function in (entropy, image_confidence):
        with pytest.raises(ValueError, match=r"`probabilities` to be a floating tensor \[B, K, H, W\] .* \(2, 4, 4\)"):
            function(p.argmax(1))
        with pytest.raises(ValueError, match=r"got torch.int64 of shape \(2, 3, 4, 4\)"):
            function(p.long())
        with pytest.raises(ValueError, match="that is not empty"):
            function(p[:0])
    with pytest.raises(ValueError, match=r"`members` to be a floating tensor \[M, B, K, H, W\]"):
        jensen_shannon(p)
    with pytest.raises(ValueError, match=r"`pixel` to be a floating tensor \[B, H, W\]"):
        image_uncertainty(p)
    for share in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=rf"`share` in \(0, 1\], got {share}"):
            image_uncertainty(p[:, 0], share)
    with pytest.raises(ValueError, match="at least 2 classes, got 1; count the background"):
        image_confidence(p[:, :1])
