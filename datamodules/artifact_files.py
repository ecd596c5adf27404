"""What folders that one stage hands to the next have in common: a manifest, and tables of reproducible bytes."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"
_SHOWN = 5


def read_json(path: Path, argument: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        argument: Argument that the message is about.

    Returns:
        The object.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        msg = (
            f"Expected `{argument}` with a JSON object in {path}, but it is damaged; remove the folder, and make it "
            "anew."
        )
        raise ValueError(msg)  # noqa: TRY004 - the content of a file, not the type of an argument
    return content


def read_manifest(folder: Path, kind: str, argument: str, remedy: str) -> dict[str, Any]:
    """Read the manifest of a finished folder.

    Args:
        folder: The folder; it has a manifest.
        kind: What the folder should hold.
        argument: Argument that gave the folder.
        remedy: What to do if it holds something else, without a full stop.

    Returns:
        The manifest.

    Raises:
        ValueError: The folder holds something else, or its manifest is damaged.
    """
    path = folder / MANIFEST
    manifest = read_json(path, argument)
    if (found := manifest.get("kind")) != kind:
        msg = f"Expected `{argument}` to be a folder of kind {kind!r}, but {path} says {found!r}; {remedy}."
        raise ValueError(msg)
    return manifest


def parquet_bytes(table: pa.Table, use_dictionary: bool | list[str] = True) -> bytes:
    """Encode a table as Parquet: all options are said, and no metadata tells when or where.

    Args:
        table: The table.
        use_dictionary: Columns whose values repeat; True for all.
    """
    buffer = io.BytesIO()
    options = {"compression": "snappy", "version": "2.6", "row_group_size": 65536, "store_schema": False}
    pq.write_table(table, buffer, use_dictionary=use_dictionary, **options)
    return buffer.getvalue()


def listed(names: Sequence[str], most: int = _SHOWN) -> str:
    """Name the first few of many things."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
