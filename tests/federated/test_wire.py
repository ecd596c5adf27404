"""What arrives is what was sent, and who did not answer is told of."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated import wire
from federated.in_process import InProcessGrid
from federated.tasks import FitTask

Answering = Callable[[int, wire.Instruction], RecordDict]

TASK = FitTask("cross_fit_1", fold=1, pseudo_labels="selected")


def grid_of(answering: Answering, clients: int, lost: Callable[[Message], bool] | None = None) -> InProcessGrid:
    app = ClientApp()

    @app.query("sum")
    def handle(message: Message, context: Context) -> Message:
        content = answering(int(context.node_config["partition-id"]), wire.read_instruction(message.content))
        return Message(content, reply_to=message)

    return InProcessGrid(app, clients, lost)


def nodes_of(grid: InProcessGrid) -> dict[int, int | None]:
    return dict.fromkeys(grid.get_node_ids())


def test_weights_arrive_with_their_types_and_shapes() -> None:
    state = {
        "w": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "half": torch.tensor([0.5, -1.25], dtype=torch.float16),
        "seen": torch.tensor(7),
        "empty": torch.zeros(0, 4, dtype=torch.float64),
    }
    arrived = wire.state_dict(wire.array_record(state))
    assert list(arrived) == list(state)
    for name, tensor in state.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)
    arrived["w"].zero_()  # its own memory, and writable
    assert state["w"].abs().sum() > 0


def test_an_instruction_arrives_as_it_was_sent() -> None:
    heard: list[wire.Instruction] = []

    def answer(client: int, instruction: wire.Instruction) -> RecordDict:
        heard.append(instruction)
        return wire.answered(client)

    grid = grid_of(answer, 1)
    config = {"task": TASK.to_json(), "what": "labels", "cohort": {"3": "ab"}}
    weights, frozen = {"w": torch.ones(2)}, {"f": torch.zeros(1)}
    wire.ask(grid, nodes_of(grid), "query.sum", config, weights, frozen)
    (got,) = heard
    assert (got.needed_task(), got.server_round) == (TASK, 0)
    assert got.arguments == {"what": "labels", "cohort": {"3": "ab"}}
    assert torch.equal(got.needed_weights()["w"], weights["w"])
    assert got.frozen is not None
    assert torch.equal(got.frozen["f"], frozen["f"])


def test_what_an_action_needs_is_asked_for_by_name() -> None:
    bare = wire.read_instruction(RecordDict({"config": wire.config_record({}, server_round=4)}))
    assert (bare.task, bare.weights, bare.frozen, bare.server_round) == (None, None, None, 4)
    with pytest.raises(ValueError, match="Expected `task`"):
        bare.needed_task()
    with pytest.raises(ValueError, match="Expected the network's weights as `arrays`"):
        bare.needed_weights()
    with pytest.raises(ValueError, match=r"Expected a `config` record in the message, got \['other'\]"):
        wire.read_instruction(RecordDict({"other": ConfigRecord()}))


def test_answers_are_told_apart_by_client() -> None:
    def answer(client: int, instruction: wire.Instruction) -> RecordDict:
        factor = instruction.arguments["factor"]
        return wire.answered(client, {"value": client * factor}, np.array([client, 2**64 - 1], dtype=np.uint64))

    grid = grid_of(answer, 3)
    answers = wire.ask(grid, nodes_of(grid), "query.sum", {"factor": 5})
    assert answers.by_client == {client: {"value": 5 * client, "client": client} for client in range(3)}
    assert answers.nodes == dict(zip(range(3), grid.get_node_ids(), strict=True))
    assert [answers.masked[client].tolist() for client in range(3)] == [[client, 2**64 - 1] for client in range(3)]
    assert answers.masked[0].dtype == np.uint64
    assert answers.errors == {}


def test_errors_and_silence_are_told_of() -> None:
    def answer(client: int, instruction: wire.Instruction) -> RecordDict:
        if client == 1:
            msg = "no images"
            raise ValueError(msg)
        return wire.answered(client)

    nodes = list(grid_of(answer, 4).get_node_ids())
    grid = grid_of(answer, 4, lambda message: message.metadata.dst_node_id in nodes[2:])
    answers = wire.ask(grid, {**nodes_of(grid), nodes[2]: 2}, "query.sum", {}, timeout=7)
    assert list(answers.by_client) == [0]
    assert answers.errors == {
        nodes[1]: "ValueError: no images",
        nodes[2]: "client 2: no answer within 7 s",
        nodes[3]: f"node {nodes[3]}: no answer within 7 s",
    }


def test_two_nodes_that_are_the_same_client_are_refused() -> None:
    grid = grid_of(lambda client, _: wire.answered(client // 2), 2)
    with pytest.raises(ValueError, match=r"Expected a `partition-id` of its own for every SuperNode, got 0 for nodes"):
        wire.ask(grid, nodes_of(grid), "query.sum", {})


def test_rounds_are_answered_as_flower_reads_them() -> None:
    trained = wire.trained(3, {"w": torch.ones(1)}, 12, 0.5)
    assert dict(trained.metric_records["metrics"]) == {"num-examples": 12, "train-loss": 0.5, "client": 3}
    assert [list(record) for record in trained.array_records.values()] == [["w"]]
    evaluated = wire.evaluated(3, 4, 9)
    assert dict(evaluated.metric_records["metrics"]) == {"num-examples": 9, "correct": 4, "client": 3}
    assert json.loads(str(wire.config_record({"a": [1]})["json"])) == {"a": [1]}
