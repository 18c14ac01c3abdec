"""Compiles small C++ programs with the address and undefined-behaviour sanitizers."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-g", "-O1", "-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@functools.cache
def why_not() -> str | None:
    """What is missing on this machine for a sanitized program to be compiled and run; None if nothing is."""
    if shutil.which("g++") is None:
        return "no g++"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "empty.cpp"), Path(folder, "empty")
        source.write_text("int main() {}\n")
        built = subprocess.run(["g++", *FLAGS, source, "-o", program], capture_output=True, text=True, check=False)
        if built.returncode != 0:
            return "g++ cannot link the sanitizers: " + built.stderr.strip()[-200:]
        ran = subprocess.run([program], capture_output=True, text=True, check=False)
        return None if ran.returncode == 0 else "a sanitized program does not run: " + ran.stderr.strip()[-200:]


@functools.cache
def _object_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fixmin-sanitized-")


@functools.cache
def _compile(source: Path) -> Path:
    """The object file of `source`, made once per test run: the reader itself is linked into several programs."""
    target = Path(_object_folder().name, f"{source.stem}-{abs(hash(source))}.o")
    command = ["g++", *FLAGS, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")  # no warnings either
    return target


def compile_sanitized(sources: list[str], program: Path) -> Path:
    """Compiles `sources` (paths from the repository's root) to `program`; skips the test if sanitizers are absent."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    objects = [_compile(ROOT / source) for source in sources]
    built = subprocess.run(["g++", *FLAGS, *objects, "-o", program], capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return program
