"""The autoencoder of latent diffusion as a configuration of diffusers' `AutoencoderKL`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_modules.networks.conditioning import check_positive

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Where log-variances are cut off, as in latent diffusion's code: beyond it their exponential says nothing more."""


class KLAutoencoder(nn.Module):
    """Images to Gaussians over latents and back (Rombach et al., 2022, arXiv 2112.10752, section 3.1).

    The encoder gives q(z | x) = N(mean, diag(exp(log-variance))) at a fraction of the resolution, the decoder an image
    for each z. With the defaults this is the f8 autoencoder of Stable Diffusion; a small one for small images is a
    matter of `block_out_channels`.

    Attributes:
        vae: The `AutoencoderKL`.
        factor: The side of an image over the side of its latents.

    Args:
        in_channels: Channels of the images: 1 for grey ones, 3 for colour.
        latent_channels: Channels z of the latents.
        block_out_channels: Width of each level, finest first. Every level after the first halves the resolution.
        layers_per_block: Residual blocks of a level on the way down; one more on the way up.
        norm_groups: Groups of every group norm. Must divide every width.
        attention: Whether the coarsest level has self-attention.

    Raises:
        ValueError: A number is not positive, or a width does not fit `norm_groups`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        attention: bool = True,
    ) -> None:
        """Check the configuration and build the network."""
        super().__init__()
        widths = tuple(block_out_channels)
        self._settings: dict[str, Any] = {
            "in_channels": in_channels,
            "latent_channels": latent_channels,
            "block_out_channels": list(widths),
            "layers_per_block": layers_per_block,
            "norm_groups": norm_groups,
            "attention": attention,
        }
        self._require_fitting(widths)
        self.factor = 2 ** (len(widths) - 1)
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        # diffusers takes seconds to import; who only reads this signature (`--help`) should not wait for it.
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.vae = AutoencoderKL(
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
            mid_block_add_attention=attention,
            scaling_factor=1.0,
        )

    def _require_fitting(self, widths: Sequence[int]) -> None:
        counts = ("in_channels", "latent_channels", "layers_per_block", "norm_groups")
        check_positive({name: self._settings[name] for name in counts})
        groups = self._settings["norm_groups"]
        if not widths or any(width < 1 or width % groups for width in widths):
            msg = (
                f"Expected `block_out_channels` to hold multiples of `norm_groups` {groups}, one a level, got "
                f"{tuple(widths)}; change either."
            )
            raise ValueError(msg)

    def settings(self) -> dict[str, Any]:
        """The arguments that build this architecture, as plain values."""
        return dict(self._settings)

    def encode(self, x: Tensor) -> Tensor:
        """Return the moments [B, 2 z, h, w] of images [B, C, H, W] in [-1, 1], see `encode`."""
        return encode(self.vae, x)

    def decode(self, z: Tensor) -> Tensor:
        """Return images [B, C, H, W], about in [-1, 1], of latents [B, z, h, w]."""
        return decode(self.vae, z)

    def forward(self, x: Tensor) -> Tensor:
        """Return what becomes of images [B, C, H, W] in [-1, 1] that go through the means of their latents."""
        mean, _ = self.encode(x).chunk(2, dim=1)
        return self.decode(mean)


def encode(vae: "AutoencoderKL", x: Tensor) -> Tensor:
    """Encode images.

    Args:
        vae: Autoencoder of diffusers.
        x: [B, C, H, W] in [-1, 1], H and W divisible by its factor.

    Returns:
        [B, 2 z, h, w]: means, then log-variances within `LOG_VARIANCE_RANGE`.

    Raises:
        ValueError: The images do not fit.
    """
    channels, factor = int(vae.config["in_channels"]), factor_of(vae)
    if x.ndim != 4 or x.shape[1] != channels:
        msg = (
            f"Expected `image` [B, {channels}, H, W], as the autoencoder has {channels} image channels, got "
            f"{list(x.shape)}; take an autoencoder for these images (its in_channels), or the images that it is for."
        )
        raise ValueError(msg)
    if x.shape[2] % factor or x.shape[3] % factor:
        msg = (
            f"Expected `image` with sides divisible by {factor}, the factor of the autoencoder, got "
            f"{tuple(x.shape[2:])}; choose another data.init_args.image_size, or fewer levels."
        )
        raise ValueError(msg)
    mean, log_variance = vae.encode(x).latent_dist.parameters.chunk(2, dim=1)
    return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1)


def decode(vae: "AutoencoderKL", z: Tensor) -> Tensor:
    """Decode latents.

    Args:
        vae: Autoencoder of diffusers.
        z: [B, z, h, w], as its encoder gives them.

    Returns:
        [B, C, H, W], about in [-1, 1].
    """
    image: Tensor = vae.decode(z).sample
    return image


def factor_of(vae: "AutoencoderKL") -> int:
    """The side of an image over the side of its latents."""
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def draw(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw latents from their Gaussians.

    Args:
        moments: [B, 2 z, h, w], means and log-variances.
        noise: [B, z, h, w] standard normal.

    Returns:
        mean + exp(log-variance / 2) noise, [B, z, h, w].
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance).exp() * noise


def kl_divergence(moments: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each image's Gaussian from the standard normal one, in nats.

    Args:
        moments: [B, 2 z, h, w], means and log-variances.

    Returns:
        1/2 sum(mean^2 + variance - 1 - log-variance) over all latents of an image, [B].
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum((1, 2, 3))
