"""What dual pseudo training says of artifacts that do not fit, of labels that are missing, and of what is not there."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from drawing_runs import CLASSES, files, predict
from dual_pseudo_runs import CONFIGS, write_configs
from PIL import Image

from datamodules import SemiSupervisedDataModule, pseudo_labels
from datamodules.classification.pseudo import ImagesToLabel
from datamodules.pseudo_labels import SPLITS, LabelTable, Origin
from lightning_modules.cli import main

RUNS = Path("runs/dpt_digits")
LABELS, DRAWN = RUNS / "round_0/pseudo_labels", RUNS / "generator_1/images"
TDSM = Path("runs/dpt_digits_tdsm/round_0/pseudo_labels")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configs of both pipelines."""
    folder = tmp_path_factory.mktemp("configs")
    for pipeline in ("dpt_digits", "dpt_digits_tdsm"):
        write_configs(folder, pipeline)
    return folder


@pytest.fixture(scope="module")
def labelled() -> tuple[LabelTable, Origin]:
    """Right pseudo-labels of all digits, as a classifier would have written them."""
    data = SemiSupervisedDataModule(image_size=8, labels_per_class=2, steps_per_epoch=1)
    data.setup()
    images = data.label_dataloader().dataset
    assert isinstance(images, ImagesToLabel)
    truth = data.truth_of(images.keys)
    splits = np.where(images.labels.numpy() >= 0, SPLITS.index("labeled"), SPLITS.index("unlabeled"))
    table = LabelTable(list(images.keys), truth, np.full(len(truth), 0.75, dtype=np.float32), splits)
    origin = Origin(data.class_names, data.images_fingerprint, made_with={"true_labels": True})
    return table, origin


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "")


Written = tuple[LabelTable, Origin]


def _written(folder: Path = LABELS, **changes: Any) -> Callable[[Written], None]:
    """Pseudo-labels whose origin says something else."""
    return lambda written: pseudo_labels.write(folder, written[0], replace(written[1], **changes))


def _edited(folder: Path = LABELS, **changes: Any) -> Callable[[Written], None]:
    """Pseudo-labels whose manifest was edited."""

    def arrange(written: Written) -> None:
        pseudo_labels.write(folder, *written)
        file = folder / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return arrange


def _without_manifest(written: Written) -> None:
    pseudo_labels.write(LABELS, *written)
    (LABELS / "manifest.json").unlink()


def _of_other_images(written: Written) -> None:
    table, origin = written
    pseudo_labels.write(LABELS, replace(table, keys=[f"train/{row:07d}" for row in range(len(table))]), origin)


def _without_eights(written: Written) -> None:
    table, origin = written
    pseudo_labels.write(LABELS, replace(table, labels=np.where(table.labels == 8, 3, table.labels)), origin)


def _drawn_from_squares(_: Written) -> None:
    predict(DRAWN, request=CLASSES)


def _half_drawn(_: Written) -> None:
    predict(DRAWN, request=CLASSES)
    (DRAWN / "manifest.json").unlink()


def _nothing(_: Written) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """What is wrong, with which fit, and what is said of it."""

    name: str
    config: str
    arrange: Callable[[Written], None]
    message: str
    error: type[Exception] = ValueError
    slow: bool = True


