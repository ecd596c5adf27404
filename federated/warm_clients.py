"""ClientApps of all SuperNodes of one machine, forked from a process that has imported everything.

A SuperNode starts the program `flwr-clientapp` for every message, which takes seconds to import PyTorch and Lightning:
with several clients on a few cores that is nearly all of a round. Here a program of that name, found before Flower's
own, asks the process of this module for a fork of itself that does what Flower's program does. Where there is no such
process, it becomes Flower's program.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

from datamodules.atomic import write_atomically
from federated.flower_cli import program

_NAME = "flwr-clientapp"
_LARGEST = 1 << 16
_SHIM = """\
#!{python} -IS
import json, os, socket, sys
try:
    asked = socket.socket(socket.AF_UNIX)
    asked.connect({address!r})
    socket.send_fds(asked, [json.dumps(sys.argv[1:]).encode()], [1, 2])
except OSError:
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
asked.recv(1)  # until the fork ends
"""


def write_program(folder: Path, address: Path) -> None:
    """Write the program that asks for a fork.

    Args:
        folder: Folder to be searched before that of Flower's programs.
        address: Socket of the process that forks.

    Raises:
        OSError: It could not be written.
    """
    text = _SHIM.format(python=sys.executable, address=str(address), real=program(_NAME))
    write_atomically(folder / _NAME, text.encode())
    (folder / _NAME).chmod(0o700)


def command(address: Path) -> list[str]:
    """Command line of the process that forks.

    Args:
        address: Its socket; only the owner may reach its folder.
    """
    # -P: the current folder is no place to import from, as it is none for Flower's program.
    return [sys.executable, "-P", "-m", "federated.warm_clients", str(address)]


def serve(address: Path) -> NoReturn:
    """Fork a ClientApp whenever one is asked for.

    Args:
        address: Socket to listen on.
    """
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen(128)  # who asks before all is imported waits
        run = _clientapp()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        while True:
            asked, _ = listening.accept()
            with asked:
                message, outputs, _, _ = socket.recv_fds(asked, _LARGEST, 2)
                if os.fork() == 0:
                    listening.close()
                    _become(run, json.loads(message), outputs)
                for output in outputs:
                    os.close(output)


def _clientapp() -> Callable[[], object]:
    import_module("federated.client_app")  # and with it nearly all that clients need
    (found,) = entry_points(group="console_scripts", name=_NAME)
    run: Callable[[], object] = found.load()
    return run


def _become(run: Callable[[], object], arguments: list[str], outputs: list[int]) -> NoReturn:
    """In the fork: be Flower's program. The socket closes with it, which is how the asking one knows."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
            os.close(output)
        sys.argv = [_NAME, *arguments]
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # nobody above prints it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
