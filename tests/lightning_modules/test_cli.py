import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import tiny_generator, write
from pytorch_lightning.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped] # publishes no types
    EventAccumulator,
)

from lightning_modules.cli import main
from lightning_modules.command_line import overlays_last
from lightning_modules.lightning_cli import FewlightCLI


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "")
    return tmp_path


def _run(*args: str | Path) -> FewlightCLI:
    cli = main([str(arg) for arg in args])
    assert cli is not None
    return cli


def test_help_and_version_need_no_heavy_import(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) is None
    assert "--overlay FILE" in capsys.readouterr().out
    assert main(["--version"]) is None
    assert re.fullmatch(r"fewlight \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_fit_leaves_config_checkpoint_metrics_and_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = _run("fit", "--config", write(tmp_path, "a", test_after_fit=True, seed_everything=3))
    run = tmp_path / "runs" / "a"
    assert 0 <= cli.trainer.callback_metrics["test_jaccard"] <= 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test_jaccard"] == pytest.approx(float(cli.trainer.callback_metrics["test_jaccard"]))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 16, "val": 0, "test": 8}
    assert manifest["class_names"] == ["background", "lesion"]
    assert manifest["metrics"]["test_jaccard"] == pytest.approx(metrics["test_jaccard"])
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["config_hash"] == manifest["config_hash"]
    assert checkpoint["global_step"] == 8
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["network"]["init_args"]["base_channels"] == 8
    assert list(run.glob("events.out.tfevents.*"))
    assert capsys.readouterr().out.count("test_jaccard ") == 1


def test_the_hparams_tab_has_settings_of_model_and_data_beside_the_metrics(tmp_path: Path) -> None:
    _run("fit", "--config", write(tmp_path, "a", test_after_fit=True))
    for file in (tmp_path / "runs" / "a").glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        plugin = events.summary_metadata.get("_hparams_/session_start_info")
        if plugin is not None:
            content = plugin.plugin_data.content
            assert b"mask_weight" in content
            assert b"data/num_labels" in content
            assert 0 <= events.Scalars("test_jaccard")[-1].value <= 1
            return
    pytest.fail("no hyper-parameters were logged")


def test_a_saved_config_runs_again_to_the_same_end(tmp_path: Path) -> None:
    first = _run("fit", "--config", write(tmp_path, "a"))
    again = _run("fit", "--config", tmp_path / "runs/a/config.yaml", "--trainer.default_root_dir", "runs/b")
    for (name, a), b in zip(first.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_new_fit_moves_the_old_one_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, "a")
    _run("fit", "--config", config)
    before = (tmp_path / "runs/a/checkpoints/last.ckpt").read_bytes()
    _run("fit", "--config", config, "--seed_everything", "1")
    assert (tmp_path / "runs/a/previous/1/checkpoints/last.ckpt").read_bytes() == before
    assert "is now in runs/a/previous/1" in capsys.readouterr().out


def test_a_fit_goes_on_from_its_last_checkpoint_bit_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = _run("fit", "--config", write(tmp_path, "straight", trainer__max_epochs=3))
    halves = write(tmp_path, "halves", trainer__max_epochs=3)
    _run("fit", "--config", halves, "--trainer.max_epochs", "1", "--ckpt_path", "last")
    assert "starting from the beginning" in capsys.readouterr().out
    resumed = _run("fit", "--config", halves, "--ckpt_path", "last")
    assert "going on from runs/halves/checkpoints/last.ckpt" in capsys.readouterr().out
    assert resumed.trainer.global_step == straight.trainer.global_step == 12
    expected = straight.model.state_dict()
    assert any(name.startswith("ema.module.") for name in expected)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    optimizers = [cli.trainer.optimizers[0].state_dict()["state"] for cli in (straight, resumed)]
    for key, state in optimizers[0].items():
        assert torch.equal(state["exp_avg"], optimizers[1][key]["exp_avg"])


def test_a_saved_config_of_a_resumed_run_starts_anew(tmp_path: Path) -> None:
    config = write(tmp_path, "a")
    _run("fit", "--config", config)
    before = json.loads((tmp_path / "runs/a/manifest.json").read_text())
    _run("fit", "--config", config, "--ckpt_path", "last")
    assert json.loads((tmp_path / "runs/a/manifest.json").read_text())["metrics"] == before["metrics"]
    saved = yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text())
    assert saved["ckpt_path"] is None
    assert saved["vars"] == {}


