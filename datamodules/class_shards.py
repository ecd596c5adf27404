"""How many drawn images of classes lie on disk: in tar files, one a block, instead of a file each.

shards/000012.tar     two members an image: <seed>.png, and <seed>.cls, the number of its class as text
metadata.parquet      as of loose files, then shard, offset, size: where the bytes of an image are

WebDataset reads the shards as samples of `png` and `cls`. They are plain tar files (POSIX ustar) without times, owners
or anything else that says when and where they were made. Each member's place follows from the sizes of those before it,
so the table alone tells how long a shard is, and a reader need not look into any.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from datamodules.artifact_files import listed
from datamodules.atomic import write_atomically
from datamodules.class_files import ClassFiles, ClassRow
from datamodules.drawn_files import Pixels, png_bytes

# A tar file is made of blocks of so many bytes: a header, the content filled up with zeros; two of zeros end it.
_BLOCK = 512
_END = 2 * _BLOCK
_SHARD = re.compile(r"shards/\d{6,}\.tar")
_OPEN = 16


class ClassShards(ClassFiles):
    """Layout of many images of classes, see `Layout`; the arguments are those of ClassFiles."""

    schema = pa.schema([*ClassFiles.schema, ("shard", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])

    def extras(self) -> dict[str, Any]:
        """Return the number of shards as well."""
        return super().extras() | {"shards": self.request.num_blocks}

    def files(self, block: int) -> list[str]:
        """Name the shard of a block."""
        return [f"shards/{block:06d}.tar"]

    def write(self, folder: Path, block: int, pixels: Pixels) -> dict[str, Any]:
        """Write the shard of a block.

        Args:
            folder: Where the images belong.
            block: Number of the block.
            pixels: Its images.

        Returns:
            Sizes of the images in bytes.

        Raises:
            OSError: It could not be written.
        """
        sizes, parts = [], []
        for seed, picture in zip(self.request.seeds(block), pixels.images, strict=True):
            data = png_bytes(picture)
            label = str(self.request.label(seed)).encode()
            parts += [_member(f"{seed:09d}.png", data), _member(f"{seed:09d}.cls", label)]
            sizes.append(len(data))
        (name,) = self.files(block)
        write_atomically(folder / name, b"".join([*parts, bytes(_END)]))
        return {"sizes": sizes}

    def rows(self, block: int, part: Mapping[str, Any]) -> Iterator[ClassRow]:
        """Return the rows of a block.

        Args:
            block: Its number.
            part: Sizes of its images.

        Yields:
            A row each; `file_name` is the name within the shard.
        """
        (shard,) = self.files(block)
        offset = _BLOCK
        for seed, size in zip(self.request.seeds(block), part["sizes"], strict=True):
            row = self.row(seed)
            yield row._replace(file_name=_file_name(seed), shard=shard, offset=offset, size=size)
            offset = _next(offset, size)


class ShardReader:
    """Reads images out of shards at random, and keeps the last few shards open.

    Processes that are forked off may read on with what was open: no position in a file is shared. One that is sent to
    another process opens the shards anew.
    """

    def __init__(self) -> None:
        """Nothing is opened yet."""
        self._open = lru_cache(_OPEN)(_Shard)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[()]]:
        """Send none of the open files along."""
        return ShardReader, ()

    def read(self, folder: Path, row: ClassRow) -> bytes:
        """Read the encoded image of a row.

        Args:
            folder: Folder of the artifact.
            row: A row of its table that has a shard.

        Returns:
            The content of the member.

        Raises:
            OSError: The shard cannot be read.
            ValueError: It holds something else at this place: another image, or a name that is not the image's.
        """
        path = folder / str(row.shard)
        size = _next(row.offset, row.size) - row.offset
        # With both headers and the class: what is read is this image, or is refused.
        data = self._open(path).read(row.offset - _BLOCK, size)
        tail, label = data[_BLOCK + _padded(row.size) :], str(row.label).encode()
        if not (
            len(data) == size
            and _is_header(data, row.file_name, row.size)
            and _is_header(tail, row.file_name.replace(".png", ".cls"), len(label))
            and tail[_BLOCK:].rstrip(b"\0") == label
        ):
            msg = (
                f"Expected `synthetic_images` whose shards hold what the table lists, but {path} has no image "
                f"{row.file_name} of class {row.label} at byte {row.offset}; copy the folder again, or draw it anew."
            )
            raise ValueError(msg)
        return data[_BLOCK : _BLOCK + row.size]


def require_shards(folder: Path, rows: Sequence[ClassRow]) -> int:
    """Look whether the shards of a table are there and as long as it says, without reading any.

    Args:
        folder: Folder of the artifact.
        rows: Its table.

    Returns:
        How many shards there are.

    Raises:
        FileNotFoundError: One of them is missing.
        ValueError: A row points outside its shard or on another one's image, or a shard is of another size.
    """
    sizes: dict[str, int] = {}
    for shard, own in groupby(rows, key=lambda row: row.shard):
        offset, bad = _BLOCK, [] if shard and _SHARD.fullmatch(shard) and shard not in sizes else [str(shard)]
        for row in own:
            if row.offset != offset or row.size < 1 or row.file_name != _file_name(row.seed):
                bad.append(f"{row.file_name} at byte {row.offset} of {shard}")
            offset = _next(offset, max(row.size, 0))
        if bad:
            msg = (
                f"Expected `synthetic_images` whose table has the images of a shard one after another, but in "
                f"{folder} it lists {listed(bad)}; do not use an artifact whose origin you do not know."
            )
            raise ValueError(msg)
        sizes[str(shard)] = offset - _BLOCK + _END
    found = {f"shards/{path.name}": path.stat().st_size for path in (folder / "shards").glob("*.tar")}
    lost = [shard for shard in sizes if shard not in found]
    if lost:
        msg = (
            f"Expected `synthetic_images` with all shards of its table, but {folder} lacks {listed(lost)}; copy it "
            "again, or remove it and draw it anew."
        )
        raise FileNotFoundError(msg)
    wrong = [f"{shard} ({found[shard]} bytes, not {size})" for shard, size in sizes.items() if found[shard] != size]
    if wrong:
        msg = (
            f"Expected `synthetic_images` whose shards are as long as the table says, but in {folder} these are not: "
            f"{listed(wrong)}; copy it again, or remove it and draw it anew."
        )
        raise ValueError(msg)
    return len(sizes)


class _Shard:
    """A file that is open as long as somebody has it: no one can close it while another thread reads."""

    def __init__(self, path: Path) -> None:
        self._number = -1
        self._number = os.open(path, os.O_RDONLY)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._number, size, start)

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)


def _file_name(seed: int) -> str:
    return f"{seed:09d}.png"


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _next(offset: int, size: int) -> int:
    """Where the next image begins: after this one come the header and the block of its class, then a header."""
    return offset + _padded(size) + 3 * _BLOCK


def _member(name: str, data: bytes) -> bytes:
    # A TarInfo of its own accord has time 0, owner 0 without a name, and rw-r--r--.
    about = tarfile.TarInfo(name)
    about.size = len(data)
    return about.tobuf(tarfile.USTAR_FORMAT) + data + bytes(_padded(len(data)) - len(data))


def _is_header(header: bytes, name: str, size: int) -> bool:
    """Whether a member's header gives a name and a size, where the standard has them."""
    return header.startswith(name.encode() + b"\0") and header[124:136] == b"%011o\0" % size
