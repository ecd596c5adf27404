import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor
from toy_clients import ToyGrid

from federated import wire
from federated.settings import Communication
from federated.strategy import CountedFedAvg, Plan

State = dict[str, Tensor]
Metrics = dict[str, int | float | list[int] | list[float]]
COMMUNICATION = Communication(min_clients=2, wait=0.0)


def _state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    draw = torch.Generator().manual_seed(seed)
    weights: State = {
        "w": torch.randn(3, 5, generator=draw).to(dtype),
        "scale": torch.randn((), generator=draw).to(dtype),
    }
    return weights | {"steps": torch.tensor(seed), "seen": torch.tensor([seed, 2]), "on": torch.tensor(seed > 1)}


def _answers(states: list[State], counts: list[int]) -> Callable[[int, wire.Instruction], RecordDict]:
    return lambda client, _: wire.trained(client, states[client], counts[client], 0.5)


def _round(
    states: list[State],
    counts: list[int],
    communication: Communication = COMMUNICATION,
    backwards: bool = False,
    lost: Callable[[Message], bool] | None = None,
    sent: State | None = None,
) -> tuple[State, CountedFedAvg]:
    """One round of clients that answer fixed weights."""
    grid = ToyGrid(_answers(states, counts), len(states), lost=lost, backwards=backwards)
    strategy = CountedFedAvg(Plan(communication, 0, "toy"))
    first = wire.array_record(states[0] if sent is None else sent)
    arrays, _ = strategy.aggregate_train(1, _replies(strategy, grid, first))
    assert arrays is not None
    return wire.state_dict(arrays), strategy


def _replies(strategy: CountedFedAvg, grid: ToyGrid, arrays: ArrayRecord, server_round: int = 1) -> list[Message]:
    messages = strategy.configure_train(server_round, arrays, wire.config_record({}), grid)
    return list(grid.send_and_receive(messages))


def _same(one: State, other: State) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ---------------------------------------------------------------- the mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_mean_is_the_naive_weighted_one_in_float64(dtype: torch.dtype) -> None:
    counts = [3, 11, 1, 40]
    states = [_state(seed, dtype) for seed in range(4)]
    found, strategy = _round(states, counts)
    for name in ("w", "scale"):
        expected = np.zeros(states[0][name].shape)
        for place in np.ndindex(expected.shape):
            products = [count * float(state[name][place]) for count, state in zip(counts, states, strict=True)]
            expected[place] = sum(products) / 55
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name].double().numpy(), expected, rtol=2 * torch.finfo(dtype).eps)
    assert strategy.last_train == {client: (count, 0.5) for client, count in enumerate(counts)}


def test_clients_with_as_many_labels_have_the_plain_average() -> None:
    states = [_state(seed) for seed in range(3)]
    found, _ = _round(states, [7, 7, 7])
    mean = torch.stack([state["w"].double() for state in states]).mean(0)
    torch.testing.assert_close(found["w"].double(), mean, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_client_keeps_its_very_weights(dtype: torch.dtype) -> None:
    state = _state(3, dtype)
    found, _ = _round([state], [13], replace(COMMUNICATION, min_clients=1), sent=_state(0, dtype))
    assert _same(found, state)


def test_integers_take_the_maximum_and_keep_their_type() -> None:
    found, _ = _round([_state(2), _state(9), _state(1)], [5, 1, 5])
    assert found["steps"].dtype == torch.int64
    assert found["steps"].shape == ()
    assert int(found["steps"]) == 9
    assert found["seen"].tolist() == [9, 2]
    assert found["on"].dtype == torch.bool
    assert bool(found["on"])


def test_order_of_the_answers_changes_no_bit() -> None:
    states = [{"w": torch.tensor([value], dtype=torch.float64)} for value in (1.0, 1e16, -1e16)]
    values = [float(state["w"]) / 3 for state in states]
    assert sum(values) != sum(reversed(values))  # a sum in the order of arrival would tell
    there, _ = _round(states, [1, 1, 1])
    back, _ = _round(states, [1, 1, 1], backwards=True)
    assert torch.equal(there["w"], back["w"])


# ---------------------------------------------------------------- who enters


def test_client_that_trained_on_nothing_does_not_enter() -> None:
    states = [_state(0), _state(1), _state(50)]
    states[2]["w"] = torch.full((3, 5), torch.nan)
    found, strategy = _round(states, [4, 8, 0])
    assert _same(found, _round(states[:2], [4, 8])[0])
    assert strategy.last_train[2] == (0, 0.5)


def test_weights_stay_where_nobody_has_labels() -> None:
    sent = _state(7)
    found, _ = _round([_state(0), _state(1)], [0, 0], sent=sent)
    assert _same(found, sent)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    states = [_state(0), _state(1), _state(2)]
    states[1]["w"][2, 1] = torch.inf
    with pytest.warns(UserWarning, match=r"Round 1 of `toy` goes on without 1 clients: client 1 .*not finite \(`w`\)"):
        found, strategy = _round(states, [4, 8, 6])
    assert strategy.last_train.keys() == {0, 2}
    expected = (4 * states[0]["w"].double() + 6 * states[2]["w"].double()) / 10
    torch.testing.assert_close(found["w"].double(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"w": torch.zeros(3, 4), "b": torch.zeros(2)}, "`w`"),
        ({"w": torch.zeros(3, 5)}, "`b`"),
        ({"w": torch.zeros(3, 5), "b": torch.zeros(2), "c": torch.zeros(1)}, "`c`"),
        ({"w": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.int64)}, "`b`"),
    ],
)
def test_model_of_another_shape_stops_the_run(other: State, named: str) -> None:
    own = {"w": torch.zeros(3, 5), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"client 1 returned a model of another shape \({named}\)"):
        _round([own, other, own], [1, 0, 1])


