import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from torch import Tensor
from toy_clients import ToyGrid

from federated import privacy, wire
from federated.rounds import FILE, Finished, RoundReport, train_together
from federated.settings import Communication, Privacy, Role, Settings
from federated.tasks import FitTask

State = dict[str, Tensor]
TASK = FitTask("toy")
COMMUNICATION = Communication(min_clients=2, wait=0.0)
ROUNDS = 4
# Of four clients, the last has no labels.
COUNTS = [3, 5, 2, 0]
NODES = {1001 + client: client for client in range(len(COUNTS))}


class StoppedError(Exception):
    """What kills a run between two rounds."""


def _settings(rounds: int = ROUNDS, server_ema: float = 0.0, **parts: Any) -> Settings:
    role = Role({}, {}, rounds=rounds, server_ema=server_ema)
    common: dict[str, Any] = {"classifier": role, "generator": role, "communication": COMMUNICATION}
    return Settings(source={}, **(common | parts))


def _first() -> State:
    draw = torch.Generator().manual_seed(0)
    return {"w": torch.randn(2, 3, generator=draw), "gate": torch.tensor(0.3), "steps": torch.tensor(0)}


def _trained(client: int, number: int, weights: State) -> State:
    """A function of (weights, client, round), as a client of fewlight is."""
    return {
        "w": 0.8 * weights["w"] + math.sin(7.0 * number + client),
        "gate": weights["gate"] * 0.5 + client,
        "steps": weights["steps"] + client + 1,
    }


def _train(client: int, asked: wire.Instruction) -> RecordDict:
    weights = asked.needed_weights()
    if not COUNTS[client]:
        return wire.trained(client, weights, 0, math.nan)
    return wire.trained(client, _trained(client, asked.server_round, weights), COUNTS[client], 1 / asked.server_round)


def _grid(**options: Any) -> ToyGrid:
    return ToyGrid(_train, len(COUNTS), **options)


def _run(
    folder: Path,
    settings: Settings,
    task: FitTask = TASK,
    grid: ToyGrid | None = None,
    identity: str = "same",
    on_round: Callable[[RoundReport], None] | None = None,
) -> Finished:
    parameters = ["w", "gate"] if settings.privacy else None
    grid = _grid() if grid is None else grid
    return train_together(
        grid, settings, task, _first(), folder, identity, on_round=on_round, parameters=parameters, clients=NODES
    )


def _same(one: State, other: State) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ---------------------------------------------------------------- what rounds do


