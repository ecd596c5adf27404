"""CTAugment's rates against a loop over probes, their memory, and who sees them."""

import copy

import pytest
import torch
from ssl_toys import ToyHost, toy_batch
from torch import Tensor

from lightning_modules.ssl.ctaugment import CTAugmentRates
from lightning_modules.ssl.mixing import one_hot
from lightning_modules.ssl.supervised import Supervised


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def probes(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ops = torch.randint(0, 19, (size, 2), generator=generator)
    bins = torch.randint(0, 3, (size, 2, 2), generator=generator)
    bins[torch.rand(size, 2, 2, generator=generator) < 0.3] = -1
    return ops, bins, torch.rand(size, generator=generator)


def test_updates_are_those_of_a_loop_over_probes() -> None:
    rates = CTAugmentRates()
    expected: dict[tuple[int, int, int], float] = {}
    for seed in range(3):
        ops, bins, p_true = probes(50, seed)
        rates.update(ops, bins, p_true)
        for b in range(50):
            for depth in range(2):
                for parameter in range(2):
                    where = (int(ops[b, depth]), parameter, int(bins[b, depth, parameter]))
                    if where[-1] >= 0:
                        expected[where] = 0.99 * expected.get(where, 1.0) + 0.01 * float(p_true[b])
    assert len(expected) > 50
    for where, value in expected.items():
        assert float(rates.rates[where]) == pytest.approx(value, rel=1e-5)
    assert int((rates.rates != 1).sum()) == len(expected)


def test_the_order_of_probes_counts() -> None:
    one, other = CTAugmentRates(0.5), CTAugmentRates(0.5)
    ops, bins = torch.tensor([[0], [0]]), torch.tensor([[[4, -1]], [[4, -1]]])
    one.update(ops, bins, torch.tensor([0.0, 1.0]))
    other.update(ops, bins, torch.tensor([1.0, 0.0]))
    assert float(one.rates[0, 0, 4]) == 0.75
    assert float(other.rates[0, 0, 4]) == 0.5


def test_an_absent_parameter_leaves_the_table_alone() -> None:
    rates = CTAugmentRates()
    rates.update(torch.tensor([[8]]), torch.tensor([[[-1, -1]]]), torch.tensor([0.0]))
    assert bool((rates.rates == 1).all())


def test_how_near_a_prediction_is_equals_the_probability_of_the_true_class() -> None:
    p, label = torch.randn(20, 5).softmax(1), torch.randint(0, 5, (20,))
    omega = 1 - (p - one_hot(label, 5)).abs().sum(1) / 2
    torch.testing.assert_close(omega, p.gather(1, label[:, None])[:, 0])


def test_probes_are_judged_by_the_average_and_of_all_processes() -> None:
    class Two(ToyHost):
        def gather(self, *tensors: Tensor) -> list[Tensor]:
            return [torch.cat([tensor, tensor]) for tensor in tensors]

    host = Two(Supervised())
    with torch.no_grad():
        for parameter in host.ema_network.parameters():
            parameter.add_(torch.randn_like(parameter))
    labeled, _ = toy_batch(host)
    size = len(labeled["label"])
    ops, bins, _ = probes(size)
    probe = torch.rand_like(labeled["image"])
    p = host.ema_network(probe).softmax(1).gather(1, labeled["label"][:, None])[:, 0].detach()
    rates, expected = CTAugmentRates(), CTAugmentRates()
    rates.learn(host, {**labeled, "probe": probe, "probe_ops": ops, "probe_bins": bins})
    for _ in range(2):
        expected.update(ops, bins, p)
    torch.testing.assert_close(rates.rates, expected.rates)


def test_a_batch_without_probes_is_refused() -> None:
    host = ToyHost(Supervised())
    labeled, _ = toy_batch(host)
    with pytest.raises(ValueError, match="probe_ops"):
        CTAugmentRates().learn(host, labeled)


def test_workers_see_the_table_that_a_checkpoint_brought() -> None:
    rates, resumed = CTAugmentRates(), CTAugmentRates()
    seen = resumed.rates  # what the loader was given before the checkpoint was loaded
    rates.update(*probes(30))
    torch.nn.ModuleDict({"inside": resumed}).load_state_dict(torch.nn.ModuleDict({"inside": rates}).state_dict())
    resumed.update(*probes(10, seed=1))
    rates.update(*probes(10, seed=1))
    assert seen.untyped_storage().is_shared()
    assert torch.equal(seen, rates.table)
    assert resumed.rates.data_ptr() == seen.data_ptr()


def test_the_table_moves_and_what_workers_see_does_not() -> None:
    rates = CTAugmentRates()
    pointer = rates.rates.data_ptr()
    moved = rates.double()
    moved.update(*probes(5))
    assert moved.table.dtype == torch.float64
    assert (rates.rates.data_ptr(), rates.rates.dtype) == (pointer, torch.float32)
    torch.testing.assert_close(rates.rates, rates.table.float())


def test_a_copy_is_independent() -> None:
    rates = CTAugmentRates()
    copied = copy.deepcopy(rates)
    copied.update(*probes(5))
    assert bool((rates.rates == 1).all())
    assert torch.equal(copied.rates, copied.table)


def test_a_decay_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="`decay`"):
        CTAugmentRates(decay=1.0)
