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


def test_the_python_example_is_short_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = _blocks("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) < 15
    pl.seed_everything(0)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    probabilities = names["probabilities"]
    assert isinstance(probabilities, torch.Tensor)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(probabilities[:, 0].shape))
    trainer = names["trainer"]
    assert isinstance(trainer, pl.Trainer)
    assert trainer.callback_metrics["test_jaccard"] > 0.2


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
