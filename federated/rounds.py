"""Rounds of federated averaging that go on where they were stopped."""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from pytorch_lightning.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datamodules.atomic import write_atomically
from federated import wire
from federated.privacy import PrivateFedAvg
from federated.roles import role_of
from federated.settings import Role, Settings
from federated.strategy import CountedFedAvg, Plan
from federated.tasks import FitTask

FILE = "rounds.safetensors"
_KIND = "federated_rounds"

State = dict[str, Tensor]


@dataclass(frozen=True)
class RoundReport:
    """What is known of a round.

    Attributes:
        number: The round, from 1.
        trained: Client number -> labelled images that it was trained on, and its loss; None where that is no number.
        evaluated: Client number -> test images that were recognised, and all of them. Empty without an evaluation.
    """

    number: int
    trained: dict[int, tuple[int, float | None]]
    evaluated: dict[int, tuple[int, int]]

    @property
    def accuracy(self) -> float | None:
        """Share of the test images of all clients that were recognised; None without an evaluation."""
        count = sum(count for _, count in self.evaluated.values())
        return sum(correct for correct, _ in self.evaluated.values()) / count if count else None

    @property
    def per_client(self) -> dict[int, float]:
        """Client number -> share of its test images that were recognised, for clients that have some."""
        return {client: correct / count for client, (correct, count) in self.evaluated.items() if count}

    @property
    def losses(self) -> dict[int, float]:
        """Client number -> loss, for clients that trained."""
        return {client: loss for client, (count, loss) in self.trained.items() if count and loss is not None}


@dataclass(frozen=True, eq=False)
class Finished:
    """What clients trained together.

    Attributes:
        weights: The network that the step ends with: the moving average over rounds where the role has one.
        last_weights: The last round's.
        history: All rounds.
    """

    weights: State
    last_weights: State
    history: list[RoundReport]


@dataclass
class _Progress:
    """What a stopped run goes on with.

    Attributes:
        weights: The last round's.
        average: The moving average over rounds; empty before the first one, and without one.
        history: The rounds so far.
        strategy: The state of the strategy.
    """

    weights: State
    average: State = field(default_factory=dict)
    history: list[RoundReport] = field(default_factory=list)
    strategy: dict[str, float | str] = field(default_factory=dict)


