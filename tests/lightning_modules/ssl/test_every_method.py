"""What every semi-supervised method has to stand: real fits on two moons, straight, resumed, and in two processes."""

import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import environment
from pytorch_lightning.callbacks import ModelCheckpoint
from ssl_methods import GAINS, METHODS, NOISY, WEIGHTS, build
from ssl_toy_data import ToyData
from ssl_toys import ToyNet
from tiny_nets import tiny_trainer
from torch import Tensor

from lightning_modules.ssl.base import Loss
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl_classifier import SSLClassifier

NAMES = sorted(METHODS)
# Two moons take seconds a method; the others' turn comes with `-m slow`.
TAUGHT_BY_DEFAULT = {"dividemix", "fixmatch", "label_propagation", "mean_teacher", "mixmatch"}
WITHOUT_UNLABELLED = {"supervised", "adversarial_training", "dividemix"}
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def module_for(name: str) -> SSLClassifier:
    torch.manual_seed(0)
    ramp = Ramp(WEIGHTS[name], until=0.2) if name in WEIGHTS else None
    return SSLClassifier(ToyNet(num_classes=2, width=64), build(name), 2, ramp, optimizer=sgd, ema_decay=0.95)


def fit(name: str, folder: Path, data: ToyData, epochs: int = 3, **options: Any) -> SSLClassifier:
    module = module_for(name)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = tiny_trainer(folder, max_epochs=epochs, limit_val_batches=0, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


def tensors(module: SSLClassifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module", autouse=True)
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a supervised fit, for methods that learn from one; in $FEWLIGHT_TOY_TEACHER."""
    folder = tmp_path_factory.mktemp("teacher")
    module = fit("supervised", folder, ToyData(), epochs=5)
    file = folder / "teacher.ckpt"
    module.trainer.save_checkpoint(file)
    return file


@pytest.fixture(autouse=True)
def teacher_by_name(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (path, arguments) in METHODS.items():
        if "teacher_from" in arguments:
            monkeypatch.setitem(METHODS, name, (path, arguments | {"teacher_from": str(teacher)}))


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_fit_ends_bit_equal_and_keeps_no_pickles(name: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    straight = fit(name, tmp_path, ToyData(steps=4), callbacks=[saving], enable_checkpointing=True)
    resumed = fit(name, tmp_path, ToyData(steps=4), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert resumed.trainer.global_step == straight.trainer.global_step == 12
    found = tensors(resumed)
    for key, value in tensors(straight).items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", sorted(set(NAMES) - WITHOUT_UNLABELLED))
def test_unlabelled_images_change_what_is_learnt(name: str, tmp_path: Path) -> None:
    here, elsewhere = ToyData(steps=4), ToyData(steps=4)
    hidden = elsewhere.labels_of("unlabeled") < 0
    elsewhere.points[hidden] = elsewhere.points[hidden].flip(0) * 1.1
    first, second = (fit(name, tmp_path, data).network for data in (here, elsewhere))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_network_is_trained_by_the_unlabelled_loss_too_and_no_frozen_weight(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_for(name)
    norms: list[float] = []
    total = Loss.total

    def noting(loss: Loss, mu: float) -> Tensor:
        if isinstance(loss.unsup, Tensor) and loss.unsup.requires_grad:
            trained = [p for p in module.parameters() if p.requires_grad]
            found = torch.autograd.grad(loss.unsup, trained, retain_graph=True, allow_unused=True)
            norms.append(float(sum(g.square().sum() for g in found if g is not None)))
        return total(loss, mu)

    monkeypatch.setattr(Loss, "total", noting)
    tiny_trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(module, datamodule=ToyData(steps=4))
    # Thresholds may let nothing through in some batches; in none would be a loss that does nothing.
    assert name in {"supervised", "adversarial_training"} or max(norms) > 1e-12
    before = dict(module_for(name).network.named_parameters())
    still = {key for key, now in module.network.named_parameters() if torch.equal(now, before[key])}
    # BatchNorm takes the mean away, and with it the gradient of a bias in front of it.
    assert still <= {"body.1.bias"}
    assert module.ema is not None
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert {id(p) for p in module.ema.parameters()} <= {id(p) for p in frozen}
    assert [p.grad for p in frozen if p.grad is not None] == []


@pytest.mark.parametrize("name", NAMES)
def test_hidden_labels_change_nothing(name: str, tmp_path: Path) -> None:
    honest, poisoned = ToyData(steps=3), ToyData(steps=3)
    poisoned.truth = 1 - poisoned.truth
    first, second = (tensors(fit(name, tmp_path, data)) for data in (honest, poisoned))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@cache
def _accuracy(name: str, noisy: bool, folder: Path) -> float:
    """Test accuracy; the mean over two data sets where labels are wrong."""
    found = []
    for seed in (0, 2) if noisy else (2,):
        kind: dict[str, Any] = {"labels_per_class": 60, "noisy": 0.3, "batch_size": 32} if noisy else {}
        data = ToyData(steps=30, seed=seed, **kind)
        module = fit(name, folder, data, epochs=5)
        (metrics,) = module.trainer.test(module, datamodule=data, verbose=False)
        found.append(float(metrics["test_accuracy"]))
    return sum(found) / len(found)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moons")


@pytest.mark.parametrize(
    "name", [name if name in TAUGHT_BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_two_moons_are_learnt_better_than_from_the_labels_alone(name: str, session_folder: Path) -> None:
    noisy = name in NOISY
    assert _accuracy(name, noisy, session_folder) >= _accuracy("supervised", noisy, session_folder) + GAINS.get(
        name, 0.0
    )


_TWO_PROCESSES = """
import json, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl_classifier import SSLClassifier
from ssl_methods import METHODS
from ssl_toy_data import ToyData
import test_every_method as every
names, folder, teacher = json.loads(sys.argv[1])
found = {{}}
for name in names:
    path, arguments = METHODS[name]
    METHODS[name] = (path, arguments | ({{"teacher_from": teacher}} if "teacher_from" in arguments else {{}}))
    module = every.fit(name, Path(folder), ToyData(steps=3), devices=2, strategy="ddp_find_unused_parameters_true")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    found[name] = {{
        key: value.double().sum().item() for key, value in module.state_dict().items() if not key.endswith(statistics)
    }}
    rank = module.trainer.global_rank
Path(folder, f"rank{{rank}}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_hold_the_same_weights_and_memory(tmp_path: Path, teacher: Path) -> None:
    tests = Path(__file__).parents[2]
    paths = [str(tests.parent), str(tests), str(Path(__file__).parent)]
    script = tmp_path / "fits.py"
    script.write_text(_TWO_PROCESSES.format(paths=paths))
    words = json.dumps([NAMES, str(tmp_path), str(teacher)])
    run = subprocess.run(
        [sys.executable, str(script), words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert sorted(first) == NAMES
    differing = [(n, k) for n in NAMES for k in first[n] if first[n][k] != second[n][k]]
    assert differing == []
