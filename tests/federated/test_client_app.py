"""Messages reach the client that they are for, with what it needs, and its answers and errors come back."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Context, Message, RecordDict, UserConfig
from torch import Tensor

from federated import client_app, wire
from federated.client import Description, Evaluated, Trained
from federated.client_app import make_client_app
from federated.in_process import InProcessGrid
from federated.secure_sum import unmask
from federated.settings import Role, Settings
from federated.tasks import FitTask
from federated.wire import Answers

TASK = FitTask("generator", "generator", pseudo_labels="selected")


@dataclass
class FakeClient:
    settings: Settings
    number: int
    source: object
    folder: Path
    heard: list[tuple[Any, ...]] = field(default_factory=list)

    def describe(self) -> Description:
        if self.number == 2:
            msg = "Expected images, got none."
            raise FileNotFoundError(msg)
        return Description(self.number, ("a", "b"), (1, 8, 8), 30, 3, 9)

    def train(
        self, task: FitTask, number: int, weights: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None
    ) -> Trained:
        return Trained({"w": weights["w"] + number + (frozen or {"f": torch.zeros(1)})["f"]}, 7 + self.number, 0.25)

    def evaluate(self, task: FitTask, weights: Mapping[str, Tensor]) -> Evaluated:
        return Evaluated(int(weights["w"].sum()), 10)

    def counts(self, what: str, task: FitTask | None, weights: Mapping[str, Tensor] | None) -> npt.NDArray[np.int64]:
        self.heard.append((what, task, weights))
        return np.array([[self.number, 1], [0, 10**self.number]], dtype=np.int64)

    def label(self, task: FitTask, weights: Mapping[str, Tensor]) -> None:
        self.heard.append(("label", task, weights))

    def select(self, confusion: npt.NDArray[np.int64], cuts: npt.NDArray[np.float64]) -> None:
        self.heard.append(("select", confusion, cuts))

    def draw(self, *arguments: object) -> None:
        self.heard.append(("draw", *arguments))


MADE: list[FakeClient] = []


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def make(settings: Settings, number: int, source: object, folder: Path) -> FakeClient:
        MADE.append(FakeClient(settings, number, source, folder))
        return MADE[-1]

    MADE.clear()
    client_app._run.cache_clear()
    monkeypatch.setattr(client_app, "Client", make)
    monkeypatch.setattr(client_app, "build_source", lambda settings, overrides: (settings.source, dict(overrides)))
    yield
    client_app._run.cache_clear()


def settings_of(run_dir: str = "somewhere") -> Settings:
    return Settings({"class_path": "A"}, Role({"class_path": "M"}, {"class_path": "D"}), run_dir=run_dir)


def ask(
    grid: InProcessGrid,
    action: str,
    config: Mapping[str, Any],
    arrays: Mapping[str, Tensor] | None = None,
    frozen: Mapping[str, Tensor] | None = None,
) -> Answers:
    return wire.ask(grid, dict.fromkeys(grid.get_node_ids()), f"query.{action}", config, arrays, frozen)


def test_a_round_is_trained_and_evaluated() -> None:
    grid = InProcessGrid(make_client_app(settings_of()), 2)
    content = RecordDict(
        {
            "arrays": wire.array_record({"w": torch.ones(2)}),
            "frozen": wire.array_record({"f": torch.tensor(10.0)}),
            "config": wire.config_record({"task": TASK.to_json()}, server_round=3),
        }
    )
    replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
    for client, reply in enumerate(replies):
        assert wire.state_dict(reply.content.array_records["arrays"])["w"].tolist() == [14.0, 14.0]
        assert dict(reply.content.metric_records["metrics"]) == {
            "num-examples": 7 + client,
            "train-loss": 0.25,
            "client": client,
        }
    replies = grid.send_and_receive([Message(content, node, "evaluate") for node in grid.get_node_ids()])
    metrics = [dict(reply.content.metric_records["metrics"]) for reply in replies]
    assert metrics == [{"num-examples": 10, "correct": 2, "client": client} for client in range(2)]


def test_clients_describe_themselves_and_say_what_is_wrong() -> None:
    grid = InProcessGrid(make_client_app(settings_of()), 3)
    first = ask(grid, "describe", {})
    assert list(first.by_client) == [0, 1]
    key = first.by_client[1].pop("public_key")
    assert first.by_client[1] == {
        "client": 1,
        "class_names": ["a", "b"],
        "image_shape": [1, 8, 8],
        "images": 30,
        "labeled": 3,
        "tested": 9,
    }
    assert list(first.errors.values()) == ["client 2: Expected images, got none."]
    assert ask(grid, "describe", {}).by_client[1]["public_key"] == key  # the node keeps it
    assert len({first.by_client[0]["public_key"], key}) == 2
    assert [(made.number, made.folder) for made in MADE] == [(k, Path(f"somewhere/clients/{k:02d}")) for k in range(3)]


def test_sums_are_masked_and_add_up() -> None:
    grid = InProcessGrid(make_client_app(settings_of()), 2)
    cohort = {str(k): answer["public_key"] for k, answer in ask(grid, "describe", {}).by_client.items()}
    config = {"what": "confusion", "nonce": "n", "cohort": cohort, "task": TASK.to_json()}
    answers = ask(grid, "sum", config, arrays={"w": torch.ones(1)})
    assert unmask([answers.masked[client] for client in (0, 1)]).tolist() == [[1, 2], [0, 11]]
    assert answers.masked[0].tolist() != [[0, 1], [0, 1]]
    assert MADE[0].heard[0][:2] == ("confusion", TASK)
    another = InProcessGrid(make_client_app(settings_of()), 2)  # nodes that were started again have other keys
    assert [text.split(";")[0] for text in ask(another, "sum", config).errors.values()] == [
        f"client {k}: Expected `cohort` with the key of client {k}, got another one or none" for k in range(2)
    ]


def test_only_a_node_that_knows_that_it_is_alone_sends_its_counts() -> None:
    for clients, errors in ((1, 0), (2, 2)):
        grid = InProcessGrid(make_client_app(settings_of()), clients)
        keys = {k: answer["public_key"] for k, answer in ask(grid, "describe", {}).by_client.items()}
        answers = ask(grid, "sum", {"what": "labels", "nonce": "n", "cohort": {"0": keys[0]}})
        assert len(answers.errors) == errors
        assert [masked.tolist() for masked in answers.masked.values()] == [[[0, 1], [0, 1]]][: 1 if not errors else 0]


def test_artifacts_are_made_from_what_the_server_sends() -> None:
    grid = InProcessGrid(make_client_app(settings_of()), 1)
    weights, gate = {"w": torch.ones(1)}, {"g": torch.zeros(1)}
    ask(grid, "label", {"task": TASK.to_json()}, arrays=weights)
    ask(grid, "select", {"confusion": [[[3, 1], [0, 2]]], "cuts": [0.5, 1]})
    drawn = {"task": TASK.to_json(), "histogram": [4, 5], "num_clients": 6}
    assert ask(grid, "draw", drawn, arrays=weights, frozen=gate).by_client == {0: {"client": 0}}
    label, select, draw = MADE[0].heard
    assert label == ("label", TASK, weights)
    assert select[1].tolist() == [[[3, 1], [0, 2]]]
    assert (select[1].dtype, select[2].dtype, select[2].tolist()) == (np.int64, np.float64, [0.5, 1.0])
    assert (draw[1], draw[2], draw[3], draw[4].tolist(), draw[5]) == (TASK, weights, gate, [4, 5], 6)


def test_a_deployed_node_brings_its_own_folder_and_source() -> None:
    plain = json.dumps(settings_of("theirs").to_plain())
    config: UserConfig = {"partition-id": 5, "run-dir": "/site/runs", "source-root": "/site/images", "source-size": 8}
    context = Context(1, 2, config, RecordDict(), {"settings": plain})
    grid = InProcessGrid(make_client_app(), 1)  # lets Flower write messages
    message = Message(RecordDict({"config": wire.config_record({})}), next(iter(grid.get_node_ids())), "query.describe")
    assert make_client_app()(message, context).has_content()
    assert (MADE[0].number, MADE[0].folder) == (5, Path("/site/runs/clients/05"))
    assert MADE[0].source == ({"class_path": "A"}, {"root": "/site/images", "size": 8})
    assert MADE[0].settings == settings_of("theirs")
    reply = make_client_app()(message, Context(1, 2, {}, RecordDict(), {"settings": plain}))
    assert reply.error.reason is not None
    assert "Expected `partition-id` in the node's config" in reply.error.reason


def test_another_run_in_the_same_process_has_clients_of_its_own() -> None:
    for run_dir in ("one", "one", "two", "one"):
        ask(InProcessGrid(make_client_app(settings_of(run_dir)), 1), "describe", {})
    assert [str(made.folder) for made in MADE] == [f"{name}/clients/00" for name in ("one", "two", "one")]