def train_together(
    grid: Grid,
    settings: Settings,
    task: FitTask,
    initial: Mapping[str, Tensor],
    folder: Path,
    identity: str,
    frozen: Mapping[str, Tensor] | None = None,
    on_round: Callable[[RoundReport], None] | None = None,
    *,
    parameters: Collection[str] | None = None,
    clients: Mapping[int, int] | None = None,
) -> Finished:
    """Let clients train a network together, or go on with it.

    After each round all that the next one needs is in one file of the folder. A run that was stopped between two rounds
    ends with the very weights of one that was not.

    Args:
        grid: Reaches the clients.
        settings: The run.
        task: What is trained.
        initial: The network's first weights.
        folder: Where rounds are kept.
        identity: Identifies what the weights depend on; rounds of another one are not gone on with.
        frozen: Weights of another network that clients need to train this one.
        on_round: Is told of all rounds: first of those that an earlier run kept, then of each as soon as it is kept.
        parameters: Names of the weights that are trained, for `settings.privacy`.
        clients: Flower's node id -> number of the client, see CountedFedAvg.

    Raises:
        RuntimeError: Too few clients answer.
        TimeoutError: Too few clients are connected.
        ValueError: The run has no such role, or clients do not fit together.
    """
    role = role_of(settings, task)
    told = on_round or (lambda report: None)
    first = {name: tensor.detach().cpu().clone() for name, tensor in initial.items()}
    path = folder / FILE
    progress = _read(path, identity, first, role) or _Progress(first)
    strategy = _strategy(settings, task, len(progress.history), frozen, parameters, clients)
    _set_up(strategy, settings, task, progress)

    def after(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            return None
        _add_round(progress, strategy, wire.state_dict(arrays), role)
        _write(path, identity, progress)
        told(progress.history[-1])
        return None

    for report in progress.history:
        told(report)
    left, timeout = role.rounds - len(progress.history), settings.communication.timeout
    if left > 0:
        train, evaluate = (wire.config_record({"task": task.to_json()}) for _ in range(2))
        with _quiet():
            strategy.start(grid, wire.array_record(progress.weights), left, timeout, train, evaluate, after)
    final = {name: value.to(first[name].dtype) for name, value in (progress.average or progress.weights).items()}
    return Finished(final, progress.weights, progress.history)


def _strategy(
    settings: Settings,
    task: FitTask,
    rounds_before: int,
    frozen: Mapping[str, Tensor] | None,
    parameters: Collection[str] | None,
    clients: Mapping[int, int] | None,
) -> CountedFedAvg:
    record = None if frozen is None else wire.array_record(frozen)
    plan = Plan(settings.communication, settings.seed, task.name, rounds_before, record, clients or {})
    if settings.privacy is None:
        return CountedFedAvg(plan)
    if parameters is None:
        msg = "Expected `parameters` with `privacy`, got None; name the tensors that are trained."
        raise ValueError(msg)
    return PrivateFedAvg(plan, settings.privacy, parameters)


def _set_up(strategy: CountedFedAvg, settings: Settings, task: FitTask, progress: _Progress) -> None:
    """Let a strategy go on, and evaluate what the step would end with: of classifiers, now and then and in the end."""
    role, every, like = role_of(settings, task), settings.communication.evaluate_every, progress.weights
    classifies = task.role == "classifier"
    strategy.restore(progress.strategy)
    strategy.evaluates = lambda number: classifies and (number % every == 0 or number == role.rounds)
    strategy.evaluated = lambda arrays: _packed(_next(progress.average, wire.state_dict(arrays), role), like, arrays)


def _add_round(progress: _Progress, strategy: CountedFedAvg, weights: State, role: Role) -> None:
    number = len(progress.history) + 1
    progress.weights = weights
    progress.average = _next(progress.average, weights, role)
    progress.history.append(RoundReport(number, dict(strategy.last_train), dict(strategy.last_evaluation)))
    # What is finished needs no secret any more.
    progress.strategy = strategy.state() if number < role.rounds else {}


def _next(before: State, weights: State, role: Role) -> State:
    """The moving average a_1 = w_1, a_r = d a_(r-1) + (1 - d) w_r in at least float32; integers are copied."""
    if role.server_ema == 0:
        return {}
    found: State = {}
    for name, value in weights.items():
        if value.is_floating_point():
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            found[name] = wide.clone() if not before else role.server_ema * before[name] + (1 - role.server_ema) * wide
        else:
            found[name] = value.clone()
    return found


def _packed(average: State, like: State, otherwise: ArrayRecord) -> ArrayRecord:
    """A moving average as it is sent, or the weights where there is none."""
    if not average:
        return otherwise
    return wire.array_record({name: value.to(like[name].dtype) for name, value in average.items()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Flower say only what is wrong: it tells of every message."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------- the file: one, so that no stop comes between two


def _write(path: Path, identity: str, progress: _Progress) -> None:
    tensors = {f"weights/{name}": value.contiguous() for name, value in progress.weights.items()}
    tensors |= {f"average/{name}": value.contiguous() for name, value in progress.average.items()}
    rounds = [
        {
            "number": report.number,
            "trained": {str(client): list(found) for client, found in report.trained.items()},
            "evaluated": {str(client): list(found) for client, found in report.evaluated.items()},
        }
        for report in progress.history
    ]
    about = {"kind": _KIND, "identity": identity, "history": rounds, "strategy": progress.strategy}
    write_atomically(path, safetensors.torch.save(tensors, {"rounds": json.dumps(about, allow_nan=False)}))


def _read(path: Path, identity: str, first: State, role: Role) -> _Progress | None:
    """The rounds of a stopped run; None where there are none that fit."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["rounds"])
            names = set(file.keys())
            # In the order of the network, not of the file: noise is drawn in it.
            weights, average = (
                {name: file.get_tensor(f"{part}/{name}") for name in first if f"{part}/{name}" in names}
                for part in ("weights", "average")
            )
        history = [
            RoundReport(
                int(report["number"]),
                {int(client): (int(count), loss) for client, (count, loss) in report["trained"].items()},
                {int(client): (int(correct), int(count)) for client, (correct, count) in report["evaluated"].items()},
            )
            for report in about["history"]
        ]
        found = _Progress(weights, average, history, about["strategy"])
        fits = about["identity"] == identity and len(history) <= role.rounds and weights.keys() == first.keys()
        fits = fits and average.keys() == (first.keys() if role.server_ema else set())
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        rank_zero_warn(f"{path} is damaged ({type(error).__name__}); its rounds are trained again.")
        return None
    return found if fits else None
