"""ADMUNet against a reference of the whole network written from the paper's description."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers.models.attention_processor import Attention
from torch import Tensor

from lightning_modules.networks import ADMUNet

Weights = dict[str, Tensor]


def tiny(out_channels: int = 5, *, randomize: bool = True, **changes: bool) -> ADMUNet:
    torch.manual_seed(0)
    network = ADMUNet(
        out_channels=out_channels,
        image_size=16,
        base_channels=8,
        channel_mult=(1, 2, 3),
        layers_per_block=1,
        attention_resolutions=(8,),
        head_channels=4,
        dropout=0.0,
        norm_groups=4,
        **changes,
    ).eval()
    if randomize:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.2))
    return network


def conv(w: Weights, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def norm(w: Weights, name: str, x: Tensor, groups: int = 4) -> Tensor:
    b, c, height, width = x.shape
    grouped = x.reshape(b, groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gain, shift = w[f"{name}.weight"], w[f"{name}.bias"]
    return unit.reshape(b, c, height, width) * gain[:, None, None] + shift[:, None, None]


def halve(x: Tensor) -> Tensor:
    b, c, height, width = x.shape
    return x.reshape(b, c, height // 2, 2, width // 2, 2).mean((3, 5))


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def same(x: Tensor) -> Tensor:
    return x


def res_block(w: Weights, name: str, x: Tensor, emb: Tensor, resize: Callable[[Tensor], Tensor] = same) -> Tensor:
    h = conv(w, f"{name}.conv1", resize(F.silu(norm(w, f"{name}.norm1", x))))
    film = F.silu(emb) @ w[f"{name}.time_emb_proj.weight"].T + w[f"{name}.time_emb_proj.bias"]
    scale, shift = film[:, :, None, None].chunk(2, dim=1)
    h = norm(w, f"{name}.norm2", h) * (1 + scale) + shift
    h = conv(w, f"{name}.conv2", F.silu(h))
    x = resize(x)
    return h + (conv(w, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in w else x)


def attention(w: Weights, name: str, x: Tensor, head_channels: int = 4) -> Tensor:
    b, c, height, width = x.shape
    h = norm(w, f"{name}.group_norm", x).reshape(b, c, -1)
    q, k, v = (
        torch.einsum("oc,bcp->bop", w[f"{name}.to_{part}.weight"], h) + w[f"{name}.to_{part}.bias"][:, None]
        for part in "qkv"
    )
    heads = []
    for first in range(0, c, head_channels):
        rows = slice(first, first + head_channels)
        weight = (torch.einsum("bcp,bcs->bps", q[:, rows], k[:, rows]) / math.sqrt(head_channels)).softmax(-1)
        heads.append(torch.einsum("bps,bcs->bcp", weight, v[:, rows]))
    out = torch.einsum("oc,bcp->bop", w[f"{name}.to_out.0.weight"], torch.cat(heads, 1))
    return x + (out + w[f"{name}.to_out.0.bias"][:, None]).reshape(b, c, height, width)


def reference(w: Weights, x: Tensor, t: Tensor) -> Tensor:
    """The network of `tiny`: levels of 8, 16, 24 channels, attention at the second and in the bottleneck."""
    frequencies = torch.tensor([10000.0 ** (-i / 4) for i in range(4)])
    angles = t[:, None] * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], 1) @ w["time_embedding.linear_1.weight"].T
    emb = F.silu(emb + w["time_embedding.linear_1.bias"]) @ w["time_embedding.linear_2.weight"].T
    emb = emb + w["time_embedding.linear_2.bias"]
    h = conv(w, "conv_in", x)
    skips = [h]
    for level in range(3):
        h = res_block(w, f"down_blocks.{level}.resnets.0", h, emb)
        h = attention(w, f"down_blocks.{level}.attentions.0", h) if level == 1 else h
        skips.append(h)
        if level < 2:
            h = res_block(w, f"down_blocks.{level}.downsamplers.0", h, emb, halve)
            skips.append(h)
    h = res_block(w, "mid_block.resnets.0", h, emb)
    h = attention(w, "mid_block.attentions.0", h)
    h = res_block(w, "mid_block.resnets.1", h, emb)
    for level in range(3):
        for block in range(2):
            h = res_block(w, f"up_blocks.{level}.resnets.{block}", torch.cat([h, skips.pop()], 1), emb)
            h = attention(w, f"up_blocks.{level}.attentions.{block}", h) if level == 1 else h
        if level < 2:
            h = res_block(w, f"up_blocks.{level}.upsamplers.0", h, emb, double)
    return conv(w, "conv_out", F.silu(norm(w, "conv_norm_out", h)))


def test_equals_reference_at_fractional_times() -> None:
    network = tiny()
    x, t = torch.randn(3, 3, 16, 24), torch.tensor([0.0, 2.5, 7.3])
    with torch.no_grad():
        got, want = network(x, t), reference(network.unet.state_dict(), x, t)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=1e-4)


@pytest.mark.parametrize(("out_channels", "count"), [(3, 138_286_467), (5, 138_288_773), (22, 138_308_374)])
def test_parameter_count_of_the_paper_network(out_channels: int, count: int) -> None:
    with torch.device("meta"):
        network = ADMUNet(out_channels=out_channels)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    heads = {module.heads for module in network.modules() if isinstance(module, Attention)}
    assert heads == {256 // 64, 512 // 64}
    assert network.downsample_factor == 32


def test_half_width_parameter_count() -> None:
    with torch.device("meta"):
        network = ADMUNet(out_channels=5, base_channels=64)
    assert sum(parameter.numel() for parameter in network.parameters()) == 34_615_109


def test_time_changes_the_output_and_keeps_fractions() -> None:
    network, x = tiny(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        outputs = [network(x, torch.tensor([t])) for t in (0.0, 0.25, 1.0)]
        whole = network(x, torch.tensor(1))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[1] - outputs[2]).abs().max() > 1e-3
    torch.testing.assert_close(whole, outputs[2], rtol=0, atol=0)


def test_zero_init_returns_zero_and_blocks_add_nothing() -> None:
    network = tiny(randomize=False)
    x, emb = torch.randn(2, 8, 16, 16), torch.randn(2, 32)
    assert not network(torch.randn(2, 3, 16, 16), torch.tensor([0.0, 5.0])).any()
    block = network.unet.down_blocks[0].resnets[0]
    attend = network.unet.mid_block.attentions[0]
    torch.testing.assert_close(block(x, emb), x, rtol=0, atol=0)
    wide = torch.randn(2, 24, 4, 4)
    torch.testing.assert_close(attend(wide), wide, rtol=0, atol=0)
    assert tiny(randomize=False, zero_init=False)(torch.randn(1, 3, 16, 16), torch.tensor([0.0])).std() > 1e-3


def test_zero_init_still_learns_every_parameter() -> None:
    network = ADMUNet.small(2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, y, t = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 16, 16), torch.tensor([0.0, 3.0])
    for _ in range(4):
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(network(x, t), y))
        optimizer.step()
    # The constant that a key's bias adds to every score cancels in the softmax.
    used = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, _ in network.named_parameters() if not name.endswith("to_k.bias")} <= used


@pytest.mark.parametrize(("out_channels", "keep_first"), [(7, 3), (3, 3), (4, 0), (5, 5)])
def test_reset_head_touches_nothing_else(out_channels: int, keep_first: int) -> None:
    network = tiny(5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.reset_head(out_channels, keep_first=keep_first)
    after = network.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    head = {"unet.conv_out.weight", "unet.conv_out.bias"}
    assert changed == (set() if keep_first == out_channels == 5 else head)
    for name in head:
        torch.testing.assert_close(after[name][:keep_first], before[name][:keep_first], rtol=0, atol=0)
    assert network.out_channels == network.head.out_channels == out_channels
    assert network(torch.randn(1, 3, 16, 16), torch.tensor([0.0])).shape == (1, out_channels, 16, 16)


def test_reset_head_is_small_not_zero() -> None:
    network = tiny(5, randomize=False)
    network.reset_head(2)
    assert all(parameter.requires_grad for parameter in network.head_parameters())
    output = network(torch.randn(2, 3, 16, 16), torch.tensor([0.0, 1.0]))
    assert 1e-3 < output.std().item() < 0.3
    assert not network.get_parameter("unet.conv_out.bias").any()


def test_trunk_and_head_split_the_parameters() -> None:
    network = tiny()
    trunk, head = list(network.trunk_parameters()), list(network.head_parameters())
    assert [p.data_ptr() for p in head] == [p.data_ptr() for p in network.unet.conv_out.parameters()]
    assert {id(p) for p in trunk} | {id(p) for p in head} == {id(p) for p in network.parameters()}
    assert len(trunk) + len(head) == len(list(network.parameters()))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, lean = tiny(), tiny(gradient_checkpointing=True)
    lean.load_state_dict(plain.state_dict())
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1.5])
    for network in (plain, lean):
        network.train()(x, t).square().mean().backward()
    assert any(block.gradient_checkpointing for block in lean.unet.down_blocks)
    for a, b in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_small_is_what_its_docstring_says() -> None:
    network = ADMUNet.small()
    text = inspect.getdoc(ADMUNet.small) or ""
    stated = yaml.safe_load(text[text.index("    class_path") : text.index("Args:")])
    assert stated["class_path"] == f"{ADMUNet.__module__.rpartition('.')[0]}.{ADMUNet.__name__}"
    written_out = ADMUNet(**stated["init_args"])
    assert dict(network.unet.config) == dict(written_out.unet.config)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert f"{count:,} parameters" in text


@pytest.mark.parametrize(
    ("shape", "times", "match"),
    [
        ((1, 4, 16, 16), 1, r"`x` of shape \[B, 3, H, W\], got \[1, 4, 16, 16\]"),
        ((3, 16, 16), 1, r"`x` of shape"),
        ((1, 3, 18, 16), 1, r"divisible by 4, got 18 x 16\. Resize or pad the images to 20 x 16"),
        ((1, 3, 0, 16), 1, r"divisible by 4, got 0 x 16"),
        ((2, 3, 16, 16), 3, r"`t` with one number per image, shape \[2\], got \[3\]"),
    ],
)
def test_bad_input(shape: tuple[int, ...], times: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny()(torch.zeros(shape), torch.zeros(times))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: ADMUNet(base_channels=48), r"`norm_groups` to divide every width of \(48, 48, 96, .*got 32"),
        (lambda: ADMUNet(head_channels=512), r"`head_channels` to divide .*\[256, 512\], got 512, .*\[256\]"),
        (
            lambda: ADMUNet(attention_resolutions=(), head_channels=1024),
            r"`head_channels` to divide .*\[512\], got 1024",
        ),
        (lambda: ADMUNet(image_size=128, attention_resolutions=(12, 8)), r"\[128, 64, .* got \[12\]"),
        (lambda: ADMUNet(image_size=100), r"`image_size` divisible by 32 for 6 levels, got 100"),
        (lambda: ADMUNet(out_channels=0), r"`out_channels` to be at least 1, got 0"),
        (lambda: ADMUNet(channel_mult=()), r"`channel_mult` to hold one positive .* got \(\)"),
        (lambda: ADMUNet(channel_mult=(1, 0)), r"`channel_mult`"),
        (lambda: tiny().reset_head(0), r"`out_channels` to be at least 1, got 0"),
        (lambda: tiny(5).reset_head(4, keep_first=5), r"`keep_first` between 0 and 4 .* got 5"),
        (lambda: tiny(5).reset_head(9, keep_first=6), r"`keep_first` between 0 and 5"),
    ],
)
def test_bad_configuration(build: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
