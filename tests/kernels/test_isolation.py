"""No code compiled for one instruction set may be what the linker picks for another.

Kernel translation units are compiled without optimisation, so that every inline function that they use is emitted: they
may define their table of kernels and nothing else that is visible outside.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fixmin_cpp import _core

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"


def instruction_sets():
    """Name -> options of the compiler, from the lines fixmin_isa(NAME HEADER OPTION...) of CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text()
    variables = {}

    def expanded(words):
        return [w for word in words for w in variables.get(word, [word])]

    found = {}
    for command, inside in re.findall(r"^ *(set|fixmin_isa)\(([^()]*)\)", text, re.MULTILINE):
        name, *words = inside.split()
        if command == "set":
            variables["${" + name + "}"] = expanded(words)
        else:
            header, *options = expanded(words)
            found[name] = [f'-DFIXMIN_VEC="kernels/{header}"', f"-DFIXMIN_ISA={name}", *options]
    return found


ISAS = instruction_sets()
MACHINES = {"x86_64": ("avx", "amx"), "aarch64": ("neon",)}  # how the names of their own instruction sets begin


def tools_for(isa):
    """A compiler and nm for the machine of an instruction set: this machine's own, or Debian's cross tools."""
    machine = next((m for m, names in MACHINES.items() if isa.startswith(names)), platform.machine())
    prefix = "" if machine == platform.machine() else f"{machine}-linux-gnu-"
    tools = [prefix + "g++", prefix + "nm"]
    for tool in tools:
        if not shutil.which(tool):
            package = "g++-" + machine.replace("_", "-") + "-linux-gnu" if prefix else "g++"
            pytest.skip(f"{tool} is not installed; on Debian: apt-get install {package}")
    return tools


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_kernel_unit_defines_only_its_table(isa, tmp_path):
    compiler, nm = tools_for(isa)
    target = tmp_path / "unit.o"
    source = SOURCES / "kernels" / "unit.cpp"
    options = ["-std=c++20", "-O0", "-w", "-fno-exceptions", *ISAS[isa]]
    subprocess.run([compiler, *options, "-I", SOURCES, "-c", source, "-o", target], check=True)
    listing = subprocess.check_output([nm, "-C", "--defined-only", "--extern-only", target], text=True)
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    table = "tiles" if any(option.startswith("-DFIXMIN_BASE") for option in ISAS[isa]) else "kernels"
    assert [name for _, name in symbols] == [f"fixmin::kernels::{table}_{isa}"]
    assert symbols[0][0] in "DR"


def test_all_units_are_looked_at():
    assert set(_core.system_info()["isas_built"]) <= set(ISAS)


def test_a_unit_that_leaks_is_noticed(tmp_path):
    if not (shutil.which("g++") and shutil.which("nm")):
        pytest.skip("g++ or nm is not installed")
    source = tmp_path / "leak.cpp"
    source.write_text("inline int f(int x) { return x; }\nint g(int x) { return f(x); }\n")
    subprocess.run(["g++", "-O0", "-c", source, "-o", tmp_path / "leak.o"], check=True)
    listing = subprocess.check_output(["nm", "--defined-only", "--extern-only", tmp_path / "leak.o"], text=True)
    assert " W " in listing
