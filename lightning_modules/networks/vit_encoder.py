"""Vision transformers as encoders, and the weights that self-supervised pretraining left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers.patch_dropout import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightning_modules.networks.normalise import Normalise
from lightning_modules.networks.tensor_files import differing, read_tensor_file

_OWN = ("ema.module.encoder.", "network.encoder.")
"""Prefixes of an encoder in a checkpoint of MaskedSiamese; the averaged one is wanted."""
_PUBLIC = "target_encoder"
"""Where the files published with arXiv 2204.07141 have the averaged encoder."""


class ViTEncoder(VisionTransformer):
    """timm's VisionTransformer without a head, for images in [0, 1]; its feature is the class token.

    Names of the weights are timm's, which are those of DeiT and MSN; normalisation comes on top. Images may be of
    another side than the one it was made for: positions are interpolated then.

    Args:
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels; divides that of the images.
        embed_dim: Width D.
        depth: Blocks.
        num_heads: Attention heads; divide the width.
        in_channels: Channels of the images.
        mean: Mean of the images, one number or one a channel; None takes ImageNet's for 3 channels, else 0.5.
        std: Standard deviation, likewise (else 0.5).

    Attributes:
        num_features: D.

    Raises:
        ValueError: A size is not a multiple of what divides it.

    Example:
        >>> import torch
        >>> from lightning_modules import ViTEncoder
        >>> ViTEncoder(image_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=4)(torch.rand(2, 3, 28, 28)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        for name, whole, divisor, part in (
            ("image_size", image_size, "patch_size", patch_size),
            ("embed_dim", embed_dim, "num_heads", num_heads),
        ):
            if part < 1 or whole < 1 or whole % part:
                msg = f"Expected `{name}` to be a multiple of `{divisor}`, got {whole} and {part}."
                raise ValueError(msg)
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=in_channels,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            dynamic_img_size=True,
        )
        photos = in_channels == 3
        self.normalise = Normalise(
            mean or ((0.485, 0.456, 0.406) if photos else (0.5,)), std or ((0.229, 0.224, 0.225) if photos else (0.5,))
        )
        self.image_size = image_size
        self.patch_size = patch_size
        # Without weights, and without effect until a call says otherwise.
        self.patch_drop = PatchDropout(0.0, num_prefix_tokens=1)

    def class_token(self, image: Tensor, patch_drop: float = 0.0) -> Tensor:
        """The class token after the last block, before the final norm.

        Args:
            image: [B, C, H, W] in [0, 1], sides multiples of the patch's.
            patch_drop: Share of the patches that each image loses, by chance and only in training mode, in [0, 1).

        Returns:
            [B, D].

        Raises:
            ValueError: A side is not a multiple of the patch's.
        """
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            msg = (
                f"Expected images with sides that are multiples of `patch_size` {self.patch_size}, got {height} x "
                f"{width}; choose `image_size` (of views: `crops.focal_size`, `crops.random_size`) accordingly."
            )
            raise ValueError(msg)
        self.patch_drop.prob = patch_drop
        tokens: Any = self.forward_intermediates(
            self.normalise(image),
            indices=1,
            norm=False,
            return_prefix_tokens=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        ((_, prefix),) = tokens
        token: Tensor = prefix[:, 0]
        return token

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]  # timm's takes attention masks, too
        """Features [B, D] of images [B, C, H, W] in [0, 1]."""
        return self.class_token(image)


def load_encoder(encoder: nn.Module, path: str | Path, argument: str = "encoder_from") -> None:
    """Fill an encoder with pretrained weights: averaged ones of MaskedSiamese, or of a file published with MSN.

    Args:
        encoder: Takes the weights; it is like the one that was trained.
        path: A checkpoint of MaskedSiamese, or a file with a dict whose `target_encoder` holds the weights.
        argument: The name of the argument that holds the path, for the errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no encoder, or another one.
    """
    weights = _encoder_weights(read_tensor_file(path, argument), path, argument)
    own = encoder.state_dict()
    if not any(name.startswith("normalise.") for name in weights):
        own = {name: value for name, value in own.items() if not name.startswith("normalise.")}
    wrong, shapes = differing(own, weights)
    if wrong:
        msg = (
            f"Expected `{argument}` to hold an encoder like this one, but {len(wrong)} tensors of {path} differ, the "
            f"first {wrong[0]}: {shapes[0]} here, {shapes[1]} there; give the encoder the sizes that it was trained "
            "with."
        )
        raise ValueError(msg)
    encoder.load_state_dict(weights, strict=False)


def _encoder_weights(content: object, path: str | Path, argument: str) -> dict[str, Tensor]:
    found = content if isinstance(content, dict) else {}
    state = found.get("state_dict", {})
    for prefix in _OWN:
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if weights:
            return weights
    if _PUBLIC in found:
        plain = {name.removeprefix("module."): value for name, value in found[_PUBLIC].items()}
        return {name: value for name, value in plain.items() if not name.startswith("fc.")}
    msg = (
        f"Expected `{argument}` to be a checkpoint of MaskedSiamese, or a file with `{_PUBLIC}`, but {path} holds "
        f"{', '.join(sorted(map(str, state or found))[:3]) or type(content).__name__}; give a file that pretraining "
        "wrote."
    )
    raise ValueError(msg)


class ProjectionHead(nn.Sequential):
    """Three linear layers, the first two with BatchNorm and GELU, from features to what prototypes are compared with.

    Args:
        in_features: D.
        width: Of the two layers between.
        dim: Of the embedding.
    """

    def __init__(self, in_features: int, width: int = 2048, dim: int = 256) -> None:
        super().__init__(
            nn.Linear(in_features, width),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Linear(width, dim),
        )


class SiameseNetwork(nn.Module):
    """An encoder with a projection head.

    Args:
        encoder: Gives class tokens.
        width: Of the head's layers.
        dim: Of the embedding.
    """

    def __init__(self, encoder: ViTEncoder, width: int = 2048, dim: int = 256) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ProjectionHead(encoder.num_features, width, dim)

    def forward(self, views: Sequence[Tensor], patch_drop: Sequence[float]) -> Tensor:
        """Embeddings of views, which share the statistics of the head's BatchNorms.

        Args:
            views: Groups [n, C, S, S] of images in [0, 1], each of its own side.
            patch_drop: Share of patches that the images of each group lose in training.

        Returns:
            [sum of n, d], group after group.
        """
        tokens = [self.encoder.class_token(x, drop) for x, drop in zip(views, patch_drop, strict=True)]
        embedding: Tensor = self.head(self.encoder.norm(torch.cat(tokens)))
        return embedding
