"""Bad inputs to whole commands: each gets its clear error, and nothing half-written stays behind."""

import copy
import errno
import os
import pickle
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from cli_runs import NETWORK, tiny_generator, write
from fake_data import write_folder, write_isic2018, write_ph2
from PIL import Image
from tiny_nets import adamw, tiny_trainer

from datamodules import ArraySource, GenerationDataModule
from lightning_modules import NoisyLabelClassifier, NoisyResNet, stages
from lightning_modules.cli import main

LAST = Path("runs/a/checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder runs/ of one epoch on generated lesions, tested; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("LOCAL_RANK", raising=False)
        main(["fit", "--config", str(write(folder, "a", trainer__max_epochs=1, test_after_fit=True))])
    return folder / "runs"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("FEWLIGHT_DATA", raising=False)
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "")
    # Of its own, so that what is forgotten in there is seen.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


# ---------------------------------------------------------------- what is wrong


def _fit(name: str = "a", **changes: object) -> list[str]:
    return ["fit", "--config", str(write(Path(), name, **changes))]


def _data(name: str, **arguments: object) -> dict[str, Any]:
    arguments = {"root": "data", "image_size": 16, "batch_size": 2, "val_share": 0.0, **arguments}
    return {"class_path": name, "init_args": arguments}


def _folder(**arguments: object) -> dict[str, Any]:
    return _data("FolderSegmentationDataModule", **arguments)


def _damaged(damage: Callable[[Path], object], **arguments: object) -> Callable[[], list[str]]:
    """A fit on a folder of four pairs that something was done to."""

    def arrange() -> list[str]:
        damage(write_folder(Path("data"), 4))
        return _fit(data=_folder(**arguments))

    return arrange


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncated_jpeg() -> list[str]:
    _truncate(write_isic2018(Path("data"), 4) / "ISIC2018_Task1-2_Training_Input" / "ISIC_0000002.jpg")
    return _fit(data=_data("ISIC2018DataModule"))


def _mask_of(ids: int, height: int = 24, width: int = 32) -> Callable[[Path], None]:
    pixels = np.full((height, width), ids, dtype=np.uint8)
    return lambda root: Image.fromarray(pixels).save(root / "masks" / "photo1.png")


def _two_broken(root: Path) -> None:
    for name in ("photo1", "photo2"):
        _truncate(root / "images" / f"{name}.png")


def _too_many_labels() -> list[str]:
    write_ph2(Path("data"), 5)
    return _fit(data=_data("PH2DataModule", num_labels=6))


def _network(**changes: object) -> dict[str, Any]:
    network: dict[str, Any] = copy.deepcopy(NETWORK)
    network["init_args"] |= changes
    return network


def _odd_size() -> list[str]:
    return _fit(model__init_args__network=_network(channel_mult=[1, 2, 2]), data__init_args__image_size=30)


def _from_file(write_it: Callable[[Path], object]) -> Callable[[], list[str]]:
    """A fit that starts from a file that is no checkpoint of its kind."""

    def arrange() -> list[str]:
        write_it(Path("start.ckpt"))
        return _fit("b", model__init_args__init_from="start.ckpt")

    return arrange


