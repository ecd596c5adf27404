"""What the networks built on diffusers' `UNet2DModel` share: its block types, checks of sizes, zero initialisation."""

from collections.abc import Sequence

from torch import Tensor, nn


def block_types(attends: Sequence[bool]) -> dict[str, tuple[str, ...]]:
    """Name diffusers' blocks for levels that attend or do not, finest level first."""
    # Not the plain "DownBlock2D" and "UpBlock2D": those ignore `downsample_type="resnet"` without a word.
    down = tuple("AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends)
    up = tuple("AttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends))
    return {"down_block_types": down, "up_block_types": up}


def zero_last_layers(unet: nn.Module) -> None:
    """Zero the last layer of every residual block and attention of a `UNet2DModel`, and the last of all.

    A block then adds nothing to its shortcut, and the network returns exactly 0.

    Args:
        unet: The network, changed in place.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    layers: list[nn.Module] = [unet.get_submodule("conv_out")]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            layers.append(module.conv2)
        elif isinstance(module, Attention):
            layers.append(module.to_out[0])
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def check_channel_mult(channel_mult: Sequence[int]) -> None:
    """Refuse widths of levels that are none.

    Args:
        channel_mult: Width of each level in units of the first one's.

    Raises:
        ValueError: There is no level, or one is not positive.
    """
    if not channel_mult or min(channel_mult) < 1:
        msg = f"Expected `channel_mult` to hold one positive integer per level, got {tuple(channel_mult)}."
        raise ValueError(msg)


def attention_levels(image_size: int, levels: int, attention_resolutions: Sequence[int]) -> list[bool]:
    """Say which levels attend, finest first.

    Args:
        image_size: Side of the images.
        levels: How many levels there are, each half as wide as the one before.
        attention_resolutions: Sides of the levels that attend.

    Raises:
        ValueError: The side cannot be halved so often, or there is no level of such a side.
    """
    factor = 2 ** (levels - 1)
    if image_size < factor or image_size % factor:
        msg = (
            f"Expected `image_size` divisible by {factor} for {levels} levels, got {image_size}. "
            f"Use another size or fewer levels (`channel_mult`)."
        )
        raise ValueError(msg)
    resolutions = [image_size // 2**level for level in range(levels)]
    unknown = [resolution for resolution in attention_resolutions if resolution not in resolutions]
    if unknown:
        msg = (
            f"Expected `attention_resolutions` among {resolutions}, the levels at `image_size` {image_size}, "
            f"got {unknown}. Name levels that exist, or change `image_size` or `channel_mult`."
        )
        raise ValueError(msg)
    return [resolution in attention_resolutions for resolution in resolutions]


def check_widths(widths: Sequence[int], attends: Sequence[bool], *, norm_groups: int, head_channels: int) -> None:
    """Check that group norms and attention heads divide what they have to.

    Args:
        widths: Channels of each level, finest first.
        attends: Which levels attend; the bottleneck, as wide as the last level, always does.
        norm_groups: Groups of every group norm.
        head_channels: Channels of an attention head.

    Raises:
        ValueError: One does not divide a width.
    """
    bad = sorted({width for width in widths if width % norm_groups})
    if bad:
        msg = (
            f"Expected `norm_groups` to divide every width of {tuple(widths)}, got {norm_groups}, which does "
            f"not divide {bad}. Choose a divisor, or another `base_channels`."
        )
        raise ValueError(msg)
    attended = {width for width, attend in zip(widths, attends, strict=True) if attend} | {widths[-1]}
    bad = sorted(width for width in attended if width % head_channels)
    if bad:
        msg = (
            f"Expected `head_channels` to divide the widths with attention, {sorted(attended)}, got "
            f"{head_channels}, which does not divide {bad}. Choose a divisor, or attend at other levels."
        )
        raise ValueError(msg)


def check_divisible(x: Tensor, factor: int) -> None:
    """Check that images can be halved as often as the network has levels.

    Args:
        x: Images, [B, C, H, W].
        factor: Height and width must be divisible by it.

    Raises:
        ValueError: They are not.
    """
    height, width = x.shape[-2:]
    if height % factor or width % factor or not height or not width:
        fit = [max(factor, -(-side // factor) * factor) for side in (height, width)]
        msg = (
            f"Expected `x` with height and width divisible by {factor}, got {height} x {width}. "
            f"Resize or pad the images to {fit[0]} x {fit[1]}, or use fewer levels (`channel_mult`)."
        )
        raise ValueError(msg)
