"""Parts of a comparison that are kept in its folder, so that a run that was ended goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..atomic_file import AtomicFile

__all__ = ["Store", "file_sha256", "fingerprint", "write_text"]

_FORMAT = 1  # of the parts; another number: what is there is measured again


class Store:
    """JSON files in FOLDER/parts, each with all that its value follows from: anything else in the key is another part.

    A part is written beside its name and renamed: it is there whole, or not at all.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "parts"

    def load(self, kind: str, key: dict[str, Any]) -> Any:
        """The value that was saved last under the key, or None. A damaged file counts as none."""
        path, key = self._place(kind, key)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found.get("value") if isinstance(found, dict) and found.get("key") == key else None

    def save(self, kind: str, key: dict[str, Any], value: Any) -> None:
        """Replaces what was there."""
        path, key = self._place(kind, key)
        write_text(path, json.dumps({"key": key, "value": value}))

    def _place(self, kind: str, key: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        key = json.loads(json.dumps({"format": _FORMAT, **key}))  # as it comes back: tuples are lists
        return self._folder / f"{kind}-{fingerprint(key)[:16]}.json", key


def fingerprint(value: Any) -> str:
    """SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step. Its folder is made: none is left behind by what fails before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with AtomicFile(path) as file:
        file.write(text.encode())
        file.commit()
