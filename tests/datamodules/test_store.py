"""The image store: progress bar, and a store that cannot deliver."""

import io
from pathlib import Path

import pytest
from fake_data import write_folder
from rich.console import Console

from datamodules import FolderSegmentationDataModule, Pair
from datamodules.segmentation import store


@pytest.mark.parametrize(("after", "shown"), [(-1.0, True), (60.0, False)])
def test_progress_bar_comes_only_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float, shown: bool
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(store, "Console", lambda stderr: Console(file=screen, force_terminal=stderr))
    monkeypatch.setattr(store, "_BAR_AFTER_SECONDS", after)
    FolderSegmentationDataModule(str(write_folder(tmp_path, 3)), image_size=8).setup()
    assert ("decoding image/mask pairs" in screen.getvalue()) is shown


def test_store_without_images() -> None:
    empty = store.ImageStore([Pair("a", Path("a"))], [(1, 1)])
    with pytest.raises(ValueError, match="either `images` or `decode`"):
        empty.get(0)
