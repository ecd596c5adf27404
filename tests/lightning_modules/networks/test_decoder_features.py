from collections.abc import Iterator

import pytest
import torch
from segmentation_models_pytorch import Unet
from tiny_nets import Segmenter, tiny_unet
from torch import Tensor, nn

from lightning_modules import ADMUNet
from lightning_modules.networks.decoder_features import (
    FeatureCache,
    block_shapes,
    decoder_blocks,
    decoder_maps,
    require_blocks,
)


@pytest.fixture(scope="module")
def full_size() -> ADMUNet:
    """The network of 138 million parameters, without any of them."""
    with torch.device("meta"):
        return ADMUNet().eval()


def test_blocks_of_the_full_network_have_the_shapes_of_the_published_one(full_size: ADMUNet) -> None:
    """Channels and side of the output at 256 px, as ADM's table says for base width 128."""
    channels = [512] * 6 + [256] * 6 + [128] * 6
    side = [8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64, 128, 128, 128, 256, 256, 256, 256]
    inputs = torch.zeros(1, 3, 256, 256, device="meta"), torch.zeros(1, device="meta")
    maps = decoder_maps(full_size, range(18), lambda: full_size(*inputs))
    assert [tuple(features.shape) for features in maps] == [(1, c, s, s) for c, s in zip(channels, side, strict=True)]
    assert block_shapes(full_size) == [(c, 256 // s) for c, s in zip(channels, side, strict=True)]
    # Three noise levels of the paper's five blocks.
    assert 3 * sum(shape.channels for shape in require_blocks(full_size, (5, 6, 7, 8, 12))) == 4224


def test_block_numbers_are_adms(full_size: ADMUNet) -> None:
    """The five blocks that LEDM uses, by hand."""
    up, blocks = full_size.unet.up_blocks, full_size.decoder_blocks()
    by_hand = {
        5: up[1],
        6: up[2].attentions[0],
        7: up[2].attentions[1],
        8: up[2],
        12: up[4].resnets[0],
    }
    assert len(blocks) == 18
    assert all(blocks[i] is module for i, module in by_hand.items())


def test_maps_are_what_the_blocks_put_out_and_later_layers_do_not_run() -> None:
    network = tiny_unet().eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 3.0])
    ran: list[str] = []
    kept: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: object, output: Tensor) -> None:
            ran.append(name)
            kept[name] = output

        module.register_forward_hook(hook)

    note("deep", network.unet.up_blocks[0])
    note("fine", network.unet.up_blocks[1].resnets[0])
    note("last", network.unet.conv_out)
    maps = decoder_maps(network, (2, 1), lambda: network(x, t))
    assert ran == ["deep", "fine"]
    assert torch.equal(maps[0], kept["fine"])
    assert torch.equal(maps[1], kept["deep"])
    network(x, t)
    assert ran == ["deep", "fine", "deep", "fine", "last"]


def test_hooks_are_removed_also_when_the_network_fails() -> None:
    network = tiny_unet().eval()
    with pytest.raises(ValueError, match="`x` of shape"):
        decoder_maps(network, (1,), lambda: network(torch.zeros(1, 4, 8, 8), torch.zeros(1)))
    decoder_maps(network, (1,), lambda: network(torch.zeros(1, 3, 8, 8), torch.zeros(1)))
    assert not any(module._forward_hooks for module in network.modules())


def test_models_of_segmentation_models_pytorch_have_blocks_too() -> None:
    network = Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 4), classes=2).eval()
    assert block_shapes(network) == [(16, 4), (8, 2), (4, 1)]


def test_a_network_without_decoder_blocks_is_named() -> None:
    with pytest.raises(TypeError, match=r"tell its decoder blocks, got Segmenter; use ADMUNet.*decoder_blocks\(\)"):
        decoder_blocks(Segmenter())


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ((), r"got \(\); choose from 0: 16 channels at 1/2 of it, 1: 16 channels at the image's resolution, 2: 8 ch"),
        ((0, 4), r"decoder blocks of ADMUNet, each once, got \(0, 4\), of which \[4\] do not exist; choose from 0: 16"),
        ((-1,), r"of which \[-1\] do not exist"),
        ((1, 2, 1), r"each once, got \(1, 2, 1\); choose"),
    ],
)
def test_blocks_that_do_not_exist(blocks: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        require_blocks(tiny_unet().eval(), blocks)


def _batches() -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    for index in ([7], [2, 7, 0], [5, 5, 9], [1, 2, 3, 4, 5]):
        numbers = torch.tensor(index)
        yield numbers, numbers.view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 10, [torch.rand(1, generator=generator)]


def test_the_cache_gives_back_what_was_added_and_asks_for_each_image_once() -> None:
    cache = FeatureCache()
    asked: list[int] = []
    for index, image, _ in _batches():
        for position in cache.missing(index, image):
            number = int(index[position])
            asked.append(number)
            one = torch.full((1, 2, 2, 2), float(number))
            cache.add(number, image[position : position + 1], [one, one.repeat(1, 1, 2, 2) + 0.5])
        rows = cache.rows(index)
        for features, shift, side in zip(cache.maps, (0.0, 0.5), (2, 4), strict=True):
            expected = index.view(-1, 1, 1, 1).expand(-1, 2, side, side) + shift
            torch.testing.assert_close(features[rows], expected.float())
    assert sorted(asked) == [0, 1, 2, 3, 4, 5, 7, 9]
    assert len(cache) == 8


@pytest.mark.parametrize("other", [torch.full((2, 3, 4, 4), 0.25), torch.zeros(2, 3, 8, 8)])
def test_an_image_that_comes_back_with_other_pixels_is_refused(other: Tensor) -> None:
    cache = FeatureCache()
    cache.add(3, torch.zeros(1, 3, 4, 4), [torch.zeros(1, 1, 1, 1)])
    with pytest.raises(ValueError, match=r"`cache_features` .*transforms: \[\].* or .*cache_features: false"):
        cache.missing(torch.tensor([2, 3]), other)
