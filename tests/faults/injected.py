"""Faults of the system that tests ask for; shim.cpp has to be loaded before everything else."""

import contextlib
import ctypes
import enum
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

SHIM = Path(__file__).with_name("shim.cpp")


class Kind(enum.IntEnum):
    """What can fail."""

    ALLOCATION = 0
    MAPPING = 1
    THREAD = 2
    FILE = 3
    READING = 4


class Action(enum.IntEnum):
    """What happens to a call."""

    FAIL_ONCE = 0
    FAIL_ON = 1  # that one and all after it
    DIE_BEFORE = 2
    DIE_AFTER = 3
    DIE_WITHIN = 4


def build(folder: Path) -> Path:
    """The shim, compiled."""
    library = folder / "shim.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


class Faults:
    """The shim of this process."""

    def __init__(self) -> None:
        self.shim = ctypes.CDLL(None)
        self.shim.fault_calls.restype = self.shim.fault_live.restype = ctypes.c_long

    def watch(self, folder: Path) -> None:
        """Files below it count, no others."""
        self.shim.fault_folder(os.fsencode(folder) + b"/")

    def arm(self, kind: Kind, at: int, action: Action = Action.FAIL_ONCE, error: int = errno.ENOSPC) -> None:
        """The call `at` from now on, counted from 1; 0: none."""
        self.shim.fault_arm(int(kind), ctypes.c_long(at), int(action), error)

    def calls(self, kind: Kind) -> int:
        """Since the last arm()."""
        return int(self.shim.fault_calls(int(kind)))

    def live(self) -> int:
        """Allocations of C++ that are in use."""
        return int(self.shim.fault_live())

    @contextlib.contextmanager
    def at(self, kind: Kind, at: int, action: Action = Action.FAIL_ONCE, error: int = errno.ENOSPC) -> Iterator[None]:
        """Armed for a `with` block."""
        self.arm(kind, at, action, error)
        try:
            yield
        finally:
            self.arm(kind, 0)
