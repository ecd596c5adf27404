"""All steps of a run: what they leave behind, and that no stop and no vanished client changes or loses anything."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from toy_federation import CLASSIFIER, GENERATOR, run, toy

from datamodules import pseudo_labels, synthetic_images
from federated.report import Report
from federated.rounds import RoundReport
from federated.settings import Confusion, Drawing, Privacy, Role, Selection
from lightning_modules.checkpoints import load_checkpoint


class StoppedError(Exception):
    """What a test stops a server with."""


def weights_of(run_dir: Path) -> dict[str, list[float]]:
    found = {}
    for path in sorted(run_dir.glob("*/rounds.safetensors")):
        tensors = load_file(path)
        found[path.parent.name] = [float(value.double().sum()) for _, value in sorted(tensors.items())]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("federated") / "whole"
    run(toy(run_dir))
    return run_dir


def test_a_run_leaves_artifacts_and_manifests(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert list(results["arms"]) == ["labels", "selected", "drawn", "selected_and_drawn", "central, all labels"]
    assert all(0 <= arm["accuracy"] <= 1 for arm in results["arms"].values())
    steps = ("classifier", "cross_fit_0", "cross_fit_1", "generator", "selected", "drawn", "selected_and_drawn")
    for step in steps:
        assert json.loads((whole / step / "manifest.json").read_text())["kind"] == "federated_fit"
        assert load_checkpoint(whole / step / "checkpoints" / "last.ckpt", "ckpt_path")["state_dict"]
    guessed = json.loads((whole / "pseudo_labels" / "manifest.json").read_text())
    # Every label is held out once: those of two folds together are all labels, none twice.
    assert sum(map(sum, guessed["confusion"])) == round(0.4 * 240)
    for client in range(3):
        folder = whole / "clients" / f"{client:02d}"
        chosen = pseudo_labels.read(folder / "selected")
        every = pseudo_labels.read(folder / "pseudo_labels")
        assert set(chosen.table.keys.to_pylist()) <= set(every.table.keys.to_pylist())
        lacking = set(range(10)) - set(every.table.labels[every.by_people].tolist())
        if (folder / "drawn").exists():
            assert {row.label for row in synthetic_images.read(folder / "drawn", "classes").rows} <= lacking
    kept = sum(counts[1] for counts in guessed["counts"])
    chosen_rows = [pseudo_labels.read(whole / "clients" / f"{client:02d}" / "selected") for client in range(3)]
    assert kept == sum(int((~found.by_people).sum()) for found in chosen_rows)
    pictures = {path.stem for path in (whole / "pictures").glob("*.png")}
    assert {"client_classes", "confusion_held_out_labels", "selected_counts", "drawn_counts", "samples"} <= pictures


@pytest.mark.parametrize(
    ("step", "number"),
    [
        pytest.param("generator", 1, marks=pytest.mark.slow),
        pytest.param("cross_fit_0", 2, marks=pytest.mark.slow),
        pytest.param("selected_and_drawn", 1, marks=pytest.mark.slow),
    ],
)
def test_a_server_that_is_stopped_goes_on_at_the_last_finished_round(
    whole: Path, step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, told = toy(tmp_path / "run"), Report.round

    def stop(self: Report, task_name: str, found: RoundReport) -> bool:
        is_new = told(self, task_name, found)
        if (task_name, found.number) == (step, number):
            raise StoppedError
        return is_new

    with monkeypatch.context() as patch:
        patch.setattr(Report, "round", stop)
        with pytest.raises(StoppedError):
            run(settings)
    trained: list[tuple[str, int]] = []

    def hear(message: Message) -> bool:
        said = message.content.config_records["config"]
        if message.metadata.message_type == "train":
            trained.append((json.loads(str(said["task"]))["name"], int(str(said["server-round"]))))
        return False

    results = run(settings, hear)
    assert trained[0] == (step, number + 1) if number < 2 else trained[0][1] == 1
    assert (step, number) not in trained
    assert weights_of(Path(settings.run_dir)) == weights_of(whole)
    assert results == json.loads((whole / "results.json").read_text())


def test_a_short_run_goes_on_at_the_last_finished_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = Confusion("held_out")
    short = toy(tmp_path / "whole", generator=None, arms=["selected"], central=None, confusion=held_out)
    expected, told = run(short), Report.round

    def stop(self: Report, task_name: str, found: RoundReport) -> bool:
        told(self, task_name, found)
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Report, "round", stop)
        with pytest.raises(StoppedError):
            run(replace(short, run_dir=str(tmp_path / "run")))
    found = run(replace(short, run_dir=str(tmp_path / "run")))
    assert found == expected
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_the_run_ends_without_a_client_that_vanishes(tmp_path: Path) -> None:
    settings = toy(tmp_path, generator=None, arms=["labels", "selected"], central=None)
    left: list[str] = []

    def lost(message: Message) -> bool:
        # Client 2 is killed in the second round of the first step, and never comes back.
        said = message.content.config_records["config"]
        if message.metadata.dst_node_id != 1003:
            return False
        if left or (message.metadata.message_type == "train" and said["server-round"] == 2):
            left.append(message.metadata.message_type)
        return bool(left)

    with pytest.warns(UserWarning, match="client 2"):
        results = run(settings, lost)
    assert left
    assert results["arms"]["selected"]["accuracy"] is not None
    assert set(results["arms"]["selected"]["clients"]) == {"0", "1"}


@pytest.mark.slow
def test_a_client_that_was_away_is_left_out_of_what_it_lacks_the_labels_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = toy(tmp_path, generator=None, arms=["labels", "selected"], central=None)

    def lost(message: Message) -> bool:
        return (message.metadata.dst_node_id, message.metadata.message_type) == (1003, "query.label")

    with pytest.warns(UserWarning, match="`selected` goes on without 1 clients: client 2: Expected `selected` of this"):
        results = run(settings, lost)
    assert "client 2: no answer within" in capsys.readouterr().out
    history = json.loads((tmp_path / "report.json").read_text())["rounds"]
    assert [set(history[step]["2"]["losses"]) for step in ("classifier", "selected")] == [{"0", "1", "2"}, {"0", "1"}]
    # It tests all of them.
    assert [set(results["arms"][arm]["clients"]) for arm in settings.arms] == [{"0", "1", "2"}] * 2


def test_nothing_is_trained_on_images_that_the_classifier_does_not_know(tmp_path: Path) -> None:
    # The classifier of one round knows no digits, the generator draws none.
    drawing = Drawing(num_steps=2, min_gate_rate=0.9, ratio=0.5, candidates=1.0)
    quick = replace(CLASSIFIER, rounds=1)
    settings = toy(tmp_path, classifier=quick, drawing=drawing, arms=["drawn"], central=None)
    results = run(replace(settings, confusion=Confusion("held_out")))
    assert results["arms"]["drawn"]["accuracy"] is None
    assert "not trained" in results["arms"]["drawn"]["note"]
    assert not (tmp_path / "drawn" / "checkpoints").exists()


@pytest.mark.slow
def test_transition_aware_drawing_takes_t_from_the_confusion_of_all_clients(tmp_path: Path) -> None:
    transition = {
        "class_path": "ConfusionTransition",
        "init_args": {"counts": "{client}/selected/manifest.json", "kind": "confusion"},
    }
    model = {
        "class_path": "TDSMDiffusion",
        "init_args": {**GENERATOR.model["init_args"], "weighting": "reverse", "transition": transition},
    }
    generator = Role(model, GENERATOR.data, rounds=1)
    quick = replace(CLASSIFIER, rounds=1)
    weighted = toy(tmp_path / "a", classifier=quick, generator=generator, arms=["labels"], central=None)
    plain = replace(weighted, generator=replace(GENERATOR, rounds=1), run_dir=str(tmp_path / "b"))
    for settings in (weighted, plain):
        run(replace(settings, confusion=Confusion("held_out"), selection=Selection("fixed", min_confidence=0.0)))
    assert weights_of(tmp_path / "a")["generator"] != weights_of(tmp_path / "b")["generator"]


def test_weights_are_noised_and_statistics_are_not(tmp_path: Path) -> None:
    quick = toy(tmp_path, classifier=replace(CLASSIFIER, rounds=1), generator=None, arms=["labels"], central=None)
    quick = replace(quick, confusion=Confusion("held_out"), selection=Selection("fixed"))
    # So much noise that every weight is far from what it was; the variances of batch normalisation stay positive.
    results = run(replace(quick, privacy=Privacy(100.0, 1.0)))
    assert results["arms"]["labels"]["accuracy"] is not None
    saved = load_checkpoint(tmp_path / "classifier" / "checkpoints" / "last.ckpt", "ckpt_path")["state_dict"]
    state = {name: value for name, value in saved.items() if name.startswith("network.")}
    weights = torch.cat([value.flatten() for name, value in state.items() if name.endswith("weight")])
    assert float(weights.std()) > 10
    statistics = [value for name, value in state.items() if "running_var" in name]
    assert len(statistics) == 2
    assert all(float(value.min()) > 0 and float(value.max()) < 10 for value in statistics)
    counts = [value for name, value in state.items() if "num_batches_tracked" in name]
    assert all(value.dtype == torch.int64 and int(value) == 4 for value in counts)
