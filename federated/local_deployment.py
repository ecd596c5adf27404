"""A SuperLink and its SuperNodes on this machine: the rehearsal of a deployment, with TLS and authenticated nodes."""

import errno
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from federated import warm_clients
from federated.credentials import Certificates, write_certificates, write_node_key, write_secret
from federated.flower_cli import FlowerCli, environment, program
from federated.process_group import ProcessGroup

_LINES = 15  # of a log, in an error


class LocalDeployment:
    """What runs, and whether it still does.

    Args:
        cli: Command line that knows the SuperLink.
        servers: The SuperLink and what starts the ServerApp for it, by name.
        supernodes: The SuperNodes, in the order of their clients.
        logs: Folder of their logs.
    """

    def __init__(
        self,
        cli: FlowerCli,
        servers: "Mapping[str, subprocess.Popen[bytes]]",
        supernodes: "Sequence[subprocess.Popen[bytes]]",
        logs: Path,
    ) -> None:
        self.cli = cli
        self.servers = servers
        self.supernodes = supernodes
        self.logs = logs
        self._ended: set[int] = set()

    def watch(self) -> None:
        """Look after the processes: say which SuperNode ended, once, as the run goes on without it.

        Raises:
            RuntimeError: The SuperLink or its helper ended, or all SuperNodes did.
        """
        for name, server in self.servers.items():
            if server.poll() is not None:
                _raise_ended(name, server, _log(self.logs, name))
        for number, process in enumerate(self.supernodes):
            if process.poll() is not None and number not in self._ended:
                self._ended.add(number)
                print(
                    f"SuperNode {number} ended ({process.returncode}), see {_log(self.logs, _node(number))}", flush=True
                )
        if len(self._ended) == len(self.supernodes):
            last = len(self.supernodes) - 1
            _raise_ended(_node(last), self.supernodes[last], _log(self.logs, _node(last)))


