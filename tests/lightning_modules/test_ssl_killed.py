"""A fit that is killed without warning and gone on with ends with the same bits, whatever its method remembers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_runs import environment

from lightning_modules.cli import main

METHODS: dict[str, dict[str, Any]] = {
    "fixmatch": {"class_path": "FixMatch"},
    "temporal_ensembling": {"class_path": "TemporalEnsembling"},
    "label_propagation": {"class_path": "LabelPropagation", "init_args": {"warmup_epochs": 1, "neighbors": 5}},
    "meta_pseudo_labels": {"class_path": "MetaPseudoLabels"},
    "dividemix": {"class_path": "DivideMix", "init_args": {"warmup_epochs": 1, "ramp_epochs": 2}},
}
EPOCHS = 20


def _config(folder: Path, method: dict[str, Any]) -> Path:
    content = {
        "model": {
            "class_path": "SSLClassifier",
            "init_args": {
                "network": {"class_path": "WideResNet", "init_args": {"depth": 10, "in_channels": 1, "width": 4}},
                "method": method,
                "ema_decay": 0.9,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02, "momentum": 0.9}},
                "lr_scheduler": {"class_path": "CosineDecay", "init_args": {"num_steps": 3 * EPOCHS}},
            },
        },
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {
                "image_size": 8,
                "batch_size": 8,
                "unlabeled_ratio": 2,
                "labels_per_class": 4,
                "steps_per_epoch": 3,
                "weak": "crop",
                "val_share": 0.25,
            },
        },
        "trainer": {
            "default_root_dir": "run",
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    folder.mkdir()
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def _last(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    return checkpoint


@pytest.mark.parametrize(
    "name", [name if name == "dividemix" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_killed_and_gone_on_with_is_bit_equal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path / "killed", METHODS[name])
    killed = subprocess.Popen(
        [sys.executable, "-m", "lightning_modules", "fit", "--config", str(config)],
        cwd=tmp_path / "killed",
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    monkeypatch.chdir((straight := tmp_path / "straight").parent)
    _config(straight, METHODS[name])
    monkeypatch.chdir(straight)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    main(["fit", "--config", "config.yaml"])
    # The other process has to come as far as a checkpoint behind every method's warm-up, and no further than the end.
    checkpoint = tmp_path / "killed/run/checkpoints/last.ckpt"
    end = time.monotonic() + 100
    while not checkpoint.is_file() or _last(tmp_path / "killed")["epoch"] < 3:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert _last(tmp_path / "killed")["epoch"] < EPOCHS - 1, "killed too late to show anything"

    monkeypatch.chdir(tmp_path / "killed")
    main(["fit", "--config", "config.yaml", "--ckpt_path", "last"])
    first, second = _last(straight), _last(tmp_path / "killed")
    assert first["global_step"] == second["global_step"] == 3 * EPOCHS
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    best = [found["best"]["predictor"] for found in (first, second)]
    assert best[0].keys() == best[1].keys()
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())
    for one, other in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        for number, moments in one["state"].items():
            assert torch.equal(moments["momentum_buffer"], other["state"][number]["momentum_buffer"])
