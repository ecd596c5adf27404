"""Drawn images of classes in tar shards: the same images as loose files, at random and one after another."""

import json
import multiprocessing
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drawing_runs import START, files, ramps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from datamodules import DrawRequest
from datamodules.synthetic_images import ClassRow, Drawing, Origin, SyntheticImages, read

NAMES = ("ant", "owl", "bat")
# 19 images in blocks of four; the last has three of them.
REQUEST = DrawRequest(None, 5, first_seed=7, batch_size=4, images_per_class=[8, 1, 10], num_classes=3, guidance=1.5)
BLOCKS = range(REQUEST.num_blocks)


def block_of_ramps(block: int) -> dict[str, Tensor]:
    """What a module would draw."""
    asked = REQUEST.batch(block)
    return {
        "image": ramps(asked["seed"], asked["label"], 5)[:, None] / 255,
        "label": asked["label"],
        "seed": asked["seed"],
    }


def begun(folder: Path, shards_above: int | None = 0, **origin: Any) -> Drawing:
    drawing = Drawing(folder, REQUEST, shards_above)
    known: dict[str, Any] = {"num_classes": 3, "class_names": NAMES, "fingerprint": "f" * 64}
    drawing.begin(Origin(REQUEST, "w" * 64, **known | origin))
    return drawing


def write(folder: Path, shards_above: int | None = 0, **origin: Any) -> Path:
    drawing = begun(folder, shards_above, **origin)
    for block in BLOCKS:
        drawing.write(block, block_of_ramps(block))
    assert drawing.finish()
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sharded"))


def members(folder: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for path in sorted((folder / "shards").iterdir()):
        with tarfile.open(path) as tar:
            for about in tar:
                content = tar.extractfile(about)
                yield about, b"" if content is None else content.read()


def test_the_same_images_as_loose_files_and_each_once(tmp_path: Path, sharded: Path) -> None:
    loose, packed = read(write(tmp_path, None), "classes"), read(sharded, "classes")
    assert [packed.bytes_of(row) for row in packed.rows] == [loose.bytes_of(row) for row in loose.rows]
    assert [row[1:5] for row in packed.rows] == [row[1:5] for row in loose.rows]
    assert [row.seed for row in packed.rows] == sorted(
        7 + 3 * j + c for c, n in enumerate((8, 1, 10)) for j in range(n)
    )
    assert [row.file_name for row in packed.rows] == [Path(row.file_name).name for row in loose.rows]
    assert {row.shard for row in loose.rows} == {None}
    assert loose.manifest == {name: value for name, value in packed.manifest.items() if name != "shards"}
    assert packed.manifest["shards"] == len(BLOCKS) == 5
    expected = [f"shards/{block:06d}.tar" for block in BLOCKS]
    assert sorted(files(sharded)) == ["manifest.json", "metadata.parquet", *expected]


def test_tarfile_reads_what_the_table_says(sharded: Path) -> None:
    table = pq.read_table(sharded / "metadata.parquet").to_pylist()
    listed = list(members(sharded))
    pictures = [(about, content) for about, content in listed if about.name.endswith(".png")]
    assert [(about.name, about.size, about.offset_data) for about, _ in pictures] == [
        (row["file_name"], row["size"], row["offset"]) for row in table
    ]
    for row, (_, content) in zip(table, pictures, strict=True):
        assert (sharded / row["shard"]).read_bytes()[row["offset"] :][: row["size"]] == content
    # Nothing tells who made them, or when.
    assert {(a.mtime, a.uid, a.gid, a.uname, a.gname, a.mode, a.type) for a, _ in listed} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }


def test_webdataset_would_find_samples(sharded: Path) -> None:
    # WebDataset takes neighbours of one name up to its first dot for a sample; what follows says what a member is.
    samples = [
        {about.name.split(".", 1)[1]: content for about, content in group}
        for _, group in groupby(members(sharded), key=lambda member: member[0].name.split(".", 1)[0])
    ]
    packed = read(sharded, "classes")
    assert samples == [{"png": packed.bytes_of(row), "cls": b"%d" % row.label} for row in packed.rows]


@pytest.mark.parametrize(("above", "shards"), [(0, True), (18, True), (19, False), (None, False)])
def test_threshold(tmp_path: Path, above: int | None, shards: bool) -> None:
    drawing = begun(tmp_path, above)
    drawing.write(0, block_of_ramps(0))
    assert (tmp_path / "shards/000000.tar").is_file() == shards
    # Who goes on, goes on in the same way.
    again = begun(tmp_path, None if shards else 0)
    assert again.missing() == [1, 2, 3, 4]
    for block in again.missing():
        again.write(block, block_of_ramps(block))
    assert again.finish()
    assert len(list(tmp_path.glob("shards/*.tar"))) == (5 if shards else 0)
    assert len(list(tmp_path.glob("*/*.png"))) == (0 if shards else 19)
    assert len(read(tmp_path, "classes").rows) == 19
    begun(tmp_path, 0 if above is None else None)  # finished folders are not looked into


