"""The roles of fewlight across clients that may not share images, on Flower (`pip install 'fewlight[federated]'`)."""

import os

# Flower reports usage, looks for updates and installs an app's dependencies unless told otherwise; Ray reports, too.
# Set before either is imported. Whoever wants one of them sets the variable.
for _name, _value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
):
    os.environ.setdefault(_name, _value)