class _Bomb:
    """What happens to those who unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def _option(option: str, name: str, content: bytes) -> Callable[[], list[str]]:
    """A fit that gets a file of some content by an option."""

    def arrange() -> list[str]:
        Path(name).write_bytes(content)
        return [*_fit(), option, name]

    return arrange


def _more_levels(name: str, **changes: object) -> list[str]:
    return _fit(name, model__init_args__network=_network(channel_mult=[1, 1, 2]), **changes)


def _without_time() -> list[str]:
    arguments = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 5}
    unet = {"class_path": "segmentation_models_pytorch.Unet", "init_args": arguments}
    return _fit(model__init_args__network=unet)


def _three_classes(**arguments: object) -> list[str]:
    write_folder(Path("data"), 4, num_classes=3)
    return _fit(data=_folder(num_classes=3, **arguments), model__init_args__network=_network(out_channels=6))


def _truncated_last() -> list[str]:
    _truncate(LAST)
    return [*_fit(), "--ckpt_path", "last"]


def _predict(*names: str, **arguments: object) -> list[str]:
    Path("photos").mkdir()
    for name in names:
        Image.new("RGB", (20, 10)).save(Path("photos") / name, "PNG")
    writer = {"class_path": "MaskWriter", "init_args": {"output_dir": "masks", **arguments}}
    return ["predict", *_fit(trainer__callbacks=[writer], data__init_args__predict_images="photos")[1:]]


def _judged_by(**arguments: Any) -> Callable[[], list[str]]:
    """A generator of digits whose classifier of noisy images was trained on other data."""

    def arrange() -> list[str]:
        torch.manual_seed(0)
        data = GenerationDataModule(**arguments, batch_size=4, steps_per_epoch=1)
        network = NoisyResNet(1, (4, 8), (1, 1), (1, 2), embed_dim=8)
        judge = NoisyLabelClassifier(network, data.num_classes, optimizer=adamw)
        trainer = tiny_trainer(Path(), max_epochs=1)
        trainer.fit(judge, datamodule=data)
        trainer.save_checkpoint("judge.ckpt")
        return _fit(model=tiny_generator("judge.ckpt"), data={"class_path": "GenerationDataModule"})

    return arrange


_SQUARES = ArraySource(np.zeros((9, 8, 8), dtype=np.uint8), [0, 1, 2] * 3)


def _masks_over_a_file() -> list[str]:
    Path("masks").write_text("mine")
    return _predict("one.png")


def _resumed() -> list[str]:
    return [*_fit(trainer__max_epochs=2), "--ckpt_path", "last"]


# ---------------------------------------------------------------- what goes wrong


def _full_disk(name: str) -> AbstractContextManager[object]:
    """There is no room for a file when it is to take its name."""

    def replace(source: str, target: str, **_: object) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
        real(source, target)

    real = os.replace
    return mock.patch("os.replace", replace)


@contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    """The system refuses to write more than so many bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _disks_fill() -> Iterator[None]:
    """The system's folder for temporary files is on another disk than the run, and the latter is full."""

    def rename(source: str, target: str, **_: object) -> None:
        if Path(tempfile.gettempdir()) in Path(source).parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        real(source, target)

    def copy(source: str, target: str, **_: object) -> None:
        data = Path(source).read_bytes()
        Path(target).write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    real = os.rename
    with mock.patch("os.rename", rename), mock.patch("shutil.copyfile", copy), _full_disk("last.ckpt"):
        yield


@dataclass(frozen=True)
class Case:
    """One bad input."""

    name: str
    arrange: Callable[[], list[str]]  # prepares the folder it is run in and returns the command
    error: type[BaseException]
    message: str  # pattern of what it says; where the process ends: of its code and what it printed
    trained: bool = False  # whether runs/a is there from before, one epoch of training
    trouble: Callable[[], AbstractContextManager[object]] = nullcontext  # what goes wrong meanwhile
    leaves: str = "$."  # pattern of what may stay behind besides logs, all of it complete


