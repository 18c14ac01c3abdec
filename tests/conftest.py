"""Shared by all tests: the import path of helper modules, hypothesis without its clock, a quick garbage collector."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A shell that starts this in the background makes it ignore Ctrl-C, and Python keeps it so; tests send that signal, to
# this process and to others that inherit the setting.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where a process connects to Ray for the second time, as this one does, Ray's thread that exports metrics outlives
# ray.shutdown() and may meet what is destroyed at the end of the process: believed to be what crashed a whole run there
# (Ray's pull requests 58952 and 60048).
os.environ["RAY_enable_open_telemetry"] = "0"  # noqa: SIM112 - as Ray spells it

# PyTorch's products of small models take five times as much of the cores with two threads, which mostly wait for each
# other. Read when it is imported, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As a user has them, also where a machine for tests says otherwise: streams are buffered, so that what cannot be
# written is seen when a process ends, and imports leave a __pycache__.
os.environ.pop("PYTHONUNBUFFERED", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Tests in subfolders can `import oracle` and `import gguf_factory`.
sys.path.insert(0, str(Path(__file__).parent))

# Tests never time anything: hypothesis would fail an example that is slow because the machine is busy. The examples are
# the same in every run; `pytest --hypothesis-profile=search` draws others, and remembers what failed in .hypothesis.
settings.register_profile("fixmin", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None)
settings.load_profile("fixmin")


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What is imported by now is garbage to nobody. PyTorch and transformers are two million objects: looking through
    them, as every conversion does several times, took more than half of its time."""
    gc.collect()
    gc.freeze()
