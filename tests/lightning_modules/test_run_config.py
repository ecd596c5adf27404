import json
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.checkpoints import file_sha256
from lightning_modules.run_config import config_hash, differences, input_files, settings


def _resolved(**changes: Any) -> dict[str, Any]:
    resolved: dict[str, Any] = {
        "seed_everything": 0,
        "vars": {"lr": 0.1},
        "runs": "runs",
        "stages": ["a.yaml"],
        "model": {"class_path": "M", "init_args": {"lr": 0.1, "sizes": [1, 2], "net": {"class_path": "N"}}},
        "data": {"class_path": "D", "init_args": {"root": "isic", "num_workers": 0}},
        "trainer": {
            "max_steps": 5,
            "default_root_dir": "runs/x",
            "callbacks": [{"class_path": "C", "init_args": {"output_dir": "x"}}],
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = resolved
        for part in path:
            place = place[part]
        place[last] = value
    return resolved


def _hash(resolved: dict[str, Any], *earlier: str) -> str:
    return config_hash(settings(resolved), earlier)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWLIGHT_DATA", raising=False)


@pytest.mark.parametrize(
    "change",
    [
        {"vars": {"lr": 0.1, "unused": 3}},
        {"runs": "elsewhere"},
        {"data__init_args__num_workers": 8},
        {"model__init_args__latent_cache": "elsewhere"},
        {"trainer__default_root_dir": "elsewhere"},
        {"trainer__enable_progress_bar": False},
        {"ckpt_path": "last"},
        {"trainer__callbacks": [{"class_path": "C", "init_args": {"output_dir": "elsewhere"}}]},
        {"trainer__callbacks": [{"class_path": "C", "init_args": {"output_dir": "x", "shards_above": 0}}]},
    ],
)
def test_what_does_not_change_the_result_does_not_change_the_hash(change: dict[str, Any]) -> None:
    assert _hash(_resolved(**change)) == _hash(_resolved())


def test_where_a_requested_drawing_goes_matters_to_the_next_stage() -> None:
    def drawn(folder: str) -> str:
        writer = {"class_path": "W", "init_args": {"output_dir": folder, "request": {"num_images": 3}}}
        return _hash(_resolved(trainer__callbacks=[writer]))

    assert drawn("a") != drawn("b")


def test_where_pseudo_labels_go_matters_to_the_next_stage() -> None:
    def written(folder: str, **arguments: object) -> str:
        writer = {"class_path": "callbacks.PseudoLabelWriter", "init_args": {"output_dir": folder, **arguments}}
        return _hash(_resolved(trainer__callbacks=[writer]))

    assert written("a") == written("a")
    assert written("a") != written("b")
    assert written("a", top_k=2) != written("a", top_k=3)


def test_which_images_are_predicted_does_not_matter() -> None:
    chosen = [{"class_path": "D", "init_args": {"predict_split": split}} for split in ("train", "test")]
    assert len({_hash(_resolved(data=data)) for data in chosen}) == 1


def test_a_folder_that_is_written_to_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert input_files({"trainer.callbacks.0.init_args.output_dir": str(tmp_path)}) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"seed_everything": 1},
        {"model__init_args__lr": 0.2},
        {"model__init_args__sizes": [1, 3]},
        {"model__init_args__net": {"class_path": "O"}},
        {"data__init_args__root": "ph2"},
        {"trainer__max_steps": 6},
        {"trainer__callbacks": [{"class_path": "C"}, {"class_path": "D"}]},
        {"trainer__callbacks": [{"class_path": "D", "init_args": {"output_dir": "x"}}]},
    ],
)
def test_what_changes_the_result_changes_the_hash(change: dict[str, Any]) -> None:
    assert _hash(_resolved(**change)) != _hash(_resolved())


def test_the_stages_before_it_and_the_data_folder_of_a_relative_root_count(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, absolute, generated = (_resolved(data__init_args__root=root) for root in ("isic", "/isic", ""))
    before = [_hash(resolved) for resolved in (plain, absolute, generated)]
    assert _hash(plain, "stage") != before[0]
    monkeypatch.setenv("FEWLIGHT_DATA", "/somewhere")
    after = [_hash(resolved) for resolved in (plain, absolute, generated)]
    assert after[0] != before[0]
    assert after[1:] == before[1:]


@pytest.mark.parametrize("name", ["root", "table", "label_list"])
def test_the_data_folder_of_a_source_counts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    relative, absolute = (
        _resolved(data__init_args={"source": {"class_path": "S", "init_args": {name: place}}}) for place in ("a", "/a")
    )
    before = _hash(relative), _hash(absolute)
    monkeypatch.setenv("FEWLIGHT_DATA", "/somewhere")
    assert _hash(relative) != before[0]
    assert _hash(absolute) == before[1]


def test_only_the_length_may_differ_between_a_run_and_its_continuation() -> None:
    now = settings(_resolved(model__init_args__lr=0.2, trainer__max_steps=50))
    assert differences(settings(_resolved()), now) == ["model.init_args.lr: 0.1 -> 0.2"]
    assert differences(settings(_resolved()), settings(_resolved(trainer__max_steps=50))) == []


def test_settings_survive_json() -> None:
    kept = settings(_resolved())
    assert differences(json.loads(json.dumps(kept)), kept) == []


def test_files_and_artifacts_that_a_run_starts_from(tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes(b"weights")
    artifact = tmp_path / "images"
    artifact.mkdir()
    (artifact / "manifest.json").write_text("{}")
    weights = tmp_path / "exported" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"more weights")
    kept = {"a": str(checkpoint), "b": str(artifact), "c": str(tmp_path), "d": "nowhere", "e": "", "f": 3}
    kept |= {"g": str(weights.parent)}
    assert input_files(kept) == {
        str(checkpoint): file_sha256(checkpoint),
        str(artifact / "manifest.json"): file_sha256(artifact / "manifest.json"),
        str(weights): file_sha256(weights),
    }