GENERATOR, NOISY, SELF = "dpt_digits_generator", "dpt_digits_noisy_classifier", "dpt_digits_self_training"
# fmt: off
CASES = [
    Case("pseudo-labels of other pictures", GENERATOR, _written(fingerprint="0" * 64),
         r"`pseudo_labels` of the images of the data \(fingerprint \w+\), but .*other images \(fingerprint 0+\).*anew"),
    Case("pseudo-labels of other classes", GENERATOR, _written(class_names=tuple("abcdefghij")),
         r"`pseudo_labels` with the classes of the data \(.*0.*9.*\), but .*a.*j.*; label the images with a module"),
    Case("pseudo-labels of other names", SELF, _of_other_images,
         r"`pseudo_labels` for every training image.*1297 of 1297 training images have none.*digits/.*Label .* anew"),
    Case("half-written pseudo-labels", GENERATOR, _without_manifest,
         r"`pseudo_labels` to be a finished folder.*has no manifest\.json: it is not finished; label the images first",
         FileNotFoundError, slow=False),
    Case("no pseudo-labels", SELF, _nothing,
         r"`pseudo_labels` to be a finished folder.*is no folder; label the images first", FileNotFoundError),
    Case("counts edited", GENERATOR, _edited(counts={"images": 3}),
         r"`pseudo_labels` as they were written, but in .*manifest\.json `counts` are .*Copy the folder again"),
    Case("a class name edited out", GENERATOR, _edited(class_names=list("012345678")),
         r"pseudo-labels whose `label` is from 0 to 8 in runs/.*/pseudo_labels\.parquet, but got 9 for 'digits/\d+'"),
    Case("a negative confusion", GENERATOR, _edited(confusion=[[-1] * 10] * 10),
         r"`confusion` has numbers that are negative or not finite.*Copy the folder again"),
    Case("a confusion of other classes", GENERATOR, _edited(expected_confusion=[[1] * 9] * 9),
         r"`expected_confusion` has shape \[9, 9\] instead of 10 x 10.*Copy the folder again"),
    Case("a class without pseudo-labels", GENERATOR, _without_eights,
         r"class '8' \(8 of 10 classes\) has none.*Label the images .*Images of each class: 0 \d+, .*, 8 0, 9 \d+",
         slow=False),
    Case("no confusion where it is needed", NOISY, _edited(TDSM, expected_confusion=None),
         r"Expected a table .* in runs/.*manifest\.json, got none: it has no `expected_confusion`.*; write one row"),
    Case("images drawn from another source", "dpt_digits", _drawn_from_squares,
         r"`synthetic_images`.*(classes|fingerprint)", slow=False),
    Case("half-drawn images", "dpt_digits", _half_drawn,
         r"`synthetic_images`.*has no manifest\.json; draw the images first", FileNotFoundError),
    Case("no drawn images", "dpt_digits", _nothing, r"`synthetic_images`.*runs/dpt_digits/generator_1/images",
         FileNotFoundError, slow=False),
]
# fmt: on
PARAMETERS = [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]


def _is_log(name: str) -> bool:
    """What a fit that failed may leave: what it was asked to do and what it logged until then."""
    return re.fullmatch(r"config\.yaml|hparams\.yaml|\.lock|events\..*", Path(name).name) is not None


@pytest.mark.parametrize("case", PARAMETERS)
def test_artifacts_that_do_not_fit(case: Case, configs: Path, labelled: Written, tmp_path: Path) -> None:
    case.arrange(labelled)
    before = files(tmp_path)
    flags = ["--vars.pipeline", "dpt_digits_tdsm"] if case.config == NOISY else []
    with pytest.raises(case.error) as caught:
        main(["fit", "--config", str(configs / f"{case.config}.yaml"), "--stages", "null", *flags])
    assert re.search(case.message, str(caught.value), re.DOTALL), str(caught.value)
    after = files(tmp_path)
    assert {name: data for name, data in after.items() if not _is_log(name)} == before


def test_a_stage_whose_file_is_missing(configs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((configs / "dpt_digits.yaml").read_text())
    (tmp_path / "last.yaml").write_text(yaml.safe_dump(content | {"stages": ["absent.yaml"]}))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "last.yaml"])
    assert stopped.value.code == 2
    said = capfd.readouterr().err
    assert "stages" in said
    assert "absent.yaml" in said
    assert list(files(tmp_path)) == ["last.yaml"]


@pytest.mark.parametrize("labels", [["cat", "dog", ""], ["cat", "cat", "cat"]])
def test_a_list_of_labels_without_one_of_a_class(labels: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(folder / f"{number}.png")
    rows = [f"{number}.png,{label}\n" for number, label in enumerate(labels)]
    (folder / "labels.csv").write_text("".join(["path,label\n", *rows]))
    names = ["--data.init_args.source.init_args.class_names", '["cat", "dog", "eel"]']
    classifier = CONFIGS / "stages/dpt_folder_classifier.yaml"
    small = ["--vars.image_size", "16", "--vars.backbone", "resnet10t", "--vars.pretrained", "false"]
    with pytest.raises(ValueError, match=r"images of every class, but class '(eel|dog)'.*Label some.*: cat \d, dog \d"):
        main(["fit", "--config", str(classifier), "--vars.root", str(folder), *small, *names])
    shutil.rmtree(folder)
    assert not [name for name in files(tmp_path) if not _is_log(name)]
