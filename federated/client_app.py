"""Flower's side of a client: what it is asked for, and how it answers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from datamodules.classification.contents import ImageSource
from federated import wire
from federated.client import Client
from federated.roles import build_source
from federated.secure_sum import mask, new_private_key, public_key
from federated.settings import Settings

_KEY = "secure-sum"
# Entries of a node's config that take the place of arguments of the source.
_SOURCE = "source-"
# What is wrong with a client's data or with what it was sent; its words reach the server. Anything else is a bug, and
# is left to Flower.
_TOLD = (ValueError, OSError, FloatingPointError)

Answering = Callable[[Client, wire.Instruction, Context], RecordDict]


def make_client_app(settings: Settings | None = None) -> ClientApp:
    """Make the app that every client runs.

    Args:
        settings: The run; None reads it from the `settings` of Flower's run configuration, as JSON.
    """
    app = ClientApp()

    def handler(answering: Answering) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            try:
                instruction = wire.read_instruction(message.content)
                content = answering(_client(settings, context), instruction, context)
            except _TOLD as error:
                name = context.node_config.get("partition-id", "without a number")
                reason = f"client {name}: {error}"
                return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
            return Message(content, reply_to=message)

        return handle

    app.train()(handler(_train))
    app.evaluate()(handler(_evaluate))
    for action, answering in _ANSWERS.items():
        app.query(action)(handler(answering))
    return app


def _client(settings: Settings | None, context: Context) -> Client:
    """The client of a node; as it keeps its data in memory, one a process."""
    config = context.node_config
    number = config.get("partition-id")
    if number is None:
        msg = "Expected `partition-id` in the node's config, got none; start it with --node-config partition-id=NUMBER."
        raise ValueError(msg)
    plain = json.dumps(settings.to_plain(), sort_keys=True) if settings else str(context.run_config["settings"])
    overrides = {name.removeprefix(_SOURCE): value for name, value in config.items() if name.startswith(_SOURCE)}
    run_dir = config.get("run-dir")
    return _run(plain).client(int(number), overrides, None if run_dir is None else str(run_dir))


class _Run:
    """The clients of a run that this process has met, and the sources that they share."""

    def __init__(self, plain: str) -> None:
        self._settings = Settings.from_plain(json.loads(plain))
        self._clients: dict[tuple[int, str, str | None], Client] = {}
        self._sources: dict[str, ImageSource] = {}

    def client(self, number: int, overrides: Mapping[str, Any], run_dir: str | None) -> Client:
        """A client, which has read its data before if this process has met it."""
        where = json.dumps(dict(overrides), sort_keys=True)
        key = number, where, run_dir
        if key not in self._clients:
            if where not in self._sources:
                self._sources[where] = build_source(self._settings, overrides)
            folder = Path(run_dir or self._settings.run_dir).expanduser() / "clients" / f"{number:02d}"
            self._clients[key] = Client(self._settings, number, self._sources[where], folder)
        return self._clients[key]


@lru_cache(maxsize=1)
def _run(plain: str) -> _Run:
    """The run of these settings; another one's data are let go."""
    return _Run(plain)


def _train(client: Client, instruction: wire.Instruction, context: Context) -> RecordDict:
    del context
    result = client.train(
        instruction.needed_task(), instruction.server_round, instruction.needed_weights(), instruction.frozen
    )
    return wire.trained(client.number, result.weights, result.count, result.loss)


def _evaluate(client: Client, instruction: wire.Instruction, context: Context) -> RecordDict:
    del context
    result = client.evaluate(instruction.needed_task(), instruction.needed_weights())
    return wire.evaluated(client.number, result.correct, result.count)


def _describe(client: Client, instruction: wire.Instruction, context: Context) -> RecordDict:
    del instruction
    key = public_key(_private_key(context)).hex()
    return wire.answered(client.number, asdict(client.describe()) | {"public_key": key})


def _label(client: Client, instruction: wire.Instruction, context: Context) -> RecordDict:
    del context
    client.label(instruction.needed_task(), instruction.needed_weights())
    return wire.answered(client.number)


def _select(client: Client, instruction: wire.Instruction, context: Context) -> RecordDict:
    del context
    arguments = instruction.arguments
    client.select(np.asarray(arguments["confusion"], np.int64), np.asarray(arguments["cuts"], np.float64))
    return wire.answered(client.number)


def _draw(client: Client, instruction: wire.Instruction, context: Context) -> RecordDict:
    del context
    client.draw(
        instruction.needed_task(),
        instruction.needed_weights(),
        instruction.frozen,
        np.asarray(instruction.arguments["histogram"], np.int64),
        int(instruction.arguments["num_clients"]),
    )
    return wire.answered(client.number)


def _sum(client: Client, instruction: wire.Instruction, context: Context) -> RecordDict:
    """Answer counts that only the sum over the cohort tells."""
    arguments: dict[str, Any] = instruction.arguments
    cohort = {int(number): bytes.fromhex(key) for number, key in arguments["cohort"].items()}
    counts = client.counts(str(arguments["what"]), instruction.task, instruction.weights)
    # The node knows that it is the only one; a server's word would not do.
    alone = context.node_config.get("num-partitions") == 1
    masked = mask(counts, client.number, _private_key(context), cohort, str(arguments["nonce"]), alone)
    return wire.answered(client.number, masked=masked)


def _private_key(context: Context) -> bytes:
    """The node's key in this run; it never leaves the node."""
    if _KEY not in context.state:
        context.state[_KEY] = ConfigRecord({"private": new_private_key()})
    private = context.state.config_records[_KEY]["private"]
    if not isinstance(private, bytes):
        msg = f"Expected the key of secure sums as bytes in the node's state, got {type(private).__name__}."
        raise TypeError(msg)
    return private


_ANSWERS: dict[str, Answering] = {
    "describe": _describe,
    "label": _label,
    "select": _select,
    "draw": _draw,
    "sum": _sum,
}

app = make_client_app()
