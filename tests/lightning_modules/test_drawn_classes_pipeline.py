"""Digits drawn by configs/tdsm_digits.yaml and configs/draw_digits.yaml, killed while they are drawn."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_runs import smaller
from drawing_runs import files, killed
from torch import Tensor
from torchvision.datasets import ImageFolder

from datamodules.synthetic_images import read
from lightning_modules import TDSMDiffusion
from lightning_modules.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
PER_CLASS, BLOCK = 3, 3  # ten blocks
HOW = {"images_per_class": PER_CLASS, "num_classes": 10, "image_size": 8, "batch_size": BLOCK, "num_steps": 4}
NETWORKS = {"network": smaller({"class_path": "UViT"}), "classifier": smaller({"class_path": "NoisyResNet"})}
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "")


def _lightning(folder: Path, *words: str) -> None:
    """Run a command in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(list(words))


def _fit(folder: Path) -> list[str]:
    """The command of a fit of two steps that measures nothing."""
    writer = {"output_dir": "runs/tdsm_digits/images", "request": {**HOW, "num_images": None}}
    content = {
        "model": {"init_args": NETWORKS | {"classifier_from": None}},
        "data": {"init_args": {"batch_size": 4, "steps_per_epoch": 1}},
        "test_after_fit": False,
        "trainer": QUIET | {"max_steps": 2, "callbacks": [{"class_path": "SyntheticImageWriter", "init_args": writer}]},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(CONFIGS / "tdsm_digits.yaml"), "--overlay", "fit.yaml", "--stages", "null"]


def _predict(folder: Path, target: str) -> list[str]:
    content = {"model": {"init_args": NETWORKS}, "data": {"init_args": HOW}, "trainer": QUIET}
    (folder / "draw.yaml").write_text(yaml.safe_dump(content))
    where = ["--trainer.callbacks.init_args.output_dir", target]
    return ["predict", "--config", str(CONFIGS / "draw_digits.yaml"), "--overlay", "draw.yaml", *where]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run of two steps; only new things are to be written there."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWLIGHT_STAGES_RAN", "")
        _lightning(folder, *_fit(folder))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Seeds that this process draws, one list a block; not of the trial before a fit, a single image."""
    seen: list[list[int]] = []
    draw = TDSMDiffusion.draw

    def listening(self: TDSMDiffusion, request: Mapping[str, Any]) -> dict[str, Tensor]:
        if len(request["seed"]) > 1:
            seen.append(request["seed"].tolist())
        return draw(self, request)

    monkeypatch.setattr(TDSMDiffusion, "draw", listening)
    return seen


def _require_whole(folder: Path, first_seed: int) -> None:
    """An image folder of torchvision's that holds each image of each class."""
    images = ImageFolder(str(folder))
    assert images.classes == list("0123456789")
    assert Counter(images.targets) == dict.fromkeys(range(10), PER_CLASS)
    picture, label = images[4]
    assert (picture.size, label) == ((8, 8), 1)
    seeds = [row.seed for row in read(folder, "classes").rows]
    assert seeds == list(range(first_seed, first_seed + 10 * PER_CLASS))
    assert len({path.read_bytes() for path in folder.glob("*/*.png")}) == 10 * PER_CLASS


def test_a_kill_while_digits_are_drawn_loses_and_doubles_none(fitted: Path, asked: list[list[int]]) -> None:
    _lightning(fitted, *_predict(fitted, "whole"))
    blocks = list(asked)
    assert len(blocks) == 10
    asked.clear()
    again = _predict(fitted, "killed")
    done = killed(fitted / "killed", 10, _lightning, fitted, *again)
    _lightning(fitted, *again)
    assert asked == blocks[done:]
    assert files(fitted / "killed") == files(fitted / "whole")
    _require_whole(fitted / "killed", 100_000)
    # Both know the images that were trained on: one from the data, one from the checkpoint.
    run = fitted / "runs/tdsm_digits"
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    origins = {read(folder, "classes").manifest["fingerprint"] for folder in (run / "images", fitted / "whole")}
    assert origins == {checkpoint["images_fingerprint"]} != {checkpoint["fingerprint"]}


@pytest.mark.slow
def test_so_does_a_kill_while_a_fit_draws_at_its_end(fitted: Path, tmp_path: Path, asked: list[list[int]]) -> None:
    command = [*_fit(tmp_path), "--ckpt_path", "last"]
    drawn = tmp_path / "runs/tdsm_digits/images"
    done = killed(drawn, 10, _lightning, tmp_path, *command)
    _lightning(tmp_path, *command)
    assert len(asked) == 10 - done
    assert files(drawn) == files(fitted / "runs/tdsm_digits/images")
    _require_whole(drawn, 0)
