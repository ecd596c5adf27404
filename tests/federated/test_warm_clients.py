"""Forks in place of fresh processes: they get the arguments, write where they are told to, and leave no trace."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from federated import warm_clients
from federated.process_group import ProcessGroup

# Plays Flower's program, as the real one takes seconds to import.
SERVER = """\
import os, sys
from pathlib import Path
from federated import warm_clients

seen = []

def run():
    seen.append(1)
    print(*sys.argv, os.getpid(), len(seen))
    print("aside", file=sys.stderr)
    if "bad" in sys.argv:
        raise ValueError("bad")

warm_clients._clientapp = lambda: run
warm_clients.serve(Path(sys.argv[1]))
"""


def ask(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    program = str(folder / "bin" / "flwr-clientapp")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "real").write_text('#!/bin/sh\necho real "$@"\n')
    (tmp_path / "real").chmod(0o755)
    monkeypatch.setattr(warm_clients, "program", lambda _: str(tmp_path / "real"))
    warm_clients.write_program(tmp_path / "bin", tmp_path / "socket")
    return tmp_path


@pytest.mark.slow
def test_forks_do_what_the_program_does(folder: Path) -> None:
    group = ProcessGroup()
    try:
        server = group.start([sys.executable, "-c", SERVER, str(folder / "socket")], folder / "log", os.environ)
        while not (folder / "socket").exists():
            assert server.poll() is None
            time.sleep(0.02)
        answers = [ask(folder, "--token", "a b"), ask(folder, "bad"), ask(folder, "--token", "c")]
    finally:
        group.stop(patience=0.0)
    words = [answer.stdout.split() for answer in answers]
    assert [each[:-2] for each in words] == [
        ["flwr-clientapp", "--token", "a", "b"],
        ["flwr-clientapp", "bad"],
        ["flwr-clientapp", "--token", "c"],
    ]
    assert len({int(each[-2]) for each in words} | {server.pid}) == 4  # a process each
    assert [each[-1] for each in words] == ["1", "1", "1"]  # nothing is left of the one before
    assert answers[0].stderr == "aside\n"
    assert answers[1].stderr.endswith("ValueError: bad\n")


def test_without_the_process_it_is_the_program_itself(folder: Path) -> None:
    assert ask(folder, "--token", "a  b").stdout == "real --token a  b\n"
