"""Every semi-supervised method, with arguments that make it fit for two moons: a new method is one entry here."""

from importlib import import_module
from typing import Any

from lightning_modules.ssl.base import Method

# Class path below lightning_modules.ssl, and arguments that differ from the method's own.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised.Supervised", {}),
    "fixmatch": ("fixmatch.FixMatch", {}),
}


def build(name: str) -> Method:
    """Return the method of an entry."""
    path, arguments = METHODS[name]
    module, class_name = path.rsplit(".", 1)
    method = getattr(import_module(f"lightning_modules.ssl.{module}"), class_name)(**arguments)
    if not isinstance(method, Method):
        msg = f"Expected {path} to be a Method, got {type(method).__name__}."
        raise TypeError(msg)
    return method