def test_round_goes_on_without_a_client_that_does_not_answer() -> None:
    states = [_state(seed) for seed in range(3)]
    with pytest.warns(UserWarning, match="node 1002 did not answer"):
        found, strategy = _round(states, [4, 8, 6], lost=lambda message: message.metadata.dst_node_id == 1002)
    assert strategy.last_train.keys() == {0, 2}
    expected = (4 * states[0]["w"].double() + 6 * states[2]["w"].double()) / 10
    torch.testing.assert_close(found["w"].double(), expected, rtol=1e-7, atol=1e-8)


def test_too_few_answers_stop_the_run_and_say_why() -> None:
    def train(client: int, instruction: wire.Instruction) -> RecordDict:
        if client:
            msg = f"no labels in the folder of {client}"
            raise ValueError(msg)
        return wire.trained(client, instruction.needed_weights(), 1, 0.0)

    strategy = CountedFedAvg(Plan(COMMUNICATION, 0, "toy", rounds_before=4))
    replies = _replies(strategy, ToyGrid(train, 3), wire.array_record(_state(0)))
    with pytest.raises(RuntimeError, match=r"= 2 clients in round 5 of `toy`, got 1 of 3: .* of 1; .* of 2\."):
        strategy.aggregate_train(1, replies)


def test_two_clients_with_one_number_are_refused() -> None:
    grid = ToyGrid(lambda _, asked: wire.trained(4, asked.needed_weights(), 1, 0.0), 2)
    strategy = CountedFedAvg(Plan(COMMUNICATION, 0, "toy"))
    with pytest.raises(ValueError, match="got 4 twice"):
        strategy.aggregate_train(1, _replies(strategy, grid, wire.array_record(_state(0))))


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        ({"num-examples": -1, "train-loss": 0.0, "client": 0}, "trained on -1 images"),
        ({"num-examples": float("nan"), "train-loss": 0.0, "client": 0}, "trained on nan images"),
        ({"train-loss": 0.0, "client": 0}, "node 1001 lacks `num-examples`"),
        ({"num-examples": 1, "train-loss": 0.0}, "node 1001 lacks `client`"),
        ({"num-examples": 1, "train-loss": 0.0, "client": 0.5}, "names 0.5 as its client"),
    ],
)
def test_answers_that_make_no_sense_are_refused(
    metrics: dict[str, int | float | list[int] | list[float]], named: str
) -> None:
    def train(client: int, instruction: wire.Instruction) -> RecordDict:
        content = wire.trained(client, instruction.needed_weights(), 1, 0.0)
        if client == 0:
            content[wire.METRICS] = MetricRecord(dict(metrics))
        return content

    strategy = CountedFedAvg(Plan(COMMUNICATION, 0, "toy"))
    replies = _replies(strategy, ToyGrid(train, 3), wire.array_record(_state(0)))
    with pytest.warns(UserWarning, match=named):
        strategy.aggregate_train(1, replies)
    assert strategy.last_train.keys() == {1, 2}


# ---------------------------------------------------------------- who is asked


