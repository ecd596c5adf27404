"""Server and clients in Flower's own simulation: clients are dealt out to processes by Ray."""

import logging
import os
from importlib.util import find_spec

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation


def run(server_app: ServerApp, client_app: ClientApp, num_clients: int) -> None:
    """Run a server in this process and its clients in others, one a core.

    Where there is a GPU, a client has one for itself.

    Args:
        server_app: The server.
        client_app: What every client runs.
        num_clients: Number of clients.

    Raises:
        ModuleNotFoundError: There is no Ray.
        Exception: What the server raised.
    """
    require_ray()
    raised: list[BaseException] = []
    guarded = ServerApp()

    @guarded.main()
    def main(grid: Grid, context: Context) -> None:
        # Flower runs it in a thread, whose exceptions get lost when the simulation itself fails after them.
        try:
            server_app(grid, context)
        except BaseException as error:
            raised.append(error)

    logger = logging.getLogger("flwr")
    # Flower adds the folders of this process to the first for its workers; the other one stops Ray's advertising it.
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logger.addFilter(_is_news)
    try:
        run_simulation(
            guarded,
            client_app,
            num_clients,
            backend_config={
                "init_args": {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 1.0 if torch.cuda.is_available() else 0.0},
            },
        )
    finally:
        logger.removeFilter(_is_news)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    if raised:
        raise raised[0]


def require_ray() -> None:
    """Look whether Flower's simulation can run.

    Raises:
        ModuleNotFoundError: There is no Ray.
    """
    if find_spec("ray") is None:
        msg = (
            "Expected Ray for `engine` simulation, but it is not installed; pip install 'fewlight[simulation]', or "
            "take `engine: in_process`."
        )
        raise ModuleNotFoundError(msg)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of Flower's log says anything but that this way of running it may go some day."""
    return "DEPRECATED FEATURE" not in record.getMessage()
