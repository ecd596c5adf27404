"""Flower's own simulation gives what one process gives."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import load_file

from datamodules.partition import ClientSplit
from federated import in_process, simulation
from federated.client_app import make_client_app
from federated.server_app import make_server_app
from federated.settings import Role, Settings

pytestmark = pytest.mark.slow

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
NETWORK = {"class_path": "ConvNet", "init_args": {"image_size": 8, "widths": [4, 8], "in_channels": 1}}
MODEL = {"network": NETWORK, "method": {"class_path": "Supervised"}, "optimizer": SGD}


def test_the_engines_agree(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    role = Role(
        {"class_path": "SSLClassifier", "init_args": MODEL},
        {"class_path": "SemiSupervisedDataModule", "init_args": {"batch_size": 8, "steps_per_epoch": None}},
        rounds=2,
    )
    source = {"class_path": "HardDigitsSource", "init_args": {"num_train": 300, "num_test": 60}}
    whole = Settings(source, role, split=ClientSplit(num_clients=3, label_share=0.3), arms=["labels"], central=None)
    results, weights = [], []
    for engine in (in_process, simulation):
        settings = replace(whole, run_dir=str(tmp_path / engine.__name__))
        engine.run(make_server_app(settings), make_client_app(settings), 3)
        folder = Path(settings.run_dir)
        results.append(json.loads((folder / "results.json").read_text()))
        weights.append({path.name: load_file(path) for path in sorted((folder / "classifier").glob("*.safetensors"))})
    assert weights[0]
    for name, arrays in weights[0].items():
        for tensor, array in arrays.items():
            np.testing.assert_allclose(weights[1][name][tensor], array, rtol=1e-4, atol=1e-6, err_msg=tensor)
    assert results[0]["arms"] == results[1]["arms"]
    assert results[0]["selection"] == results[1]["selection"]


def test_what_the_server_raises_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", "/as/it/was")
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        msg = "Expected at least 2 clients"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="Expected at least 2 clients"):
        simulation.run(server, ClientApp(), 2)
    assert os.environ["PYTHONPATH"] == "/as/it/was"
