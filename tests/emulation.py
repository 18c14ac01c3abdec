"""Builds with something emulated, a GPU or AMX tiles: the Python package, and programs with sanitizers.

The folders under build/tests stay, so that a second run compiles only what has changed.
"""

import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Options of cmake for the kernels of GPUs on the CPU, beside the instruction set that they are compared with.
EMULATED_GPU = ("-DFIXMIN_CUDA=EMULATED", "-DFIXMIN_ONLY_ISAS=scalar")
#: For AMX tiles in software.
EMULATED_TILES = ("-DFIXMIN_CUDA=OFF", "-DFIXMIN_EMULATED_TILES=ON", "-DFIXMIN_ONLY_ISAS=scalar;amx")
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
    configure = ["cmake", "-S", ROOT, "-B", folder, *ninja, *options]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
            done = run(command)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return folder


#: Removes what an editable installation of the package puts before PYTHONPATH, in every process that is started.
SITE = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
"""


def package(site: Path, name: str, *options: str) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs Python with a fixmin_cpp in the empty folder `site`, whose _core is that of build(name, *options)."""
    folder = build(
        name,
        "-DCMAKE_BUILD_TYPE=Release",
        "-DSKBUILD_PROJECT_VERSION=0.0.0",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    )
    (site / "fixmin_cpp").mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    native = folder.glob("_core*.so")
    for path in (*(ROOT / "python" / "fixmin_cpp").iterdir(), ROOT / "convert", ROOT / "reference", *native):
        (site / "fixmin_cpp" / path.name).symlink_to(path)

    def python(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        paths = os.pathsep.join([str(site), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        return run([sys.executable, *arguments], PYTHONPATH=paths, **environment)

    return python


def passed(done: "subprocess.CompletedProcess[str]") -> int:
    """How many tests a run of pytest has passed; demands that none failed."""
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else 0
