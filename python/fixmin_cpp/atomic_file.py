"""A file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, CheckpointError

__all__ = ["AtomicFile", "naming", "refuse_inputs", "terminate_cleanly"]


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong with a descriptor (a disk that is full, say) names the file that its reader knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


class AtomicFile:
    """A file that is written beside its final place and takes its name only in `commit`.

    The temporary `.NAME.partial` is locked while it is written, so a second conversion to the same output is refused,
    and one that a killed process left behind (which holds no lock any more) is simply overwritten by the next run.
    Leaving the `with` block without `commit`, by an exception or Ctrl-C, removes it.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        # Through a symbolic link the file it names is replaced, not the link.
        self.target = Path(os.path.realpath(target))
        self.path = self.target.parent / _partial(self.target.name)
        self._given = Path(target)
        self._file: BinaryIO | None = None

    def __enter__(self) -> AtomicFile:
        if self._given.exists() and not self._given.is_file():  # a pipe's real path is the path of nothing
            kind = "directory" if self._given.is_dir() else "device or pipe"
            raise CheckpointError(f"{self._given}: is a {kind}; give the name of a file to write")
        while self._file is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                file = open(os.open(self.path, flags, 0o666), "r+b")
            except OSError as error:  # by the name that whoever reads it knows
                raise OSError(error.errno, error.strerror, str(self.target)) from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise CheckpointError(f"{self.target}: another process is writing this file at the moment") from None
            # Between open and flock its owner may have renamed or removed it: then this is not the file of that name.
            if _is_same_file(file.fileno(), self.path):
                file.truncate(0)
                self._file = file
            else:
                file.close()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            # Removed while still locked, so that this cannot remove the file of a run that starts now.
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            with contextlib.suppress(OSError):  # what could not be written before cannot be written now
                self._close()

    @property
    def file(self) -> BinaryIO:
        """The open temporary file, binary, readable and writable."""
        if self._file is None:
            raise ValueError("the file is closed")
        return self._file

    def write(self, data: bytes | NDArray[np.uint8]) -> None:
        """Append bytes. A full disk gives an OSError that names the file that was to be."""
        with naming(self.target):
            self.file.write(data if isinstance(data, bytes) else data.data.cast("B"))

    def commit(self, target: Path | None = None) -> None:
        """Put everything on the disk and give it its name (or `target`, in the same folder), replacing what had it."""
        with naming(self.target):
            self.file.flush()
            os.fsync(self.file.fileno())
            os.replace(self.path, target or self.target)
            folder = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def refuse_inputs(target: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """ArgumentError if the file to write, or its temporary, is one of those that are read: it would be lost."""
    for path in [os.fspath(one) for one in inputs if one is not None]:
        if _is_same(path, target):
            other = "" if path == os.fspath(target) else f", {path}"
            raise ArgumentError(f"{os.fspath(target)} is an input{other}: give the output another name")
        if _is_same(path, AtomicFile(target).path):
            raise ArgumentError(
                f"{path}, an input, has the name under which {os.fspath(target)} is written: give one of them another"
            )


def _is_same(path: str, other: str | os.PathLike[str]) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _partial(name: str) -> str:
    """The name of the file beside it, which must not be too long where this one just fits."""
    partial = f".{name}.partial"
    return partial if len(os.fsencode(partial)) <= 255 else f".{sha256(os.fsencode(name)).hexdigest()}.partial"


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path)) and stat.S_ISREG(os.fstat(fd).st_mode)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def terminate_cleanly() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless `nohup` has it ignored, as an exception, so that the temporary file is removed.

    Only the main thread may set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
