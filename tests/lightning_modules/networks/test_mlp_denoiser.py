"""MLPDenoiser: its parts by hand, what it is a function of, and its arguments."""

import pytest
import torch
from torch import Tensor

from lightning_modules.networks.conditioning import sinusoid
from lightning_modules.networks.mlp_denoiser import MLPDenoiser


def network(classes: int | None = 3, null: bool = True) -> MLPDenoiser:
    torch.manual_seed(0)
    made = MLPDenoiser(4, in_channels=2, width=6, depth=2, num_classes=classes, null_class=null)
    torch.nn.init.normal_(made.last.weight)
    return made


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, 4, 4, generator=generator), torch.linspace(-1, 1, 5), torch.tensor([0, 1, 2, 3, 3])


def test_it_is_the_formula_written_down() -> None:
    made, (x, t, label) = network(), inputs()
    w = dict(made.state_dict())
    e = torch.nn.functional.silu(
        sinusoid(t, 64, 1000.0) @ w["time.weight"].T + w["time.bias"] + w["class_table.weight"][label]
    )
    h = x.reshape(5, -1) @ w["first.weight"].T + w["first.bias"]
    for k in range(2):
        inner = h + e @ w[f"conditions.{k}.weight"].T + w[f"conditions.{k}.bias"]
        inner = (inner - inner.mean(1, keepdim=True)) / (inner.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        inner = inner @ w[f"blocks.{k}.1.weight"].T + w[f"blocks.{k}.1.bias"]
        h = h + (inner * inner.sigmoid()) @ w[f"blocks.{k}.3.weight"].T + w[f"blocks.{k}.3.bias"]
    torch.testing.assert_close(made(x, t, label), (h @ w["last.weight"].T + w["last.bias"]).reshape(x.shape))


def test_a_new_network_puts_out_zeros() -> None:
    x, t, label = inputs()
    assert not MLPDenoiser(4, in_channels=2, num_classes=3)(x, t, label).any()


def test_classes_come_later() -> None:
    made, (x, t, label) = network(None), inputs()
    assert made.null_label is None
    with pytest.raises(ValueError, match="reset_classes"):
        made(x, t, label)
    made.reset_classes(3)
    assert [made.num_classes, made.null_label, network(null=False).null_label] == [3, 3, None]
    assert made(x, t[0], label).shape == x.shape


@pytest.mark.parametrize(("cut", "named"), [("side", "`x` of 4 x 4"), ("label", "`label`"), ("t", "`t`")])
def test_wrong_shapes_are_named(cut: str, named: str) -> None:
    x, t, label = inputs()
    given = {
        "side": (x[..., :3, :3], t, label),
        "label": (x, t, label[:2]),
        "t": (x, t[:2], label),
    }[cut]
    with pytest.raises(ValueError, match=named):
        network()(*given)


def test_counts_are_positive() -> None:
    with pytest.raises(ValueError, match="`depth`"):
        MLPDenoiser(8, depth=0)
