"""What the README shows is run."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("number", "lines", "metric", "least"), [(0, 25, "test_accuracy", 0.6), (2, 15, "test_jaccard", 0.2)]
)
def test_a_python_example_is_short_and_works(
    number: int, lines: int, metric: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = _blocks("python")
    assert len(examples) == 3
    written = [line for line in examples[number].splitlines() if line.strip()]
    assert len(written) < lines
    pl.seed_everything(0)
    names: dict[str, object] = {}
    exec(compile(examples[number], "README.md", "exec"), names)
    probabilities = names["probabilities"]
    assert isinstance(probabilities, torch.Tensor)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(probabilities[:, 0].shape))
    trainer = names["trainer"]
    assert isinstance(trainer, pl.Trainer)
    assert trainer.callback_metrics[metric] > least


def test_the_example_that_draws_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = re.sub(r"max_epochs=\d+", "max_epochs=1", _blocks("python")[1])
    pl.seed_everything(0)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    images = names["images"]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (10, 1, 8, 8)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1


def test_the_two_set_up_commands_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    install, tests = _blocks("bash")[:2]
    assert "pip install" in install
    assert "lightning fit --config configs/hybrid_lesions.yaml" in install
    assert 'lightning" fit --config configs/hybrid_lesions.yaml' in ci
    assert "pip install -e '.[test]'" in tests
    assert "-e '.[test]'" in ci
    assert "-m pytest" in tests
    assert "-m pytest" in ci


def test_every_file_the_readme_names_exists() -> None:
    for path in re.findall(r"(?:configs|benchmarks)/[\w/.]+\.(?:yaml|py|png)", README):
        assert (ROOT / path).is_file(), path
