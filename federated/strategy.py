"""Federated averaging on Flower, by counts and in a fixed order."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from pytorch_lightning.utilities import rank_zero_warn

from federated import wire
from federated.averaging import Arrays, average, digest, floating
from federated.settings import Communication

_NAMED = 3  # tensors that an error names

Read = TypeVar("Read")


@dataclass(frozen=True, eq=False)
class Contribution:
    """What a client trained.

    Attributes:
        client: Its number.
        count: Labelled images that it was trained on.
        loss: The mean loss; None where it is no number.
        arrays: The weights, named and shaped as they were sent.
        reply: The message that brought them.
    """

    client: int
    count: int
    loss: float | None
    arrays: Arrays
    reply: Message


@dataclass(frozen=True, eq=False)
class Plan:
    """What a strategy trains, and with whom.

    Attributes:
        communication: Who takes part.
        seed: Seed of the run.
        name: Name of the step.
        rounds_before: Rounds that were trained before this strategy's first one.
        frozen: Weights of another network, which clients are sent to train with; None for none.
        clients: Flower's node id -> number of the client. Sampling goes by numbers where they are known, as node ids
            change when an engine is started anew.
    """

    communication: Communication
    seed: int
    name: str
    rounds_before: int = 0
    frozen: ArrayRecord | None = None
    clients: Mapping[int, int] = field(default_factory=dict)


class _RefusedError(Exception):
    """A reply that must not enter; the others may."""


class CountedFedAvg(FedAvg):
    """FedAvg whose result depends on what the clients answer, not on when.

    The mean sum_k n_k w_k / sum_k n_k (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) is taken in float64 in the
    order of the clients' numbers, and each tensor keeps its type. Integer tensors, which count steps, take the
    maximum. A client that trained on nothing (n_k = 0) does not enter; where all have nothing, the weights stay.
    Weights that are not finite are refused.

    Which clients train in a round is a function of (seed, name, round).

    Args:
        plan: What is trained, and with whom.

    Attributes:
        last_train: Client number -> (count, loss; None where it is no number) of the last round.
        last_evaluation: Client number -> (correct, count) of the last round; empty where it was not evaluated.
        evaluates: Whether a round, counted from 1 over all that were trained, is evaluated.
        evaluated: What is evaluated, given the new average.
    """

    uniform = False  # whether every client counts alike

    def __init__(self, plan: Plan) -> None:
        least = plan.communication.min_clients
        super().__init__(plan.communication.fraction, 1.0, least, least, least, wire.WEIGHT, wire.ARRAYS, wire.CONFIG)
        self.plan = plan
        self.last_train: dict[int, tuple[int, float | None]] = {}
        self.last_evaluation: dict[int, tuple[int, int]] = {}
        self.evaluates: Callable[[int], bool] = lambda number: True
        self.evaluated: Callable[[ArrayRecord], ArrayRecord] = lambda arrays: arrays
        self._sent: Arrays = {}
        self._asked: list[int] = []

    # ---------------------------------------------------------------- what a resumed run needs

    def state(self) -> dict[str, float | str]:
        """What goes from round to round beside the weights."""
        return {}

    def restore(self, state: Mapping[str, float | str]) -> None:
        """Go on from what `state` gave.

        Args:
            state: It.
        """

    # ---------------------------------------------------------------- training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose clients, and ask them to train.

        Args:
            server_round: The round, from 1 for this strategy's first one.
            arrays: The weights.
            config: What is trained.
            grid: Reaches the clients.

        Raises:
            TimeoutError: Too few clients are connected.
        """
        number = self.plan.rounds_before + server_round
        self._sent = {name: array.numpy() for name, array in arrays.items()}
        self._asked = self._sampled(number, wire.connected(grid, self.plan.communication))
        config[wire.ROUND] = number
        content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: config})
        if self.plan.frozen is not None:
            content[wire.FROZEN] = self.plan.frozen
        return self._construct_messages(content, self._asked, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what the clients trained.

        Args:
            server_round: The round, from 1 for this strategy's first one.
            replies: Their answers, in any order.

        Returns:
            The new weights; no metrics, see `last_train`.

        Raises:
            RuntimeError: Too few of them can be used.
            ValueError: A client trains a model of another shape, or two have one number.
        """
        number = self.plan.rounds_before + server_round
        found = self._sorted_out(number, replies, self._contribution)
        self.last_train = {client: (one.count, one.loss) for client, one in found.items()}
        entering = [one for one in found.values() if self.uniform or one.count > 0]
        arrays = self.combine(number, self._sent, entering) if entering else self._sent
        return ArrayRecord({name: Array(array) for name, array in arrays.items()}), None

    def combine(self, number: int, sent: Arrays, entering: Sequence[Contribution]) -> Arrays:
        """Make new weights of the clients'.

        Args:
            number: The round, from 1 over all that were trained.
            sent: The weights that they began with.
            entering: What they trained, by client number; at least one.
        """
        del number
        return average(sent, [one.arrays for one in entering], [one.count for one in entering])

    # ---------------------------------------------------------------- evaluation

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all clients to evaluate, in rounds that are evaluated.

        Args:
            server_round: The round, from 1 for this strategy's first one.
            arrays: The new average.
            config: What is evaluated.
            grid: Reaches the clients.

        Raises:
            TimeoutError: Too few clients are connected.
        """
        number = self.plan.rounds_before + server_round
        self._asked = wire.connected(grid, self.plan.communication) if self.evaluates(number) else []
        if not self._asked:
            return []
        config[wire.ROUND] = number
        content = RecordDict({wire.ARRAYS: self.evaluated(arrays), wire.CONFIG: config})
        return self._construct_messages(content, self._asked, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Note what the clients found.

        Args:
            server_round: The round, from 1 for this strategy's first one.
            replies: Their answers, in any order.

        Returns:
            Nothing, see `last_evaluation`.

        Raises:
            RuntimeError: Too few of them can be used.
            ValueError: Two clients have one number.
        """
        number = self.plan.rounds_before + server_round
        self.last_evaluation = self._sorted_out(number, replies, _evaluation) if self._asked else {}
        return None

    # ---------------------------------------------------------------- clients

    def _sampled(self, number: int, nodes: list[int]) -> list[int]:
        """The nodes whose turn it is: those of the smallest hashes, a random sample that no other draw can shift."""
        size = max(round(self.plan.communication.fraction * len(nodes)), self.plan.communication.min_clients)

        def turn(node: int) -> bytes:
            return digest(self.plan.seed, self.plan.name, number, self._who(node))

        return sorted(sorted(nodes, key=turn)[:size])

    def _contribution(self, reply: Message) -> tuple[int, Contribution]:
        client = _client(reply)
        count, loss = _number(reply, wire.WEIGHT), _number(reply, "train-loss")
        if not (math.isfinite(count) and count >= 0):
            reason = f"client {client} says that it was trained on {count} images"
            raise _RefusedError(reason)
        record = reply.content.array_records.get(wire.ARRAYS, ArrayRecord())
        try:
            arrays = {name: array.numpy() for name, array in record.items()}
        except (ValueError, TypeError, EOFError) as error:
            reason = f"client {client} sent arrays that cannot be read ({error})"
            raise _RefusedError(reason) from error
        self._require_shapes(client, arrays)
        broken = [name for name, array in arrays.items() if floating(array) and not np.isfinite(array).all()]
        if broken and (self.uniform or count > 0):
            reason = (
                f"client {client} sent weights that are not finite ({_listed(broken)}), after a loss of {loss:g}; "
                "lower its learning rate, or clip gradients"
            )
            raise _RefusedError(reason)
        told = loss if math.isfinite(loss) else None
        return client, Contribution(client, int(count), told, {name: arrays[name] for name in self._sent}, reply)

    def _require_shapes(self, client: int, arrays: Arrays) -> None:
        wrong = sorted(self._sent.keys() ^ arrays.keys()) or [
            name
            for name, array in arrays.items()
            if array.shape != self._sent[name].shape or array.dtype.kind != self._sent[name].dtype.kind
        ]
        if wrong:
            msg = (
                f"Expected the weights of `{self.plan.name}` as they were sent, but client {client} returned a model "
                f"of another shape ({_listed(wrong)}); give all clients the same configuration and version."
            )
            raise ValueError(msg)

    def _sorted_out(
        self, number: int, replies: Iterable[Message], read: Callable[[Message], tuple[int, Read]]
    ) -> dict[int, Read]:
        """Read replies; by client number.

        Raises:
            RuntimeError: Fewer than `min_clients` can be used.
            ValueError: Two clients have one number.
        """
        timeout = self.plan.communication.timeout
        failures = {node: f"{self._who(node)} did not answer within {timeout:g} s" for node in self._asked}
        found: dict[int, Read] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                failures[node] = wire.reason_of(reply)
                continue
            try:
                client, value = read(reply)
            except _RefusedError as error:
                failures[node] = str(error)
                continue
            if client in found:
                msg = f"Expected every client to have a number of its own, got {client} twice; see `partition-id`."
                raise ValueError(msg)
            failures.pop(node, None)
            found[client] = value
        told = "; ".join(reason for _, reason in sorted(failures.items()))
        least = self.plan.communication.min_clients
        if len(found) < least:
            msg = (
                f"Expected answers of at least `communication.min_clients` = {least} clients in round {number} of "
                f"`{self.plan.name}`, got {len(found)} of {len(self._asked)}: {told or 'no more were asked'}. Repair "
                "what they say, or start more; the same command goes on where this one stopped."
            )
            raise RuntimeError(msg)
        if failures:
            rank_zero_warn(f"Round {number} of `{self.plan.name}` goes on without {len(failures)} clients: {told}.")
        return dict(sorted(found.items()))

    def _who(self, node: int) -> str:
        return f"client {self.plan.clients[node]}" if node in self.plan.clients else f"node {node}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _evaluation(reply: Message) -> tuple[int, tuple[int, int]]:
    client = _client(reply)
    correct, count = _number(reply, "correct"), _number(reply, wire.WEIGHT)
    if not 0 <= correct <= count < math.inf:
        reason = f"client {client} says that it recognised {correct:g} of {count:g} images"
        raise _RefusedError(reason)
    return client, (int(correct), int(count))


def _client(reply: Message) -> int:
    client = _number(reply, "client")
    if isinstance(client, int):
        return client
    reason = f"the answer of node {reply.metadata.src_node_id} names {client} as its client; see `partition-id`"
    raise _RefusedError(reason)


def _number(reply: Message, name: str) -> float:
    node = reply.metadata.src_node_id
    value = reply.content.metric_records.get(wire.METRICS, MetricRecord()).get(name)
    if not isinstance(value, int | float):
        reason = f"the answer of node {node} lacks `{name}`; give all clients the same version of fewlight"
        raise _RefusedError(reason)
    return value
