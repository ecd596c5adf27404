"""Flower's command line: the app that it hands to a SuperLink, how it reaches that, and what it answers."""

import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.atomic import write_atomically
from federated.settings import Settings

_CONNECTION = "run"
_APP = """\
[project]
name = "fewlight-federated"
version = "1.0.0"
description = "A federated run of fewlight"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fewlight"

[tool.flwr.app.components]
serverapp = "federated.server_app:app"
clientapp = "federated.client_app:app"

[tool.flwr.app.config]
settings = {settings}
"""


def program(name: str) -> str:
    """Where a program of Flower is: beside this Python, whether or not its environment is activated.

    Args:
        name: Its name.

    Raises:
        FileNotFoundError: It is not installed.
    """
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.is_file():
        msg = (
            f"Expected the program {name} in {path.parent}, but it is not there; run `pip install fewlight[federated]`."
        )
        raise FileNotFoundError(msg)
    return str(path)


def environment(home: Path) -> dict[str, str]:
    """Environment variables of a program of Flower.

    Args:
        home: What it writes, and reads its configuration from.
    """
    # It starts others of its programs by their names alone.
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    return {**os.environ, "PATH": path, "FLWR_HOME": str(home)}


class FlowerCli:
    """Flower's command line for one SuperLink.

    Args:
        home: Folder of its configuration and of the app, FLWR_HOME.
        superlink: Address of the SuperLink, host:port.
        root_certificates: File with the certificate that it is trusted by; None speaks without TLS.
    """

    def __init__(self, home: Path, superlink: str, root_certificates: Path | None) -> None:
        self.home = home
        lines = [
            "[superlink]",
            f'default = "{_CONNECTION}"',
            f"[superlink.{_CONNECTION}]",
            f"address = {_toml(superlink)}",
        ]
        certificates = "insecure = true"
        if root_certificates is not None:
            certificates = f"root-certificates = {_toml(str(root_certificates))}"
        write_atomically(home / "config.toml", "\n".join([*lines, certificates, ""]).encode())

    def start_run(self, settings: Settings) -> int:
        """Hand the app with these settings to the SuperLink. It has no code: every site has fewlight installed.

        Args:
            settings: Of the run.

        Returns:
            The number that the SuperLink gave the run.

        Raises:
            RuntimeError: The SuperLink refused it or was not there.
        """
        app = self.home / "app"
        # Twice JSON: a string of JSON in TOML, whose strings escape as those of JSON do.
        text = _APP.format(settings=_toml(json.dumps(settings.to_plain(), allow_nan=False)))
        write_atomically(app / "pyproject.toml", text.encode())
        return int(self.ask("run", str(app), _CONNECTION)["run-id"])

    def outcome(self, run: int) -> tuple[str, str]:
        """How a run stands.

        Args:
            run: Its number.

        Returns:
            Its status ("running", "finished:completed", "finished:failed", ...) and what there is to say about it.

        Raises:
            RuntimeError: The SuperLink was not there.
        """
        (found,) = self.ask("list", _CONNECTION, "--run-id", str(run))["runs"]
        return found["status"], found["status-details"]

    def register(self, public_key: Path) -> None:
        """Let the SuperNode in that has the private key.

        Args:
            public_key: File of the public key.

        Raises:
            RuntimeError: The SuperLink refused it or was not there.
        """
        self.ask("supernode", "register", str(public_key), _CONNECTION)

    def stop_run(self, run: int) -> None:
        """Stop a run.

        Args:
            run: Its number.

        Raises:
            RuntimeError: The SuperLink refused it or was not there.
        """
        self.ask("stop", str(run), _CONNECTION)

    def show_log(self, run: int, watch: Callable[[], None]) -> None:
        """Print what the ServerApp of a run prints, until that ends.

        Args:
            run: Its number.
            watch: Called twice a second; what it raises ends the printing.
        """
        command = [program("flwr"), "log", str(run), _CONNECTION, "--stream"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment(self.home)) as process:
            try:
                while process.poll() is None:
                    watch()
                    time.sleep(0.5)
            finally:
                process.kill()

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Run a command of `flwr` that answers with JSON.

        Args:
            arguments: Its arguments.

        Returns:
            The answer.

        Raises:
            RuntimeError: It failed; with what it said.
        """
        done = subprocess.run(
            [program("flwr"), *arguments, "--format", "json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment(self.home),
            check=False,
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {}
        if not answer.get("success"):
            said = answer.get("error-message") or done.stdout + done.stderr
            msg = f"`flwr {' '.join(arguments)}` failed: {' '.join(said.split())}"
            raise RuntimeError(msg)
        return answer


def _toml(text: str) -> str:
    # ASCII in, so that the escapes of JSON are all that is needed: TOML knows no surrogate pairs.
    return json.dumps(text, ensure_ascii=False)
