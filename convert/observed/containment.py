"""Run a checkpoint's code without letting it end this process, write into its output or change its settings.

This contains accidents, not malice: code that is run can do anything. A crash in native code and a loop without end
cannot be caught from within the process; both leave no file behind, and Ctrl-C ends the latter.
"""

import contextlib
import io
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch

from ...errors import CheckpointError

_PRINTED_LINES = 10  # of what the code prints, shown for each call

_in_use = threading.RLock()  # what is put back belongs to the whole process


class _Ended(BaseException):
    """The code called os._exit, os.abort or exec; no `except Exception` of it may catch this."""


@contextlib.contextmanager
def contained(tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within it, ending the process is a CheckpointError; what the code prints goes to `tell`, line by line; and
    folder, environment, signal handlers, logging, warnings and PyTorch's settings are put back at the end.

    Random numbers are not: see `random_state`.
    """
    output = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_in_use)
            stack.enter_context(_settings_restored())
            stack.enter_context(contextlib.redirect_stdout(output))
            for name in ("_exit", "abort", "execv", "execve"):
                stack.enter_context(mock.patch.object(os, name, _refuse(f"os.{name}")))
            yield
    except SystemExit as error:
        status = "" if error.code is None else f" (status {error.code})"
        raise CheckpointError(f"the checkpoint's code ended the process{status}: sys.exit or exit") from error
    except _Ended as error:
        raise CheckpointError(f"the checkpoint's code ended the process: {error}") from error
    finally:
        _show(output.getvalue(), tell)  # only now: within, what `tell` prints would count as the code's


def _show(printed: str, tell: Callable[[str], None] | None) -> None:
    lines = [line for line in printed.splitlines() if line.strip()]
    if tell is not None:
        for line in lines[:_PRINTED_LINES]:
            tell(f"the checkpoint's code prints: {line}")
        if len(lines) > _PRINTED_LINES:
            tell(f"the checkpoint's code prints {len(lines) - _PRINTED_LINES} lines more")


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise _Ended(name)

    return refuse


@contextlib.contextmanager
def _settings_restored() -> Iterator[None]:
    """Put back what belongs to the process."""
    folder, environment = os.getcwd(), dict(os.environ)
    streams, arguments = (sys.stdout, sys.stderr, sys.stdin, sys.excepthook, sys.getrecursionlimit()), list(sys.argv)
    numbers, place = np.geterr(), locale.setlocale(locale.LC_ALL)
    root = logging.getLogger()
    logs = root.level, list(root.handlers), logging.root.manager.disable
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    exact, only_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    main = threading.current_thread() is threading.main_thread()
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals()} if main else {}
    try:
        with warnings.catch_warnings():
            yield
    finally:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        sys.stdout, sys.stderr, sys.stdin, sys.excepthook = streams[:4]
        sys.setrecursionlimit(streams[4])
        sys.argv[:] = arguments
        np.seterr(**numbers)
        if locale.setlocale(locale.LC_ALL) != place:
            locale.setlocale(locale.LC_ALL, place)
        root.setLevel(logs[0])
        root.handlers[:] = logs[1]
        logging.disable(logs[2])
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact, warn_only=only_warn)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, handler)


def random_state() -> Callable[[], None]:
    """The state of all generators of random numbers, as a function that puts it back.

    Not part of `contained`: two runs of code that draws numbers must differ, or nobody would notice.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    def put_back() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])

    return put_back
