"""Federated averaging of one client, through all of its messages, is training in one place."""

from dataclasses import replace
from pathlib import Path

import torch
from tiny_nets import tiny_trainer
from toy_federation import CLASSIFIER, toy

from datamodules.classification.client_part import ClientPart
from datamodules.partition import ClientSplit
from federated.client import Client
from federated.client_app import make_client_app
from federated.in_process import InProcessGrid
from federated.roles import build_data, build_module
from federated.rounds import train_together
from federated.tasks import FitTask
from federated.weights import network_state

ROUNDS, EPOCHS = 2, 2


def test_one_client_ends_like_one_fit(tmp_path: Path) -> None:
    split, role, task = ClientSplit(1, 0.4), replace(CLASSIFIER, rounds=ROUNDS, epochs=EPOCHS), FitTask("classifier")
    settings = toy(tmp_path, split=split, classifier=role)
    client = Client(settings, 0)
    module = build_module(role, 10, None, settings.seed)
    first = network_state(module)
    grid = InProcessGrid(make_client_app(settings), 1)
    found = train_together(grid, settings, task, first, tmp_path / "rounds", "identity").weights

    # The same random numbers, in the loop of a Trainer.
    data = build_data(role, task, ClientPart(client.source, 0, split), tmp_path, client._seed("data"))
    with torch.random.fork_rng():
        torch.manual_seed(client._seed(task.name))
        tiny_trainer(tmp_path, max_epochs=ROUNDS * EPOCHS, limit_val_batches=0).fit(module, datamodule=data)
    wanted = network_state(module)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not torch.equal(first["head.weight"], wanted["head.weight"])
