"""Who takes part: clients that do not fit together are named, and sums are those of the clients that are left."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from toy_federation import toy

from datamodules.partition import ClientSplit
from federated import client_app, wire
from federated.client import Client, Description
from federated.cohort import Cohort
from federated.in_process import InProcessGrid
from federated.settings import Communication, Settings

AT_ONCE = Communication(min_clients=1, wait=0.0)


def clients_that_say(**said: Callable[[int], Any]) -> ClientApp:
    """Clients that describe themselves as 0, 1, 2, ... with two classes and ten images, but for what is said."""
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        about: dict[str, Any] = {
            "class_names": ("cat", "dog"),
            "image_shape": (1, 8, 8),
            "images": 10,
            "labeled": 3,
            "tested": 2,
        }
        values = about | {name: value(number) for name, value in said.items()}
        who = values.pop("client", number)
        return Message(wire.answered(who, values | {"public_key": "00"}), reply_to=message)

    return app


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"class_names": lambda n: ("cat", "cow" if n == 2 else "dog")}, r"`class_names`.*'cow'\] from client 2"),
        ({"image_shape": lambda n: (1, 8, 8) if n else (3, 8, 8)}, r"`image_shape`.*\[3, 8, 8\] from client 0"),
        ({"images": lambda n: 10 if n != 1 else 0}, "got none of client 1; leave it out"),
        ({"labeled": lambda n: 0}, "got none from all 3 clients; label some images"),
        ({"client": lambda n: min(n, 1)}, "`partition-id` of its own for every SuperNode, got 1"),
    ],
)
def test_clients_that_do_not_fit_together_are_named(said: dict[str, Callable[[int], Any]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Cohort(InProcessGrid(clients_that_say(**said), 3), AT_ONCE)


def test_clients_are_waited_for() -> None:
    with pytest.raises(TimeoutError, match=r"at least 4 clients \(`communication.min_clients`\) within 0 s .*, got 3"):
        Cohort(InProcessGrid(clients_that_say(), 3), replace(AT_ONCE, min_clients=4))


def test_who_does_not_answer_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    grid = InProcessGrid(clients_that_say(), 3, lost=lambda message: message.metadata.dst_node_id == 1002)
    assert [member.client for member in Cohort(grid, AT_ONCE).members] == [0, 2]
    assert "going on without it" in capsys.readouterr().out


def described(client: Client) -> Description:
    """Without reading images: a Description is all that a cohort needs."""
    return Description(client.number, ("a", "b"), (1, 8, 8), 10, 3, 2)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(Client, "describe", described)

    def counts(self: Client, what: str, *_: object) -> npt.NDArray[np.int64]:
        return np.array([[self.number, 10**12], [7, -self.number]])

    monkeypatch.setattr(Client, "counts", counts)
    return toy(tmp_path, split=ClientSplit(num_clients=4))


def test_sums_are_those_of_all_clients_and_no_single_one_shows(settings: Settings) -> None:
    sent: list[npt.NDArray[np.uint64]] = []
    grid = InProcessGrid(client_app.make_client_app(settings), 4)
    cohort = Cohort(grid, AT_ONCE)
    plain = grid.send_and_receive

    def listen(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = list(plain(messages, timeout=timeout))
        sent.extend(reply.content.array_records[wire.ARRAYS][wire.MASKED].numpy() for reply in replies)
        return replies

    grid.send_and_receive = listen  # type: ignore[method-assign]  # what a server sees
    assert cohort.total("anything").tolist() == [[0 + 1 + 2 + 3, 4 * 10**12], [28, -6]]
    assert len(sent) == 4
    for number, masked in enumerate(sent):
        assert not (masked.astype(np.int64) == np.array([[number, 10**12], [7, -number]])).any()


def test_a_sum_is_asked_for_again_without_the_client_that_has_gone(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def lost(message: Message) -> bool:
        asked.append(message.metadata.dst_node_id)
        return message.metadata.message_type == "query.sum" and message.metadata.dst_node_id == 1002

    cohort = Cohort(InProcessGrid(client_app.make_client_app(settings), 4, lost), AT_ONCE)
    assert cohort.total("anything").tolist() == [[0 + 2 + 3, 3 * 10**12], [21, -5]]
    assert "client 1 did not take part; asking anew" in capsys.readouterr().out
    assert [member.client for member in cohort.members] == [0, 2, 3]
    assert asked.count(1002) == 3  # described, asked in vain, described


def test_a_client_that_was_started_again_takes_part_with_its_new_key(settings: Settings) -> None:
    grid = InProcessGrid(client_app.make_client_app(settings), 4)
    cohort = Cohort(grid, AT_ONCE)
    grid._contexts[1002].state.clear()  # its node has lost the key
    assert cohort.total("anything").tolist() == [[6, 4 * 10**12], [28, -6]]
    assert [member.client for member in cohort.members] == [0, 1, 2, 3]


def test_who_is_away_is_not_waited_for(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def hear(message: Message) -> bool:
        asked.append(message.metadata.dst_node_id)
        return False

    grid = InProcessGrid(client_app.make_client_app(settings), 4, hear)
    cohort = Cohort(grid, AT_ONCE)
    monkeypatch.setattr(grid, "get_node_ids", lambda: [1001, 1002, 1004])
    asked.clear()
    assert cohort.total("anything").tolist() == [[0 + 1 + 3, 3 * 10**12], [21, -4]]
    assert asked == [1001, 1002, 1004]


def test_too_few_answers_stop_the_run_with_what_clients_said(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = InProcessGrid(client_app.make_client_app(settings), 4)
    cohort = Cohort(grid, replace(AT_ONCE, min_clients=3))

    def fails(self: Client, *_: object) -> None:
        if self.number < 2:
            msg = f"no images in /data/{self.number}"
            raise FileNotFoundError(msg)

    monkeypatch.setattr(Client, "select", fails)
    with pytest.raises(RuntimeError, match=r"at least 3 clients .* got 2: client 0: no images in /data/0; client 1:"):
        cohort.ask("query.select", {"confusion": [], "cuts": []})
    # Where enough are left, those that failed are told of.
    assert len(Cohort(grid, AT_ONCE).ask("query.select", {"confusion": [], "cuts": []}).by_client) == 2
    told = [f"client {number}: no images in /data/{number}; going on without it" for number in range(2)]
    assert capsys.readouterr().out.splitlines() == told
