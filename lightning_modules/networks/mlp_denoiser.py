"""A residual network without convolutions, for tiny noisy images of classes."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.conditioning import (
    check_labels,
    check_noisy_images,
    check_positive,
    class_rows,
    require_classes,
    sinusoid,
)

_SINUSOID = 64


class MLPDenoiser(nn.Module):
    """Pixels, noise level and class through a few residual blocks.

    With h the pixels mapped to `width` channels, and e = SiLU(Linear(sinusoid(t)) + class),

        h <- h + MLP(LN(h + Linear(e)))

    `depth` times, MLP being Linear, SiLU, Linear; h is then mapped to pixels, by a layer that starts with zeros. On
    images of 8 to 16 pixels it learns in seconds of one core what attention and convolutions take minutes for; it does
    not know that neighbours are neighbours, so larger images are no use.

    Args:
        image_size: Side of the square images.
        in_channels: Channels of the images, and of the output.
        width: Channels of the blocks.
        depth: Blocks.
        num_classes: Classes K; None until `reset_classes` (the module that trains the network calls it).
        null_class: One more row in the class table, K, for "no class", which classifier-free guidance needs.
        time_scale: Multiplies t before the embedding, which is made for t up to about 1000; 1000 for EDM's
            t = ln(sigma) / 4.

    Attributes:
        num_classes: K, or None.
        null_label: The id of "no class", K, or None where there is none.
        in_channels: Channels of the images.
        image_size: Side of the images.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        width: int = 256,
        depth: int = 3,
        num_classes: int | None = None,
        null_class: bool = True,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        check_positive({"image_size": image_size, "in_channels": in_channels, "width": width, "depth": depth})
        self.image_size = image_size
        self.in_channels = in_channels
        self.width = width
        self.null_class = null_class
        self.time_scale = time_scale
        pixels = in_channels * image_size**2
        self.first = nn.Linear(pixels, width)
        self.time = nn.Linear(_SINUSOID, width)
        self.conditions = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.last = nn.Linear(width, pixels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.class_table: nn.Module = nn.Identity()
        self.num_classes: int | None = None
        if num_classes is not None:
            self.reset_classes(num_classes)

    @property
    def null_label(self) -> int | None:
        """The id of "no class", or None where there is none."""
        return self.num_classes if self.null_class else None

    def reset_classes(self, num_classes: int) -> None:
        """Start with new classes: a new class table, everything else stays as it is.

        Args:
            num_classes: K.

        Raises:
            ValueError: It is not positive.
        """
        self.class_table = class_rows(num_classes, self.null_class, self.width, self.first.weight)
        self.num_classes = num_classes

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: Noisy images, [B, in_channels, image_size, image_size].
            t: The number that tells each image's noise level, [B], or one for all, 0-dimensional.
            label: Class ids, [B], in 0..K-1, or `null_label`.

        Returns:
            One tensor like x.

        Raises:
            ValueError: A shape does not fit, or labels or classes are missing.
        """
        check_noisy_images(x, t, self.in_channels)
        if x.shape[2:] != (self.image_size, self.image_size):
            msg = f"Expected `x` of {self.image_size} x {self.image_size} pixels, got {x.shape[2]} x {x.shape[3]}."
            raise ValueError(msg)
        require_classes(self.num_classes)
        time = sinusoid(t.to(x.device).expand(len(x)), _SINUSOID, self.time_scale).to(self.first.weight.dtype)
        e = F.silu(self.time(time) + self.class_table(check_labels(label, len(x))))
        h = self.first(x.flatten(1))
        for block, condition in zip(self.blocks, self.conditions, strict=True):
            h = h + block(h + condition(e))
        out: Tensor = self.last(h)
        return out.view_as(x)
