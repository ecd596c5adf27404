"""ViTEncoder: its sizes, what its feature is, and whose weights it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_modules import ViTEncoder
from lightning_modules.networks.vit_encoder import ProjectionHead, SiameseNetwork, load_encoder

TINY: dict[str, Any] = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("patch", "width", "depth", "heads", "parameters"),
    [
        (16, 384, 12, 6, 21_665_664),
        (16, 768, 12, 12, 85_798_656),
        (4, 768, 12, 12, 87_503_616),
        (7, 1024, 24, 16, 303_513_600),
        (16, 1024, 24, 16, 303_301_632),
    ],
)
def test_parameter_counts_of_the_published_encoders(
    patch: int, width: int, depth: int, heads: int, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing weights that are never there takes seconds.
    monkeypatch.setattr("timm.models.vision_transformer.trunc_normal_", lambda tensor, **_: tensor)
    with torch.device("meta"):
        encoder = ViTEncoder(224, patch, width, depth, heads)
    assert _count(encoder) == parameters
    assert encoder.num_features == width


def test_parameter_count_of_the_published_head() -> None:
    with torch.device("meta"):
        assert _count(ProjectionHead(384)) == 5_517_568


def _timm(**changes: Any) -> VisionTransformer:
    torch.manual_seed(1)
    options = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 0}
    network = VisionTransformer(**options | changes)
    network.norm = nn.LayerNorm(8, eps=1e-6)
    nn.init.normal_(network.norm.weight)  # not 1: with or without the norm must differ
    return network.eval()


def _public(folder: Path, network: nn.Module) -> Path:
    """A file as MSN publishes them."""
    weights = {f"module.{name}": value for name, value in network.state_dict().items()}
    weights |= {"module.fc.fc1.weight": torch.rand(3, 8), "module.fc.fc1.bias": torch.rand(3)}
    torch.save({"target_encoder": weights, "prototypes": torch.rand(4, 3), "epoch": 3}, folder / "msn.pth.tar")
    return folder / "msn.pth.tar"


def test_a_published_file_loads_and_gives_timms_feature_before_the_norm(tmp_path: Path) -> None:
    network = _timm()
    encoder = ViTEncoder(**TINY).eval()
    load_encoder(encoder, _public(tmp_path, network))
    image = torch.rand(3, 3, 8, 8)
    x = encoder.normalise(image)
    # The class token comes first in what the norm is given.
    seen: list[torch.Tensor] = []
    network.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][:, 0]))
    network(x)
    hidden: Any = network.forward_intermediates(
        x, indices=1, norm=False, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )
    expected = seen[0]
    torch.testing.assert_close(hidden[-1][1][:, 0], expected)
    torch.testing.assert_close(encoder(image), expected)
    torch.testing.assert_close(encoder.norm(encoder(image)), network(x))
    assert (network(x) - expected).abs().mean() > 0.1


def test_focal_views_have_their_own_size_and_patches_are_dropped_by_the_call_only() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(**TINY).train()
    seen: list[int] = []
    encoder.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    image = torch.rand(2, 3, 8, 8)
    for side, drop in ((8, 0.0), (8, 0.3), (4, 0.0), (8, 0.99)):
        encoder.class_token(image[..., :side, :side], drop)
    encoder.eval().class_token(image, 0.5)
    assert seen == [17, 1 + 11, 5, 1 + 1, 17]
    alone = encoder.train()(image[:1])
    torch.testing.assert_close(encoder(image)[:1], alone)


def test_the_networks_head_takes_the_normed_token_of_all_groups_together() -> None:
    torch.manual_seed(0)
    network = SiameseNetwork(ViTEncoder(**TINY), width=16, dim=4).train()
    views = [torch.rand(4, 3, 8, 8), torch.rand(6, 3, 4, 4)]
    tokens = torch.cat([network.encoder.norm(network.encoder(view)) for view in views])
    torch.testing.assert_close(network(views, [0.0, 0.0]), network.head(tokens))


def test_grey_images_and_own_statistics() -> None:
    encoder = ViTEncoder(**TINY, in_channels=1, mean=[0.2], std=[0.1])
    assert encoder(torch.rand(2, 1, 8, 8)).shape == (2, 8)
    torch.testing.assert_close(encoder.normalise(torch.full((1, 1, 8, 8), 0.3)), torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("prefix", ["ema.module.encoder.", "network.encoder."])
def test_a_checkpoint_of_ours_brings_its_normalisation(prefix: str, tmp_path: Path) -> None:
    source, encoder = ViTEncoder(**TINY, mean=[0.3], std=[0.7]), ViTEncoder(**TINY, mean=[0.1], std=[0.2])
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    # The averaged encoder comes first, and the head is left out.
    state |= {"network.encoder.cls_token": torch.zeros(1, 1, 8)} if prefix.startswith("ema") else {}
    torch.save({"state_dict": state | {"network.head.0.weight": torch.rand(2, 2)}}, tmp_path / "last.ckpt")
    load_encoder(encoder, tmp_path / "last.ckpt")
    image = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(encoder(image), source(image), rtol=0, atol=0)


def test_files_that_hold_no_such_encoder(tmp_path: Path) -> None:
    encoder = ViTEncoder(**TINY)
    with pytest.raises(FileNotFoundError, match="`encoder_from` to be a checkpoint file, but there is none at"):
        load_encoder(encoder, tmp_path / "none.ckpt")
    with pytest.raises(
        ValueError, match=r"`init` to hold an encoder like this one.*pos_embed: \[1, 17, 8\] here, \[1, 5"
    ):
        load_encoder(encoder, _public(tmp_path, _timm(img_size=4)), "init")
    with pytest.raises(ValueError, match=r"but 12 tensors of .* differ"):
        load_encoder(encoder, _public(tmp_path, _timm(depth=3)))
    torch.save({"state_dict": {"network.conv.weight": torch.rand(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint of MaskedSiamese, or .*holds network.conv.weight; give"):
        load_encoder(encoder, tmp_path / "other.ckpt")
    torch.save([Path("evil")], tmp_path / "objects.ckpt")
    with pytest.raises(ValueError, match=r"objects.ckpt cannot be read as one"):
        load_encoder(encoder, tmp_path / "objects.ckpt")


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="`image_size` to be a multiple of `patch_size`, got 8 and 3"):
        ViTEncoder(8, 3)
    with pytest.raises(ValueError, match="`embed_dim` to be a multiple of `num_heads`, got 8 and 3"):
        ViTEncoder(8, 2, 8, 2, 3)
    with pytest.raises(ValueError, match=r"multiples of `patch_size` 2, got 5 x 6.*focal_size"):
        ViTEncoder(**TINY)(torch.rand(1, 3, 5, 6))
