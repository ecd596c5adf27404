"""What a deployment is made of, without Flower's programs: command lines, files, addresses, process groups."""

import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from datamodules.partition import ClientSplit
from federated import deployment, flower_cli
from federated.credentials import Certificates, write_certificates, write_node_key
from federated.flower_cli import FlowerCli
from federated.local_deployment import local_deployment, server_commands, supernode_command
from federated.process_group import ProcessGroup
from federated.settings import Deployment, Role, Settings


def settings_of(folder: Path, where: Deployment, split: ClientSplit | None = None) -> Settings:
    odd = {"class_path": "x.Y", "init_args": {"root": "a \"b\" \\ 'c' \u00e9 \U0001f600\n\x7f"}}
    return Settings(source=odd, classifier=Role({}, {}), run_dir=str(folder), split=split, deployment=where)


def test_settings_reach_the_app_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(_: FlowerCli, *arguments: str) -> dict[str, Any]:
        asked.append(arguments)
        return {"success": True, "run-id": "7"}

    monkeypatch.setattr(FlowerCli, "ask", ask)
    settings = settings_of(tmp_path, Deployment())
    assert FlowerCli(tmp_path, "127.0.0.1:8000", None).start_run(settings) == 7
    app = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert Settings.from_plain(json.loads(app["config"]["settings"])) == settings
    assert app["components"] == {"serverapp": "federated.server_app:app", "clientapp": "federated.client_app:app"}
    assert asked == [("run", str(tmp_path / "app"), "run")]


@pytest.mark.parametrize("trusted", [None, 'ca "1".crt'])
def test_the_connection_is_the_default_one(tmp_path: Path, trusted: str | None) -> None:
    FlowerCli(tmp_path, "hospital.example:9443", None if trusted is None else tmp_path / trusted)
    superlinks = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]
    protection = {"insecure": True} if trusted is None else {"root-certificates": str(tmp_path / trusted)}
    assert superlinks[superlinks["default"]] == {"address": "hospital.example:9443", **protection}


def fake_flwr(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "flwr").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "flwr").chmod(0o755)
    monkeypatch.setattr(flower_cli, "program", lambda name: str(folder / name))


def test_what_flower_says_of_a_failure_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = FlowerCli(tmp_path, "127.0.0.1:8000", None)
    fake_flwr(
        tmp_path, monkeypatch, """echo '{"success": false, "error-message": "no such\n key"}'""".replace("\n", "")
    )
    with pytest.raises(RuntimeError, match=r"`flwr stop 3 run` failed: no such key"):
        cli.stop_run(3)
    fake_flwr(tmp_path, monkeypatch, "echo 'a\n  box' >&2; exit 1")
    with pytest.raises(RuntimeError, match="failed: a box"):
        cli.register(tmp_path / "key.pub")


def test_programs_find_their_folder_and_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    variables = flower_cli.environment(tmp_path)
    scripts = str(Path(flower_cli.program("flower-superexec")).parent)
    assert variables["PATH"] == f"{scripts}{os.pathsep}/nowhere"
    assert variables["FLWR_HOME"] == str(tmp_path)
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
    with pytest.raises(FileNotFoundError, match="program flower-no"):
        flower_cli.program("flower-no")


