"""What server and clients say to each other, as Flower's records carry it."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from torch import Tensor

from federated.settings import Communication
from federated.tasks import FitTask

# Names of the records of a message.
ARRAYS = "arrays"
FROZEN = "frozen"
CONFIG = "config"
METRICS = "metrics"
ANSWER = "answer"
MASKED = "masked"

_SECONDS_BETWEEN_LOOKS = 0.2

ROUND = "server-round"  # Flower's strategies add it
WEIGHT = "num-examples"  # and weight by it


@dataclass(frozen=True)
class Instruction:
    """What a client is asked to do.

    Attributes:
        task: The network that it is about; None for none.
        server_round: The round, from 1; 0 outside of rounds.
        arguments: What else the action needs.
        weights: The network's weights; None for none.
        frozen: Weights of a finished network that the action uses; None for none.
    """

    task: FitTask | None
    server_round: int
    arguments: dict[str, Any]
    weights: dict[str, Tensor] | None
    frozen: dict[str, Tensor] | None

    def needed_task(self) -> FitTask:
        """The task.

        Raises:
            ValueError: There is none.
        """
        if self.task is None:
            msg = "Expected `task` in the message's config, got none; send it with federated.wire.config_record."
            raise ValueError(msg)
        return self.task

    def needed_weights(self) -> dict[str, Tensor]:
        """The weights.

        Raises:
            ValueError: There are none.
        """
        if self.weights is None:
            msg = f"Expected the network's weights as `{ARRAYS}` in the message, got none; send them."
            raise ValueError(msg)
        return self.weights


@dataclass(frozen=True)
class Answers:
    """What clients answered.

    Attributes:
        by_client: Plain values by the client's number, in its order.
        nodes: Flower's id of the node that each client runs on.
        masked: Counts of each client that only their sum tells, uint64, where they were asked for.
        errors: What went wrong, by the node's id; a node that did not answer is among them.
        refused: Nodes whose client itself said what went wrong.
    """

    by_client: dict[int, dict[str, Any]] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    masked: dict[int, npt.NDArray[np.uint64]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)


def array_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Pack weights.

    Args:
        state: A state dict, on any device.
    """
    return ArrayRecord(dict(state))