def test_the_last_checkpoint_of_another_configuration_is_not_gone_on_from(tmp_path: Path) -> None:
    config = write(tmp_path, "a")
    _run("fit", "--config", config)
    other = ("fit", "--config", config, "--model.init_args.mask_weight", "0.5")
    with pytest.raises(ValueError, match=r"differs in model.init_args.mask_weight: 0.0001 -> 0.5. Leave --ckpt_path"):
        _run(*other, "--ckpt_path", "last")
    # By its name it is: whoever gives that knows what is asked for, and the manifest says so.
    _run(*other, "--ckpt_path", "runs/a/checkpoints/last.ckpt", "--trainer.default_root_dir", "runs/b")
    assert json.loads((tmp_path / "runs/b/manifest.json").read_text())["resumed_from"].endswith(
        "runs/a/checkpoints/last.ckpt"
    )


def test_a_run_that_max_time_ends_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, "a", trainer__max_epochs=100_000, trainer__max_time="00:00:00:01", test_after_fit=True)
    _run("fit", "--config", config)
    assert "max_time is over" in capsys.readouterr().out
    assert (tmp_path / "runs/a/checkpoints/last.ckpt").is_file()
    assert not (tmp_path / "runs/a/manifest.json").exists()


def test_sigterm_ends_with_its_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*_: object, **__: object) -> None:
        raise SIGTERMException

    monkeypatch.setattr(FewlightCLI, "_fit_and_test", terminated)
    with pytest.raises(SystemExit) as stopped:
        _run("fit", "--config", write(tmp_path, "a"))
    assert stopped.value.code == 143


def test_testing_on_another_split_than_the_one_trained_with_is_said(tmp_path: Path) -> None:
    config = write(tmp_path, "a")
    _run("fit", "--config", config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(num_workers|isinstance|DistributedSampler).*")
        _run("test", "--config", config)
    with pytest.warns(UserWarning, match="trained on other data, or on another split"):
        _run("test", "--config", config, "--data.init_args.labels_seed", "1")


def test_validating_without_validation_images_is_an_error(tmp_path: Path) -> None:
    config = write(tmp_path, "a")
    _run("fit", "--config", config)
    with pytest.raises(ValueError, match=r"Expected validation images, got none; raise data.init_args.val_share"):
        _run("validate", "--config", config)


def test_a_mistake_of_the_last_fit_shows_before_its_stages_run(tmp_path: Path) -> None:
    write(tmp_path, "stage")
    config = write(tmp_path, "a", stages=["stage.yaml"], model__init_args__init_from="runs/other/checkpoints/last.ckpt")
    with pytest.raises(
        FileNotFoundError, match=r"`init_from` to be a checkpoint file, but there is none at runs/other"
    ):
        _run("fit", "--config", config)
    ph2 = ("--data", "PH2DataModule", "--data.init_args.root", "nowhere")
    with pytest.raises(FileNotFoundError, match="`root` to be a folder"):
        _run("fit", "--config", config, "--model.init_args.init_from", "null", *ph2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("missing", ["classifier_from", "latent.init_args.init_from"])
def test_so_does_a_missing_checkpoint_of_a_generator(missing: str, tmp_path: Path) -> None:
    write(tmp_path, "stage")
    written = "runs/stage/checkpoints/last.ckpt"
    model = tiny_generator(written, written)
    config = write(tmp_path, "a", stages=["stage.yaml"], model=model, data={"class_path": "GenerationDataModule"})
    with pytest.raises(
        FileNotFoundError, match=rf"`{missing.split('.')[-1]}` to be a checkpoint file, .* none at runs/b"
    ):
        _run("fit", "--config", config, f"--model.init_args.{missing}", "runs/b/checkpoints/last.ckpt")
    assert not (tmp_path / "runs").exists()


def test_fast_dev_run_runs_no_stages(tmp_path: Path) -> None:
    write(tmp_path, "stage")
    _run("fit", "--config", write(tmp_path, "a", stages=["stage.yaml"], trainer__fast_dev_run=True))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"stages": ["stage.yaml"]}, "without a circle"),
        (
            {"trainer__default_root_dir": "${runs}/a"},
            "`trainer.default_root_dir` of its own for every stage, got runs/a",
        ),
    ],
)
def test_stages_in_a_circle_or_in_one_directory_are_refused(
    stage: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "stage", **stage)
    with pytest.raises(SystemExit) as stopped:
        _run("fit", "--config", write(tmp_path, "a", stages=["stage.yaml"]))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_test_and_predict_take_the_last_checkpoint_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, "a", test_after_fit=True)
    fitted = float(_run("fit", "--config", config).trainer.callback_metrics["test_jaccard"])
    capsys.readouterr()
    tested = _run("test", "--config", config)
    assert float(tested.trainer.callback_metrics["test_jaccard"]) == fitted
    assert capsys.readouterr().out.count("test_jaccard ") == 1
    assert (tmp_path / "runs/a/config.yaml").is_file()
    assert (tmp_path / "runs/a/config_test.yaml").is_file()
    _run("predict", "--config", config, "--trainer.callbacks", "MaskWriter", "--trainer.callbacks.output_dir", "masks")
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 8


