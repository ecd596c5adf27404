"""Classifiers: known sizes, normalisation inside, features and logits that fit together."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.networks.normalise import Normalise
from lightning_modules.networks.timm_classifier import TimmClassifier
from lightning_modules.networks.wide_resnet import WideResNet


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_wide_resnet_28_2_has_the_published_size() -> None:
    # By hand: stem 432, three groups, last norm and 128 x 10 + 10.
    assert _count(WideResNet(num_classes=10)) == 1_467_610


@pytest.mark.parametrize(
    "network",
    [
        WideResNet(10, 1, num_classes=5, width=8),
        WideResNet(10, 1, num_classes=5, width=8, stem_stride=2),
        TimmClassifier("resnet10t", num_classes=5),
        TimmClassifier("vit_tiny_patch16_224", num_classes=5, image_size=32),
        TimmClassifier("mobilenetv3_small_050", num_classes=5),
    ],
    ids=["wrn", "wrn_stride", "resnet10t", "vit", "mobilenet"],
)
def test_a_classifier_is_its_head_on_its_features(network: WideResNet | TimmClassifier) -> None:
    network.eval()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = network.embed(image)
        assert features.shape == (2, network.num_features)
        torch.testing.assert_close(network.classify(features), network(image))
        if isinstance(network, TimmClassifier):
            inner: Any = network.model
            torch.testing.assert_close(inner(network.normalise(image)), network(image))
    network.reset_classifier(7)
    assert network(image).shape == (2, 7)


def test_timm_brings_the_mean_and_std_of_its_weights() -> None:
    network = TimmClassifier("resnet18", num_classes=2)
    assert network.normalise.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert network.normalise.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    grey = TimmClassifier("resnet18", num_classes=2, in_channels=1).eval()
    assert grey(torch.rand(1, 1, 32, 32)).shape == (1, 2)


def test_reset_parameters_draws_other_weights() -> None:
    for network in (WideResNet(10, 1, num_classes=3, width=8), TimmClassifier("resnet10t", num_classes=3)):
        before = {name: p.clone() for name, p in network.named_parameters()}
        network.reset_parameters()
        changed = [name for name, p in network.named_parameters() if p.ndim > 1 and not torch.equal(before[name], p)]
        assert len(changed) == sum(p.ndim > 1 for p in network.parameters())


def test_normalise_is_subtract_and_divide() -> None:
    image = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    expected = torch.stack([(image[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(Normalise(mean.tolist(), std.tolist())(image), expected)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`depth` to be 6 n"):
        WideResNet(depth=12)
    with pytest.raises(ValueError, match="positive `std`"):
        WideResNet(std=(0.0,))
    with pytest.raises(ValueError, match=r"`name` to be a model of timm, got 'resnet_of_mine'.*list_models"):
        TimmClassifier("resnet_of_mine")
