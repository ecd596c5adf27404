"""`import callbacks` is cheap, and every public name is really there."""

import subprocess
import sys
from pathlib import Path

import pytest

import callbacks


def test_names_are_resolved_on_first_use() -> None:
    for name in callbacks.__all__:
        assert name in dir(callbacks)
        assert getattr(callbacks, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        getattr(callbacks, "Nothing")  # noqa: B009 - mypy knows that it does not exist
    code = "import sys, callbacks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(callbacks.__file__).parents[1])
