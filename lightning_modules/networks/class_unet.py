"""The class-conditional UNet of score-based models (DDPM++) as a configuration of diffusers' `UNet2DModel`."""

from torch import Tensor, nn

from lightning_modules.networks.conditioning import (
    check_labels,
    check_noisy_images,
    check_positive,
    class_rows,
    require_classes,
)
from lightning_modules.networks.unet_options import (
    attention_levels,
    block_types,
    check_channel_mult,
    check_divisible,
    check_widths,
    zero_last_layers,
)


class ClassUNet(nn.Module):
    """DDPM++ (Song et al., arXiv 2011.13456, section 4 and appendix H) with classes, for images or latents.

    The defaults are the CIFAR-10 network of EDM (Karras et al., arXiv 2206.00364, table 7, "DDPM++"): residual blocks
    that also change the resolution, the noise level added inside them, sums divided by sqrt(2), one attention head,
    attention at 16 px. The embedding of the class is added to that of the noise level.

    Three things are as diffusers has them, not as in EDM's own network (55,735,299 parameters for ten classes; this
    one has 62,438,659 with the row for "no class"): a level with attention attends after every block on the way up,
    not only after the last; shortcuts that change the resolution have no 1 x 1 convolution; the class joins behind the
    two layers of the noise embedding, not before them. Weights start as PyTorch draws them, but see `zero_init`.

    Args:
        in_channels: Channels of the images or latents, and of the output.
        image_size: Side for which `attention_resolutions` is meant. Other sizes run as well.
        base_channels: Channels that `channel_mult` multiplies; also the width of the sinusoidal embedding of `t` times
            the first of them.
        channel_mult: Width of each level in units of `base_channels`, finest level first. Every level after the first
            halves the resolution.
        layers_per_block: Residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: Sides, in pixels at `image_size`, of the levels with self-attention. The bottleneck
            always has it.
        head_channels: Channels of one attention head; None is a single head.
        dropout: Dropout inside the residual blocks.
        norm_groups: Groups of every group norm; None is 32, or a quarter of `base_channels` where that is less.
        num_classes: Classes K; None until `reset_classes` (the module that trains the network calls it).
        null_class: One more row in the class table, K, for "no class", which classifier-free guidance needs.
        zero_init: Start with blocks that add nothing to their shortcuts and with an output of 0. False keeps
            PyTorch's initialisation.
        gradient_checkpointing: Recompute the residual blocks in the backward pass: less memory for about a third more
            time.
        time_scale: Multiplies t before the embedding, which is made for t up to about 1000. 1 for times 0..1000; 1000
            for EDM's t = ln(sigma) / 4, which else would move only the first few channels.

    Attributes:
        unet: The `UNet2DModel`.
        num_classes: K, or None.
        in_channels: Channels of the images.
        image_size: As given.
        downsample_factor: Height and width must be divisible by it.

    Raises:
        ValueError: If a width does not fit `norm_groups` or `head_channels`, if an attention resolution is not the
            resolution of any level, or if a count is not positive.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        base_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        head_channels: int | None = None,
        dropout: float = 0.13,
        norm_groups: int | None = None,
        num_classes: int | None = None,
        null_class: bool = True,
        zero_init: bool = True,
        gradient_checkpointing: bool = False,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        counts = {"in_channels": in_channels, "base_channels": base_channels, "layers_per_block": layers_per_block}
        optional = {"head_channels": head_channels, "norm_groups": norm_groups}
        check_positive(counts | {name: count for name, count in optional.items() if count is not None})
        check_channel_mult(channel_mult)
        attends = attention_levels(image_size, len(channel_mult), attention_resolutions)
        widths = tuple(base_channels * multiple for multiple in channel_mult)
        groups = max(1, min(32, base_channels // 4)) if norm_groups is None else norm_groups
        check_widths(widths, attends, norm_groups=groups, head_channels=head_channels or 1)
        self.in_channels = in_channels
        self.image_size = image_size
        self.null_class = null_class
        self.zero_init = zero_init
        self.time_scale = time_scale
        self.downsample_factor = 2 ** (len(channel_mult) - 1)
        self.num_classes: int | None = None
        # diffusers takes seconds to import; who only reads this signature (`--help`) should not wait for it.
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=image_size,
            in_channels=in_channels,
            out_channels=in_channels,
            layers_per_block=layers_per_block,
            block_out_channels=widths,
            attention_head_dim=head_channels,
            norm_num_groups=groups,
            norm_eps=1e-6,
            dropout=dropout,
            downsample_type="resnet",
            upsample_type="resnet",
            **block_types(attends),
        )
        self._scale_sums()
        if zero_init:
            zero_last_layers(self.unet)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if num_classes is not None:
            self.reset_classes(num_classes)

    @property
    def null_label(self) -> int | None:
        """The id of "no class", or None where there is none."""
        return self.num_classes if self.null_class else None

    def reset_parameters(self) -> None:
        """Draw all weights anew, the class table too."""
        for module in self.unet.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm | nn.Embedding):
                module.reset_parameters()
        if self.zero_init:
            zero_last_layers(self.unet)

    def reset_classes(self, num_classes: int) -> None:
        """Start with new classes: a new class table, everything else stays as it is.

        Args:
            num_classes: K.

        Raises:
            ValueError: It is not positive.
        """
        last = self.unet.time_embedding.linear_2
        self.unet.class_embedding = class_rows(num_classes, self.null_class, last.out_features, last.weight)
        self.unet.register_to_config(num_class_embeds=self.unet.class_embedding.num_embeddings)
        self.num_classes = num_classes

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: Noisy images, [B, in_channels, H, W], H and W divisible by `downsample_factor`.
            t: The number that tells each image's noise level, [B], or one for all, 0-dimensional.
            label: Class ids, [B], in 0..K-1, or `null_label`.

        Returns:
            One tensor like x.

        Raises:
            ValueError: A shape does not fit, or there are no classes or no labels.
        """
        check_noisy_images(x, t, self.in_channels)
        check_divisible(x, self.downsample_factor)
        require_classes(self.num_classes)
        # Not 16-bit: neighbouring noise levels would share one embedding.
        t = (t.to(x.device).float() * self.time_scale).expand(len(x))
        out: Tensor = self.unet(x, t, check_labels(label, len(x)), return_dict=False)[0]
        return out

    def _scale_sums(self) -> None:
        """Divide every sum of block and shortcut by sqrt(2); UNet2DModel offers it at the bottleneck only."""
        from diffusers.models.attention_processor import Attention
        from diffusers.models.resnet import ResnetBlock2D

        for module in self.unet.modules():
            if isinstance(module, ResnetBlock2D):
                module.output_scale_factor = 2**0.5
            elif isinstance(module, Attention):
                module.rescale_output_factor = 2**0.5
