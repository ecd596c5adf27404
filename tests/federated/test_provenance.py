"""A client knows which of its artifacts are of this run, whatever an earlier one left and whatever was lost."""

import shutil
from pathlib import Path

import pytest

from federated.provenance import Provenance


def write(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "manifest.json").write_text("{}")


def lacks(folder: Path, name: str, run: str = "a") -> bool:
    try:
        Provenance(folder, run).require([name])
    except FileNotFoundError as error:
        return f"`{name}` of this run in {folder}" in str(error)
    return False


def test_artifacts_are_those_of_the_run_that_made_them(tmp_path: Path) -> None:
    folder = tmp_path / "client"
    assert lacks(folder, "selected")
    assert not folder.exists()
    Provenance(folder, "a").require([])
    for name in ("pseudo_labels", "selected"):
        with Provenance(folder, "a").made(name):
            assert lacks(folder, name)
            write(folder, name)
    with Provenance(folder, "a").made("drawn"):  # nothing to draw is as good
        pass
    names = ("pseudo_labels", "selected", "drawn")
    assert not any(lacks(folder, name) for name in names)
    assert all(lacks(folder, name, "b") for name in names)
    with Provenance(folder, "b").made("selected"):
        write(folder, "selected")
    assert [[lacks(folder, name, run) for name in names] for run in "ab"] == [[False, True, False], [True, False, True]]
    shutil.rmtree(folder / "pseudo_labels")
    assert lacks(folder, "pseudo_labels")


def test_what_was_not_finished_is_no_artifact(tmp_path: Path) -> None:
    with Provenance(tmp_path, "a").made("drawn"):
        write(tmp_path, "drawn")
    with pytest.raises(KeyboardInterrupt), Provenance(tmp_path, "a").made("drawn"):
        raise KeyboardInterrupt
    assert lacks(tmp_path, "drawn")
