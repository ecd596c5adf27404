import numpy as np
import pytest
import torch

from datamodules import BatchViews
from datamodules.ctaugment import OPS, RATES_SHAPE, bin_probabilities, choose_bins
from datamodules.views.policies import CTAUGMENT, KINDS, ViewSettings, draw_plan


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rates(seed: int = 0) -> torch.Tensor:
    return torch.rand(RATES_SHAPE, generator=generator(seed))


def test_operations_and_bins() -> None:
    assert len(OPS) == 19
    assert [name for name, _, _ in OPS] == [name for name, _, _ in CTAUGMENT]
    odd = {name: (first, second) for name, first, second in OPS if (first, second) != (17, 0)}
    assert odd == {"identity": (0, 0), "posterize": (8, 0), "rescale": (17, 6)}


def test_probabilities_are_those_of_the_paper() -> None:
    rates = random_rates()
    result = bin_probabilities(rates).numpy()
    for op, (_, *counts) in enumerate(OPS):
        for parameter, count in enumerate(counts):
            expected = np.zeros(17)
            if count:
                p = rates[op, parameter, :count].numpy() + 0.01
                p /= p.max()
                p[p < 0.8] = 0
                expected[:count] = p / p.sum()
            else:
                expected[0] = 1
            np.testing.assert_allclose(result[op, parameter], expected, atol=1e-6)


def test_rates_of_missing_bins_do_not_matter() -> None:
    rates, other = random_rates(), random_rates()
    posterize = [name for name, _, _ in OPS].index("posterize")
    other[posterize, 0, 8:] = 1e9
    other[:, 1][torch.tensor([op[2] == 0 for op in OPS])] = 5
    assert torch.equal(bin_probabilities(rates), bin_probabilities(other))


def test_a_table_of_zeros_draws_all_bins() -> None:
    probabilities = bin_probabilities(torch.zeros(RATES_SHAPE))
    assert torch.allclose(probabilities[0, 0], torch.full((17,), 1 / 17))


def test_bins_are_drawn_with_their_probabilities() -> None:
    rates = random_rates(3)
    probabilities = bin_probabilities(rates)
    count = 20000
    for op, (_, first, second) in enumerate(OPS):
        bins = choose_bins(torch.full((count,), op), torch.rand(count, 2, generator=generator(op)), probabilities)
        for parameter, size in enumerate((first, second)):
            if not size:
                assert (bins[:, parameter] == -1).all()
                continue
            frequency = torch.bincount(bins[:, parameter], minlength=17) / count
            assert (frequency - probabilities[op, parameter]).abs().max() < 0.02
            assert (frequency[probabilities[op, parameter] == 0] == 0).all()


def test_the_largest_random_number_is_no_bin_too_many() -> None:
    almost = torch.full((len(OPS), 2), 1 - 2**-24)
    for probabilities in (None, bin_probabilities(random_rates())):
        bins = choose_bins(torch.arange(len(OPS)), almost, probabilities)
        assert (bins < torch.tensor([op[1:] for op in OPS]).clamp_min(1)).all()


def test_probes_say_what_was_done() -> None:
    make = BatchViews(16, strong="ctaugment")
    assert make.names == ("plain", "weak", "strong", "probe")
    views = make(torch.rand(50, 3, 16, 16, generator=generator()), ("weak", "probe", "probe"), generator())
    assert tuple(views) == ("weak", "probe", "probe_ops", "probe_bins", "probe_2", "probe_ops_2", "probe_bins_2")
    assert views["probe_ops"].shape == (50, 2)
    assert views["probe_bins"].shape == (50, 2, 2)
    assert not torch.equal(views["probe"], views["probe_2"])


@pytest.mark.parametrize("name", ["probe", "strong"])
def test_strengths_lie_in_their_bins(name: str) -> None:
    plan = draw_plan(ViewSettings(32, strong="ctaugment"), name, 6000, generator(), torch.ones(RATES_SHAPE))
    assert plan.ops is not None
    assert plan.bins is not None
    assert plan.kinds is not None
    assert plan.values is not None
    assert (plan.hole is None) == (name == "probe")
    for op, (kind, low, high) in enumerate(CTAUGMENT):
        chosen = plan.ops == op
        assert abs(int(chosen.sum()) - 12000 / 19) < 130
        assert (plan.kinds[chosen] == KINDS.index(kind)).all()
        values, bins = plan.values[chosen], plan.bins[chosen]
        first, second = OPS[op][1:]
        if kind == "posterize":
            assert torch.equal(values[:, 0], bins[:, 0] + 1.0)
        elif first:
            place = (values[:, 0] - low) / (high - low) * first
            assert ((place > bins[:, 0] - 1e-3) & (place < bins[:, 0] + 1 + 1e-3)).all()
            assert set(bins[:, 0].tolist()) == {*range(first)}
        if second:
            assert torch.equal((values[:, 1] * second).long(), bins[:, 1])
            assert set(bins[:, 1].tolist()) == {*range(second)}
        if kind == "cutout":
            assert abs(values[:, 1:].mean() - 0.5) < 0.05


def test_the_table_is_read_at_every_call() -> None:
    make = BatchViews(16, strong="ctaugment")
    images = torch.rand(40, 3, 16, 16, generator=generator())

    def views() -> dict[str, torch.Tensor]:
        return make(images, ("strong", "probe"), generator())

    rates = torch.ones(RATES_SHAPE)
    alone = views()
    make.share_rates(rates)
    before = views()
    # A table of ones draws all bins, as does none.
    assert torch.equal(alone["strong"], before["strong"])
    rates[:, :, 1:] = 0.0
    after = views()
    assert not torch.equal(before["strong"], after["strong"])
    assert torch.equal(before["probe"], after["probe"])


def test_only_what_the_network_copes_with_is_drawn() -> None:
    rates = torch.zeros(RATES_SHAPE)
    rates[:, :, 3] = 1
    plan = draw_plan(ViewSettings(32, strong="ctaugment"), "strong", 500, generator(), rates)
    assert plan.bins is not None
    assert set(plan.bins.flatten().tolist()) == {-1, 3}


def test_a_table_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`rates` to have shape \(19, 2, 17\), but got \(18, 2, 17\)"):
        BatchViews(16, strong="ctaugment").share_rates(torch.ones(18, 2, 17))
