"""The SyntheticImages artifact: what a folder must hold to be read, and what it is refused for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drawing_runs import files
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from datamodules import DrawRequest, FolderSegmentationDataModule, SyntheticImages
from datamodules.synthetic_images import Drawing, Origin, read, weights_sha256

REQUEST = DrawRequest(num_images=5, image_size=4, first_seed=4 * 10**9, batch_size=2)
NAMES = ("background", "lesion")


def pairs(request: DrawRequest, block: int) -> dict[str, Tensor]:
    """A grey ramp each, class 1 on its right half."""
    seed = request.batch(block)["seed"]
    size = request.image_size
    image = torch.linspace(0, 1, size).expand(len(seed), 1, size, size)
    return {"image": image, "mask": (image[:, 0] > 0.5).long(), "confidence": seed % 3 / 3, "seed": seed}


def write(folder: Path, request: DrawRequest = REQUEST, order: list[int] | None = None, **origin: Any) -> Path:
    known: dict[str, Any] = {"num_classes": 2, "class_names": NAMES, "fingerprint": "f" * 64} | origin
    drawing = Drawing(folder, request)
    drawing.begin(Origin(request, "w" * 64, **known))
    for block in order or range(request.num_blocks):
        drawing.write(block, pairs(request, block))
    assert drawing.finish()
    return folder


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (7, 3), (6, 3), (2, 5)])
def test_blocks_hold_every_seed_once(images: int, batch: int) -> None:
    request = DrawRequest(images, 8, first_seed=4, batch_size=batch)
    blocks = [list(request.seeds(block)) for block in range(request.num_blocks)]
    assert sum(blocks, []) == list(range(4, 4 + images))  # noqa: RUF017 - a few lists
    assert {len(block) for block in blocks[:-1]} <= {batch}
    for block, seeds in enumerate(blocks):
        asked = request.batch(block)
        assert asked["seed"].dtype == torch.int64
        assert asked["seed"].tolist() == seeds
        assert {k: v for k, v in asked.items() if k != "seed"} == {"image_size": 8, "sampler": "heun", "num_steps": 50}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_blocks(tmp_path: Path, world_size: int) -> None:
    drawing = Drawing(tmp_path, DrawRequest(7, 8, batch_size=2))
    own = [drawing.missing(rank, world_size) for rank in range(world_size)]
    assert sorted(block for blocks in own for block in blocks) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "`num_images` to be at least 1, but got 0"),
        ({"image_size": 0}, "`image_size` to be at least 1"),
        ({"first_seed": -1}, "`first_seed` to be at least 0, but got -1"),
        ({"batch_size": 0}, "`batch_size` to be at least 1"),
        ({"num_steps": 0}, "`num_steps` to be at least 1"),
        ({"first_seed": 2**32 - 2}, r"`first_seed` to leave the seeds of \d+ images below 2\^32"),
        ({"sampler": "magic"}, "`sampler` to be one of euler, heun, ancestral, dpmpp_2m, but got 'magic'"),
    ],
)
def test_request_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrawRequest(**{"num_images": 3, "image_size": 8} | arguments)


def test_request_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--request", type=DrawRequest | None)
    config = parser.parse_object({"request": {"num_images": 3, "image_size": 8, "num_steps": 7}})
    assert parser.instantiate(config).request == DrawRequest(3, 8, num_steps=7)


def test_round_trip(tmp_path: Path) -> None:
    artifact = read(write(tmp_path))
    assert isinstance(artifact, SyntheticImages)
    assert [row.seed for row in artifact.rows] == list(range(4 * 10**9, 4 * 10**9 + 5))
    assert artifact.rows[1].file_name == "images/4000000001.png"
    assert artifact.rows[1].mask_file_name == "masks/4000000001.png"
    assert artifact.rows[1].confidence == pytest.approx((4 * 10**9 + 1) % 3 / 3)
    assert artifact.manifest["kind"] == "synthetic_images"
    assert artifact.manifest["request"]["batch_size"] == 2
    artifact.require(NAMES, "f" * 64)


def test_files_do_not_depend_on_who_wrote_which_block_when(tmp_path: Path) -> None:
    assert files(write(tmp_path / "a")) == files(write(tmp_path / "b", order=[2, 0, 1]))


def test_the_folder_is_a_data_set_as_it_is(tmp_path: Path) -> None:
    data = FolderSegmentationDataModule(str(write(tmp_path)), image_size=4, val_share=0.0, num_labels=4)
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert batch["mask"][0].tolist() == [[0, 0, 1, 1]] * 4
    assert batch["image"][0, 0].tolist() == [pytest.approx([0, 85 / 255, 170 / 255, 1])] * 4


def test_weights_are_identified_by_their_bytes() -> None:
    def digest(module: nn.Module) -> str:
        return weights_sha256(module)

    plain = nn.BatchNorm1d(2)
    same = nn.BatchNorm1d(2)
    assert digest(plain) == digest(same)
    with torch.no_grad():
        same.weight[1] += torch.finfo(torch.float32).eps
    assert digest(plain) != digest(same)
    # What torch.equal takes for equal, and values alone do not tell.
    assert digest(nn.ParameterList([torch.zeros(2, 3)])) != digest(nn.ParameterList([torch.zeros(3, 2)]))
    assert digest(nn.ParameterList([torch.zeros(2)])) != digest(nn.ParameterList([-torch.zeros(2)]))
    assert digest(nn.ParameterDict({"a": torch.zeros(2)})) != digest(nn.ParameterDict({"b": torch.zeros(2)}))
    half = [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.float16)]
    assert digest(nn.ParameterList(half[:1])) != digest(nn.ParameterList(half[1:]))
    strided = nn.ParameterList([torch.arange(6.0).reshape(2, 3).T])
    assert digest(strided) == digest(nn.ParameterList([torch.tensor([[0.0, 3], [1, 4], [2, 5]])]))


def _edit_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _rename_files(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        table = pq.read_table(folder / "metadata.parquet")
        other = pa.array([name, *table["mask_file_name"].to_pylist()[1:]])
        pq.write_table(table.set_column(1, "mask_file_name", other), folder / "metadata.parquet")

    return rename


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), FileNotFoundError, "has no manifest.json; draw the pairs first"),
        (lambda f: (f / "manifest.json").rename(f / "drawing.json"), FileNotFoundError, "not finished; run the comm"),
        (lambda f: (f / "manifest.json").write_text("{"), ValueError, "manifest.json, but it is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), ValueError, "manifest.json, but it is damaged"),
        (_edit_manifest(kind="fit"), ValueError, "of kind 'synthetic_images', but .*manifest.json says 'fit'"),
        (_edit_manifest(counts={"images": 6}), ValueError, "with 6 pairs, but .*metadata.parquet lists 5"),
        (lambda f: (f / "metadata.parquet").unlink(), FileNotFoundError, "there is no .*metadata.parquet"),
        (lambda f: (f / "metadata.parquet").write_text("no"), ValueError, "metadata.parquet is none"),
        (
            lambda f: pq.write_table(pa.table({"seed": [1]}), f / "metadata.parquet"),
            ValueError,
            "table of file_name, mask_file_name, seed, confidence",
        ),
        (
            lambda f: (f / "masks/4000000003.png").unlink(),
            FileNotFoundError,
            "lacks masks/4000000003.png; copy it again",
        ),
        (_rename_files("../secret.png"), ValueError, r"lists \.\./secret\.png; do not use an artifact"),
        (_rename_files("/etc/passwd"), ValueError, "lists /etc/passwd; do not use an artifact"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], object], kind: type[Exception], message: str) -> None:
    damage(write(tmp_path))
    with pytest.raises(kind, match=f"`synthetic_images`.*{message}"):
        read(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is none at .*nowhere; draw them first \(SyntheticImageWriter"):
        read(tmp_path / "nowhere")


def test_other_classes_and_other_data(tmp_path: Path) -> None:
    artifact = read(write(tmp_path / "named"))
    with pytest.raises(ValueError, match=r"\(background, vessel\), but those in .* are background, lesion; draw from"):
        artifact.require(("background", "vessel"), "f" * 64)
    with pytest.raises(ValueError, match="are background, lesion"):
        artifact.require(("background", "lesion", "vessel"), "f" * 64)
    with pytest.raises(ValueError, match=r"other data, or another split .*\(fingerprint f{12}, here e{12}\)") as caught:
        artifact.require(NAMES, "e" * 64)
    assert "tested on here" in str(caught.value)
    assert "`synthetic_from_other_data`" in str(caught.value)
    artifact.require(NAMES, "e" * 64, from_other_data=True)

    nameless = read(write(tmp_path / "nameless", class_names=None, fingerprint=None))
    nameless.require(NAMES, from_other_data=True)
    with pytest.raises(ValueError, match="are 2 classes without names"):
        nameless.require((*NAMES, "vessel"), from_other_data=True)
    with pytest.raises(ValueError, match="comes from data that it does not name"):
        nameless.require(NAMES, None)


def test_blocks_whose_files_are_gone_are_drawn_again(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    drawing = Drawing(tmp_path / "pairs", REQUEST)
    drawing.begin(Origin(REQUEST, "w" * 64, 2, NAMES, "f" * 64))
    for block in range(3):
        drawing.write(block, pairs(REQUEST, block))
    (tmp_path / "pairs/masks/4000000002.png").unlink()
    assert drawing.missing() == [1]
    assert not drawing.finish()
    drawing.write(1, pairs(REQUEST, 1))
    assert drawing.finish()
    assert files(tmp_path / "pairs") == files(tmp_path / "whole")


def test_what_does_not_fit_into_the_files(tmp_path: Path) -> None:
    drawing = Drawing(tmp_path, REQUEST)
    good = pairs(REQUEST, 0)
    with pytest.raises(ValueError, match="masks of ids from 0 to 255, but got 0 to 256"):
        drawing.write(0, good | {"mask": good["mask"] * 256})
    with pytest.raises(ValueError, match="masks of ids from 0 to 1, but got -1 to 0"):
        drawing.write(0, good | {"mask": -good["mask"]}, num_classes=2)
    with pytest.raises(TypeError, match="dict of the tensors image, mask, confidence, seed, but got Tensor"):
        drawing.write(0, good["image"])
    assert not files(tmp_path)


def test_half_precision_and_one_channel(tmp_path: Path) -> None:
    drawing = Drawing(tmp_path, REQUEST)
    good = pairs(REQUEST, 0)
    pixels = drawing.check(0, good | {"image": torch.tensor([-1, 0.25, 1, 2]).bfloat16().expand(2, 1, 4, 4)})
    assert pixels.images.shape == (2, 4, 4, 3)
    assert pixels.images[0, 0].tolist() == [[0] * 3, [64] * 3, [255] * 3, [255] * 3]
