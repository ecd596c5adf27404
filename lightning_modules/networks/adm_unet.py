"""The ADM UNet as a configuration of diffusers' `UNet2DModel`.

ADM is the network of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233,
section 3): residual blocks that also change the resolution, FiLM conditioning on the noise level, multi-head
attention at the coarse resolutions. diffusers has all of these parts, behind options whose defaults build
another network; this wrapper sets them, adds the zero initialisation that diffusers leaves out, and checks
its inputs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_modules.networks.conditioning import check_noisy_images, check_positive
from lightning_modules.networks.unet_options import (
    attention_levels,
    block_types,
    check_channel_mult,
    check_divisible,
    check_widths,
    zero_last_layers,
)

HEAD_GAIN = 0.1
"""A fresh head draws weights of deviation HEAD_GAIN / sqrt(fan_in): logits near 0, gradients not."""

ADM_OPTIONS: dict[str, Any] = {
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
"""What makes a `UNet2DModel` an ADM UNet, whatever its size."""


class ADMUNet(nn.Module):
    """UNet of ADM: a noisy image and its noise level in, `out_channels` maps of the same size out.

    The defaults are the hybrid-diffusion network (arXiv 2408.03433): 138,288,773 parameters with 5 output
    channels (3 of the image, 2 of the mask). The maps are returned as one tensor; who trains the network
    decides what each channel means (in this project image channels come first, mask channels last).

    Attributes:
        unet: The `UNet2DModel`. Hook its `down_blocks`, `mid_block` and `up_blocks` to read features.
        in_channels: Number of image channels expected.
        out_channels: Number of channels returned; changed by `reset_head`.
        downsample_factor: Height and width must be divisible by it.

    Args:
        out_channels: Channels of the output: 3 + K for an image and the mask of K classes.
        in_channels: Channels of the input image. The mask is never an input.
        image_size: Side in pixels for which `attention_resolutions` is meant. Other sizes run as well;
            attention then stays at the same levels, not at the same number of pixels.
        base_channels: Width of the first level, C in the papers.
        channel_mult: Width of each level in units of `base_channels`, finest level first. Every level after
            the first halves the resolution.
        layers_per_block: Residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: Sides, in pixels at `image_size`, of the levels that get self-attention. The
            bottleneck always has it.
        head_channels: Channels of one attention head; the number of heads follows from the width.
        dropout: Dropout inside the residual blocks: 0.1 in ADM's LSUN models.
        norm_groups: Groups of every group norm. Must divide every width.
        zero_init: Start as ADM does: the second convolution of every residual block, every attention output
            projection and the final convolution are zero. A block then adds nothing to its shortcut, and the
            network returns exactly 0 until its first step. False keeps PyTorch's initialisation.
        gradient_checkpointing: Recompute the residual blocks in the backward pass: less memory for about a
            third more time.

    Raises:
        ValueError: If a width does not fit `norm_groups` or `head_channels`, if an attention resolution is
            not the resolution of any level, or if a count is not positive.
    """

    def __init__(
        self,
        out_channels: int = 5,
        in_channels: int = 3,
        image_size: int = 256,
        base_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4),
        layers_per_block: int = 2,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        head_channels: int = 64,
        dropout: float = 0.1,
        norm_groups: int = 32,
        zero_init: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Check the configuration and build the network."""
        super().__init__()
        counts = {
            "out_channels": out_channels,
            "in_channels": in_channels,
            "base_channels": base_channels,
            "layers_per_block": layers_per_block,
            "head_channels": head_channels,
            "norm_groups": norm_groups,
        }
        check_positive(counts)
        check_channel_mult(channel_mult)
        attends = attention_levels(image_size, len(channel_mult), attention_resolutions)
        widths = tuple(base_channels * multiple for multiple in channel_mult)
        check_widths(widths, attends, norm_groups=norm_groups, head_channels=head_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.downsample_factor = 2 ** (len(channel_mult) - 1)
        # diffusers takes seconds to import; who only reads this signature (`--help`) should not wait for it.
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=image_size,
            in_channels=in_channels,
            out_channels=out_channels,
            layers_per_block=layers_per_block,
            block_out_channels=widths,
            attention_head_dim=head_channels,
            norm_num_groups=norm_groups,
            # Without it, FiLM conditioning makes diffusers drop the norm of the bottleneck's attention.
            attn_norm_num_groups=norm_groups,
            dropout=dropout,
            **block_types(attends),
            **ADM_OPTIONS,
        )
        if zero_init:
            zero_last_layers(self.unet)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    @classmethod
    def small(cls, out_channels: int = 5, in_channels: int = 3, dropout: float = 0.0) -> "ADMUNet":
        """Build the configuration for 32 px images on a CPU.

        It has 847,349 parameters with 5 output channels. Its width is at 8 and 4 px, where convolutions are
        cheap. The blocks at 32 px have 16 channels, those below them too, because ADM's upsampling block
        convolves with its own level's width at the resolution above.

        In YAML, write its arguments out:

            class_path: lightning_modules.networks.ADMUNet
            init_args:
              out_channels: 5
              image_size: 32
              base_channels: 16
              channel_mult: [1, 1, 2, 4]
              layers_per_block: 1
              attention_resolutions: [8, 4]
              head_channels: 32
              dropout: 0.0
              norm_groups: 8

        Args:
            out_channels: Channels of the output: 3 + K for an image and the mask of K classes.
            in_channels: Channels of the input image.
            dropout: Dropout inside the residual blocks; none by default, so small a network hardly overfits.

        Returns:
            The network, for images whose sides are divisible by 8.
        """
        return cls(
            out_channels=out_channels,
            in_channels=in_channels,
            image_size=32,
            base_channels=16,
            channel_mult=(1, 1, 2, 4),
            layers_per_block=1,
            attention_resolutions=(8, 4),
            head_channels=32,
            dropout=dropout,
            norm_groups=8,
        )

    def save_pretrained(
        self, folder: str | Path, overwrite: bool = False, about: Mapping[str, Any] | None = None
    ) -> None:
        """Write the network as a folder that diffusers loads alone: `UNet2DModel.from_pretrained(folder)`.

        Args:
            folder: A new or empty folder; it is written whole or not at all.
            overwrite: Replace a network that was exported to it before.
            about: Plain values for fewlight.json beside the network, such as {"num_classes": 2}.

        Raises:
            OSError: The folder is in use, or cannot be written; what was there still is.
        """
        from lightning_modules.networks.pretrained import write_pretrained

        write_pretrained(self.unet.to_json_string(), self.unet.state_dict(), folder, overwrite, about)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote, or diffusers from the `UNet2DModel` of an ADM UNet.

        Args:
            folder: A local folder with config.json and safetensors; pickles are not opened.

        Returns:
            The network in evaluation mode, as diffusers returns it; call train() to train it on.

        Raises:
            FileNotFoundError: The folder or one of its files is missing.
            ValueError: It is not an ADM UNet, or its files are damaged.
        """
        from lightning_modules.networks.pretrained import read_arguments, read_weights, with_weights

        arguments = read_arguments(folder)
        weights = {f"unet.{name}": value for name, value in read_weights(folder).items()}
        return with_weights(lambda: cls(**arguments, zero_init=False), weights, f"`folder` {folder}").eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Run the network.

        Args:
            x: Images, [B, in_channels, H, W], H and W divisible by `downsample_factor`.
            t: Conditioning of each image, [B], or one number as a 0-dimensional tensor. Fractions are kept.

        Returns:
            Maps, [B, out_channels, H, W].

        Raises:
            ValueError: If a shape does not fit.
        """
        check_noisy_images(x, t, self.in_channels)
        check_divisible(x, self.downsample_factor)
        # Not 16-bit: neighbouring steps near 1000 would share one embedding.
        t = t.to(device=x.device, dtype=torch.float32).expand(x.shape[0])
        maps: Tensor = self.unet(x, t, return_dict=False)[0]
        return maps

    @property
    def head(self) -> nn.Conv2d:
        """The last convolution, the only layer whose shape depends on `out_channels`."""
        head: nn.Conv2d = self.unet.conv_out
        return head

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of `head`."""
        yield from self.head.parameters()

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter that is not in `head`."""
        head = {id(parameter) for parameter in self.head.parameters()}
        yield from (parameter for parameter in self.parameters() if id(parameter) not in head)

    def decoder_blocks(self) -> list[nn.Module]:
        """List the modules whose outputs are ADM's decoder blocks, deepest level first.

        Block i = (layers_per_block + 1) * level + j is what the j-th residual block of a level puts out, with its
        attention where there is any. The last block of a level also upsamples: its output is the whole level's.
        """
        blocks: list[nn.Module] = []
        for level in self.unet.up_blocks:
            blocks += [*getattr(level, "attentions", level.resnets)[:-1], level]
        return blocks

    def reset_head(self, out_channels: int, keep_first: int = 0) -> None:
        """Replace the last convolution by a fresh one; every other tensor stays as it is.

        The new rows start small but not at zero (see `HEAD_GAIN`), with zero bias. Build the optimiser
        afterwards: the head's parameters are new objects.

        Args:
            out_channels: Channels of the new head.
            keep_first: How many of the first output channels keep their weights: the image channels, when
                only the number of classes of the mask changes.

        Raises:
            ValueError: If `out_channels` is not positive, or if `keep_first` exceeds the old or the new head.
        """
        most = min(out_channels, self.out_channels)
        if out_channels < 1:
            msg = f"Expected `out_channels` to be at least 1, got {out_channels}."
            raise ValueError(msg)
        if not 0 <= keep_first <= most:
            msg = (
                f"Expected `keep_first` between 0 and {most} to go from {self.out_channels} to "
                f"{out_channels} channels, got {keep_first}. Keep only channels that both heads have."
            )
            raise ValueError(msg)
        old = self.head
        new = nn.Conv2d(old.in_channels, out_channels, kernel_size=3, padding=1).to(old.weight)
        with torch.no_grad():
            nn.init.normal_(new.weight, std=HEAD_GAIN * new.weight[0].numel() ** -0.5)
            for name, parameter in new.named_parameters():
                if name == "bias":
                    nn.init.zeros_(parameter)
                parameter[:keep_first] = old.get_parameter(name)[:keep_first]
        self.unet.conv_out = new.train(old.training)
        self.unet.register_to_config(out_channels=out_channels)
        self.out_channels = out_channels
