"""What a pipeline is resolved to; nothing is trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import config

from lightning_modules.cli import main
from lightning_modules.command_line import known_variables, overlays_last, variable_flags
from lightning_modules.lightning_cli import FewlightCLI
from lightning_modules.stages import Stage


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _write(name: str, run_dir: str, **changes: Any) -> str:
    content = config(name, **changes)
    content["trainer"]["default_root_dir"] = run_dir
    Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return f"{name}.yaml"


def _run(*words: str) -> FewlightCLI:
    cli = main(["fit", *words])
    assert isinstance(cli, FewlightCLI)
    return cli


def _resolved(*words: str) -> FewlightCLI:
    return _run(*words, "--trainer.fast_dev_run", "true")


def _alone(stage: Stage) -> FewlightCLI:
    """The stage as its own process resolves it."""
    return _resolved(*stage.arguments, "--trainer.fast_dev_run", "true")


def _three_fits() -> str:
    """A classifier that is the same in every round, a generator that is not, and the last fit."""
    _write("classifier", "${runs}/round_0")
    _write("generator", "${runs}/generator_${round}", data__init_args__seed="${previous_round}")
    return _write("last", "${runs}/round_${round}", stages=["classifier.yaml", "generator.yaml"])


def test_rounds_repeat_what_depends_on_the_round_and_nothing_else() -> None:
    _three_fits()
    one = _resolved("--config", "last.yaml")
    assert [str(stage.run_dir) for stage in one.stages] == ["runs/round_0", "runs/generator_1"]
    assert str(one.run_dir) == "runs/round_1"
    three = _resolved("--config", "last.yaml", "--rounds", "3")
    places = ["round_0", "generator_1", "round_1", "generator_2", "round_2", "generator_3"]
    assert [str(stage.run_dir) for stage in three.stages] == [f"runs/{place}" for place in places]
    assert str(three.run_dir) == "runs/round_3"
    # What one round needs is not done again when there are more.
    assert [stage.config_hash for stage in three.stages[:2]] == [stage.config_hash for stage in one.stages]
    assert three.stages[2].config_hash == one.config_hash
    two = _resolved("--config", "last.yaml", "--rounds", "2")
    assert three.stages[4].config_hash == two.config_hash
    assert three.stages[3].config_hash != three.stages[1].config_hash


def test_a_stage_of_a_round_is_in_its_own_process_what_the_pipeline_takes_it_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _three_fits()
    cli = _resolved("--config=last.yaml", "--rounds", "2", "--runs", "elsewhere", "--model.init_args.ema_decay=0.5")
    repeated = cli.stages[2]
    assert str(repeated.run_dir) == "elsewhere/round_1"
    # Not a dry run, which would be another configuration. Its stages have been seen to.
    monkeypatch.setattr("lightning_modules.stages.run_stages", lambda *_: None)
    alone = _run(*repeated.arguments)
    assert [stage.config_hash for stage in alone.stages] == [stage.config_hash for stage in cli.stages[:2]]
    assert alone.config_hash == repeated.config_hash
    assert alone.run_dir == repeated.run_dir
    assert alone.config.fit.model.init_args.ema_decay == 0.5
    generator = _alone(cli.stages[3])
    assert generator.datamodule.seed == 1


def test_a_stage_of_two_rounds_needs_two_places() -> None:
    _three_fits()
    text = Path("generator.yaml").read_text().replace("generator_${round}", "generator")
    Path("generator.yaml").write_text(text)
    with pytest.raises(SystemExit):
        _resolved("--config", "last.yaml", "--rounds", "2")


def test_a_saved_config_is_its_own_round() -> None:
    _three_fits()
    cli = _resolved("--config", "last.yaml", "--rounds", "2", "--stages", "null")
    saved = cli.config.fit
    assert (saved.rounds, saved.round, saved.previous_round) == (1, 2, 1)


def test_variables_of_the_command_line_reach_the_stages_that_have_them() -> None:
    seed = {"data__init_args__seed": "${vars.seed}"}
    _write("inner", "${runs}/inner", vars={"width": 1, "seed": 0}, **seed)
    _write("outer", "${runs}/outer", stages=["inner.yaml"])
    _write("last", "${runs}/last", stages=["outer.yaml"], vars={"steps": 4})
    assert known_variables(["last.yaml"]) == {"width", "seed", "steps"}
    Path("based.yaml").write_text("base: last.yaml\nvars: {more: 1}\n")
    assert known_variables(["based.yaml"]) == {"width", "seed", "steps", "more"}
    cli = _resolved("--config", "last.yaml", "--vars.seed", "3", "--vars.steps=8")
    (outer,) = cli.stages
    assert "--vars.seed=3" in outer.arguments
    assert not any("steps" in word for word in outer.arguments)
    (nested,) = _alone(outer).stages
    assert "--vars.seed=3" in nested.arguments
    assert _alone(nested).datamodule.seed == 3
    plain = _resolved("--config", "last.yaml")
    assert plain.stages[0].config_hash != outer.config_hash
    # A file can say it as well.
    _write("other", "${runs}/other", stages=["outer.yaml"], stage_vars={"seed": 3, "unknown": 1})
    assert _resolved("--config", "other.yaml").stages == [outer]
    with pytest.raises(SystemExit):
        _resolved("--config", "last.yaml", "--vars.sead", "3")


def test_variables_survive_being_written_and_read_again() -> None:
    values = {"a": 3, "b": "path/to x", "c": "3", "d": None, "e": [1, 2], "f": 1.0e-3, "g": "null", "h": True}
    Path("a.yaml").write_text(yaml.safe_dump({"vars": dict.fromkeys(values, 0)}))
    words = overlays_last(["fit", "--config", "a.yaml", *variable_flags(values)])
    found = [word for word in words if word.startswith("--stage_vars=")]
    assert yaml.safe_load(found[0].removeprefix("--stage_vars=")) == values
