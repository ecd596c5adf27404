"""U-ViT: a vision transformer with long skip connections, for noisy images or latents."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.networks.conditioning import (
    check_labels,
    check_noisy_images,
    check_positive,
    class_rows,
    require_classes,
    sinusoid,
)


class UViT(nn.Module):
    """U-ViT (Bao et al., "All are Worth Words", arXiv 2209.12152): noise level, class and patches are all tokens.

    The tokens are [class, time, patches row by row], plus a learned position. Then come depth / 2 blocks, one in the
    middle, and depth / 2 blocks that each first merge their input with the output of the block opposite to them,
    x <- Linear([x, skip]). A block is x <- x + Attention(LN(x)); x <- x + MLP(LN(x)). The patch tokens are mapped to
    pixels, and a 3 x 3 convolution smooths the seams. The time token is the sinusoidal embedding itself, without MLP.

    Published sizes (embed_dim, depth, num_heads): Small (512, 12, 8), Mid (768, 16, 12), Large (1024, 20, 16), Huge
    (1152, 28, 16) with conv=False. Large for ImageNet latents of 4 x 32 x 32 with patch 2 has 286,763,172 parameters.

    Under autocast the tokens' running sum, the layer norms and the time embedding stay in float32, and attention runs
    in 16 bits: torch's fused kernels form the softmax and its sums in float32 by themselves, and widening queries that
    a 16-bit layer put out would bring nothing back.

    Args:
        image_size: Side of the square images or latents; a multiple of `patch_size`.
        patch_size: Side of a patch. Cost grows with (image_size / patch_size)^2 tokens.
        in_channels: Channels of the images, and of the output.
        embed_dim: Width D of a token; even, a multiple of `num_heads`.
        depth: Blocks without the middle one, so depth + 1 in all; even.
        num_heads: Attention heads of a block.
        num_classes: Classes K; None until `reset_classes` (the module that trains the network calls it).
        null_class: One more row in the class table, K, for "no class", which classifier-free guidance needs.
        conv: The last 3 x 3 convolution; the Huge models have none.
        gradient_checkpointing: Recompute the blocks in the backward pass: less memory for about a third more time.
        mlp_ratio: Hidden width of an MLP in units of `embed_dim`.
        time_scale: Multiplies t before the embedding, which is made for t up to about 1000. 1 for times 0..1000; 1000
            for EDM's t = ln(sigma) / 4, which else would move only the first few channels.
        conditional: False leaves the class token out; the network is then called without labels.

    Attributes:
        num_classes: K, or None.
        null_label: The id of "no class", K, or None where there is none.
        in_channels: Channels of the images.
        image_size: Side of the images.

    Raises:
        ValueError: A number is not positive, or one does not divide another as said above.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int = 2,
        in_channels: int = 3,
        embed_dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        num_classes: int | None = None,
        null_class: bool = True,
        conv: bool = True,
        gradient_checkpointing: bool = False,
        mlp_ratio: float = 4.0,
        time_scale: float = 1.0,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(image_size, patch_size, embed_dim, depth, num_heads)
        check_positive({"in_channels": in_channels})
        # timm takes seconds to import; who only reads this signature (`--help`) should not wait for it.
        from timm.models.vision_transformer import Block

        def block() -> nn.Module:
            # timm's own norm layer has another eps than U-ViT, 1e-6 instead of torch's 1e-5.
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias=False, norm_layer=nn.LayerNorm)

        self.image_size = image_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.embed_dim = embed_dim
        self.null_class = null_class
        self.time_scale = time_scale
        self.gradient_checkpointing = gradient_checkpointing
        self.num_extra_tokens = 2 if conditional else 1
        self.patch_embed = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)
        num_tokens = self.num_extra_tokens + (image_size // patch_size) ** 2
        self.position = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.skips = nn.ModuleList(nn.Linear(2 * embed_dim, embed_dim) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, patch_size**2 * in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if conv else nn.Identity()
        self.class_table: nn.Module = nn.Identity()
        self.num_classes: int | None = None
        self.reset_parameters()
        if num_classes is not None:
            self.reset_classes(num_classes)

    @property
    def conditional(self) -> bool:
        """Whether there is a class token."""
        return self.num_extra_tokens == 2

    @property
    def null_label(self) -> int | None:
        """The id of "no class", or None where there is none."""
        return self.num_classes if self.null_class else None

    def reset_parameters(self) -> None:
        """Draw all weights anew: Linear and positions N(0, 0.02^2), classes N(0, 1), convolutions as torch does."""
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d | nn.Embedding):
                module.reset_parameters()

    def reset_classes(self, num_classes: int) -> None:
        """Start with new classes: a new class table, everything else stays as it is.

        Args:
            num_classes: K.

        Raises:
            ValueError: It is not positive, or the network has no class token.
        """
        if not self.conditional:
            msg = f"Expected no `num_classes` for conditional=False, got {num_classes}; build it with conditional=True."
            raise ValueError(msg)
        self.class_table = class_rows(num_classes, self.null_class, self.embed_dim, self.position)
        self.num_classes = num_classes

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: Noisy images, [B, in_channels, image_size, image_size].
            t: The number that tells each image's noise level, [B], or one for all, 0-dimensional.
            label: Class ids, [B], in 0..K-1, or `null_label`; None for a network without class token.

        Returns:
            One tensor like x.

        Raises:
            ValueError: A shape does not fit, or there are labels for a network without classes or the reverse.
        """
        x = self._unpatchify(self.head(self.norm(self._transform(self._tokens(x, t, label)))))
        smooth: Tensor = self.conv(x)
        return smooth

    def _tokens(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        check_noisy_images(x, t, self.in_channels)
        if x.shape[2:] != (self.image_size, self.image_size):
            msg = f"Expected `x` of {self.image_size} x {self.image_size} pixels, got {x.shape[2]} x {x.shape[3]}."
            raise ValueError(msg)
        time = sinusoid(t.to(x.device).expand(len(x)), self.embed_dim, self.time_scale).to(self.position.dtype)
        tokens = [time[:, None], self.patch_embed(x).flatten(2).transpose(1, 2)]
        if self.conditional:
            require_classes(self.num_classes)
            tokens.insert(0, self.class_table(check_labels(label, len(x)))[:, None])
        elif label is not None:
            msg = "Expected no `label` for a network without class token; build it with conditional=True."
            raise ValueError(msg)
        return torch.cat(tokens, 1) + self.position

    def _transform(self, x: Tensor) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        skips = []
        for block in self.in_blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            skips.append(x)
        x = checkpoint(self.mid_block, x, use_reentrant=False) if recompute else self.mid_block(x)
        for merge, block in zip(self.skips, self.out_blocks, strict=True):
            x = merge(torch.cat([x, skips.pop()], -1))
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, tokens, p * p * C] -> [B, C, H, W]; within a token the channel counts fastest, then the column."""
        side, p = self.image_size // self.patch_size, self.patch_size
        grid = tokens[:, self.num_extra_tokens :].reshape(-1, side, side, p, p, self.in_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, self.image_size, self.image_size)


def _check_sizes(image_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> None:
    sizes = {"image_size": image_size, "patch_size": patch_size, "embed_dim": embed_dim}
    check_positive(sizes | {"num_heads": num_heads, "depth": depth})
    if image_size % patch_size:
        msg = f"Expected `patch_size` to divide `image_size`, got {patch_size} and {image_size}."
        raise ValueError(msg)
    if embed_dim % num_heads or embed_dim % 2:
        msg = f"Expected `embed_dim` to be even and a multiple of `num_heads`, got {embed_dim} and {num_heads}."
        raise ValueError(msg)
    if depth % 2:
        msg = f"Expected `depth` to be even, half of the blocks on each side of the middle one, got {depth}."
        raise ValueError(msg)
