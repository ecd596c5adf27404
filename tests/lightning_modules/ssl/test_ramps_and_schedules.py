"""mu(t) and the learning rate against published values."""

import math

import pytest
import torch

from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.schedules import CosineDecay


def test_a_gaussian_ramp_has_the_published_values() -> None:
    ramp = Ramp(shape="gaussian", until=1.0)
    assert [round(ramp(t), 4) for t in (0, 0.25, 0.5, 0.75, 1)] == [0.0067, 0.0601, 0.2865, 0.7316, 1.0]


@pytest.mark.parametrize("shape", ["linear", "gaussian", "cosine"])
def test_a_ramp_rises_to_its_weight_and_stays(shape: str) -> None:
    ramp = Ramp(weight=50.0, until=0.4, shape=shape)  # type: ignore[arg-type]  # a parametrised Literal
    values = [ramp(t / 100) for t in range(101)]
    assert values == sorted(values)
    assert values[40:] == [50.0] * 61
    assert values[0] < 0.5
    assert Ramp(weight=3.0)(0.0) == 3.0


def test_a_linear_ramp_is_half_way_at_half_of_it() -> None:
    assert Ramp(weight=2.0, until=0.5)(0.25) == pytest.approx(1.0)
    assert Ramp(weight=2.0, until=0.5, shape="cosine")(0.25) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "value"), [("weight", -1.0), ("until", 1.5), ("shape", "quadratic")])
def test_a_ramp_refuses_what_makes_no_sense(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        Ramp(**{name: value})  # type: ignore[arg-type]  # on purpose


def test_cosine_decay_ends_at_the_published_share_and_warms_up() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.03)
    schedule = CosineDecay(optimizer, num_steps=100, warmup_steps=10)
    rates = []
    for _ in range(120):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[5] == pytest.approx(0.015)
    assert rates[10] == pytest.approx(0.03)
    assert rates[55] == pytest.approx(0.03 * math.cos(math.pi * 7 / 32))
    assert rates[100] == pytest.approx(0.03 * 0.1951, rel=1e-3)
    assert rates[119] == rates[100]


@pytest.mark.parametrize(("arguments", "name"), [({"cycles": 0.6}, "cycles"), ({"warmup_steps": 10}, "warmup_steps")])
def test_cosine_decay_refuses_what_makes_no_sense(arguments: dict[str, float], name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.03)
    with pytest.raises(ValueError, match=f"`{name}`"):
        CosineDecay(optimizer, 10, **arguments)  # type: ignore[arg-type]  # on purpose
