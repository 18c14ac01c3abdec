"""The output of a batch job: one record per input line, in their order, kept whole whenever the process is killed."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic_file import AtomicFile, naming
from .batch_lines import InputFile, Line, read_record
from .errors import ArgumentError, FixminError
from .state import file_sha256

__all__ = ["OutputFile", "Resumed"]


@dataclass(frozen=True)
class Resumed:
    """What an earlier run left."""

    n_records: int
    n_errors: int  # among them
    number: int  # of the input line to go on with ...
    offset: int  # ... and the bytes of input before it


class OutputFile:
    """A file of records that only grows, and beside it, until `finish`, `NAME.resume`, which says of which job it is.

    A record is written by one call, so a kill leaves whole lines and at most one torn one, at the end. The records
    answer the input lines one to one in their order: how far a job got is what the file holds, there is no second
    account that could differ from it. The file is locked while it is open.

    `finish` gives the account of the job the name `NAME.done` and adds the hash of the output, so that the same job is
    not taken for another one when it is started again.

    Args:
        path: the file; its folder must exist.
        identity: what must be the same for a job to be resumed: JSON values by name.
        source: the input, whose hash is "input" in the identity.
        overwrite: start again whatever the file holds.

    Raises:
        ArgumentError: the file is another job's, was changed after its job had ended, or another run is writing it.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: Mapping[str, Any], source: InputFile, *, overwrite: bool
    ) -> None:
        self.path, self.sidecar, self.done = self.names(path)
        self._identity = json.loads(json.dumps(identity))  # as it reads back
        self._source = source
        self._overwrite = overwrite
        self._fd = -1
        self._is_new = False
        self._is_done = False

    @staticmethod
    def names(path: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
        """All files that a job with this output writes: itself, `NAME.resume`, `NAME.done`."""
        return Path(path), Path(f"{os.fspath(path)}.resume"), Path(f"{os.fspath(path)}.done")

    def __enter__(self) -> "OutputFile":
        if self.path.exists() and not self.path.is_file():
            raise ArgumentError(f"{self.path} must be a file: a job is resumed from it")
        existed = os.path.lexists(self.path)
        self._fd = self._locked()
        self._is_new = not existed and os.fstat(self._fd).st_size == 0
        try:
            for account in (self.sidecar, self.done):
                _account(account)
            if self._overwrite:
                os.ftruncate(self._fd, 0)
            if os.fstat(self._fd).st_size == 0:  # nothing that could be another job's
                self._write(self.sidecar)
                self.done.unlink(missing_ok=True)
            elif self.sidecar.exists() or not self.done.exists():
                self._check_identity(self.sidecar)
            else:
                self._check_identity(self.done)
                self._is_done = not self.sidecar.exists()  # not so if the input has grown
        except BaseException:
            self._remove_empty()
            os.close(self._fd)
            raise
        return self

    def _locked(self) -> int:
        """A descriptor of the file, made if it is not there, which no other run has."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise ArgumentError(f"{self.path}: another run is writing this file at the moment") from None
            if self._is_in_place(fd):
                return fd
            os.close(fd)  # between open and flock a run that failed has removed it

    def _is_in_place(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _remove_empty(self) -> None:
        """The file that this run has made, if nothing has been written to it."""
        if self._is_new and os.fstat(self._fd).st_size == 0 and self._is_in_place(self._fd):
            self.path.unlink(missing_ok=True)

    def __exit__(self, *exc: object) -> None:
        if os.fstat(self._fd).st_size == 0:
            self.sidecar.unlink(missing_ok=True)  # there is nothing to resume
            if exc[0] is not None:
                self._remove_empty()
        os.close(self._fd)  # and with it the lock

    def resume(self, lines: Iterator[Line]) -> Resumed:
        """Compares what is there with the input from its beginning, and cuts off what is torn or damaged."""
        n_records = n_errors = end = number = offset = 0
        with open(self.path, "rb") as file:
            for data in file:
                record = read_record(data)
                if record is None:
                    break
                line = next(lines, None)
                if line is None or line.number != record[0]:
                    raise ArgumentError(
                        f"{self.path} does not fit the input: its line {n_records + 1} answers line {record[0]}"
                        + (f", not line {line.number}" if line else ", but the input has ended")
                        + ". Was it edited? Overwrite it to start again"
                    )
                n_records += 1
                n_errors += record[1]
                end += len(data)
                number, offset = line.number, line.end
        if self._is_done and end < os.fstat(self._fd).st_size:
            raise ArgumentError(f"{self.path}: its job has ended, but its line {n_records + 1} cannot be read")
        with naming(self.path):
            os.ftruncate(self._fd, end)
        return Resumed(n_records, n_errors, number + 1, offset)

    def append(self, record: bytes) -> None:
        """Writes a record, its line feed included."""
        with naming(self.path):
            n_written = os.write(self._fd, record)
        if n_written != len(record):  # a full disk; the next run cuts the torn line off
            raise FixminError(f"{self.path}: {n_written} of {len(record)} bytes could be written; is the disk full?")

    def finish(self) -> None:
        """Puts everything on the disk; the job is done."""
        with naming(self.path):
            os.fsync(self._fd)
        if not self._is_in_place(self._fd):
            raise FixminError(f"{self.path} was moved or removed while the job wrote it: start it again to go on")
        if os.fstat(self._fd).st_size > 0:
            self._write(self.done, output=file_sha256(self.path))
        self.sidecar.unlink(missing_ok=True)

    def _write(self, path: Path, **more: Any) -> None:
        account = {**self._identity, "input_bytes": self._source.n_bytes, **more}
        with AtomicFile(path) as file:
            file.write(json.dumps(account, indent=2).encode() + b"\n")
            file.commit()

    def _check_identity(self, path: Path) -> None:
        """Raises ArgumentError unless the output is the one that the account in `path` speaks of, and of this job."""
        before = self._read(path)
        n_bytes, output = before.pop("input_bytes", None), before.pop("output", None)
        grown = before.get("input") != self._identity["input"] and self._source.goes_on(n_bytes, before.get("input"))
        if grown:
            before["input"] = self._identity["input"]
        names = [*before, *(name for name in self._identity if name not in before)]
        changes = [
            f"{name} was {before.get(name)!r} and is {self._identity.get(name)!r}"
            for name in names
            if before.get(name) != self._identity.get(name)
        ]
        if changes:
            raise ArgumentError(
                f"{self.path} was begun with other settings: {'; '.join(changes)}. Use those, or overwrite it to "
                "start again"
            )
        if path == self.done and file_sha256(self.path) != output:
            raise ArgumentError(
                f"{self.path} was changed after its job had ended: give another name, or overwrite it to start again"
            )
        if grown:
            self._write(self.sidecar)  # the job is now that of the longer input, and not done
            self.done.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Any]:
        before = _account(path)
        if before is None:
            raise ArgumentError(
                f"{self.path} exists and is not the beginning of a job: give another name, or overwrite it"
            )
        return before


def _account(path: Path) -> dict[str, Any] | None:
    """What a job has written about itself; None if it has not.

    Raises ArgumentError for anything else of that name, which would be replaced or removed, and nobody has said so.
    """
    try:
        account = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, IsADirectoryError):
        account = None
    if not isinstance(account, dict) or not {"fixmin", "input", "model"} <= account.keys():
        raise ArgumentError(
            f"{path} has the name of a file of this job, but no job has written it, or it is damaged: move it away, or "
            "give the output another name"
        )
    return account
