"""The package with an emulated GPU."""

import os
import subprocess
import sys
from collections.abc import Callable

import pybind11
import pytest
from emulation import ROOT, build, run

#: Removes what an editable installation of the package puts before PYTHONPATH, in every process that is started.
SITE = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
"""


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs Python with a fixmin_cpp whose GPU is emulated."""
    folder = build(
        "emulated",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DSKBUILD_PROJECT_VERSION=0.0.0",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )
    package = tmp_path_factory.mktemp("site") / "fixmin_cpp"
    package.mkdir()
    (package.parent / "sitecustomize.py").write_text(SITE)
    native = folder.glob("_core*.so")
    for path in (*(ROOT / "python" / "fixmin_cpp").iterdir(), ROOT / "convert", ROOT / "reference", *native):
        (package / path.name).symlink_to(path)

    def python(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        paths = os.pathsep.join([str(package.parent), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        return run([sys.executable, *arguments], PYTHONPATH=paths, **environment)

    return python
