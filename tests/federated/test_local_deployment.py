"""SuperLink, SuperNodes, keys and certificates for real, on the loopback; a message takes 5 to 30 s of two cores."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from datamodules.partition import ClientSplit
from federated import deployment, in_process
from federated.client_app import make_client_app
from federated.credentials import write_node_key
from federated.flower_cli import environment
from federated.local_deployment import LocalDeployment, local_deployment, supernode_command
from federated.process_group import ProcessGroup
from federated.server_app import make_server_app
from federated.settings import Communication, Confusion, Deployment, Role, Settings
from lightning_modules.stages import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = """\
import json, sys
from federated.deployment import run
from federated.settings import Settings
run(Settings.from_plain(json.loads(sys.argv[1])))
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number: int = taken.getsockname()[1]
    return number


def settings_of(folder: Path, port: int, clients: int = 2, rounds: int = 2) -> Settings:
    """A classifier on labels, its pseudo-labels, and a classifier on the selected ones; seconds in one process."""
    network = {"class_path": "ConvNet", "init_args": {"image_size": 8, "widths": [8, 16], "in_channels": 1}}
    model = {
        "class_path": "SSLClassifier",
        "init_args": {
            "network": network,
            "method": {"class_path": "Supervised"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        },
    }
    data = {
        "class_path": "SemiSupervisedDataModule",
        "init_args": {"image_size": 8, "batch_size": 8, "weak": "none"},
    }
    digits = {"num_train": 400, "num_test": 200, "noise": 0.0, "shift": 0, "flip_contrast": False}
    return Settings(
        source={"class_path": "HardDigitsSource", "init_args": digits},
        classifier=Role(model, data, rounds=rounds, trainer={"accelerator": "cpu"}),
        run_dir=str(folder),
        engine="deployment",
        split=ClientSplit(num_clients=clients, label_share=0.3, alpha_labeled=1.0, alpha_unlabeled=1.0),
        confusion=Confusion("held_out"),
        arms=["selected"],
        central=None,
        communication=Communication(min_clients=min(clients, 2), timeout=900.0),
        deployment=Deployment(superlink=f"127.0.0.1:{port}", local=True),
    )


def run_in_process(settings: Settings) -> None:
    in_process.run(make_server_app(settings), make_client_app(settings), 2)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "selected" / "rounds.safetensors")


def until(condition: Callable[[], bool], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def processes_of(home: Path, *words: str) -> list[int]:
    """Flower's programs that run with keys of this folder, and whose command line holds the words."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if (
            str(home / "keys") in line
            and ("flower-" in line or "flwr-" in line)
            and all(word in line for word in words)
        ):
            found.append(int(entry.name))
    return found


def test_a_deployment_gives_what_one_process_gives(tmp_path: Path, port: int) -> None:
    settings = settings_of(tmp_path / "deployment", port)
    deployment.run(settings)
    assert processes_of(tmp_path / "deployment" / "flower") == []
    with socket.create_server(("127.0.0.1", port)):  # free again
        pass
    run_in_process(replace(settings, run_dir=str(tmp_path / "in_process")))
    ours, theirs = weights_of(tmp_path / "deployment"), weights_of(tmp_path / "in_process")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_reason_of_a_failed_run_is_told(tmp_path: Path, port: int) -> None:
    settings = settings_of(tmp_path, port)
    source = {"class_path": "HardDigitsSource", "init_args": {"num_train": -1}}
    with pytest.raises(RuntimeError, match="num_train"):
        deployment.run(replace(settings, source=source))
    assert processes_of(tmp_path / "flower") == []


@pytest.fixture
def started(tmp_path: Path, port: int) -> Iterator[LocalDeployment]:
    with local_deployment(tmp_path / "flower", "127.0.0.1", port, 1, 120.0) as local:
        yield local


def test_an_unknown_key_is_turned_away(tmp_path: Path, port: int, started: LocalDeployment) -> None:
    log = tmp_path / "flower" / "logs" / "supernode_00.log"
    until(lambda: "SuperNode ID" in log.read_text())
    authority = tmp_path / "flower" / "keys" / "ca.crt"
    stranger = write_node_key(tmp_path / "strange", "node")
    group = ProcessGroup()
    try:
        command = supernode_command(f"127.0.0.1:{port}", authority, stranger, 1, 2, port + 1)
        group.start(command, tmp_path / "stranger.log", environment(tmp_path / "strange"))
        until(lambda: "[code: 2004] Failed to activate SuperNode" in (tmp_path / "stranger.log").read_text(), 120.0)
        assert "SuperNode ID" not in (tmp_path / "stranger.log").read_text()
        superlink = (tmp_path / "flower" / "logs" / "superlink.log").read_text()
        assert "No SuperNode found with the given public key" in superlink
        # Nor does one get in that shows no key at all.
        at = command.index("--auth-supernode-private-key")
        nameless = group.start(
            command[:at] + command[at + 2 :], tmp_path / "nameless.log", environment(tmp_path / "strange")
        )
        until(lambda: nameless.poll() is not None or "Failed to" in (tmp_path / "nameless.log").read_text(), 120.0)
        assert "SuperNode ID" not in (tmp_path / "nameless.log").read_text()
    finally:
        group.stop()
    started.watch()  # those that belong here are still here


class Started:
    """A run in a process of its own, to be killed."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.log, self.home = log, Path(settings.run_dir) / "flower"
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, json.dumps(settings.to_plain())],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def says(self, words: str) -> bool:
        return words in self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start() -> Iterator[Callable[[Settings, Path], Started]]:
    started: list[Started] = []

    def begin(settings: Settings, log: Path) -> Started:
        started.append(Started(settings, log))
        return started[-1]

    yield begin
    for each in started:
        each.kill()


def test_a_killed_supernode_does_not_stop_the_run(
    tmp_path: Path, port: int, start: Callable[[Settings, Path], Started]
) -> None:
    settings = settings_of(tmp_path / "run", port, clients=3)
    run = start(settings, tmp_path / "log")
    until(lambda: run.says("classifier: round 1 of 2"))
    (victim,) = processes_of(run.home, "flower-supernode", "node_02")
    os.kill(victim, signal.SIGKILL)
    assert run.process.wait(timeout=1200) == 0, run.log.read_text()
    assert run.says("SuperNode 2 ended (-9)")
    assert read_manifest(tmp_path / "run") is not None
    assert processes_of(run.home) == []


def test_a_killed_run_leaves_no_process_and_goes_on(
    tmp_path: Path, port: int, start: Callable[[Settings, Path], Started]
) -> None:
    settings = settings_of(tmp_path / "run", port, rounds=3)
    run = start(settings, tmp_path / "log")
    until(lambda: run.says("classifier: round 2 of 3"))
    assert processes_of(run.home, "flwr-serverapp")
    run.kill()
    until(lambda: processes_of(run.home) == [], 30.0)
    again = start(settings, tmp_path / "again")
    assert again.process.wait(timeout=1200) == 0, again.log.read_text()
    assert not again.says("classifier: round 2 of 3")
    assert again.says("classifier: round 3 of 3")
    run_in_process(replace(settings, run_dir=str(tmp_path / "in_process")))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "in_process")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
