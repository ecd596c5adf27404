"""Which artifacts in a client's folder are those of this run: what another run left there is not to be trained on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.artifact_files import MANIFEST, read_json
from datamodules.atomic import write_json_atomically

FILE = "provenance.json"
_KIND = "federated_provenance"


class Provenance:
    """Notes for which run a client made its artifacts, also where it had nothing to write.

    A client may be away when pseudo-labels are given, chosen or images drawn, or may lose its folder. Without a note it
    would go on with what an earlier run of other settings left, or without any, and nobody would notice.

    Args:
        folder: Folder of the client.
        config_hash: Identifies the run, see Settings.
    """

    def __init__(self, folder: Path, config_hash: str) -> None:
        self.folder = folder
        self.config_hash = config_hash

    @contextmanager
    def made(self, name: str) -> Iterator[None]:
        """Note that an artifact is this run's, unless making it fails or is interrupted.

        Args:
            name: Name of its folder, which need not be there afterwards.
        """
        known = self._read()
        if known.pop(name, None) is not None:
            self._write(known)
        yield
        self._write(known | {name: {"config_hash": self.config_hash, "is_empty": not self._is_there(name)}})

    def require(self, names: Sequence[str]) -> None:
        """Look whether artifacts are this run's.

        Args:
            names: Names of their folders.

        Raises:
            FileNotFoundError: One is not, or has gone.
        """
        known = self._read()
        for name in names:
            note = known.get(name, {})
            if note.get("config_hash") != self.config_hash or not (note["is_empty"] or self._is_there(name)):
                msg = (
                    f"Expected `{name}` of this run in {self.folder}, but there is none: the folder was lost, or the "
                    "client was away when it was asked to make it. Start the run again: it goes on, and asks once more."
                )
                raise FileNotFoundError(msg)

    def _is_there(self, name: str) -> bool:
        return (self.folder / name / MANIFEST).is_file()

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.folder / FILE
        known: dict[str, dict[str, Any]] = read_json(path, "folder").get("artifacts", {}) if path.is_file() else {}
        return known

    def _write(self, known: dict[str, dict[str, Any]]) -> None:
        write_json_atomically(self.folder / FILE, {"kind": _KIND, "artifacts": known})
