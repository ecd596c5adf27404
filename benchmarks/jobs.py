"""Runs of the command line, several at a time, each in a process with one thread."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from time import monotonic


@dataclass(frozen=True)
class Job:
    """One command line and the directory that it fills."""

    place: Path
    words: tuple[str, ...]


def is_done(job: Job) -> bool:
    """Whether a job's run is finished."""
    return (job.place / "manifest.json").is_file()


def run(job: Job) -> str:
    """Run a job in this process unless it is finished; an error carries what it printed."""
    if is_done(job):
        return f"done before: {job.place}"
    from lightning_modules.cli import main as lightning

    begun, output = monotonic(), StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            lightning(list(job.words))
    except (Exception, SystemExit) as error:
        msg = f"lightning {' '.join(job.words)} failed: {error}\n{output.getvalue()[-3000:]}"
        raise RuntimeError(msg) from None
    return f"finished in {monotonic() - begun:.0f} s: {job.place}"


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Run jobs in fresh processes with one thread each, and say when each is done."""
    os.environ |= {"OMP_NUM_THREADS": "1", "FEWLIGHT_STAGES_RAN": ""}
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, line in enumerate(pool.map(run, jobs), 1):
            print(f"{number}/{len(jobs)} {line}", file=sys.stderr, flush=True)
