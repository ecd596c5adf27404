"""UViT: parameter counts of the published sizes, and what each of its parts is for."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.networks.conditioning import sinusoid
from lightning_modules.networks.uvit import UViT


def _tiny(**options: object) -> UViT:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return UViT(**sizes | {"num_classes": 3} | options)  # type: ignore[arg-type]  # plain numbers and flags


def _inputs(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, generator=generator)
    return x, torch.linspace(0, 1000, batch), torch.arange(batch) % 4


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# Sizes and counts of arXiv 2209.12152, table 1 and appendix: depth without the middle block.
SMALL, DEEP, MID, LARGE, HUGE = (512, 12, 8), (512, 16, 8), (768, 16, 12), (1024, 20, 16), (1152, 28, 16)


@pytest.mark.parametrize(
    ("size", "image", "classes", "conv", "count"),
    [
        (SMALL, (32, 2, 3), 0, True, 44_255_328),
        (SMALL, (64, 4, 3), 0, True, 44_292_228),
        (DEEP, (32, 2, 3), 0, True, 57_908_320),
        (MID, (64, 4, 3), 1000, True, 130_940_292),
        (LARGE, (64, 4, 3), 1000, True, 286_827_652),
        (LARGE, (32, 2, 4), 1001, True, 286_763_172),
        (LARGE, (64, 4, 4), 1001, True, 286_861_524),
        (HUGE, (32, 2, 4), 1001, False, 500_832_016),
        (HUGE, (64, 4, 4), 1001, False, 500_942_656),
    ],
)
def test_parameter_counts_of_the_paper(
    size: tuple[int, int, int], image: tuple[int, int, int], classes: int, conv: bool, count: int
) -> None:
    null = classes == 1001
    with torch.device("meta"):
        network = UViT(*image, *size, classes - null or None, null, conv, conditional=classes > 0)
    assert _count(network) == count


def test_output_is_like_the_input() -> None:
    x, t, label = _inputs()
    assert _tiny()(x, t, label).shape == x.shape
    assert _tiny(conditional=False, num_classes=None)(x, t).shape == x.shape
