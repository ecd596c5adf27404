"""`lightning federate`: read the settings, look whether they can work, run them where they ask to."""

import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from datamodules.classification.client_part import ClientPart
from federated.parsing import read
from federated.roles import build_data, build_module, build_source
from federated.settings import Settings
from federated.tasks import FitTask, RoleName
from lightning_modules.command_line import refuse
from lightning_modules.lightning_cli import ChecksEarly

_OWN = ("federated", "lightning_modules", "datamodules", "callbacks")


def run(words: Sequence[str]) -> None:
    """Run what a command line asks for; the table of results is printed in the end.

    Args:
        words: The command line behind `federate`.

    Raises:
        SystemExit: The command line or the settings cannot work (code 2), Flower is not there or the run failed
            (code 1), or it was interrupted (code 130).
        Exception: A bug, with all that Python tells of it.
    """
    if find_spec("flwr") is None:
        _fail("expected Flower for `lightning federate`, but it is not installed; pip install 'fewlight[federated]'")
    settings = read(words)
    try:
        _try_out(settings)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        refuse(str(error))
    # Of each round Flower says several lines; what is asked for is the progress that the steps print.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    try:
        federate(settings)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on at the last finished round", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError) as error:
        if not _is_told(error):
            raise
        _fail(str(error))


def federate(settings: Settings) -> None:
    """Run settings on their engine; what `lightning federate` does after it has read them.

    Args:
        settings: The run; its folder holds everything in the end.

    Raises:
        RuntimeError: Too few clients answered, or a deployment failed.
        ValueError: Clients do not fit together, or none has labels.
        OSError: Images or certificates are missing, or a port is in use.
    """
    if settings.engine == "deployment":
        from federated import deployment

        deployment.run(settings)
        return
    from federated import in_process, simulation
    from federated.client_app import make_client_app
    from federated.server_app import make_server_app

    engine = simulation if settings.engine == "simulation" else in_process
    # `check` has seen that there is a split.
    clients = settings.split.num_clients if settings.split is not None else 0
    engine.run(make_server_app(settings), make_client_app(settings), clients)


def _try_out(settings: Settings) -> None:
    """Build each module, and the data of one client, so that a mistake in the last step does not show after hours.

    Raises:
        ValueError: Something of it cannot be built, or does not fit.
        OSError: Images or certificates are missing.
        ModuleNotFoundError: The engine is not installed.
    """
    if settings.engine == "simulation":
        from federated.simulation import require_ray

        require_ray()
    if settings.engine == "deployment":
        from federated.deployment import check

        check(settings)
    if settings.split is None or (settings.engine == "deployment" and not settings.deployment.local):
        return  # the images are elsewhere
    source = build_source(settings, {})
    source.check()
    part = ClientPart(source, 0, settings.split, None, settings.confusion.folds)
    names: tuple[RoleName, ...] = ("classifier", "noisy_classifier", "generator")
    for name in names:
        role = getattr(settings, name)
        if role is not None:
            build_module(role, len(source.class_names), None, settings.seed)
            data = build_data(role, FitTask(name, name), part, Path(settings.run_dir), settings.seed)
            if isinstance(data, ChecksEarly):
                data.check()


def _is_told(error: BaseException) -> bool:
    """Whether an error is one of ours, whose words say all there is to say; others come with a traceback."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).split(".")[0] in _OWN


def _fail(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(1)
