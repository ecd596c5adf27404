"""Learn to draw, draw, train again with what was drawn: through the command line, with a tiny network."""

import json
import shutil
from pathlib import Path

import pytest
from cli_runs import write

from datamodules.synthetic_images import read
from lightning_modules import stages
from lightning_modules.cli import main

REQUEST = {"num_images": 5, "image_size": 16, "batch_size": 2, "sampler": "euler", "num_steps": 3}
WRITER = {"class_path": "SyntheticImageWriter", "init_args": {"output_dir": "runs/pairs/drawn", "request": REQUEST}}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_generator_hands_its_pairs_to_the_next_fit(tmp_path: Path) -> None:
    generator = write(tmp_path, "pairs", trainer__callbacks=[WRITER], trainer__max_epochs=1)
    again = write(
        tmp_path,
        "again",
        stages=["pairs.yaml"],
        model__init_args__objective="supervised",
        data__init_args__synthetic_images="runs/pairs/drawn",
        data__init_args__synthetic_share=0.5,
        trainer__max_epochs=1,
        test_after_fit=True,
    )
    cli = main(["fit", "--config", str(again)])
    assert cli is not None
    drawn, made = tmp_path / "runs/pairs/drawn", stages.read_manifest(tmp_path / "runs/pairs")
    assert made is not None
    assert len(read(drawn).rows) == 5
    assert list(made["artifacts"]) == ["runs/pairs/drawn/manifest.json"]
    last = json.loads((tmp_path / "runs/again/manifest.json").read_text())
    assert last["inputs"] == made["artifacts"]
    assert last["counts"] == {"train": 16, "val": 0, "test": 8, "synthetic": 5}
    before = _contents(drawn)
    assert json.loads(before["manifest.json"])["config_hash"] == made["config_hash"]

    # Without its artifact the stage is not done; going on with it draws the same files again, and trains no more.
    shutil.rmtree(drawn)
    assert not stages.is_done(tmp_path / "runs/pairs", made["config_hash"])
    went_on = main(["fit", "--config", str(generator), "--ckpt_path", "last"])
    assert went_on is not None
    assert _contents(drawn) == before
    assert stages.is_done(tmp_path / "runs/pairs", made["config_hash"])
    assert not list(tmp_path.glob("runs/pairs/previous"))

    # A checkpoint draws in predict as well: the same pairs for the same seeds, in other blocks.
    requests = {"class_path": "SamplingDataModule", "init_args": REQUEST | {"num_classes": 2, "batch_size": 5}}
    writer = WRITER | {"init_args": {"output_dir": "runs/predicted"}}
    draw = write(tmp_path, "pairs", data=requests, trainer__callbacks=[writer])
    main(["predict", "--config", str(draw)])
    predicted = _contents(tmp_path / "runs/predicted")
    assert {k: v for k, v in predicted.items() if k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }
    manifests = [json.loads(files["manifest.json"]) for files in (before, predicted)]
    for name in ("weights", "fingerprint", "config_hash", "class_names"):
        assert manifests[0][name] == manifests[1][name] is not None


def test_a_new_fit_sets_the_pairs_of_the_old_one_aside(tmp_path: Path) -> None:
    config = write(tmp_path, "pairs", trainer__callbacks=[WRITER], trainer__max_epochs=1)
    main(["fit", "--config", str(config)])
    main(["fit", "--config", str(config), "--seed_everything", "1"])
    assert (tmp_path / "runs/pairs/previous/1/drawn/manifest.json").is_file()
    weights = [read(tmp_path / f"runs/pairs/{place}").manifest["weights"] for place in ("drawn", "previous/1/drawn")]
    assert weights[0] != weights[1]
