"""Files that are either complete or not there."""

import contextlib
import errno
import json
import os
import uuid
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "Free some space, or write to another disk.",
    errno.EDQUOT: "Free some of your quota, or write to another disk.",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.EROFS: "Choose a folder that you may write to.",
    errno.EISDIR: "Choose another file name, or remove that folder.",
    errno.EEXIST: "Choose another folder, or remove the file that is in the way.",
    errno.ENOTDIR: "Choose another folder, or remove the file that is in the way.",
}


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that no reader, and no crash, ever meets half of it.

    The bytes go to a temporary name in the same folder (which is made if missing), are flushed to the disk
    and renamed. When that fails, the temporary is removed and an earlier file of the name stays as it was.

    Args:
        path: The file to write or replace.
        data: Its whole content.

    Raises:
        OSError: The file could not be written; names the path, the cause and what to do.
    """
    path = Path(path)
    # Not derived from the name: one that is as long as the file system allows must stay writable.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        _discard(temporary)
        code = error.errno or errno.EIO
        remedy = _REMEDIES.get(code, "Check the disk, or write to another folder.")
        reason = error.strerror or str(error)
        msg = f"Could not write `path` {path}: {reason}. {remedy} Nothing half-written was left."
        raise OSError(code, msg) from error
    except BaseException:  # an interrupt must not leave the temporary behind either
        _discard(temporary)
        raise


def write_json_atomically(path: str | Path, obj: object) -> None:
    """Write an object as indented JSON, see `write_atomically`.

    Args:
        path: The file to write or replace.
        obj: Anything that JSON can hold. NaN and infinity are no JSON: replace them before.

    Raises:
        ValueError: `obj` holds NaN or infinity.
        TypeError: `obj` holds something else that JSON cannot hold.
        OSError: The file could not be written.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _discard(temporary: Path) -> None:
    # When even this fails, the first error is the one to report.
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
