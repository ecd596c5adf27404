"""Features of a frozen network: what its decoder blocks put out, at their own resolution."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.denoisers import takes_time


@runtime_checkable
class HasDecoderBlocks(Protocol):
    """A network that can tell its decoder blocks (ADMUNet)."""

    def decoder_blocks(self) -> Sequence[nn.Module]:
        """The modules whose outputs are the decoder blocks, deepest first."""
        ...


class BlockShape(NamedTuple):
    """What a decoder block puts out.

    Attributes:
        channels: Number of channels.
        stride: Side of the image over the side of the map.
    """

    channels: int
    stride: int


class _Enough(Exception):
    """Everything asked for is there: the layers behind the last block need not run."""


def decoder_blocks(network: nn.Module) -> list[nn.Module]:
    """List the decoder blocks of a network, deepest first.

    Args:
        network: ADMUNet, another network with a method `decoder_blocks()`, or a Unet of segmentation_models_pytorch.

    Raises:
        TypeError: The network cannot tell.
    """
    if isinstance(network, HasDecoderBlocks):
        return list(network.decoder_blocks())
    blocks = getattr(getattr(network, "decoder", None), "blocks", None)
    if isinstance(blocks, nn.ModuleList):
        return list(blocks)
    msg = (
        f"Expected a `network` that can tell its decoder blocks, got {type(network).__name__}; use ADMUNet or a Unet "
        "of segmentation_models_pytorch, or add a method decoder_blocks() that returns the modules, deepest first."
    )
    raise TypeError(msg)


def decoder_maps(network: nn.Module, blocks: Iterable[int], run: Callable[[], object]) -> list[Tensor]:
    """Run a network and keep what some of its decoder blocks put out.

    The hooks are gone when this returns or raises. Layers behind the last block asked for do not run.

    Args:
        network: The network.
        blocks: Numbers of the blocks, see `decoder_blocks`.
        run: Calls the network, once.

    Returns:
        Float32 maps [B, channels, h, w], in the order of `blocks`.
    """
    modules = decoder_blocks(network)
    wanted = list(blocks)
    found: dict[int, Tensor] = {}

    def keep(_: nn.Module, inputs: object, output: Tensor, block: int) -> None:
        found[block] = output
        if len(found) == len(wanted):
            raise _Enough

    handles = [modules[block].register_forward_hook(partial(keep, block=block)) for block in wanted]
    try:
        run()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[block].float() for block in wanted]


@torch.no_grad()
def block_shapes(network: nn.Module) -> list[BlockShape]:
    """Find out what each decoder block of a network puts out, by running it on one small image.

    Args:
        network: The network, in evaluation mode. Its attributes `in_channels` and `downsample_factor` (else
            32) say what images it takes, the former also its first convolution.
    """
    side = int(getattr(network, "downsample_factor", 32))
    # Beside the weights, wherever they are: on the meta device nothing is computed.
    weight = next(network.parameters())
    image = weight.new_zeros(1, _in_channels(network), side, side)
    inputs = (image, weight.new_zeros(1)) if takes_time(network) else (image,)
    maps = decoder_maps(network, range(len(decoder_blocks(network))), lambda: network(*inputs))
    return [BlockShape(features.shape[1], side // features.shape[-1]) for features in maps]


def _in_channels(network: nn.Module) -> int:
    first = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), 3)
    return int(getattr(network, "in_channels", first))


def require_blocks(network: nn.Module, blocks: Sequence[int]) -> list[BlockShape]:
    """Find out what some decoder blocks of a network put out.

    Args:
        network: The network, in evaluation mode.
        blocks: Numbers of the blocks, see `decoder_blocks`.

    Raises:
        ValueError: There are none, one is there twice or does not exist.
        TypeError: The network cannot tell its decoder blocks.
    """
    shapes = block_shapes(network)
    unknown = [block for block in blocks if not 0 <= block < len(shapes)]
    if not blocks or unknown or len(set(blocks)) < len(blocks):
        exist = ", ".join(f"{i}: {s.channels} channels at {_resolution(s.stride)}" for i, s in enumerate(shapes))
        msg = (
            f"Expected `blocks` to name decoder blocks of {type(network).__name__}, each once, got {tuple(blocks)}"
            f"{f', of which {unknown} do not exist' if unknown else ''}; choose from {exist}."
        )
        raise ValueError(msg)
    return [shapes[block] for block in blocks]


def _resolution(stride: int) -> str:
    return "the image's resolution" if stride == 1 else f"1/{stride} of it"


class FeatureCache:
    """Feature maps of images that were seen before, by the number of the image.

    Memory grows by doubling, so that adding stays cheap. Everything stays on the device it is added from.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        # The images themselves come first: they tell whether a number still means the same image.
        self._buffers: list[Tensor] = []

    def __len__(self) -> int:
        """How many images are kept."""
        return len(self._rows)

    @property
    def maps(self) -> list[Tensor]:
        """The maps [capacity, C, h, w] of all images; `rows` says which row belongs to whom."""
        return self._buffers[1:]

    def rows(self, index: Tensor) -> Tensor:
        """The row of each image in `maps`.

        Args:
            index: [B] numbers of images that are kept.
        """
        return torch.tensor([self._rows[i] for i in index.tolist()], device=index.device)

    def missing(self, index: Tensor, image: Tensor) -> list[int]:
        """Which images of a batch are not kept yet, as positions in it.

        Args:
            index: [B] numbers of the images.
            image: [B, C, H, W].

        Raises:
            ValueError: An image is kept under its number, but with other pixels.
        """
        numbers = index.tolist()
        known = [position for position, i in enumerate(numbers) if i in self._rows]
        if known and not self._same(image[known], index[known]):
            msg = (
                "Expected every training image to come back as it was while `cache_features` is true, got other pixels "
                "for the same index: images are augmented. Switch augmentation off "
                "(data.init_args.train_transform: {class_path: albumentations.Compose, init_args: {transforms: []}}) "
                "or set model.init_args.cache_features: false, which computes features at every step."
            )
            raise ValueError(msg)
        first = {i: position for position, i in reversed(list(enumerate(numbers))) if i not in self._rows}
        return sorted(first.values())

    def _same(self, image: Tensor, index: Tensor) -> bool:
        kept = self._buffers[0]
        return image.shape[1:] == kept.shape[1:] and torch.equal(kept[self.rows(index)], image)

    def add(self, index: int, image: Tensor, maps: Sequence[Tensor]) -> None:
        """Keep the maps of one image.

        Args:
            index: Its number.
            image: [1, C, H, W].
            maps: [1, C_b, h_b, w_b] each.
        """
        row = len(self._rows)
        tensors = [image, *maps]
        if not self._buffers:
            self._buffers = [_empty(tensor, 1) for tensor in tensors]
        for number, tensor in enumerate(tensors):
            buffer = self._buffers[number]
            if row == len(buffer):
                self._buffers[number] = _empty(tensor, 2 * row)
                self._buffers[number][:row] = buffer
            self._buffers[number][row] = tensor[0]
        self._rows[index] = row


def _empty(like: Tensor, length: int) -> Tensor:
    # Pixels are read one by one, all channels of each: channels last makes that one run of memory.
    shape = (length, *like.shape[1:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
