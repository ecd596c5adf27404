"""`lightning federate`: what it says where it cannot run, and whom it hands a run to."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from datamodules.partition import ClientSplit
from federated import command, deployment, in_process, simulation
from federated.cohort import Cohort
from federated.settings import Communication, Confusion, Deployment, Role, Settings
from lightning_modules.cli import main

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
NETWORK = {"class_path": "ConvNet", "init_args": {"image_size": 8, "widths": [4, 8], "in_channels": 1}}
MODEL = {"network": NETWORK, "method": {"class_path": "Supervised"}, "optimizer": SGD}
ROLE = Role(
    {"class_path": "SSLClassifier", "init_args": MODEL},
    {"class_path": "SemiSupervisedDataModule", "init_args": {"batch_size": 8, "steps_per_epoch": None}},
    rounds=1,
)


def digits(tmp_path: Path) -> Settings:
    source = {"class_path": "HardDigitsSource", "init_args": {"num_train": 60, "num_test": 20}}
    split = ClientSplit(num_clients=2, label_share=0.5)
    whole = Settings(source, ROLE, run_dir=str(tmp_path / "run"), split=split, arms=["labels"], central=None)
    return replace(whole, confusion=Confusion("held_out"))


def given(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "read", lambda words: settings)


def test_without_flower_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "flwr" else find_spec(name))
    with pytest.raises(SystemExit) as stopped:
        main(["federate", "--config", "none.yaml"])
    assert stopped.value.code == 1
    assert "pip install 'fewlight[federated]'" in capsys.readouterr().err


@pytest.mark.slow
def test_reading_a_command_line_needs_no_flower() -> None:
    code = "import sys, federated.command; print([name for name in ('flwr', 'ray') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("engine", ["in_process", "simulation", "deployment"])
def test_a_run_goes_to_its_engine(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, object]] = []

    def local(name: str) -> Callable[[ServerApp, ClientApp, int], None]:
        return lambda server, client, clients: ran.append((name, clients))

    monkeypatch.setattr(in_process, "run", local("in_process"))
    monkeypatch.setattr(simulation, "run", local("simulation"))
    monkeypatch.setattr(simulation, "require_ray", lambda: None)
    monkeypatch.setattr(deployment, "run", lambda settings: ran.append(("deployment", settings)))
    settings = Settings.from_plain({**digits(tmp_path).to_plain(), "engine": engine})
    given(settings, monkeypatch)
    assert main(["federate"]) is None
    assert ran == [(engine, settings if engine == "deployment" else 2)]


def test_what_cannot_work_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = digits(tmp_path)
    folder = {"class_path": "ImageFolderSource", "init_args": {"root": str(tmp_path / "nowhere")}}
    bad_model = replace(ROLE, model={"class_path": "SSLClassifier", "init_args": {**MODEL, "num_classes": 3}})
    away = Deployment("site.example:8000")
    monkeypatch.setattr(simulation, "find_spec", lambda name: None)
    for wrong, problem in (
        (replace(settings, source=folder), "nowhere"),
        (replace(settings, generator=bad_model), "Expected `model.init_args.num_classes` to be the data's, got 3"),
        (replace(settings, engine="simulation"), "pip install 'fewlight[simulation]'"),
        (replace(settings, engine="deployment", deployment=away), "Expected `deployment.root_certificates`"),
    ):
        given(wrong, monkeypatch)
        with pytest.raises(SystemExit) as stopped:
            command.run([])
        assert stopped.value.code == 2
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_errors_of_a_run_are_told_and_bugs_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(digits(tmp_path), monkeypatch)

    def few(*_: object) -> None:
        nobody = in_process.InProcessGrid(ClientApp(), 1)
        Cohort(nobody, Communication(wait=0))

    def bug(*_: object) -> NoReturn:
        msg = "mat1 and mat2"
        raise RuntimeError(msg)

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for engine, code, words in (
        (few, 1, "error: Expected at least 2 clients (`communication.min_clients`)"),
        (stop, 130, "interrupted; the same command goes on at the last finished round"),
    ):
        monkeypatch.setattr(in_process, "run", engine)
        with pytest.raises(SystemExit) as stopped:
            command.run([])
        assert stopped.value.code == code
        assert words in capsys.readouterr().err
    monkeypatch.setattr(in_process, "run", bug)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        command.run([])


def test_a_run_in_this_process_ends_with_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(digits(tmp_path), monkeypatch)
    command.run([])
    said = capsys.readouterr().out
    assert "classifier: round 1 of 1, loss " in said
    assert "worst client" in said
    assert (tmp_path / "run" / "results.json").is_file()
    assert sorted(path.name for path in (tmp_path / "run" / "clients").iterdir()) == ["00", "01"]
