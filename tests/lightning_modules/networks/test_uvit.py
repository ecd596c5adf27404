"""UViT: parameter counts of the published sizes, and what each of its parts is for."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.diffusion.noise import EDMProcess, karras_sigmas
from lightning_modules.networks.conditioning import sinusoid
from lightning_modules.networks.uvit import UViT


def _tiny(**options: object) -> UViT:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return UViT(**sizes | {"num_classes": 3} | options)  # type: ignore[arg-type]  # plain numbers and flags


def _inputs(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, generator=generator)
    return x, torch.linspace(0, 1000, batch), torch.arange(batch) % 4


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# Sizes and counts of arXiv 2209.12152, table 1 and appendix: depth without the middle block.
SMALL, DEEP, MID, LARGE, HUGE = (512, 12, 8), (512, 16, 8), (768, 16, 12), (1024, 20, 16), (1152, 28, 16)


@pytest.mark.parametrize(
    ("size", "image", "classes", "conv", "count"),
    [
        (SMALL, (32, 2, 3), 0, True, 44_255_328),
        (SMALL, (64, 4, 3), 0, True, 44_292_228),
        (DEEP, (32, 2, 3), 0, True, 57_908_320),
        (MID, (64, 4, 3), 1000, True, 130_940_292),
        (LARGE, (64, 4, 3), 1000, True, 286_827_652),
        (LARGE, (32, 2, 4), 1001, True, 286_763_172),
        (LARGE, (64, 4, 4), 1001, True, 286_861_524),
        (HUGE, (32, 2, 4), 1001, False, 500_832_016),
        (HUGE, (64, 4, 4), 1001, False, 500_942_656),
    ],
)
def test_parameter_counts_of_the_paper(
    size: tuple[int, int, int], image: tuple[int, int, int], classes: int, conv: bool, count: int
) -> None:
    null = classes == 1001
    with torch.device("meta"):
        network = UViT(*image, *size, classes - null or None, null, conv, conditional=classes > 0)
    assert _count(network) == count


def test_output_is_like_the_input() -> None:
    x, t, label = _inputs()
    assert _tiny()(x, t, label).shape == x.shape
    assert _tiny(conditional=False, num_classes=None)(x, t).shape == x.shape


def test_time_embedding_by_hand() -> None:
    assert torch.equal(sinusoid(torch.zeros(2), 6), torch.tensor([[1.0, 1, 1, 0, 0, 0]] * 2))
    t, width = 7.25, 10
    angles = [t * 10000 ** (-i / 5) for i in range(5)]
    expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    torch.testing.assert_close(sinusoid(torch.tensor([t]), width)[0], expected)
    torch.testing.assert_close(sinusoid(torch.tensor([t / 1000]), width, 1000.0)[0], expected)


def test_scale_makes_noise_levels_of_edm_far_apart() -> None:
    sigma = karras_sigmas(18, 0.002, 80.0)[:-1]
    t = EDMProcess().c_noise(sigma)

    def nearest(scale: float) -> float:
        """Smallest distance of two levels, in units of the largest possible."""
        embedding = sinusoid(t, 96, scale)
        return float(torch.pdist(embedding).min()) / (2 * math.sqrt(48))

    assert nearest(1.0) < 0.02
    assert nearest(1000.0) > 0.3


def test_tokens_are_class_time_and_patches_row_by_row() -> None:
    network = _tiny()
    nn.init.zeros_(network.position)
    x, t, label = _inputs()
    tokens = network._tokens(x, t, label)
    assert isinstance(network.class_table, nn.Embedding)
    torch.testing.assert_close(tokens[:, 0], network.class_table.weight[label])
    torch.testing.assert_close(tokens[:, 1], sinusoid(t, 16))
    for number, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        patch = x[:, :, row : row + 4, column : column + 4]
        expected = torch.einsum("bcij,dcij->bd", patch, network.patch_embed.weight)
        expected += network.patch_embed.get_parameter("bias")
        torch.testing.assert_close(tokens[:, 2 + number], expected, atol=1e-5, rtol=1e-5)


def test_patches_go_back_where_they_came_from() -> None:
    network = _tiny(image_size=12)
    tokens = torch.randn(3, 2 + 9, 4 * 4 * 2)
    image = network._unpatchify(tokens)
    for row in range(12):
        for column in range(12):
            token = tokens[:, 2 + row // 4 * 3 + column // 4]
            place = (row % 4 * 4 + column % 4) * 2
            assert torch.equal(image[:, :, row, column], token[:, place : place + 2])


def test_block_by_hand() -> None:
    """LN, attention with heads side by side and without bias, MLP with exact GELU: eps 1e-5, scale d^-1/2."""
    block = _tiny().mid_block
    w = dict(block.named_parameters())
    assert "attn.qkv.bias" not in w
    x = 1e-2 * torch.randn(2, 5, 16)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    qkv = norm(x) @ w["attn.qkv.weight"].T
    heads = []
    for head in range(2):
        q, k, v = (qkv[..., 16 * part + 8 * head :][..., :8] for part in range(3))
        heads.append((q @ k.mT / math.sqrt(8)).softmax(-1) @ v)
    y = x + torch.cat(heads, -1) @ w["attn.proj.weight"].T
    hidden = norm(y) @ w["mlp.fc1.weight"].T
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(block(x), y + hidden @ w["mlp.fc2.weight"].T, atol=1e-6, rtol=1e-4)


def test_skips_join_opposite_blocks_last_in_first_out() -> None:
    network = _tiny()
    # Blocks that add a power of ten: the digits of a token tell which blocks it went through.
    for power, block in enumerate([*network.in_blocks, network.mid_block, *network.out_blocks]):
        _add_constant(block, 10.0**power)
    skip_counts_tenfold = torch.cat([torch.eye(16), 2 * torch.eye(16)], 1)
    for merge in network.skips:
        assert isinstance(merge, nn.Linear)
        merge.weight.data = skip_counts_tenfold
        nn.init.zeros_(merge.bias)
    out = network._transform(torch.zeros(1, 6, 16))
    # in: 1, 11; mid: 111; out: 111 + 2 * 11 + 1000, then + 2 * 1 + 10000.
    torch.testing.assert_close(out, torch.full((1, 6, 16), 11135.0))


def _add_constant(block: nn.Module, constant: float) -> None:
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(block.get_parameter("mlp.fc2.bias"), constant)


def test_long_skips_and_class_reach_the_output() -> None:
    network = _tiny()
    x, t, label = _inputs()
    before = network(x, t, label)
    assert not torch.allclose(before, network(x, t, (label + 1) % 4), atol=1e-4)
    assert not torch.allclose(before, network(x, t + 300, label), atol=1e-4)
    for merge in network.skips:
        assert isinstance(merge, nn.Linear)
        merge.weight.data[:, 16:] = 0
    assert not torch.allclose(before, network(x, t, label), atol=1e-4)


def test_without_the_last_convolution() -> None:
    with_conv, without = _tiny(in_channels=3), _tiny(in_channels=3, conv=False)
    assert _count(with_conv) - _count(without) == 9 * 3**2 + 3
    assert not any(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in without.modules())


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        network = _tiny(gradient_checkpointing=recompute)
        network(*_inputs()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_image_does_not_depend_on_its_batch() -> None:
    network = _tiny()
    x, t, label = _inputs()
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(network(x, t, label), alone, atol=1e-6, rtol=1e-5)
    assert torch.equal(network(x, torch.tensor(7.0), label), network(x, torch.full((5,), 7.0), label))


def test_classes_come_late_and_the_rest_stays() -> None:
    network = _tiny(num_classes=None)
    assert network.null_label is None
    x, t, label = _inputs()
    with pytest.raises(ValueError, match=r"`num_classes` to be known.*reset_classes"):
        network(x, t, label)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.reset_classes(3)
    assert network.null_label == network.num_classes == 3
    after = network.state_dict()
    assert after.pop("class_table.weight").shape == (4, 16)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert _tiny(null_class=False).null_label is None
    assert _tiny(null_class=False).state_dict()["class_table.weight"].shape == (3, 16)


def test_reset_draws_everything_anew() -> None:
    network = _tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.reset_parameters()
    same = {name for name, value in network.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if "norm" in name or (name.endswith("bias") and "conv" not in name)} - {
        "patch_embed.bias"
    }


def test_half_precision_keeps_time_and_residuals_wide() -> None:
    network = _tiny(time_scale=1.0)
    x, _, label = _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = network._tokens(x, torch.full((5,), 999.0), label)
        near = network._tokens(x, torch.full((5,), 998.9), label)
        assert torch.isfinite(network(x, torch.full((5,), 999.0), label)).all()
    assert tokens.dtype == torch.float32
    assert not torch.equal(tokens[:, 1], near[:, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "`patch_size` to divide `image_size`, got 3 and 8"),
        ({"embed_dim": 15}, "`embed_dim` to be even and a multiple of `num_heads`, got 15 and 2"),
        ({"num_heads": 3}, "got 16 and 3"),
        ({"depth": 3}, "`depth` to be even"),
        ({"depth": 0}, "`depth` to be at least 1"),
        ({"in_channels": 0}, "`in_channels` to be at least 1"),
        ({"num_classes": 0}, "`num_classes` to be at least 1"),
        ({"conditional": False}, "no `num_classes` for conditional=False"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tiny(**options)


def test_refuses_inputs_that_do_not_fit() -> None:
    network = _tiny()
    x, t, label = _inputs()
    with pytest.raises(ValueError, match="`x` of 8 x 8 pixels, got 8 x 4"):
        network(x[..., :4], t, label)
    with pytest.raises(ValueError, match=r"`x` of shape \[B, 2, H, W\]"):
        network(x[:, :1], t, label)
    with pytest.raises(ValueError, match="`t` with one number per image"):
        network(x, t[:2], label)
    with pytest.raises(ValueError, match=r"`label` with one class id per image, shape \[5\], got None"):
        network(x, t)
    with pytest.raises(ValueError, match=r"shape \[5\], got \[2\]"):
        network(x, t, label[:2])
    with pytest.raises(ValueError, match="no `label` for a network without class token"):
        _tiny(conditional=False, num_classes=None)(x, t, label)
