"""A federated run on a SuperLink and its SuperNodes."""

import ipaddress
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from federated.flower_cli import FlowerCli
from federated.local_deployment import local_deployment
from federated.settings import Settings


def run(settings: Settings) -> None:
    """Hand the run to the SuperLink and follow it to its end.

    The steps run where the SuperLink is: `run_dir` is a folder there, where a relative one is below the folder that
    the SuperLink was started in. Ctrl-C stops the run; where this process is killed, a run on a SuperLink goes on, but
    one on a SuperLink of `deployment.local` ends with it. Either way the next one goes on at the last finished round.

    Args:
        settings: Of the run.

    Raises:
        ValueError: The address or what protects it does not fit, see `check`.
        FileNotFoundError: The file of root certificates or Flower's programs are not there.
        OSError: `deployment.local`: the port is in use; or a file could not be written.
        RuntimeError: The run failed, was stopped, or the SuperLink could not be reached.
    """
    host, port = check(settings)
    where = settings.deployment
    home = Path(settings.run_dir).expanduser().resolve() / "flower"
    if _is_this_machine(host):
        # The programs of a SuperLink may run in another folder than this.
        settings = replace(settings, run_dir=str(home.parent))
    with ExitStack() as stack:
        watch: Callable[[], None] = _nothing
        if where.local:
            clients = settings.split.num_clients if settings.split is not None else 1
            local = stack.enter_context(local_deployment(home, host, port, clients, settings.communication.wait))
            cli, watch = local.cli, local.watch
        else:
            trusted = Path(where.root_certificates).expanduser().resolve() if where.root_certificates else None
            cli = FlowerCli(home, where.superlink, trusted)
        _follow(cli, settings, watch)


def check(settings: Settings) -> tuple[str, int]:
    """Refuse what cannot work or is not safe, before anything starts.

    Args:
        settings: Of the run.

    Returns:
        Host and port of the SuperLink.

    Raises:
        ValueError: The address is none; it is on another machine and nothing protects it; `deployment.local` has no
            split to count its clients by, is on another machine, or is to use certificates other than its own.
        FileNotFoundError: The file of root certificates is not there.
    """
    where = settings.deployment
    host, port = _address(where.superlink)
    if where.local:
        _check_local(settings, host)
    elif where.root_certificates is not None:
        _check_trust(where.root_certificates, where.insecure)
    elif not where.insecure and not _is_this_machine(host):
        msg = (
            f"Expected `deployment.root_certificates` for a SuperLink on another machine, got none for {host}; give "
            "the certificate of its authority, or set `deployment.insecure` in a network that you trust."
        )
        raise ValueError(msg)
    return host, port


def _check_trust(root_certificates: str, insecure: bool) -> None:
    if insecure:
        msg = (
            "Expected `deployment.root_certificates` or `deployment.insecure`, got both; leave out what the SuperLink "
            "does not do."
        )
        raise ValueError(msg)
    if not Path(root_certificates).expanduser().is_file():
        msg = f"Expected `deployment.root_certificates` to be a file, got {root_certificates}; correct the path."
        raise FileNotFoundError(msg)


def _check_local(settings: Settings, host: str) -> None:
    where = settings.deployment
    if not _is_this_machine(host) or ":" in host:
        msg = (
            "Expected `deployment.superlink` to be an IPv4 address of this machine where `deployment.local` is set, "
            f"got {host}; take 127.0.0.1, or leave out `deployment.local`."
        )
        raise ValueError(msg)
    if settings.split is None:
        msg = (
            "Expected `split` to say how many clients `deployment.local` starts, got none; set split.num_clients, or "
            "start the SuperNodes with their own data yourself and leave out `deployment.local`."
        )
        raise ValueError(msg)
    if where.root_certificates is not None or where.insecure:
        msg = (
            "Expected neither `deployment.root_certificates` nor `deployment.insecure` where `deployment.local` is "
            "set, as it makes its own certificates; leave them out."
        )
        raise ValueError(msg)


def _address(superlink: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{superlink}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.netloc != superlink or parts.username is not None:
        msg = f"Expected `deployment.superlink` to be host:port, got {superlink!r}; write it like 127.0.0.1:8000."
        raise ValueError(msg)
    return host, port


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _nothing() -> None:
    """There are no processes of ours to look after."""


def _follow(cli: FlowerCli, settings: Settings, watch: Callable[[], None]) -> None:
    run = cli.start_run(settings)
    print(f"run {run} on {settings.deployment.superlink}", flush=True)
    try:
        cli.show_log(run, watch)
        status, details = cli.outcome(run)
        while not status.startswith("finished"):  # the connection of the log broke
            time.sleep(2.0)
            watch()
            status, details = cli.outcome(run)
    except KeyboardInterrupt:
        cli.stop_run(run)
        raise
    if status != "finished:completed":
        msg = f"Expected the run {run} to finish, but it is {status}: {details}"
        raise RuntimeError(msg)
