"""Processes that end together, at the latest when the process that started them does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Reads until the last writer of the pipe is gone, which is this process however it ends, and takes the group along.
# It ignores what a terminal or `stop` says to the others: someone has to be left who ends the group.
_GUARD = (
    "import os, signal, sys\n"
    "for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(each, signal.SIG_IGN)\n"
    "sys.stdin.buffer.read()\n"
    "os.killpg(os.getpid(), signal.SIGKILL)\n"
)


class ProcessGroup:
    """Processes in a process group of their own, with all that they start.

    A guard leads the group. It waits for a pipe to close that only this process holds, and then kills the group: so
    nothing is left when this process is killed, either. Ctrl-C in a terminal reaches this process only.
    """

    def __init__(self) -> None:
        # -I -S: not the guard's concern what is installed or set here, and it starts at once.
        command = [sys.executable, "-I", "-S", "-c", _GUARD]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def number(self) -> int:
        """The id of the group."""
        return self._guard.pid

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a process in the group.

        Args:
            command: Its command line.
            log: File that its output replaces.
            environment: All its environment variables.

        Returns:
            The process.
        """
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=self.number,
            )
        self._processes.append(process)
        return process

    def stop(self, patience: float = 5.0) -> None:
        """Ask all processes to end, then kill what is left of the group.

        Args:
            patience: Seconds that they have to end by themselves.
        """
        for process in self._processes:
            process.terminate()
        end = time.monotonic() + patience
        try:
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(end - time.monotonic(), 0.0))
        finally:  # a second Ctrl-C cuts the patience short, no more
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.number, signal.SIGKILL)
            for process in (*self._processes, self._guard):
                process.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
