"""Means per bin."""

import pytest
import torch

from lightning_modules.metrics import BinnedMean


def test_means_and_empty_bins() -> None:
    metric = BinnedMean(4)
    metric.update(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0, 0, 3]))
    metric.update(torch.tensor([5.0], dtype=torch.bfloat16), torch.tensor([0]))
    assert metric.compute().nan_to_num(-1).tolist() == [3.0, -1.0, -1.0, 10.0]
    metric.reset()
    metric.update(torch.empty(0), torch.empty(0, dtype=torch.long))
    assert metric.compute().isnan().all()


def test_random_values_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    values, bins = torch.rand(50, generator=generator), torch.randint(5, (50,), generator=generator)
    metric = BinnedMean(5)
    for part in (slice(0, 20), slice(20, 50)):
        metric(values[part], bins[part])
    for k in range(5):
        chosen = [v for v, b in zip(values.tolist(), bins.tolist(), strict=True) if b == k]
        assert metric.compute()[k].item() == pytest.approx(sum(chosen) / len(chosen))


def test_nan_stays_in_its_bin_and_gradients_do_not_pile_up() -> None:
    metric = BinnedMean(2)
    values = torch.tensor([float("nan"), 2.0], requires_grad=True)
    metric.update(values, torch.tensor([0, 1]))
    assert metric.compute()[0].isnan()
    assert metric.compute()[1] == 2
    assert not metric.total.requires_grad


def test_popping_starts_again_and_every_process_takes_part(recwarn: pytest.WarningsRecorder) -> None:
    metric = BinnedMean(2)
    metric.update(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]))
    assert metric.pop().nan_to_num(-1).tolist() == [-1.0, 2.0]
    assert metric.pop().isnan().all()
    assert not recwarn.list
    # Nothing fell here, but 4 did on the other process: who did not ask would leave that one waiting.
    metric.distributed_available_fn = lambda: True
    there = {torch.float32: torch.tensor([0.0, 4.0]), torch.int64: torch.tensor([0, 1])}
    metric.dist_sync_fn = lambda own, group=None: [own, there[own.dtype]]
    assert metric.pop().nan_to_num(-1).tolist() == [-1.0, 4.0]


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match="`num_bins` to be at least 1 but got 0"):
        BinnedMean(0)
    metric = BinnedMean(3)
    with pytest.raises(ValueError, match=r"vectors of one length but got shapes \(2,\) and \(3,\)"):
        metric.update(torch.zeros(2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"vectors of one length but got shapes \(2, 1\)"):
        metric.update(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="`bins` to hold integers but got"):
        metric.update(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`bins` to lie in 0..2 but got values from -1 to 3"):
        metric.update(torch.zeros(2), torch.tensor([-1, 3]))