@contextmanager
def local_deployment(home: Path, host: str, port: int, num_clients: int, wait: float) -> Iterator[LocalDeployment]:
    """Start a SuperLink and a SuperNode for each client, and stop them in the end; nothing outlives this process.

    Certificates and keys are new every time. A SuperNode whose key was not registered is turned away. Programs run in
    the current folder, so relative paths of data are those of this process.

    Args:
        home: FLWR_HOME: certificates, keys (for their owner only), logs and the app.
        host: Address of this machine that the SuperLink listens on.
        port: Port of the SuperLink.
        num_clients: Number of SuperNodes; `partition-id` counts them from 0.
        wait: Seconds to wait for the SuperLink.

    Yields:
        What runs.

    Raises:
        OSError: The port is in use, or a file could not be written.
        RuntimeError: The SuperLink did not start.
    """
    _expect_free(host, port)
    logs, keys = home / "logs", home / "keys"
    logs.mkdir(parents=True, exist_ok=True)
    certificates = write_certificates(keys, host)
    nodes = [write_node_key(keys, f"node_{number:02d}") for number in range(num_clients)]
    secret = keys / "superexec"
    write_secret(secret, secrets.token_bytes(32))
    cli = FlowerCli(home, f"{host}:{port}", certificates.authority)
    # What runs beside each other shares the cores; new work is looked for five times a second, not once.
    threads = str(max((os.cpu_count() or 1) // num_clients, 1))
    variables = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"} | environment(home)
    of_nodes = {"OMP_NUM_THREADS": threads} | variables
    of_nodes["PATH"] = os.pathsep.join((str(home / "bin"), of_nodes["PATH"]))
    # Its own temporary folder: the path of a socket may not be long.
    with TemporaryDirectory(prefix="fewlight-") as temporary, _stopped(ProcessGroup()) as group:
        address = Path(temporary) / "clients"
        warm_clients.write_program(home / "bin", address)
        group.start(warm_clients.command(address), _log(logs, "clients"), of_nodes)
        servers = {
            name: group.start(command, _log(logs, name), variables)
            for name, command in server_commands(host, port, certificates, secret).items()
        }
        _wait_for(servers["superlink"], host, port, _log(logs, "superlink"), wait)
        for key in nodes:
            cli.register(key.with_suffix(".pub"))
        with _free_ports(num_clients) as ports:
            commands = [
                supernode_command(f"{host}:{port}", certificates.authority, key, number, num_clients, own_port)
                for number, (key, own_port) in enumerate(zip(nodes, ports, strict=True))
            ]
        started = [group.start(each, _log(logs, _node(number)), of_nodes) for number, each in enumerate(commands)]
        yield LocalDeployment(cli, servers, started, logs)


def server_commands(host: str, port: int, certificates: Certificates, secret: Path) -> dict[str, list[str]]:
    """Command lines of a SuperLink that speaks TLS and lets in registered SuperNodes only, and of its helper.

    The helper starts the ServerApp. A SuperLink that starts it itself puts it into a session of its own, which outlives
    a SuperLink that is killed.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        certificates: The SuperLink's.
        secret: File with what the helper proves itself with.

    Returns:
        The command lines by the names "superlink" and "superexec".
    """
    listen = ["--host", host, "--port", str(port), "--isolation", "process"]
    tls = ["--ssl-ca-certfile", str(certificates.authority), "--ssl-certfile", str(certificates.server)]
    tls += ["--ssl-keyfile", str(certificates.server_key)]
    proof = ["--superexec-auth-secret-file", str(secret)]
    switches = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    reach = ["--runtime-api-address", f"{host}:{port}", "--root-certificates", str(certificates.authority)]
    return {
        "superlink": [program("flower-superlink"), *listen, *tls, *proof, *switches],
        "superexec": [program("flower-superexec"), *reach, *proof],
    }


def supernode_command(
    superlink: str, authority: Path, key: Path, number: int, num_clients: int, own_port: int
) -> list[str]:
    """Command line of a SuperNode.

    Args:
        superlink: Address of the SuperLink, host:port.
        authority: File of the certificate that the SuperLink is trusted by.
        key: File of its private key.
        number: Number of its client.
        num_clients: Number of clients.
        own_port: Port of this machine for its own processes.
    """
    reach = ["--superlink", superlink, "--root-certificates", str(authority)]
    proof = ["--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(own_port)]
    config = f"partition-id={number} num-partitions={num_clients}"
    return [program("flower-supernode"), *reach, *proof, "--node-config", config]


@contextmanager
def _stopped(group: ProcessGroup) -> Iterator[ProcessGroup]:
    try:
        yield group
    finally:
        group.stop()


def _expect_free(host: str, port: int) -> None:
    try:
        _bound(host, port).close()
    except OSError as error:
        msg = (
            f"Expected `deployment.superlink` to be an address of this machine that is free, got {host}:{port} "
            f"({error.strerror}); choose another port, or leave out `deployment.local` to use the SuperLink that runs "
            "there."
        )
        raise OSError(error.errno or errno.EADDRINUSE, msg) from error


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


@contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    with ExitStack() as stack:  # held together, so that all differ
        yield [stack.enter_context(_bound("127.0.0.1", 0)).getsockname()[1] for _ in range(count)]


def _wait_for(process: "subprocess.Popen[bytes]", host: str, port: int, log: Path, wait: float) -> None:
    end = time.monotonic() + wait
    while process.poll() is None:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
        except OSError as error:
            if time.monotonic() > end:
                msg = f"Expected the SuperLink to listen on {host}:{port} within {wait:g} s; see {log}."
                raise RuntimeError(msg) from error
            time.sleep(0.1)
        else:
            return
    _raise_ended("superlink", process, log)


def _raise_ended(name: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    last = "\n".join(log.read_text(errors="replace").splitlines()[-_LINES:])
    msg = f"Expected {name} to run until the run is over, but it ended ({process.returncode}); {log} ends with:\n{last}"
    raise RuntimeError(msg)


def _node(number: int) -> str:
    return f"supernode_{number:02d}"


def _log(logs: Path, name: str) -> Path:
    return logs / f"{name}.log"
