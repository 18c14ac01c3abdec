"""What a release is made of: licences of what it contains, files that it needs, the same bytes twice."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import wheels

ROOT = Path(__file__).resolve().parents[2]
#: First parts of names in angle brackets that are the C++ library's, the system's or a compiler's. NVIDIA's driver is
#: declared in csrc/cuda itself.
STANDARD = {"sys", "asm", "arm_neon.h", "immintrin.h", "cpuid.h", "link.h", "signal.h", "ucontext.h", "unistd.h"} | {
    "sched.h", "fcntl.h", "dlfcn.h", "malloc.h", "pthread.h"
}  # fmt: skip


def foreign_headers() -> set[str]:
    """ "pybind11" of <pybind11/stl.h>, and whatever else the native code includes that is not the system's."""
    found = set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            for header in re.findall(r"^ *# *include <([^>]+)>", path.read_text(encoding="utf-8"), re.M):
                first = header.split("/")[0]
                if first not in STANDARD and not re.fullmatch(r"[a-z_]+", header):  # <vector>
                    found.add(first)
    return found


def test_every_library_in_a_wheel_has_its_licence() -> None:
    listed = (ROOT / "THIRD_PARTY_LICENSES.md").read_text(encoding="utf-8")
    assert "pybind11" in foreign_headers()
    assert [name for name in foreign_headers() if name not in listed] == []
    for name in ("libc++", "libc++abi", "compiler-rt", "Redistribution and use", "LLVM Exceptions", "Zig contributors"):
        assert name in listed


def test_the_container_has_what_the_metadata_names() -> None:
    """A file of license-files that the Dockerfile does not copy would fail its build."""
    named = re.search(r"license-files = \[([^\]]+)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert named
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert [name for name in re.findall(r'"([^"]+)"', named[1]) if f" {name} " not in dockerfile] == []


def sdist(folder: Path) -> Path:
    return wheels.build(
        "sdist", Path(sys.executable), wheels.exported(folder), folder / "out", {}, wheels.environment()
    )


def test_the_sdist_is_small_complete_and_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    once, again = sdist(tmp_path / "a"), sdist(tmp_path / "b")
    assert once.read_bytes() == again.read_bytes()
    assert once.stat().st_size < 2_000_000
    with tarfile.open(once) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    built_from = {"CMakeLists.txt", "cmake/FindNvcc.cmake", "cmake/zig.cmake", "cmake/exports.map", "pyproject.toml"}
    legal = {"LICENSE", "THIRD_PARTY_LICENSES.md", "SECURITY.md", "README.md"}
    rooms = [tmp_path / "a" / "tree" / room for room in ("csrc", "python", "convert", "reference")]
    packages = {
        path.relative_to(tmp_path / "a" / "tree").as_posix()
        for room in rooms
        for path in room.rglob("*")
        if path.is_file()
    }
    assert len(packages) > 100
    assert (built_from | legal | packages) - names == set()


@pytest.mark.external
def test_a_wheel_is_the_same_twice_and_says_what_it_contains(tmp_path: Path) -> None:
    """In two folders. One instruction set and the bindings would suffice, but a wheel is made in one way only."""
    for module, program in (("ziglang", "g++"), ("auditwheel", "patchelf")):
        pytest.importorskip(module)
        if shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
            pytest.skip(f"{program} is not installed")
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name
        command = [sys.executable, ROOT / "tools/wheels.py", folder / "dist", "--work", folder / "work"]
        command += ["--pythons", sys.executable, "--processors", "x86_64", "--cuda", "OFF"]
        env = os.environ | {f"ZIG_{kind}_CACHE_DIR": str(folder / "cache") for kind in ("GLOBAL", "LOCAL")}
        subprocess.run(command, check=True, capture_output=True, env=env)
        made += list((folder / "dist").glob("*.whl"))
    assert len(made) == 2
    assert made[0].read_bytes() == made[1].read_bytes()
    with zipfile.ZipFile(made[0]) as archive:
        names = archive.namelist()
    assert any(name.endswith("licenses/THIRD_PARTY_LICENSES.md") for name in names)
    found = re.search(r"manylinux_2_(\d+)_x86_64", made[0].name)
    assert found
    assert int(found[1]) <= 28