def state_dict(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack weights, as tensors of their own on the CPU.

    Args:
        record: What `array_record` made.
    """
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def config_record(arguments: Mapping[str, Any], server_round: int = 0) -> ConfigRecord:
    """Say what to do.

    Args:
        arguments: Arguments of the action, as JSON can hold them; `task` is a FitTask as JSON.
        server_round: The round; Flower's strategies set it themselves.
    """
    further = {name: value for name, value in arguments.items() if name != "task"}
    record = ConfigRecord({ROUND: server_round, "json": json.dumps(further)})
    if "task" in arguments:
        record["task"] = str(arguments["task"])
    return record


def read_instruction(content: RecordDict) -> Instruction:
    """Read a message to a client.

    Args:
        content: Its records.

    Raises:
        ValueError: There is no config among them.
    """
    said = content.config_records.get(CONFIG)
    if said is None:
        msg = f"Expected a `{CONFIG}` record in the message, got {sorted(content)}; the server is not fewlight's."
        raise ValueError(msg)
    states = {name: state_dict(record) for name, record in content.array_records.items()}
    task = said.get("task")
    return Instruction(
        task=None if task is None else FitTask.from_json(str(task)),
        server_round=int(str(said.get(ROUND, 0))),
        arguments=json.loads(str(said.get("json", "{}"))),
        weights=states.get(ARRAYS),
        frozen=states.get(FROZEN),
    )


def trained(client: int, weights: Mapping[str, Tensor], count: int, loss: float) -> RecordDict:
    """Answer a round of training.

    Args:
        client: The client's number.
        weights: The network's weights.
        count: Labelled images that it was trained on, the weight of the answer.
        loss: The mean loss.
    """
    metrics = MetricRecord({WEIGHT: count, "train-loss": loss, "client": client})
    return RecordDict({ARRAYS: array_record(weights), METRICS: metrics})


def evaluated(client: int, correct: int, count: int) -> RecordDict:
    """Answer an evaluation.

    Args:
        client: The client's number.
        correct: Images that were recognised.
        count: All images.
    """
    return RecordDict({METRICS: MetricRecord({WEIGHT: count, "correct": correct, "client": client})})


def answered(
    client: int, values: Mapping[str, Any] | None = None, masked: npt.NDArray[np.uint64] | None = None
) -> RecordDict:
    """Answer a question.

    Args:
        client: The client's number.
        values: Plain values, as JSON can hold them.
        masked: Counts that only the sum over clients tells.
    """
    content = RecordDict({ANSWER: ConfigRecord({"json": json.dumps({**(values or {}), "client": client})})})
    if masked is not None:
        content[ARRAYS] = ArrayRecord({MASKED: Array(masked)})
    return content


def connected(grid: Grid, communication: Communication) -> list[int]:
    """Wait for clients.

    Args:
        grid: Flower's connection to the nodes.
        communication: How many, and how long.

    Returns:
        The ids of all nodes that are there, sorted.

    Raises:
        TimeoutError: There are too few.
    """
    least, wait = communication.min_clients, communication.wait
    end = time.monotonic() + wait
    while len(nodes := sorted(grid.get_node_ids())) < least:
        if time.monotonic() >= end:
            msg = (
                f"Expected at least {least} clients (`communication.min_clients`) within {wait:g} s "
                f"(`communication.wait`), got {len(nodes)}; start more, or lower it. The same command goes on where "
                "this one stopped."
            )
            raise TimeoutError(msg)
        time.sleep(min(_SECONDS_BETWEEN_LOOKS, wait))
    return nodes


def ask(
    grid: Grid,
    nodes: Mapping[int, int | None],
    action: str,
    config: Mapping[str, Any],
    arrays: Mapping[str, Tensor] | None = None,
    frozen: Mapping[str, Tensor] | None = None,
    timeout: float = 3600.0,
) -> Answers:
    """Ask clients one question, and wait.

    Args:
        grid: Flower's connection to the nodes.
        nodes: The nodes' ids, and the client that runs on each as far as that is known.
        action: What is asked, as `query.label`.
        config: The question, see `config_record`.
        arrays: Weights of a network.
        frozen: Weights of a finished network.
        timeout: Seconds to wait for answers.

    Raises:
        ValueError: Two nodes say that they are the same client.
    """
    content = RecordDict({CONFIG: config_record(config)})
    for name, state in ((ARRAYS, arrays), (FROZEN, frozen)):
        if state is not None:
            content[name] = array_record(state)
    answers = Answers(
        errors={
            node: f"{f'node {node}' if client is None else f'client {client}'}: no answer within {timeout:g} s"
            for node, client in nodes.items()
        }
    )
    replies = grid.send_and_receive([Message(content, node, action) for node in nodes], timeout=timeout)
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        node = reply.metadata.src_node_id
        if reply.has_error():
            answers.errors[node] = reason_of(reply)
            if reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
                answers.refused.add(node)
        else:
            del answers.errors[node]
            _take(answers, node, reply.content)
    return replace(answers, by_client=dict(sorted(answers.by_client.items())))


def reason_of(reply: Message) -> str:
    """What a reply says went wrong.

    Args:
        reply: A message with an error.
    """
    return reply.error.reason or f"Flower's error code {reply.error.code}"


def _take(answers: Answers, node: int, content: RecordDict) -> None:
    """Add what a node answered."""
    values = json.loads(str(content.config_records[ANSWER]["json"]))
    client = int(values["client"])
    if client in answers.nodes:
        msg = (
            f"Expected a `partition-id` of its own for every SuperNode, got {client} for nodes {answers.nodes[client]} "
            f"and {node}; start them with different --node-config partition-id=NUMBER."
        )
        raise ValueError(msg)
    answers.by_client[client] = values
    answers.nodes[client] = node
    if ARRAYS in content.array_records:
        answers.masked[client] = content.array_records[ARRAYS][MASKED].numpy()
