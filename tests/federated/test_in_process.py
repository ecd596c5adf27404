"""The Grid in one process does to messages what Flower's engines do."""

import logging

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from federated import in_process
from federated.in_process import InProcessGrid


def counting_app() -> ClientApp:
    """Counts, in its node's state, how often it was asked."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        before = context.state.config_records.get("seen", ConfigRecord({"times": 0}))
        context.state["seen"] = ConfigRecord({"times": int(str(before["times"])) + 1})
        if context.node_config["partition-id"] == 1:
            msg = "out of luck"
            raise RuntimeError(msg)
        return Message(RecordDict({"seen": context.state.config_records["seen"]}), reply_to=message)

    return app


def ask_all(grid: Grid) -> list[Message]:
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, timeout=0.0))


def test_a_node_keeps_its_state_and_errors_become_answers(caplog: pytest.LogCaptureFixture) -> None:
    grid = InProcessGrid(counting_app(), 3)
    nodes = list(grid.get_node_ids())
    assert len(set(nodes)) == 3
    assert not set(nodes) & {0, 1, 2}  # nobody can take one for the client's number
    for times in (1, 2):
        with caplog.at_level(logging.ERROR):
            replies = ask_all(grid)
        assert [reply.metadata.src_node_id for reply in replies] == nodes
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert replies[0].content.config_records["seen"]["times"] == times
        assert replies[1].error.reason == "RuntimeError: out of luck"
    assert "Traceback" in caplog.text  # a bug is not told by its last line alone


def test_each_answer_is_handed_out_once() -> None:
    grid = InProcessGrid(counting_app(), 1)
    ids = list(grid.push_messages([Message(RecordDict(), node, "train") for node in grid.get_node_ids()]))
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == ids
    assert list(grid.pull_messages(ids)) == []


def test_a_lost_client_is_neither_run_nor_answered() -> None:
    grid = InProcessGrid(counting_app(), 2, lambda message: message.metadata.dst_node_id == first)
    first = next(iter(grid.get_node_ids()))
    assert [reply.metadata.src_node_id for reply in ask_all(grid)] == [first + 1]
    assert [node.node_id for node in grid.get_nodes()] == [first, first + 1]


def test_a_server_runs_and_its_errors_reach_the_caller() -> None:
    seen: list[int] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seen.append(len(ask_all(grid)))
        if len(seen) == 2:
            msg = "too few clients"
            raise RuntimeError(msg)

    in_process.run(server, counting_app(), 4)
    assert seen == [4]
    with pytest.raises(RuntimeError, match="too few clients"):
        in_process.run(server, counting_app(), 2)
    assert seen == [4, 2]
