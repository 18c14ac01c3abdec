"""Lets no log line hold up the event loop: a pipe that nobody reads would stop all requests, and the end too."""

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..logs import Facts

__all__ = ["never_waiting"]

_log = logging.getLogger(__name__)

_MOST = 4 << 20  # bytes that wait; further lines are lost
_PATIENCE = 2.0  # seconds that they get at the end


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """The root logger's lines to stderr, or wherever a StreamHandler writes into a file, wait in memory if need be."""
    root = logging.getLogger()
    put = [_Handler(one, file) for one in root.handlers if (file := _file_of(one)) is not None]
    for handler in put:
        root.addHandler(handler)
        root.removeHandler(handler.instead_of)
    try:
        yield
    finally:
        for handler in put:
            if handler.finish():  # else the old one would wait
                root.addHandler(handler.instead_of)
                root.removeHandler(handler)


def _file_of(handler: logging.Handler) -> int | None:
    """Number of the file that a StreamHandler writes to, if it is one and does."""
    if type(handler) is not logging.StreamHandler:  # others may have meanings of their own
        return None
    try:
        handler.flush()
        number: int = handler.stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    return number


class _Handler(logging.Handler):
    """Writes a line at once where that needs no waiting. What is left a thread writes, in its order."""

    def __init__(self, instead_of: Any, file: int) -> None:
        super().__init__(instead_of.level)
        self.setFormatter(instead_of.formatter)
        self.filters = instead_of.filters
        self._encoding = getattr(instead_of.stream, "encoding", None) or "utf-8"
        self.instead_of: logging.Handler = instead_of
        self._file = file
        self._left = bytearray()  # of whole lines, but for what the first of them has written
        self._n_lost = 0
        self._thread: threading.Thread | None = None
        self._finished = False

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock."""
        try:
            line = self._line(record)
        except Exception:
            self.handleError(record)
            return
        if self._finished or self._n_lost or len(self._left) + len(line) > _MOST:
            self._n_lost += 1
            return
        self._left += line
        if self._thread is None:
            self._write()
            if self._left:
                self._thread = threading.Thread(target=self._drain, name="log", daemon=True)
                self._thread.start()

    def finish(self) -> bool:
        """Whether all was written, in the time that there is for it. If not, it takes no more."""
        end = time.monotonic() + _PATIENCE
        while (thread := self._thread) is not None and time.monotonic() < end:
            thread.join(0.1)
        with self._locked():
            self._finished = self._thread is not None
        if thread is not None:
            thread.join()
        return not self._finished

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(self._encoding, "backslashreplace")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _write(self) -> None:
        """As much as the file takes now."""
        ready = select.poll()
        ready.register(self._file, select.POLLOUT)
        try:
            while self._left and ready.poll(0):  # a pipe then has room for so many bytes
                n = os.write(self._file, self._left[: select.PIPE_BUF])
                del self._left[:n]
        except BlockingIOError:
            pass
        except OSError:  # it can't be written, which is no reason to end
            self._left.clear()

    def _drain(self) -> None:
        ready = select.poll()
        ready.register(self._file, select.POLLOUT)
        while True:
            ready.poll(100)  # ms
            with self._locked():
                self._write()
                if self._n_lost and len(self._left) <= _MOST // 2 and not self._finished:
                    self._left += self._line(_lost(self._n_lost))
                    self._n_lost = 0
                elif self._finished or not self._left:
                    self._thread = None
                    return


def _lost(n: int) -> logging.LogRecord:
    text = "log lines are missing here, as nobody read them %s"
    return _log.makeRecord(_log.name, logging.WARNING, __file__, 0, text, (Facts(lines=n),), None)
