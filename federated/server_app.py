"""The server's side of a run: a Flower ServerApp that conducts the steps."""

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federated.settings import Settings


def make_server_app(settings: Settings | None = None) -> ServerApp:
    """Build the app.

    Args:
        settings: The run; None takes it from the configuration that Flower brings along (`settings`, as JSON).
    """
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        from federated.run import conduct

        conduct(grid, _settings_of(context.run_config) if settings is None else settings)

    return server


def _settings_of(run_config: Mapping[str, Any]) -> Settings:
    return Settings.from_plain(json.loads(str(run_config["settings"])))


app = make_server_app()