def _asked(grid: ToyGrid, communication: Communication, seed: int, server_round: int, **plan: Any) -> set[int]:
    strategy = CountedFedAvg(Plan(communication, seed, "toy", **plan))
    messages = strategy.configure_train(server_round, wire.array_record({}), wire.config_record({}), grid)
    return {message.metadata.dst_node_id - 1001 for message in messages}


def test_sample_is_a_function_of_seed_and_round_and_fair() -> None:
    grid = ToyGrid(_answers([], []), 8)
    half = replace(COMMUNICATION, fraction=0.5)
    rounds = [_asked(grid, half, 1, number) for number in range(1, 101)]
    assert all(len(asked) == 4 for asked in rounds)
    assert rounds == [_asked(grid, half, 1, 1, rounds_before=number) for number in range(100)]
    assert rounds != [_asked(grid, half, 2, number) for number in range(1, 101)]
    turns: npt.NDArray[Any] = np.array([sum(client in asked for asked in rounds) for client in range(8)])
    # 100 draws of probability 1/2: five standard deviations.
    assert np.abs(turns - 50).max() <= 25
    assert len({frozenset(asked) for asked in rounds}) > 40  # of 70 that there are


def test_sample_goes_by_the_numbers_of_clients_where_they_are_known() -> None:
    half = replace(COMMUNICATION, fraction=0.5)
    grid = ToyGrid(_answers([], []), 8)
    numbers = {1001 + place: client for place, client in enumerate([3, 1, 7, 0, 2, 6, 5, 4])}
    own = {1001 + client: client for client in range(8)}
    by_node = [_asked(grid, half, 1, number, clients=numbers) for number in range(1, 9)]
    translated = [{numbers[1001 + place] for place in asked} for asked in by_node]
    assert translated == [_asked(grid, half, 1, number, clients=own) for number in range(1, 9)]


@pytest.mark.parametrize(("fraction", "least", "expected"), [(1.0, 2, 5), (0.4, 1, 2), (0.1, 3, 3), (0.01, 1, 1)])
def test_size_of_the_sample(fraction: float, least: int, expected: int) -> None:
    communication = replace(COMMUNICATION, fraction=fraction, min_clients=least)
    assert len(_asked(ToyGrid(_answers([], []), 5), communication, 0, 1)) == expected


def test_too_few_clients_are_waited_for_and_then_named() -> None:
    communication = replace(COMMUNICATION, min_clients=3, wait=0.05)
    with pytest.raises(TimeoutError, match=r"at least 3 clients .* within 0\.05 s .*, got 2"):
        _asked(ToyGrid(_answers([], []), 2), communication, 0, 1)


def test_client_that_comes_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ToyGrid(_answers([], []), 3)
    seen = iter([[1001], [1001, 1002], [1001, 1002, 1003]])
    monkeypatch.setattr(grid, "get_node_ids", lambda: next(seen))
    assert _asked(grid, replace(COMMUNICATION, min_clients=3, wait=30.0), 0, 1) == {0, 1, 2}


def test_messages_carry_what_a_client_needs() -> None:
    grid = ToyGrid(_answers([_state(0), _state(1)], [1, 1]), 2)
    frozen = {"v": torch.arange(3.0)}
    strategy = CountedFedAvg(Plan(COMMUNICATION, 0, "toy", rounds_before=2, frozen=wire.array_record(frozen)))
    strategy.aggregate_train(1, _replies(strategy, grid, wire.array_record(_state(5))))
    messages = strategy.configure_evaluate(1, wire.array_record(_state(6)), wire.config_record({}), grid)
    strategy.aggregate_evaluate(1, grid.send_and_receive(messages))
    (_, _, train), (_, _, evaluate) = grid.heard[0], grid.heard[2]
    assert train.server_round == evaluate.server_round == 3
    assert _same(train.needed_weights(), _state(5))
    assert train.frozen is not None
    assert _same(train.frozen, frozen)
    assert _same(evaluate.needed_weights(), _state(6))
    assert evaluate.frozen is None
    assert strategy.last_evaluation == {0: (0, 0), 1: (1, 2)}


def test_no_generator_of_the_process_is_touched() -> None:
    before = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002 - must not be used
    _round([_state(0), _state(1), _state(2)], [1, 2, 3], replace(COMMUNICATION, fraction=0.7))
    assert random.getstate() == before[0]
    assert pickle.dumps(np.random.get_state()) == before[1]  # noqa: NPY002 - must not be used
    assert torch.equal(torch.get_rng_state(), before[2])
