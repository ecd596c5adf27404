"""Pipelines of published size, run as a whole on tiny data with tiny networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_runs import has_published_autoencoder, small_data, small_model, small_writers, write_overlay

from datamodules.pseudo_labels import read
from lightning_modules import ViTEncoder
from lightning_modules.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


def _resolved(config: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--stages", "null", "--print_config"])
    resolved: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return resolved


def _write_encoder(file: Path, resolved: dict[str, Any]) -> None:
    """A file as the one published with MSN, of a tiny network."""
    encoder = ViTEncoder(**small_model(resolved)["encoder"]["init_args"])
    weights = {f"module.{name}": value for name, value in encoder.state_dict().items() if "normalise" not in name}
    torch.save({"target_encoder": weights | {"module.fc.weight": torch.zeros(1)}}, file)


def _overlay(config: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What makes a fit small and leaves all that it takes from earlier ones as it is."""
    resolved = _resolved(config, capsys)
    arguments = resolved["model"]["init_args"]
    model = small_model(resolved, folder / "autoencoder" if has_published_autoencoder(resolved) else None)
    if arguments.get("encoder_from") is not None:
        if not (folder / "encoder.pth").exists():
            _write_encoder(folder / "encoder.pth", resolved)
        model["encoder_from"] = str(folder / "encoder.pth")
    data = small_data(resolved)
    if resolved["data"]["init_args"].get("synthetic_per_class") is not None:
        data["synthetic_per_class"] = 1  # of two that are drawn
    return write_overlay(folder / "small.yaml", model, data, max_steps=1, callbacks=small_writers(resolved))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpt_cifar10", "dpt_cifar10_tdsm", "dpt_imagenet256"])
def test_each_fit_of_a_pipeline_takes_what_the_ones_before_it_made(
    name: str, tmp_path: Path, fake_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FEWLIGHT_DATA", str(fake_data))
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    config = CONFIGS / f"{name}.yaml"
    stages = [CONFIGS / stage for stage in yaml.safe_load(config.read_text())["stages"]]
    labelled: dict[str, int] = {}
    for fit in (*stages, config):
        overlay = _overlay(fit, tmp_path, capsys)
        cli = main(["fit", "--config", str(fit), "--overlay", str(overlay), "--stages", "null"])
        assert cli is not None
        run = Path(cli.trainer.default_root_dir)
        assert (run / "manifest.json").is_file(), fit.name
        labelled[fit.name] = getattr(cli.datamodule, "num_labeled", 0)
        classes = cli.datamodule.num_classes
    images = 12 if name == "dpt_imagenet256" else 200
    assert labelled[stages[1].name] == 2 * classes
    assert labelled[stages[-1].name] == images  # the others with their pseudo-labels
    assert labelled[config.name] == 3 * classes  # one drawn image of each
    assert len(read(run / "pseudo_labels").table) == images
