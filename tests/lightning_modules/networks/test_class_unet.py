"""ClassUNet: the options it sets in diffusers' UNet2DModel, classes, noise level."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.networks.class_unet import ClassUNet


def _tiny(**options: object) -> ClassUNet:
    torch.manual_seed(0)
    sizes = {"in_channels": 2, "image_size": 8, "base_channels": 16, "channel_mult": (1, 2), "layers_per_block": 1}
    plain = {"attention_resolutions": (4,), "dropout": 0.0, "num_classes": 3, "zero_init": False}
    return ClassUNet(**sizes | plain | options)  # type: ignore[arg-type]  # plain numbers and flags


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 3.0, 500.0, 1000.0]), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(("classes", "null", "count"), [(10, True, 62_438_659), (100, False, 62_529_795)])
def test_parameter_count_of_the_defaults(classes: int, null: bool, count: int) -> None:
    with torch.device("meta"):
        network = ClassUNet(num_classes=classes, null_class=null)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_class_and_noise_level_reach_the_output() -> None:
    network = _tiny().eval()
    x, t, label = _inputs()
    out = network(x, t, label)
    assert out.shape == x.shape
    for changed in (network(x, t, label.roll(1)), network(x, t + 20, label)):
        assert ((out - changed).abs().amax((1, 2, 3)) > 1e-4).all()
    scaled = _tiny(time_scale=1000.0).eval()
    torch.testing.assert_close(scaled(x, t / 1000, label), out, atol=1e-4, rtol=1e-4)
    assert torch.equal(network(x, t[1], label), network(x, t[1].expand(4), label))


def test_class_joins_the_embedding_of_the_noise_level() -> None:
    network = _tiny().eval()
    x, t, _ = _inputs()
    seen: list[Tensor] = []
    with torch.no_grad():
        network.unet.mid_block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        network(x, t, torch.tensor([0, 1, 2, 3]))
        network(x, t, torch.tensor([3, 3, 3, 3]))
    table = network.unet.class_embedding.weight
    torch.testing.assert_close(seen[0] - seen[1], (table - table[3]).detach(), atol=1e-5, rtol=1e-4)


def test_sums_of_block_and_shortcut_are_divided_by_root_two() -> None:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    # With zero_init blocks add nothing, so a block of equal widths divides its input and does nothing else.
    network = _tiny(zero_init=True).eval()
    x = torch.randn(2, 32, 4, 4)
    checked = set()
    for module in network.unet.modules():
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is None and not (module.up or module.down):
            width = module.in_channels
            torch.testing.assert_close(module(x[:, :width], torch.randn(2, 64)), x[:, :width] / 2**0.5)
            checked.add("block")
        elif isinstance(module, Attention):
            torch.testing.assert_close(module(x), x / 2**0.5)
            checked.add("attention")
    assert checked == {"block", "attention"}


def test_starts_at_zero_and_can_start_again() -> None:
    network = _tiny(zero_init=True)
    inputs = _inputs()
    assert not network(*inputs).any()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    network.reset_parameters()
    assert not network(*inputs).any()
    # Norms and zeroed layers start with constants; whatever is drawn is new.
    drawn = [name for name, value in before.items() if value.std() > 0]
    assert len(drawn) > 20
    assert not any(torch.equal(network.state_dict()[name], before[name]) for name in drawn)


def test_all_parameters_get_gradients_with_and_without_checkpointing() -> None:
    gradients = []
    for recompute in (False, True):
        network = _tiny(gradient_checkpointing=recompute)
        network(*_inputs()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.any(), name
    torch.testing.assert_close(gradients[1], gradients[0])


def test_classes_come_late_and_the_rest_stays() -> None:
    network = _tiny(num_classes=None)
    assert network.null_label is None
    with pytest.raises(ValueError, match=r"`num_classes` to be known.*reset_classes"):
        network(*_inputs())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.reset_classes(3)
    assert network.null_label == network.num_classes == 3
    after = network.state_dict()
    assert after.pop("unet.class_embedding.weight").shape == (4, 64)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    network = _tiny(null_class=False)
    assert network.null_label is None
    assert network.unet.config.num_class_embeds == 3


def test_groups_and_heads_follow_the_width() -> None:
    network = _tiny()
    assert {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)} == {4}
    assert {module.heads for module in network.modules() if hasattr(module, "heads")} == {1}
    assert {module.heads for module in _tiny(head_channels=8).modules() if hasattr(module, "heads")} == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 0}, "`base_channels` to be at least 1"),
        ({"channel_mult": ()}, "`channel_mult` to hold one positive"),
        ({"attention_resolutions": (16,)}, r"`attention_resolutions` among \[8, 4\]"),
        ({"image_size": 7}, "`image_size` divisible by 2"),
        ({"norm_groups": 32}, "`norm_groups` to divide every width"),
        ({"head_channels": 5}, "`head_channels` to divide the widths"),
        ({"head_channels": 0}, "`head_channels` to be at least 1"),
        ({"num_classes": 0}, "`num_classes` to be at least 1"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tiny(**options)


def test_refuses_inputs_that_do_not_fit() -> None:
    network = _tiny()
    x, t, label = _inputs()
    with pytest.raises(ValueError, match="divisible by 2, got 8 x 7"):
        network(x[..., :7], t, label)
    with pytest.raises(ValueError, match=r"`x` of shape \[B, 2, H, W\]"):
        network(x[:, :1], t, label)
    with pytest.raises(ValueError, match="got None"):
        network(x, t)
