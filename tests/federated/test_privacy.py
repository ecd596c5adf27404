import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor
from toy_clients import ToyGrid

from federated import wire
from federated.privacy import PrivateFedAvg
from federated.settings import Communication, Privacy
from federated.strategy import Plan

State = dict[str, Tensor]
PARAMETERS = ("w", "gate")


def _sent(size: int = 4) -> State:
    draw = torch.Generator().manual_seed(0)
    state: State = {"mean": torch.zeros(3), "w": torch.randn(size, generator=draw), "gate": torch.tensor(0.5)}
    return state | {"steps": torch.tensor(0)}


def _moved(sent: State, update: list[float], client: int) -> State:
    """What a client answers whose update is (w, gate)."""
    *w, gate = update
    return sent | {
        "w": sent["w"] + torch.tensor(w),
        "gate": sent["gate"] + gate,
        "mean": sent["mean"] + client,
        "steps": torch.tensor(client),
    }


def _strategy(privacy: Privacy, seed: int = 0) -> PrivateFedAvg:
    strategy = PrivateFedAvg(Plan(Communication(min_clients=1, wait=0.0), seed, "toy"), privacy, PARAMETERS)
    strategy.noise_key = f"key {seed}"
    return strategy


def _round(
    strategy: PrivateFedAvg,
    sent: State,
    states: list[State],
    server_round: int = 1,
    lost: Callable[[Message], bool] | None = None,
) -> State:
    grid = ToyGrid(lambda client, _: wire.trained(client, states[client], client, 0.5), len(states), lost=lost)
    record = wire.config_record({})
    messages = strategy.configure_train(server_round, wire.array_record(sent), record, grid)
    arrays, _ = strategy.aggregate_train(server_round, grid.send_and_receive(messages))
    assert arrays is not None
    found = wire.state_dict(arrays)
    assert list(found) == list(sent)
    assert all(found[name].dtype == sent[name].dtype and found[name].shape == sent[name].shape for name in sent)
    return found


def _update(found: State, sent: State) -> Tensor:
    return torch.cat([found["w"].double() - sent["w"], (found["gate"].double() - sent["gate"]).reshape(1)])


# ---------------------------------------------------------------- clipping


def test_without_noise_and_clipping_it_is_the_plain_average_of_all() -> None:
    sent = _sent()
    updates = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).tolist()
    states = [_moved(sent, update, client) for client, update in enumerate(updates)]
    found = _round(_strategy(Privacy(0.0, 1e6)), sent, states)
    for name in (*PARAMETERS, "mean"):
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(found[name].double(), mean, rtol=1e-6, atol=1e-7)
    assert int(found["steps"]) == 2


def test_updates_are_clipped_as_one_vector_and_buffers_are_not() -> None:
    sent, norm = _sent(), 0.7
    # Norms 0 (a client without labels), 0.5, 10 and 6, the last in the tensor without an axis.
    updates = [[0.0] * 5, [0.3, 0.4, 0.0, 0.0, 0.0], [6.0, 0.0, 0.0, 0.0, 8.0], [0.0, 0.0, 0.0, 0.0, -6.0]]
    states = [_moved(sent, update, client) for client, update in enumerate(updates)]
    found = _round(_strategy(Privacy(0.0, norm)), sent, states)
    expected = np.zeros(5)
    for update in updates:
        length = math.sqrt(sum(value * value for value in update))
        expected += np.array(update) * (min(1.0, norm / length) if length else 1.0) / 4
    np.testing.assert_allclose(_update(found, sent).numpy(), expected, atol=1e-6)
    assert float(_update(found, sent).norm()) <= norm
    assert found["mean"].tolist() == [1.5] * 3
    assert int(found["steps"]) == 3


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("lost", [0, 2])
def test_noise_has_the_standard_deviation_of_the_clients_that_answered(lost: int) -> None:
    sent, privacy = _sent(40_000), Privacy(1.5, 0.8)
    states = [sent | {"mean": sent["mean"] + 2} for _ in range(4)]
    gone = {1001 + client for client in range(lost)}
    strategy = _strategy(privacy)
    if gone:
        with pytest.warns(UserWarning, match="goes on without 2 clients"):
            found = _round(strategy, sent, states, lost=lambda message: message.metadata.dst_node_id in gone)
    else:
        found = _round(strategy, sent, states)
    noise = _update(found, sent)
    std = 1.5 * 0.8 / (4 - lost)
    # Five standard errors of a standard deviation and of a mean.
    assert abs(float(noise.std()) / std - 1) < 5 / math.sqrt(2 * len(noise))
    assert abs(float(noise.mean())) < 5 * std / math.sqrt(len(noise))
    assert float(noise[-1]) != 0
    assert torch.equal(found["mean"], torch.full((3,), 2.0))
    assert int(found["steps"]) == 0