def handshake(made: Certificates, name: str) -> str | None:
    """Name of the server's certificate as a client sees it that trusts the authority and expects `name`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.server, made.server_key)
    client = ssl.create_default_context(cafile=made.authority)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as connection:
                connection.recv(1)
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as connection:
            found = connection.version()
            connection.sendall(b"x")
    finally:
        ours.close()
        thread.join()
    return found


def test_certificates_hold_for_their_host_only(tmp_path: Path) -> None:
    made = write_certificates(tmp_path / "keys", "127.0.0.1")
    assert handshake(made, "127.0.0.1") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, "127.0.0.2")
    named = write_certificates(tmp_path / "other", "localhost")
    assert handshake(named, "localhost") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(Certificates(made.authority, named.server, named.server_key), "localhost")
    server, authority = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (made.server, made.authority))
    server.verify_directly_issued_by(authority)


def test_private_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write_certificates(keys, "127.0.0.1")
    path = write_node_key(keys, "node_00")
    private = load_ssh_private_key(path.read_bytes(), None)
    public = load_ssh_public_key((keys / "node_00.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert private.public_key() == public
    assert public.curve.name == "secp384r1"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    secrets = {each.name for each in keys.iterdir() if b"PRIVATE KEY" in each.read_bytes()}
    assert secrets == {"server.key", "node_00"}  # none of the authority: nobody can sign in its name any more
    assert {stat.S_IMODE((keys / name).stat().st_mode) for name in secrets} == {0o600}


def test_command_lines_demand_tls_and_known_nodes(tmp_path: Path) -> None:
    made = Certificates(tmp_path / "ca", tmp_path / "crt", tmp_path / "key")
    commands = server_commands("127.0.0.1", 8000, made, tmp_path / "secret")
    node = supernode_command("127.0.0.1:8000", made.authority, tmp_path / "node", 3, 5, 9099)
    for command in (*commands.values(), node):
        assert "--insecure" not in command
        assert str(made.authority) in command
    assert "--enable-supernode-auth" in commands["superlink"]
    assert "--disable-runtime-dependency-installation" in commands["superlink"]
    assert node[node.index("--auth-supernode-private-key") + 1] == str(tmp_path / "node")
    assert node[node.index("--node-config") + 1] == "partition-id=3 num-partitions=5"


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = Deployment(superlink=f"127.0.0.1:{port}", local=True)
        with pytest.raises(OSError, match=f"address of this machine that is free, got 127.0.0.1:{port}"):
            deployment.run(settings_of(tmp_path, where, ClientSplit(num_clients=2)))
        with (
            pytest.raises(OSError, match="choose another port"),
            local_deployment(tmp_path / "flower", "127.0.0.1", port, 2, 1.0),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


SPLIT = ClientSplit(num_clients=2)


@pytest.mark.parametrize(
    ("where", "split", "message"),
    [
        (Deployment(superlink="hospital.example"), None, "to be host:port, got 'hospital.example'"),
        (Deployment(superlink="hospital.example:x"), None, "to be host:port"),
        (Deployment(superlink="https://hospital.example:1"), None, "to be host:port"),
        (Deployment(superlink="hospital.example:9443"), None, "for a SuperLink on another machine"),
        (Deployment(superlink="10.0.0.7:9443"), None, "for a SuperLink on another machine"),
        (Deployment(root_certificates="ca.crt", insecure=True), None, "got both"),
        (Deployment(superlink="10.0.0.7:9443", local=True), SPLIT, "an IPv4 address of this machine"),
        (Deployment(local=True), None, "Expected `split`"),
        (Deployment(local=True, insecure=True), SPLIT, "makes its own certificates"),
        (Deployment(local=True, root_certificates="ca.crt"), SPLIT, "makes its own certificates"),
    ],
)
def test_what_is_not_safe_or_cannot_work_is_refused(
    tmp_path: Path, where: Deployment, split: ClientSplit | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        deployment.run(settings_of(tmp_path, where, split))
    assert list(tmp_path.iterdir()) == []


def test_certificates_have_to_be_there(tmp_path: Path) -> None:
    where = Deployment(superlink="hospital.example:9443", root_certificates=str(tmp_path / "ca.crt"))
    with pytest.raises(FileNotFoundError, match="root_certificates` to be a file"):
        deployment.check(settings_of(tmp_path, where))
    (tmp_path / "ca.crt").touch()
    assert deployment.check(settings_of(tmp_path, where)) == ("hospital.example", 9443)
    insecure = Deployment(superlink="hospital.example:9443", insecure=True)
    assert deployment.check(settings_of(tmp_path, insecure)) == ("hospital.example", 9443)
    assert deployment.check(settings_of(tmp_path, Deployment())) == ("127.0.0.1", 8000)


class FakeCli:
    """Plays a SuperLink whose run passes through `states` each time that it is asked."""

    def __init__(self, states: list[tuple[str, str]], show: Callable[[], None]) -> None:
        self.states, self.show, self.stopped = states, show, list[int]()

    def start_run(self, settings: Settings) -> int:
        self.run_dir = settings.run_dir
        return 5

    def show_log(self, run: int, watch: Callable[[], None]) -> None:
        watch()
        self.show()

    def outcome(self, run: int) -> tuple[str, str]:
        return self.states.pop(0)

    def stop_run(self, run: int) -> None:
        self.stopped.append(run)


def follow(cli: FakeCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "FlowerCli", lambda *_: cli)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    deployment.run(settings_of(tmp_path / "run", Deployment()))


def test_a_run_is_followed_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = FakeCli([("running", ""), ("running", ""), ("finished:completed", "")], lambda: None)
    monkeypatch.chdir(tmp_path)
    follow(cli, Path(), monkeypatch)
    assert cli.states == []
    assert cli.run_dir == str(tmp_path / "run")


def test_the_error_of_a_failed_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = FakeCli([("finished:failed", "ServerApp failed: Expected labels, got none.")], lambda: None)
    with pytest.raises(RuntimeError, match=r"run 5 .* finished:failed: .*Expected labels, got none\."):
        follow(cli, tmp_path, monkeypatch)


def test_an_interrupted_run_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:  # as Ctrl-C has it, whatever handler another test has left
        raise KeyboardInterrupt

    cli = FakeCli([], interrupted)
    with pytest.raises(KeyboardInterrupt):
        follow(cli, tmp_path, monkeypatch)
    assert cli.stopped == [5]


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended but that nobody asked for does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 20
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(lives, pids))


STUBBORN = "trap '' TERM INT; sleep 300 & echo $! $$; while :; do sleep 300; done"


def pids_in(log: Path) -> list[int]:
    end = time.monotonic() + 20
    while not log.is_file() or not log.read_text().endswith("\n"):
        assert time.monotonic() < end
        time.sleep(0.02)
    return [int(pid) for pid in log.read_text().split()]


def test_stop_takes_grandchildren_and_the_stubborn(tmp_path: Path) -> None:
    group = ProcessGroup()
    group.start(["sh", "-c", STUBBORN], tmp_path / "log", os.environ)
    pids = [*pids_in(tmp_path / "log"), group.number]
    assert len(pids) == 3
    assert all(map(lives, pids))
    assert all(os.getpgid(pid) == group.number for pid in pids)
    group.stop(patience=0.1)
    assert gone(pids)


def test_a_group_ends_with_a_killed_parent(tmp_path: Path) -> None:
    text = (
        "import os, sys, time; from pathlib import Path; from federated.process_group import ProcessGroup\n"
        "ProcessGroup().start(['sh', '-c', sys.argv[1]], Path(sys.argv[2]), os.environ); time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", text, STUBBORN, str(tmp_path / "log")])
    pids = pids_in(tmp_path / "log")
    assert all(map(lives, pids))
    parent.kill()
    parent.wait()
    assert gone(pids)
