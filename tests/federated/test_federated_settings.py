"""Settings that cannot work are refused by name, from a command line, before anything runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datamodules.partition import ClientSplit
from federated.checks import check
from federated.parsing import read
from federated.settings import (
    Central,
    Communication,
    Confusion,
    Drawing,
    Privacy,
    Role,
    Selection,
    Settings,
)

CONFIG = """
vars: {lr: 0.05, rounds: 4}
source: {class_path: DigitsSource}
classifier:
  model:
    class_path: SSLClassifier
    init_args:
      network: {class_path: ConvNet, init_args: {image_size: 8, widths: [4, 8]}}
      method: {class_path: Supervised}
      optimizer: {class_path: torch.optim.SGD, init_args: {lr: "${vars.lr}"}}
  data: {class_path: SemiSupervisedDataModule, init_args: {batch_size: 16}}
  rounds: ${vars.rounds}
run_dir: ${runs}/here
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(CONFIG)
    path = tmp_path / "run.yaml"
    path.write_text("base: base.yaml\nvars: {lr: 0.1}\nsplit: {num_clients: 3}\ncentral: null\n")
    return path


def test_a_command_line_becomes_plain_settings(config: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "more.yaml"
    overlay.write_text("split: {alpha_labeled: 0.1}\nprivacy: {noise_multiplier: 0.5, clipping_norm: 2}\n")
    words = ["--classifier.epochs=2", "--vars.rounds=7", "--config", str(config), "--overlay", str(overlay)]
    settings = read([*words, "--runs=/runs", "--arms=[labels,selected]"])
    model = settings.classifier.model
    assert model["class_path"] == "lightning_modules.SSLClassifier"
    assert model["init_args"]["network"]["class_path"] == "lightning_modules.ConvNet"
    assert model["init_args"]["optimizer"]["init_args"]["lr"] == 0.1
    assert model["init_args"]["num_classes"] is None  # from the source, later
    assert settings.classifier.data["init_args"]["batch_size"] == 16
    assert (settings.classifier.rounds, settings.classifier.epochs) == (7, 2)
    assert settings.source == {"class_path": "datamodules.DigitsSource"}
    assert (settings.run_dir, settings.arms) == ("/runs/here", ["labels", "selected"])
    assert (settings.split, settings.central) == (ClientSplit(num_clients=3, alpha_labeled=0.1), None)
    assert (settings.generator, settings.privacy) == (None, Privacy(0.5, 2.0))
    assert Settings.from_plain(json.loads(json.dumps(settings.to_plain()))) == settings


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("--classifier.roundz=3", "unrecognized arguments: --classifier.roundz=3"),
        ("--classifier.model.init_args.depth=3", "Option 'depth' is not accepted"),
        ("--vars.foo=3", "expected `--vars.NAME` with a NAME of the configs (lr, rounds), got foo"),
        ("--classifier.rounds=0", "error: classifier: Expected `rounds` to be at least 1, got 0"),
        ("--generator.rounds=3", "the following arguments are required: generator.model, generator.data"),
    ],
)
def test_a_wrong_word_is_refused(word: str, problem: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(["--config", str(config), word])
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err


def test_what_a_later_file_takes_away_is_not_looked_at(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (config.parent / "base.yaml").open("a") as base:
        base.write("generator: {model: {class_path: NoSuchModule}}\n")
    with pytest.raises(SystemExit):
        read(["--config", str(config)])
    assert 'Parser key "generator.model"' in capsys.readouterr().err
    assert read(["--config", str(config), "--generator=null"]).generator is None


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Role({}, {}, rounds=0), "`rounds` to be at least 1, got 0"),
        (lambda: Role({}, {}, epochs=0), "`epochs` to be at least 1, got 0"),
        (lambda: Role({}, {}, server_ema=1.0), "`server_ema` to be at least 0 and below 1, got 1.0"),
        (lambda: Confusion(folds=1), "`folds` to be at least 2, got 1"),
        (lambda: Selection(smoothing=-1), "`smoothing` to be at least 0, got -1"),
        (lambda: Selection(min_precision=1.5), "`min_precision` to be at least 0 and at most 1, got 1.5"),
        (lambda: Selection(min_confidence=float("nan")), "`min_confidence` to be at least 0 and at most 1, got nan"),
        (lambda: Drawing(ratio=-0.5), "`ratio` to be at least 0"),
        (lambda: Drawing(candidates=0.5), "`candidates` to be at least 1"),
        (lambda: Drawing(min_gate_rate=2), "`min_gate_rate` to be at least 0 and at most 1, got 2"),
        (lambda: Communication(fraction=0), "`fraction` to be above 0 and at most 1, got 0"),
        (lambda: Communication(min_clients=0), "`min_clients` to be at least 1, got 0"),
        (lambda: Communication(timeout=float("inf")), "`timeout` to be above 0, got inf"),
        (lambda: Privacy(-1, 1), "`noise_multiplier` to be at least 0, got -1"),
        (lambda: Privacy(1, 0), "`clipping_norm` to be above 0, got 0"),
        (lambda: Central(epochs=0), "`epochs` to be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(ValueError, match="Expected ") as refused:
        make()
    assert problem in str(refused.value)


ROLE = Role({"class_path": "M"}, {"class_path": "D"})
NOISY = "{client}/noisy_classifier.ckpt"


def generator(**arguments: object) -> Role:
    return replace(ROLE, model={"class_path": "G", "init_args": arguments})


def settings(**parts: Any) -> Settings:
    return Settings({"class_path": "S"}, ROLE, **parts)


def test_the_gate_asks_for_more_than_chance_and_for_what_can_be_reached() -> None:
    assert [Drawing().least_gate_rate(classes) for classes in (2, 3, 4, 10)] == pytest.approx([0.75, 2 / 3, 0.5, 0.2])
    assert Drawing(min_gate_rate=0.0).least_gate_rate(2) == 0


def test_settings_that_fit_together_pass() -> None:
    check(settings())
    check(settings(generator=generator(weighting="none"), arms=["labels", "drawn", "selected_and_drawn"]))
    check(settings(generator=generator(weighting="posterior", classifier_from="other.ckpt")))
    check(settings(generator=generator(weighting="posterior", classifier_from=NOISY), noisy_classifier=ROLE))
    check(settings(split=None, engine="deployment"))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"arms": ["labels", "drawn"]}, "a `generator` for `arms` with drawn images"),
        ({"arms": ["labels", "labels"]}, "`arms` to name at least one classifier, and each once"),
        ({"arms": []}, "`arms` to name at least one classifier"),
        ({"generator": generator(weighting="posterior")}, "classifier_from` for `weighting: posterior`, got none"),
        ({"generator": generator(classifier_from=NOISY)}, "a `noisy_classifier` for `classifier_from`"),
        ({"generator": generator(weighting="none"), "noisy_classifier": ROLE}, "where there is a `noisy_classifier`"),
        ({"noisy_classifier": ROLE}, "where there is a `noisy_classifier`"),
        ({"split": None}, "a `split` for `engine` in_process"),
        ({"split": ClientSplit(num_clients=1)}, "at most `split.num_clients`, got 2 of 1 clients"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(parts: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match="Expected ") as refused:
        check(settings(**parts))
    assert problem in str(refused.value)


@pytest.mark.parametrize("argument", ["source", "pseudo_labels", "synthetic_images"])
def test_what_the_run_sets_is_not_for_the_user(argument: str) -> None:
    role = replace(ROLE, data={"class_path": "D", "init_args": {argument: "mine"}})
    with pytest.raises(ValueError, match=rf"`generator.data.init_args.{argument}` to be left out, got 'mine'"):
        check(settings(generator=role))


@pytest.mark.parametrize("option", ["max_epochs", "logger", "epochs"])
def test_trainers_take_what_a_run_leaves_to_them(option: str) -> None:
    check(settings(generator=replace(generator(weighting="none"), trainer={"gradient_clip_val": 1.0})))
    with pytest.raises(ValueError, match=f"`generator.trainer` to hold arguments .* got {option}"):
        check(settings(generator=replace(ROLE, trainer={option: 3})))
