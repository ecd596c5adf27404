"""Writing files whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from datamodules.atomic import write_atomically, write_json_atomically


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    write_atomically(str(path), b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.bin"]


def test_json_is_readable_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomically(path, {"name": "Läsion", "value": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Läsion", "value": None}
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json_atomically(path, {"value": float("nan")})
    assert "Läsion" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    monkeypatch.setattr(Path, step, full, raising=False)
    with pytest.raises(OSError, match=r"`path` .*file.bin: No space left.*Free some space") as caught:
        write_atomically(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.bin", b"new")
    assert names(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"taken.*remove the file that is in the way"):
        write_atomically(tmp_path / "taken" / "file.bin", b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="remove that folder"):
        write_atomically(tmp_path / "folder", b"new")
    assert names(tmp_path) == ["folder", "taken"]