def test_what_a_kill_may_leave_is_drawn_again(tmp_path: Path, sharded: Path) -> None:
    drawing = begun(tmp_path)
    for block in (4, 1, 0, 2):  # in any order, as several processes would
        drawing.write(block, block_of_ramps(block))
    (tmp_path / "shards/000003.tar").write_bytes(b"without its part")
    (tmp_path / "shards" / f".{'0' * 32}.tmp").write_bytes(b"half")
    (tmp_path / "shards/000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match="is not finished; run the command that draws it again"):
        read(tmp_path, "classes")
    assert not drawing.finish()
    assert drawing.missing() == [2, 3]
    assert [drawing.missing(rank, 2) for rank in (0, 1)] == [[2], [3]]
    for block in (3, 2):
        drawing.write(block, block_of_ramps(block))
    assert drawing.finish()
    assert files(tmp_path) == files(sharded)


class _Drawn(Dataset[bytes]):
    def __init__(self, artifact: SyntheticImages[ClassRow]) -> None:
        self.artifact = artifact

    def __len__(self) -> int:
        return len(self.artifact.rows)

    def __getitem__(self, index: int) -> bytes:
        return self.artifact.bytes_of(self.artifact.rows[index])


def test_workers_read_on_after_a_fork(sharded: Path) -> None:
    data = _Drawn(read(sharded, "classes"))
    expected = [data[i] for i in range(len(data))]  # all shards are open now
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(
        data, batch_size=None, sampler=order, num_workers=2, multiprocessing_context=multiprocessing.get_context(START)
    )
    for _ in range(2):
        assert list(loader) == [expected[i] for i in order]
    assert [data[i] for i in order] == [expected[i] for i in order]


def test_few_files_stay_open_and_none_travels(tmp_path: Path) -> None:
    many = DrawRequest(None, 2, batch_size=1, images_per_class=9, num_classes=2)
    drawing = Drawing(tmp_path, many, 0)
    drawing.begin(Origin(many, "w", 2))
    for block in range(18):
        asked = many.batch(block)
        drawing.write(block, {"image": torch.zeros(1, 1, 2, 2), "label": asked["label"], "seed": asked["seed"]})
    assert drawing.finish()
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("this system does not list open files")
    shards = str(tmp_path / "shards")

    def open_shards() -> int:
        return sum(os.path.realpath(link).startswith(shards) for link in descriptors.iterdir())

    artifact = read(tmp_path, "classes")
    pictures = [artifact.bytes_of(row) for row in artifact.rows]
    assert 1 <= open_shards() <= 16
    sent = pickle.loads(pickle.dumps(artifact))
    assert open_shards() <= 16
    assert [sent.bytes_of(row) for row in sent.rows] == pictures
    del artifact, sent
    assert open_shards() == 0


def test_image_folder_does_not_take_shards_for_a_class(sharded: Path) -> None:
    with pytest.raises(FileNotFoundError, match="shards"):
        ImageFolder(str(sharded))


def _manifest(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _table(column: str, row: int, value: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        table = pq.read_table(folder / "metadata.parquet")
        values = table[column].to_pylist()
        values[row] = value
        place = table.column_names.index(column)
        changed = table.set_column(place, column, pa.array(values, table.schema.field(column).type))
        pq.write_table(changed, folder / "metadata.parquet")

    return edit


def _drop_columns(folder: Path) -> None:
    path = folder / "metadata.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["shard"]), path)


def _resize(by: int) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "shards/000002.tar"
        os.truncate(path, path.stat().st_size + by)

    return edit


_COUNTS = {"ant": 8, "owl": 1, "bat": 10}


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / "shards/000003.tar").unlink(), FileNotFoundError, "lacks shards/000003.tar; copy it again"),
        (_resize(-512), ValueError, r"as long as the table says, .*: shards/000002.tar \(\d+ bytes, not \d+\); copy"),
        (_resize(1), ValueError, "as long as the table says, .* shards/000002.tar"),
        (_table("offset", 3, 10**9), ValueError, r"lists 000000010.png at byte 1000000000 of shards/000000.tar"),
        (_table("offset", 3, -512), ValueError, "at byte -512 of"),
        (_table("offset", 1, 512), ValueError, "lists 000000008.png at byte 512"),
        (_table("size", 18, 10**9), ValueError, r"as long as the table says, .* shards/000004.tar \(\d+ bytes, not 1"),
        (_table("size", 18, -5), ValueError, "lists 0000000.*png at byte .*; do not use an artifact"),
        (_table("shard", 0, "../000000.tar"), ValueError, r"lists \.\./000000\.tar"),
        (_table("shard", 0, "/etc/passwd"), ValueError, "lists /etc/passwd"),
        (_table("shard", 0, None), ValueError, "lists None"),
        (_table("shard", 18, "shards/000000.tar"), ValueError, "lists shards/000000.tar"),
        (_table("file_name", 0, "../000000007.png"), ValueError, r"lists \.\./000000007\.png at byte 512"),
        (_table("seed", 0, 8), ValueError, "lists 000000007.png at byte 512"),
        (_table("label", 0, 1), ValueError, "disagree about class_names"),
        (_drop_columns, FileNotFoundError, "lacks 000000007.png"),
        (_manifest(counts={"images": 20, "classes": _COUNTS}), ValueError, "with 20 images, but .* lists 19"),
        (_manifest(counts=None), ValueError, "with None images, but .* lists 19"),
        (_manifest(counts={"images": 19}), ValueError, "disagree about counts, class_names"),
        (_manifest(counts={"images": 19, "classes": _COUNTS | {"owl": 2}}), ValueError, "disagree about counts: was"),
        (_manifest(counts={"images": 19, "classes": _COUNTS | {"owl": "1"}}), ValueError, "disagree about counts: was"),
        (_manifest(class_names=["ant", "bat", "owl"]), ValueError, "disagree about class_names: was one"),
        (_manifest(class_names=["ant", "owl"]), ValueError, "disagree about class_names, num_classes: was one"),
        (_manifest(num_classes=4), ValueError, "disagree about num_classes"),
        (_manifest(shards=6), ValueError, "disagree about shards"),
        (_manifest(shards=None), ValueError, "disagree about shards"),
        (_manifest(layout="pairs"), ValueError, r"holds \(image, mask\) pairs"),
        (lambda f: (f / "manifest.json").unlink(), FileNotFoundError, "has no manifest.json; draw the images first"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], object], kind: type[Exception], message: str) -> None:
    damage(write(tmp_path))
    with pytest.raises(kind, match=f"`synthetic_images`.*{message}"):
        read(tmp_path, "classes")