def test_what_is_configured_wins_over_a_checkpoints_hyperparameters(tmp_path: Path) -> None:
    config = write(tmp_path, "a")
    _run("fit", "--config", config)
    cli = _run("test", "--config", config, "--model.init_args.mask_weight", "0.5")
    assert cli.model.hparams["mask_weight"] == 0.5


def test_num_classes_comes_from_the_data_and_a_contradiction_is_an_error(tmp_path: Path) -> None:
    config = write(tmp_path, "a", trainer__fast_dev_run=True)
    assert _run("fit", "--config", config).model.hparams["num_classes"] == 2
    assert _run("fit", "--config", config, "--model.init_args.num_classes", "2").model.hparams["num_classes"] == 2
    with pytest.raises(ValueError, match=r"got 7 for the model, 2 from the data; leave it out"):
        _run(
            *("fit", "--config", config, "--model.init_args.num_classes", "7"),
            *("--model.init_args.network.init_args.out_channels", "10"),
        )


def test_print_config_resolves_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = write(tmp_path, "stage")
    config = write(tmp_path, "a", stages=[str(stage)], runs="elsewhere")
    with pytest.raises(SystemExit) as stopped:
        _run("fit", "--config", config, "--print_config")
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["default_root_dir"] == "elsewhere/a"
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "runs").exists()


def test_overlays_come_after_all_configs_and_flags_after_both(tmp_path: Path) -> None:
    for name, content in {"a.yaml": "vars: {x: 1, y: 2}", "o.yaml": "vars: {y: 3}"}.items():
        (tmp_path / name).write_text(content)
    words = ["fit", "--overlay", "o.yaml", "--trainer.max_steps", "5", "--config=a.yaml", "--vars.x", "9"]
    assert overlays_last(words) == [
        *("fit", "--config", "a.yaml", "--config", "o.yaml"),
        '--vars={"x": 1, "y": 3}',
        f"--overlay+={tmp_path / 'o.yaml'}",
        '--stage_vars={"x": 9}',
        *("--trainer.max_steps", "5", "--vars.x", "9"),
    ]


