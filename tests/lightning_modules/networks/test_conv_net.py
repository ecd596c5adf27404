"""ConvNet: shapes, what its normalisation looks at, and its arguments."""

import pytest
import torch

from lightning_modules.networks.conv_net import ConvNet, NormName


@pytest.mark.parametrize(
    ("side", "widths", "features"), [(8, (4, 6), 6 * 16), (7, (4, 6, 8), 8 * 4), (5, (4,), 4 * 25)]
)
def test_each_further_convolution_halves_the_side(side: int, widths: tuple[int, ...], features: int) -> None:
    network = ConvNet(side, widths, num_classes=3, in_channels=1)
    x = torch.rand(2, 1, side, side)
    assert network.embed(x).shape == (2, features) == (2, network.num_features)
    torch.testing.assert_close(network(x), network.embed(x) @ network.head.weight.T + network.head.bias)


@pytest.mark.parametrize(("norm", "alone"), [("batch", False), ("group", True)])
def test_group_norm_looks_at_each_image_alone(norm: NormName, alone: bool) -> None:
    network = ConvNet(8, num_classes=4, in_channels=1, norm=norm).train()
    x = torch.rand(6, 1, 8, 8)
    assert torch.allclose(network(x)[:3], network(x[:3]), atol=1e-6) == alone


def test_a_new_last_layer_has_other_classes() -> None:
    network = ConvNet(8)
    network.reset_classifier(7)
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(("widths", "norm", "named"), [((), "batch", "widths"), ((8,), "layer", "norm")])
def test_bad_arguments_are_named(widths: tuple[int, ...], norm: NormName, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ConvNet(8, widths, norm=norm)
