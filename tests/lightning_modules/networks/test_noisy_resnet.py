"""NoisyResNet: the ResNet it is, and how the noise level enters."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

from lightning_modules.networks.conditioning import sinusoid
from lightning_modules.networks.noisy_resnet import NoisyResNet


def _tiny(**options: object) -> NoisyResNet:
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "widths": (8, 16), "blocks": (1, 2), "embed_dim": 12, "num_classes": 3}
    return NoisyResNet(**sizes | options)  # type: ignore[arg-type]  # plain numbers and tuples


def _inputs(batch: int = 4, side: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 1, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0, 1000, batch)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("blocks", "classes", "count"), [((2, 2, 2, 2), 10, 11_173_962), ((3, 4, 6, 3), 100, 21_328_292)]
)
def test_backbone_has_the_known_parameter_count(blocks: tuple[int, ...], classes: int, count: int) -> None:
    with torch.device("meta"):
        network = NoisyResNet(blocks=blocks, num_classes=classes)
    assert _count(network) - _count(network.embedding) - _count(network.biases) == count
    assert _count(network.embedding) == 128 * 512 + 512 + 512 * 512 + 512
    assert _count(network.biases) == (512 + 1) * (64 + 128 + 256 + 512)


def test_noise_level_is_a_bias_of_each_channel_after_each_stage() -> None:
    network = _tiny().eval()
    x, t = _inputs()
    first, second = network.embedding[0], network.embedding[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    with torch.no_grad():
        for bias in network.biases:
            nn.init.normal_(bias.get_parameter("weight"))
        logits = network(x, t)
        emb = sinusoid(t, 128) @ first.weight.T + first.bias
        emb = emb * emb.sigmoid() @ second.weight.T + second.bias
        emb = emb * emb.sigmoid()
        emb = emb * emb.sigmoid()
        y = network.stem(x)
        for stage, bias in zip(network.stages, network.biases, strict=True):
            y = stage(y) + F.linear(emb, bias.get_parameter("weight"), bias.get_parameter("bias")).view(4, -1, 1, 1)
        expected = y.flatten(2).sum(2) / (y.shape[2] * y.shape[3]) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_noise_level_changes_the_logits() -> None:
    network = _tiny().eval()
    x, t = _inputs()
    logits = network(x, t)
    assert logits.shape == (4, 3)
    assert ((network(x, t + 50) - logits).abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(_tiny(time_scale=1000.0).eval()(x, t / 1000), logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(network(x, t[1]), network(x, t[1].expand(4)))


@pytest.mark.parametrize("widths", [(8, 16), (4, 6)])
def test_training_uses_batch_statistics_and_evaluation_does_not(widths: tuple[int, int]) -> None:
    network = _tiny(widths=widths)
    x, t = _inputs()
    network.train()
    together = network(x, t)
    assert not torch.allclose(together[:2], network(x[:2], t[:2]), atol=1e-4)
    network.eval()
    torch.testing.assert_close(network(x, t)[:2], network(x[:2], t[:2]), atol=1e-5, rtol=1e-4)


def test_gradient_reaches_everything() -> None:
    network = _tiny()
    loss: Tensor = F.cross_entropy(network(*_inputs()), torch.tensor([0, 1, 2, 0]))
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(("side", "strides", "last"), [(8, None, 1), (28, None, 4), (8, (1, 1, 2, 1), 4), (1, None, 1)])
def test_any_side_runs(side: int, strides: tuple[int, ...] | None, last: int) -> None:
    network = _tiny(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), strides=strides).eval()
    sides: list[int] = []
    network.stages[-1].register_forward_hook(lambda _module, _inputs, out: sides.append(out.shape[-1]))
    assert network(*_inputs(side=side)).shape == (4, 3)
    assert sides == [last]


def test_classes_come_late_and_the_rest_stays() -> None:
    network = _tiny(num_classes=None)
    with pytest.raises(ValueError, match=r"`num_classes` to be known.*reset_classes"):
        network(*_inputs())
    before = {name: value.clone() for name, value in network.state_dict().items() if not name.startswith("head")}
    network.reset_classes(7)
    assert network.num_classes == 7
    after = {name: value for name, value in network.state_dict().items() if not name.startswith("head")}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert network(*_inputs()).shape == (4, 7)


def test_reset_draws_anew_and_forgets_statistics() -> None:
    network = _tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(*_inputs())
    assert network.state_dict()["stem.1.num_batches_tracked"] == 1
    network.reset_parameters()
    after = network.state_dict()
    constant = [name for name, value in before.items() if value.numel() == 1 or value.std() == 0]
    assert any("running_mean" in name for name in constant)
    torch.testing.assert_close({n: after[n] for n in constant}, {n: before[n] for n in constant}, rtol=0, atol=0)
    assert not any(torch.equal(after[name], before[name]) for name in before if name not in constant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, "one number a stage"),
        ({"blocks": (1,)}, "one number a stage"),
        ({"strides": (1, 2, 2)}, "one number a stage"),
        ({"blocks": (1, 0)}, "`blocks` to be positive"),
        ({"strides": (1, 0)}, "`strides` to be positive"),
        ({"embed_dim": 0}, "`embed_dim` to be at least 1"),
        ({"num_classes": 0}, "`num_classes` to be at least 1"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tiny(**options)


def test_refuses_inputs_that_do_not_fit() -> None:
    x, t = _inputs()
    with pytest.raises(ValueError, match=r"`x` of shape \[B, 1, H, W\]"):
        _tiny()(x.expand(-1, 3, -1, -1), t)
    with pytest.raises(ValueError, match="`t` with one number per image"):
        _tiny()(x, t[:3])