def test_a_config_is_merged_after_its_base_and_the_saved_one_needs_none(tmp_path: Path) -> None:
    write(tmp_path / "deep", "ground", vars={"steps": 7, "lr": 0.5}, trainer__max_steps="${vars.steps}")
    (tmp_path / "middle.yaml").write_text("base: deep/ground.yaml\nvars: {steps: 1}\n")
    (tmp_path / "top.yaml").write_text(
        "base: middle.yaml\nmodel: {init_args: {mask_weight: 0.25}}\ntrainer: {default_root_dir: runs/top}\n"
    )
    cli = _run("fit", "--config", "top.yaml")
    assert cli.config.fit.model.init_args.mask_weight == 0.25
    assert cli.config.fit.vars == {"steps": 1, "lr": 0.5}
    assert cli.trainer.global_step == 1
    saved = yaml.safe_load((tmp_path / "runs/top/config.yaml").read_text())
    assert saved["base"] is None
    again = _run("fit", "--config", "runs/top/config.yaml")
    assert again.config_hash == cli.config_hash


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("base: a.yaml", "without a circle, but .*a.yaml is based on itself"),
        ("base: b.yaml", "there is none at .*b.yaml"),
    ],
)
def test_a_base_in_a_circle_or_missing_is_refused(
    content: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        _run("fit", "--config", "a.yaml")
    assert stopped.value.code == 2
    assert re.search(problem, capsys.readouterr().err)


def test_an_overlay_is_merged_key_by_key_and_vars_reach_every_value(tmp_path: Path) -> None:
    config = write(tmp_path, "a", vars={"steps": 7, "lr": 0.5}, trainer__max_steps="${vars.steps}")
    (tmp_path / "o.yaml").write_text(
        "vars: {steps: 1}\nmodel: {init_args: {network: {init_args: {base_channels: 16}}, mask_weight: 0.25}}\n"
        "trainer: {fast_dev_run: true}\n"
    )
    cli = _run("fit", "--config", config, "--overlay", "o.yaml", "--model.init_args.mask_weight", "0.125")
    resolved = cli.config.fit
    assert resolved.trainer.max_steps == 1
    assert resolved.vars == {"steps": 1, "lr": 0.5}
    assert resolved.model.init_args.network.init_args.base_channels == 16
    assert resolved.model.init_args.network.init_args.head_channels == 8
    assert resolved.model.init_args.mask_weight == 0.125


def test_the_hash_follows_the_result_not_the_way_it_was_asked_for(tmp_path: Path) -> None:
    config = write(tmp_path, "a", trainer__fast_dev_run=True)
    (tmp_path / "o.yaml").write_text("model: {init_args: {mask_weight: 0.25}}")
    plain = _run("fit", "--config", config)
    flag = _run("fit", "--config", config, "--model.init_args.mask_weight", "0.25")
    overlay = _run("fit", "--config", config, "--overlay", "o.yaml")
    assert flag.config_hash == overlay.config_hash != plain.config_hash


def test_fast_dev_run_touches_no_files(tmp_path: Path) -> None:
    config = write(tmp_path, "a", trainer__fast_dev_run=True, test_after_fit=True)
    _run("fit", "--config", config)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.class_path", "HybridSegmentaton"], "HybridSegmentaton"),
        (["--model.init_args.objective", "hybird"], "hybird"),
        (["--model.init_args.lrr", "1"], "lrr"),
        (["--vars.stepps", "1"], "`--vars.NAME` with a NAME of the configs (), got stepps"),
        (["--overlay", "nowhere.yaml"], "`--overlay` to be a YAML file, but there is none at nowhere.yaml"),
        (["--stages", "[nowhere.yaml]"], "nowhere.yaml"),
    ],
)
def test_parse_errors_exit_with_2_and_name_the_value(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _run("fit", "--config", write(tmp_path, "a"), *args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_that_is_not_one_is_refused_before_anything_runs(command: str, tmp_path: Path) -> None:
    (tmp_path / "no.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"`ckpt_path` to be a checkpoint written by a fit .* no.ckpt cannot be read"):
        _run(command, "--config", write(tmp_path, "a"), "--ckpt_path", "no.ckpt")
    with pytest.raises(FileNotFoundError, match=r"`ckpt_path` to be a checkpoint file, but there is none at gone.ckpt"):
        _run(command, "--config", write(tmp_path, "a"), "--ckpt_path", "gone.ckpt")
    assert not (tmp_path / "runs").exists()


def test_the_sub_command_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _run("--config", "a.yaml", "fit")
    assert stopped.value.code == 2
    words = "expected a sub-command first (fit, validate, test, predict, export, federate), got --config"
    assert words in capsys.readouterr().err


def test_testing_without_any_checkpoint_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is none at runs/a/checkpoints/last.ckpt"):
        _run("test", "--config", write(tmp_path, "a"))