# fmt: off
CASES = [
    # Data
    Case("wrong root", lambda: _fit(data=_folder(root="nowhere")), FileNotFoundError,
         r"`root` to be a folder.*nowhere.*FEWLIGHT_DATA.*Expected layout"),
    Case("wrong root after a finished run", lambda: _fit(data=_folder(root="nowhere")), FileNotFoundError,
         r"`root` to be a folder", trained=True),
    Case("empty folder", lambda: _fit(data=_folder(root=".")), FileNotFoundError,
         r"`root` to hold images.*has none.*Expected layout"),
    Case("truncated JPEG", _truncated_jpeg, ValueError,
         r"1 of 4.*ISIC_0000002\.jpg: cannot be decoded.*`on_bad_file: skip`"),
    Case("text named .png", _damaged(lambda root: (root / "images/photo1.png").write_text("hello")), ValueError,
         r"1 of 4.*photo1\.png: cannot be decoded"),
    Case("mask ids out of range", _damaged(_mask_of(7)), ValueError,
         r"mask photo1\.png: ids out of range: 7 \(expected \{0, 1\} or \{0, 255\}\)"),
    Case("image without mask", _damaged(lambda root: (root / "masks/photo1.png").unlink()), ValueError,
         r"images/photo1\.png: image without mask"),
    Case("mask without image", _damaged(lambda root: (root / "images/photo1.png").unlink()), ValueError,
         r"masks/photo1\.png: mask without image"),
    Case("size mismatch", _damaged(_mask_of(0, 12, 13)), ValueError,
         r"photo1\.png: size mismatch: image 32x24, mask 13x12"),
    Case("too much to skip", _damaged(_two_broken, on_bad_file="skip", max_bad_share=0.25), ValueError,
         r"2 of 4.*50\.0%, more than `max_bad_share` \(25\.0%\)"),
    Case("more labels than images", _too_many_labels, ValueError, r"`num_labels` to be from 1 to 5.*got 6\. Leave it"),
    Case("val_share of 1", lambda: _fit(data=_folder(val_share=1.0)), ValueError,
         r"`val_share` to be in \[0, 1\), but got 1\.0"),
    Case("no images to predict", _predict, FileNotFoundError,
         r"`predict_images` to be a folder of images.*photos holds no images", trained=True),
    Case("two masks of one name", lambda: _predict("a.jpg", "a.png", "a.jpg.png"), ValueError,
         r"one mask file for each image, got several for a\.jpg.*rename", trained=True),
    # Model
    Case("image size that does not divide", _odd_size, ValueError,
         r"divisible by 4, got 30 x 30\. Resize or pad the images to 32 x 32"),
    Case("channels that do not fit", lambda: _fit(model__init_args__network=_network(out_channels=7)), ValueError,
         r"`network` with 5 output channels.*got 7; set the network's out_channels"),
    Case("no time input", _without_time, ValueError,
         r"network\(x, t\) for objective 'hybrid', got Unet without a time input; use ADMUNet"),
    Case("no optimiser", lambda: _fit(model__init_args__optimizer=None), ValueError,
         r"`optimizer` for fit, got None; give model\.init_args\.optimizer\.class_path"),
    Case("NaN loss", lambda: _fit(model__init_args__optimizer__init_args__lr=1e30), FloatingPointError,
         r"finite training loss, got (nan|inf) at step \d.*Lower the learning rate"),
    # Checkpoints
    Case("other classes in ckpt_path", lambda: [*_three_classes(), "--ckpt_path", str(LAST)], ValueError,
         r"`num_classes` = 3, got one with 2;.*init_from", trained=True),
    Case("other classes in test", lambda: ["test", *_three_classes(num_labels=2)[1:]], ValueError,
         r"`num_classes` = 3, got one with 2;.*init_from", trained=True),
    Case("other network in ckpt_path", lambda: [*_more_levels("a"), "--ckpt_path", str(LAST)], ValueError,
         r"`ckpt_path`.*tensors.*differ.*`network`", trained=True),
    Case("other network in init_from", lambda: _more_levels("b", model__init_args__init_from=str(LAST)), ValueError,
         r"`init_from` to hold the same network.*last\.ckpt differ: .*give `network` the arguments", trained=True),
    Case("text as init_from", _from_file(lambda path: path.write_text("hello")), ValueError,
         r"`init_from` to be a checkpoint.*start\.ckpt cannot be read"),
    Case("truncated init_from", _from_file(lambda path: path.write_bytes(LAST.read_bytes()[:9000])), ValueError,
         r"`init_from` to be a checkpoint.*start\.ckpt cannot be read.*written completely", trained=True),
    Case("pickled code as init_from", _from_file(lambda path: path.write_bytes(pickle.dumps(_Bomb()))), ValueError,
         r"`init_from` to be a checkpoint.*start\.ckpt cannot be read"),
    Case("tensors as init_from", _from_file(lambda path: torch.save({"x": torch.ones(1)}, path)), ValueError,
         r"`init_from` to be a Lightning checkpoint with a `state_dict`, got dict without"),
    Case("missing init_from", _from_file(lambda path: None), FileNotFoundError,
         r"`init_from` to be a checkpoint file, but there is none at start\.ckpt.*run the fit that writes it"),
    Case("classifier_from of other classes", _judged_by(source=_SQUARES), ValueError,
         r"`classifier_from` to be a classifier of the same classes.*trained with num_classes 3, not 10; fit one"),
    Case("classifier_from of another resolution", _judged_by(image_size=16), ValueError,
         r"`classifier_from` to be a classifier of the same .*images.*trained with image_size 16, not 8; fit one"),
    Case("text as ckpt_path", _option("--ckpt_path", "no.ckpt", b"hello"), ValueError,
         r"`ckpt_path` to be a checkpoint.*no\.ckpt cannot be read"),
    Case("truncated last.ckpt", _truncated_last, ValueError,
         r"`ckpt_path` to be a checkpoint.*last\.ckpt cannot be read.*written completely", trained=True),
    # Command line and YAML
    Case("unknown class", lambda: [*_fit(), "--model.class_path", "Nothing"], SystemExit, r"^2\n.*model.*Nothing"),
    Case("unknown objective", lambda: [*_fit(), "--model.init_args.objective", "best"], SystemExit,
         r"^2\n.*objective.*'hybrid', 'supervised', 'generative'.*best"),
    Case("unknown key", lambda: _fit(trainer__max_epoch=3), SystemExit, r"^2\n.*trainer\.max_epoch"),
    Case("no YAML", _option("--config", "no.yaml", b"model: [1,"), SystemExit, r"^2\n.*no\.yaml"),
    Case("no YAML as overlay", _option("--overlay", "no.yaml", b"model: {"), SystemExit, r"^2\n.*no\.yaml"),
    Case("a list as YAML", _option("--config", "no.yaml", b"- 1"), SystemExit, r"^2\n.*no\.yaml"),
    Case("a picture as YAML", _option("--config", "no.yaml", b"\x89PNG\r\n\x1a\n\0"), SystemExit, r"^2\n.*no\.yaml"),
    Case("missing config", lambda: ["fit", "--config", "gone.yaml"], SystemExit, r"^2\n.*does not exist.*gone\.yaml"),
    Case("missing stage", lambda: _fit(stages=["gone.yaml"]), SystemExit, r"^2\n.*stages.*does not exist.*gone\.yaml"),
    # Disks
    Case("disk full at metrics.json", lambda: _fit(test_after_fit=True), OSError,
         r"`path` runs/a/metrics\.json: No space left.*Free some space",
         trouble=lambda: _full_disk("metrics.json"), leaves=r".*last\.ckpt"),
    Case("disk full at the manifest", lambda: _fit(report=None), OSError,
         r"runs/a/manifest\.json \(No space left on device\); make room",
         trouble=lambda: _full_disk("manifest.json"), leaves=r".*last\.ckpt"),
    Case("disk full at a mask", lambda: _predict("one.png"), OSError,
         r"`path` masks/one\.png: No space left", trained=True, trouble=lambda: _full_disk("one.png")),
    Case("files too large at a checkpoint", _resumed, OSError, r"last\.ckpt.*File too large", trained=True,
         trouble=lambda: _files_up_to(30_000)),
    Case("disk full at a checkpoint", _resumed, OSError, r"last\.ckpt.*No space left", trained=True,
         trouble=_disks_fill),
    Case("files too large at config.yaml", _fit, OSError, r"config\.yaml.*File too large",
         trouble=lambda: _files_up_to(1000)),
    Case("a file in place of the masks", _masks_over_a_file, OSError,
         r"`path` masks/one\.png: .*Choose another folder", trained=True),
    Case("a file in place of the runs", lambda: _fit(runs="a.yaml"), OSError,
         r"`trainer\.default_root_dir`.*a\.yaml/a"),
    Case("another fit in the directory", _fit, RuntimeError,
         r"`trainer\.default_root_dir` to be free.*another process.*runs/a; wait",
         trouble=lambda: stages.only_one_fit(Path("runs/a"))),
]
# fmt: on
PARAMETERS = [pytest.param(c, id=c.name) for c in CASES]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _is_log(name: str) -> bool:
    """What a run that failed may leave: what it was asked to do and what it logged until then."""
    return re.fullmatch(r"config(_test|_predict)?\.yaml|hparams\.yaml|\.lock|events\..*", Path(name).name) is not None


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_bad_input_gets_a_clear_error_and_leaves_nothing_half_written(
    case: Case, tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if case.trained:
        shutil.copytree(trained, tmp_path / "runs")
    command = case.arrange()
    before = _files(tmp_path)
    capfd.readouterr()
    with pytest.raises(case.error) as caught, case.trouble():
        main(command)
    said = str(caught.value)
    if isinstance(caught.value, SystemExit):
        said += "\n" + capfd.readouterr().err
    assert re.search(case.message, said, re.DOTALL)

    after = _files(tmp_path)
    assert [name for name in before if after.get(name) != before[name] and not _is_log(name)] == []
    new = [name for name in after if name not in before and not _is_log(name)]
    assert [name for name in new if not re.fullmatch(case.leaves, name)] == []
    for name in new:
        assert "state_dict" in torch.load(tmp_path / name, weights_only=True)
    for config in tmp_path.glob("runs/*/config*.yaml"):
        assert {"model", "data", "trainer"} <= yaml.safe_load(config.read_text()).keys()


def test_a_failing_stage_ends_the_run_before_the_last_fit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(Path(), "early", data=_folder(root="nowhere"))
    with pytest.raises(SystemExit) as stopped:
        main(_fit(stages=["early.yaml"]))
    assert stopped.value.code == 1
    printed = capfd.readouterr()
    assert "stage 1/1 early.yaml: failed (exit code 1)" in printed.out
    assert "Expected argument `root` to be a folder" in printed.err
    assert [name for name in _files(tmp_path / "runs") if not (name.startswith("early/") and _is_log(name))] == []


def test_images_that_differ_in_the_suffix_only_keep_it(tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    main(_predict("a.jpg", "a.png", "b.png"))
    assert sorted(_files(tmp_path / "masks")) == ["a.jpg.png", "a.png.png", "b.png", "confidence.csv"]
