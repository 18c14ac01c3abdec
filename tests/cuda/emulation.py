"""Builds with the kernels on the emulator: the Python module, and programs with sanitizers.

The folders under build/tests stay, so that a second run compiles only what has changed.
"""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: With the folder of this interpreter in front: a virtual environment has cmake and ninja there.
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(command: list[object], **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if not key.startswith("FIXMIN_")}
    return subprocess.run(
        [str(part) for part in command],
        env=env | {"PATH": SEARCH_PATH} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def build(name: str, *options: str) -> Path:
    """The folder build/tests/NAME, made with these options of cmake."""
    if shutil.which("cmake", path=SEARCH_PATH) is None:
        pytest.skip("cmake is not installed")
    folder = ROOT / "build" / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    ninja = ["-GNinja"] if shutil.which("ninja", path=SEARCH_PATH) else []
    configure = ["cmake", "-S", ROOT, "-B", folder, *ninja, "-DFIXMIN_CUDA=EMULATED", *options]
    configure.append("-DFIXMIN_ONLY_ISAS=scalar")  # which the emulated GPU is compared with
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
            done = run(command)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return folder