def test_loose_files_that_say_they_were_shards(tmp_path: Path) -> None:
    _manifest(shards=5)(write(tmp_path, None))
    with pytest.raises(ValueError, match="disagree about shards"):
        read(tmp_path, "classes")


@pytest.mark.parametrize(
    ("member", "place", "content"),
    [
        ("png", 0, b"../000000009.png"),
        ("png", 0, b"/00000009.png"),
        ("cls", 0, b"../000000009.cls"),
        ("cls", 0, b"000000008.cls"),
        ("cls", 512, b"1"),
    ],
)
def test_members_that_are_not_the_tables(tmp_path: Path, member: str, place: int, content: bytes) -> None:
    path = write(tmp_path) / "shards/000000.tar"
    data = path.read_bytes()
    place += data.index(f"000000009.{member}".encode())
    path.write_bytes(data[:place] + content + data[place + len(content) :])
    artifact = read(tmp_path, "classes")  # no shard is read before an image is asked for
    for row in (0, 1, 3):
        artifact.bytes_of(artifact.rows[row])
    with pytest.raises(ValueError, match=r"shards/000000\.tar has no image 000000009\.png of class 2 at byte"):
        artifact.bytes_of(artifact.rows[2])


def test_a_shard_that_shrank_since(tmp_path: Path) -> None:
    artifact = read(write(tmp_path), "classes")
    os.truncate(tmp_path / "shards/000001.tar", 600)
    (tmp_path / "shards/000002.tar").unlink()
    with pytest.raises(ValueError, match="has no image"):
        artifact.bytes_of(artifact.rows[4])
    with pytest.raises(FileNotFoundError, match="000002"):
        artifact.bytes_of(artifact.rows[8])


def test_other_images_are_refused_whatever_their_labels(sharded: Path) -> None:
    artifact = read(sharded, "classes")
    artifact.require(NAMES, "f" * 64)
    with pytest.raises(ValueError, match=r"source that splits them otherwise \(fingerprint f{12}, here e{12}\)") as why:
        artifact.require(NAMES, "e" * 64)
    assert "trained on these images, but" in str(why.value)
    assert "of the same `source`, or set `synthetic_from_other_data`" in str(why.value)
    artifact.require(NAMES, "e" * 64, from_other_data=True)


def test_unnamed_classes_are_counted_alike(tmp_path: Path) -> None:
    artifact = read(write(tmp_path, class_names=None), "classes")
    assert artifact.manifest["counts"]["classes"] == {"0": 8, "1": 1, "2": 10}
    assert Counter(row.class_name for row in artifact.rows) == {"0": 8, "1": 1, "2": 10}
