"""`import datamodules` is cheap, and every public name is really there."""

import subprocess
import sys

import pytest

import datamodules


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, os, datamodules; print(os.environ['NO_ALBUMENTATIONS_UPDATE'], *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *modules = done.stdout.split()
    assert first == "1"
    assert not {"torch", "albumentations", "pytorch_lightning", "numpy", "PIL"} & set(modules)


@pytest.mark.parametrize("name", datamodules.__all__)
def test_public_names(name: str) -> None:
    value = getattr(datamodules, name)
    assert value.__name__ == name
    assert value.__module__.startswith("datamodules.")
    assert name in dir(datamodules)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'datamodules' has no attribute 'nothing'"):
        datamodules.nothing  # noqa: B018 - the access itself is the test