def test_noise_is_a_function_of_key_step_and_round() -> None:
    sent, privacy = _sent(), Privacy(1.0, 1.0)
    state = pickle.dumps(np.random.get_state())  # noqa: NPY002 - must not change

    def drawn(key: str | None, server_round: int, name: str = "toy", before: int = 0) -> Tensor:
        plan = Plan(Communication(min_clients=1, wait=0.0), 0, name, before)
        strategy = PrivateFedAvg(plan, privacy, PARAMETERS)
        strategy.noise_key = strategy.noise_key if key is None else key
        return _update(_round(strategy, sent, [sent, sent], server_round), sent)

    first = drawn("a", 3)
    assert torch.equal(first, drawn("a", 3))
    assert torch.equal(first, drawn("a", 1, before=2))
    # Without a word every strategy has a key of its own, though all have one seed.
    others = [drawn("a", 2), drawn("b", 3), drawn("a", 3, "other"), drawn(None, 3), drawn(None, 3)]
    assert not torch.isclose(others[-1], others[-2]).any()
    assert not any(torch.isclose(first, other).any() for other in others)
    assert pickle.dumps(np.random.get_state()) == state  # noqa: NPY002 - must not change


# ---------------------------------------------------------------- adaptive norm


def test_adaptive_norm_goes_to_the_median() -> None:
    sent = _sent()
    norms = [0.5, 1.0, 2.0, 4.0, 9.0]
    states = [_moved(sent, [norm, 0.0, 0.0, 0.0, 0.0], client) for client, norm in enumerate(norms)]
    for start in (1.8, 2.3):
        strategy = _strategy(Privacy(0.0, start, adaptive=True))
        norm = start
        for server_round in range(1, 13):
            found = _round(strategy, sent, states, server_round)
            expected = sum(min(length, norm) for length in norms) / 5
            assert float(_update(found, sent)[0]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            norm *= math.exp(-0.2 * (sum(length <= norm for length in norms) / 5 - 0.5))
            assert strategy.clipping_norm == pytest.approx(norm, rel=1e-9)
        assert 1.95 < strategy.clipping_norm < 2.05


def test_adaptive_norm_takes_more_noise_for_the_weights() -> None:
    sent = _sent(40_000)
    strategy = _strategy(Privacy(0.3, 0.8, adaptive=True))
    noise = _update(_round(strategy, sent, [sent] * 4), sent)
    # Andrew et al. 2021, theorem 1: (z^-2 - (2 sigma_b)^-2)^-1/2, with sigma_b = 4 / 20.
    std = 0.8 * (1 / 0.3**2 - 1 / 0.4**2) ** -0.5 / 4
    assert abs(float(noise.std()) / std - 1) < 5 / math.sqrt(2 * len(noise))
    norms = []
    for seed in range(20):
        strategy = _strategy(Privacy(0.3, 0.8, adaptive=True), seed)
        _round(strategy, _sent(), [_sent()] * 4)
        norms.append(-math.log(strategy.clipping_norm / 0.8) / 0.2 + 0.5)
    # All updates are within: the share is 1, with noise of sigma_b / 4.
    assert np.mean(norms) == pytest.approx(1.0, abs=5 * 0.05 / math.sqrt(20))
    assert np.std(norms) == pytest.approx(0.05, rel=0.7)


def test_adaptive_norm_needs_clients() -> None:
    strategy, sent = _strategy(Privacy(0.5, 1.0, adaptive=True)), _sent()
    with pytest.raises(ValueError, match=r"below a tenth of the clients of a round \(4\)"):
        _round(strategy, sent, [sent] * 4)


def test_adaptive_norm_is_what_a_resumed_run_needs() -> None:
    strategy = _strategy(Privacy(0.0, 1.0, adaptive=True))
    sent = _sent()
    _round(strategy, sent, [sent, sent])
    resumed = _strategy(Privacy(0.0, 1.0, adaptive=True))
    resumed.restore(strategy.state())
    assert resumed.clipping_norm == strategy.clipping_norm != 1.0
    assert resumed.noise_key == strategy.noise_key


# ---------------------------------------------------------------- settings


def test_parameters_must_be_among_the_weights() -> None:
    plan = Plan(Communication(min_clients=1, wait=0.0), 0, "toy")
    strategy = PrivateFedAvg(plan, Privacy(1.0, 1.0), [*PARAMETERS, "v"])
    with pytest.raises(ValueError, match="got 'v'"):
        _round(strategy, _sent(), [_sent()])


def test_weights_that_are_not_finite_are_refused_of_clients_without_labels_too() -> None:
    sent = _sent()
    states = [sent | {"w": torch.full((4,), math.nan)}, sent, sent]
    strategy = PrivateFedAvg(
        replace(Plan(Communication(min_clients=1, wait=0.0), 0, "toy"), seed=3), Privacy(0.0, 1.0), PARAMETERS
    )
    with pytest.warns(UserWarning, match="client 0 sent weights that are not finite"):
        found = _round(strategy, sent, states)
    assert torch.equal(found["w"], sent["w"])