def test_rounds_are_the_recursion_of_weighted_means_and_their_moving_average(tmp_path: Path) -> None:
    decay = 0.7
    finished = _run(tmp_path, _settings(server_ema=decay))
    weights, average = {name: value.double() for name, value in _first().items()}, State()
    for number in range(1, ROUNDS + 1):
        answers = [_trained(client, number, weights) for client in range(3)]
        for name in ("w", "gate"):
            mean = sum((count * answer[name] for count, answer in zip(COUNTS, answers, strict=False)), torch.zeros(()))
            weights[name] = mean / 10
            average[name] = weights[name] if number == 1 else decay * average[name] + (1 - decay) * weights[name]
        weights["steps"] = weights["steps"] + 3
    for name in ("w", "gate"):
        torch.testing.assert_close(finished.last_weights[name].double(), weights[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(finished.weights[name].double(), average[name], rtol=1e-6, atol=1e-7)
        assert finished.weights[name].dtype == torch.float32
    assert finished.weights["steps"].dtype == torch.int64
    assert int(finished.weights["steps"]) == int(finished.last_weights["steps"]) == 3 * ROUNDS
    assert [report.number for report in finished.history] == list(range(1, ROUNDS + 1))


def test_moving_average_of_half_precision_is_not_kept_in_it(tmp_path: Path) -> None:
    def train(client: int, asked: wire.Instruction) -> RecordDict:
        return wire.trained(
            client, {"w": torch.full((1,), 1.0 + (asked.server_round > 1), dtype=torch.float16)}, 1, 0.0
        )

    first = {"w": torch.zeros(1, dtype=torch.float16)}
    settings = _settings(rounds=12, server_ema=0.9999)
    found = train_together(ToyGrid(train, 2), settings, TASK, first, tmp_path, "")
    assert found.weights["w"].dtype == torch.float16
    # Half precision would stay at 1: its next number is 1.00098, and a step is 1e-4.
    assert float(found.weights["w"]) == pytest.approx(2 - 0.9999**11, abs=5e-4)


def test_without_a_moving_average_a_step_ends_with_the_last_round(tmp_path: Path) -> None:
    finished = _run(tmp_path, _settings())
    assert _same(finished.weights, finished.last_weights)


def test_reports_tell_of_clients(tmp_path: Path) -> None:
    seen: list[RoundReport] = []
    finished = _run(tmp_path, _settings(), on_round=seen.append)
    assert seen == finished.history
    assert seen[1].trained == {0: (3, 0.5), 1: (5, 0.5), 2: (2, 0.5), 3: (0, None)}
    assert seen[1].losses == {0: 0.5, 1: 0.5, 2: 0.5}
    assert seen[1].evaluated == {0: (0, 0), 1: (1, 2), 2: (2, 4), 3: (3, 6)}
    assert seen[1].accuracy == 0.5
    assert seen[1].per_client == {1: 0.5, 2: 0.5, 3: 0.5}


# ---------------------------------------------------------------- evaluation


def test_classifiers_are_evaluated_now_and_then_and_in_the_end(tmp_path: Path) -> None:
    settings = _settings(rounds=5, communication=replace(COMMUNICATION, evaluate_every=2))
    finished = _run(tmp_path, settings)
    assert [report.accuracy for report in finished.history] == [None, 0.5, None, 0.5, 0.5]


def test_generators_are_not_evaluated(tmp_path: Path) -> None:
    grid = _grid()
    finished = _run(tmp_path, _settings(), FitTask("generator", "generator"), grid)
    assert {kind for kind, _, _ in grid.heard} == {"train"}
    assert all(report.accuracy is None and not report.per_client for report in finished.history)


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_what_is_evaluated_is_what_a_step_would_end_with(tmp_path: Path, decay: float) -> None:
    for rounds in (1, 3):
        grid = _grid()
        finished = _run(tmp_path / f"{rounds}", _settings(rounds, decay), grid=grid)
        (asked, *_) = [asked for kind, _, asked in grid.heard if kind == "evaluate" and asked.server_round == rounds]
        assert _same(asked.needed_weights(), finished.weights)


# ---------------------------------------------------------------- stopped and resumed


def _lost_in_round_two(message: Message) -> bool:
    asked = wire.read_instruction(message.content)
    return message.metadata.dst_node_id == 1001 and asked.server_round == 2 and message.metadata.message_type == "train"


@pytest.mark.parametrize(
    "settings",
    [
        _settings(server_ema=0.9),
        _settings(communication=replace(COMMUNICATION, fraction=0.75, evaluate_every=3)),
        _settings(server_ema=0.5, privacy=Privacy(0.5, 0.3)),
        _settings(privacy=Privacy(0.15, 0.3, adaptive=True)),
    ],
    ids=["average", "sampled", "private", "adaptive"],
)
@pytest.mark.parametrize("lost", [None, _lost_in_round_two], ids=["", "lost"])
@pytest.mark.filterwarnings("ignore:Round 2 of `toy` goes on without")
def test_run_that_was_stopped_ends_like_one_that_was_not(
    tmp_path: Path, settings: Settings, lost: Callable[[Message], bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "new_noise_key", lambda: "first")
    grid = _grid(lost=lost)
    whole = _run(tmp_path / "whole", settings, grid=grid)
    for last in range(1, ROUNDS):

        def stop(report: RoundReport, last: int = last) -> None:
            if report.number == last:
                raise StoppedError

        folder = tmp_path / f"{last}"
        monkeypatch.setattr(privacy, "new_noise_key", lambda: "first")
        with pytest.raises(StoppedError):
            _run(folder, settings, grid=_grid(lost=lost), on_round=stop)
        monkeypatch.setattr(privacy, "new_noise_key", lambda: "of another process")
        rest, seen = _grid(lost=lost), list[RoundReport]()
        resumed = _run(folder, settings, grid=rest, on_round=seen.append)
        assert {asked.server_round for _, _, asked in rest.heard} == set(range(last + 1, ROUNDS + 1))
        assert rest.clients("train", ROUNDS) == grid.clients("train", ROUNDS)
        assert _same(resumed.weights, whole.weights)
        assert _same(resumed.last_weights, whole.last_weights)
        assert resumed.history == whole.history == seen


def test_run_that_failed_in_a_round_goes_on_with_it(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", _settings(server_ema=0.9))
    gone = _grid(lost=lambda message: wire.read_instruction(message.content).server_round == 3)
    with pytest.raises(RuntimeError, match="in round 3 of `toy`, got 0 of 4: client 0 did not answer"):
        _run(tmp_path, _settings(server_ema=0.9), grid=gone)
    assert _same(_run(tmp_path, _settings(server_ema=0.9)).weights, whole.weights)


def test_finished_rounds_are_not_trained_again(tmp_path: Path) -> None:
    whole = _run(tmp_path, _settings(server_ema=0.9))
    grid = _grid()
    again = _run(tmp_path, _settings(server_ema=0.9), grid=grid)
    assert grid.heard == []
    assert _same(again.weights, whole.weights)
    assert _same(again.last_weights, whole.last_weights)
    assert again.history == whole.history


def test_more_rounds_go_on_where_fewer_ended(tmp_path: Path) -> None:
    _run(tmp_path, _settings(2))
    assert _same(_run(tmp_path, _settings(5)).weights, _run(tmp_path / "whole", _settings(5)).weights)


@pytest.mark.parametrize("change", ["identity", "fewer rounds", "moving average"])
def test_rounds_of_another_run_are_not_gone_on_with(tmp_path: Path, change: str) -> None:
    _run(tmp_path, _settings(), identity="other" if change == "identity" else "same")
    settings = {"fewer rounds": _settings(2), "moving average": _settings(server_ema=0.5)}.get(change, _settings())
    grid = _grid()
    found = _run(tmp_path, settings, grid=grid)
    assert len(found.history) == settings.classifier.rounds
    assert grid.clients("train", 1) == [0, 1, 2, 3]
    assert _same(found.weights, _run(tmp_path / "whole", settings).weights)


@pytest.mark.parametrize("content", [b"", b"half a file", b"\x02\0\0\0\0\0\0\0{}"], ids=["empty", "half", "other"])
def test_damaged_rounds_are_trained_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        found = _run(tmp_path, _settings())
    assert _same(found.weights, _run(tmp_path / "whole", _settings()).weights)


# ---------------------------------------------------------------- quiet, and what cannot work


def test_flower_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        _run(tmp_path, _settings(2))
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(level)
    assert capfd.readouterr() == ("", "")


def test_roles_that_a_run_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected settings with a `noisy_classifier`"):
        _run(tmp_path, _settings(), FitTask("noisy", "noisy_classifier"))


def test_privacy_needs_the_names_of_the_parameters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `parameters` with `privacy`, got None"):
        train_together(_grid(), _settings(privacy=Privacy(1.0, 1.0)), TASK, _first(), tmp_path, "")
