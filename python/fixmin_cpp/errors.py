"""The errors that this package raises on purpose. A message says what was wrong, where, and what to do about it."""

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ._core import ArgumentError, ContextLengthError, DeviceError, FixminError, GGUFError, UnsupportedError

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BusyError",
    "CheckpointError",
    "ContextLengthError",
    "DeviceError",
    "FixminError",
    "GGUFError",
    "UnsupportedError",
    "naming",
    "raised_by_signal_handler",
]


class CheckpointError(FixminError, ValueError):
    """A Hugging Face checkpoint cannot be read, is ambiguous, or does not compute what the converter can express."""


class BusyError(FixminError):
    """Nothing is wrong with what was asked for, but what it needs is taken by others: it may be asked again later."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has the wrong type (a bool for a count, an array of floats for token ids, ...)."""


def raised_by_signal_handler(error: BaseException) -> bool:
    """Whether a signal handler written in Python raised it: no failure of what it interrupted, but the caller's."""
    codes = set()
    for number in signal.valid_signals():
        handler: object = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        for called in (handler, type(handler).__call__ if callable(handler) else None):
            codes.add(getattr(called, "__code__", None))  # a method has that of its function
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code not in codes:
        trace = trace.tb_next
    return trace is not None


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of a GGUF file, and memory that is lacking for it, say which file, if they do not already."""
    try:
        yield
    except MemoryError as error:
        why = str(error) if str(error) != "std::bad_alloc" else ""
        raise MemoryError(f"{os.fspath(path)}: not enough memory" + (why and f": {why}")) from None
    except UnicodeDecodeError as error:  # a message of the native module with a name of a file that is not UTF-8
        if os.fsencode(path) not in error.object:
            raise
        raise GGUFError(error.object.decode("utf-8", "surrogateescape")) from None
    except (GGUFError, UnsupportedError) as error:
        name = os.fspath(path)
        if str(error).startswith(name):
            raise
        raise type(error)(f"{name}: {error}") from None
