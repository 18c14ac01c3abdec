"""No code compiled for one instruction set may be what the linker picks for another.

Kernel translation units are compiled without optimisation, so that every inline function that they use is emitted: they
may define their table of kernels and nothing else that is visible outside.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS = {
    "scalar": [],
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
    "amx": [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
    "neon": [],
    "neon_dotprod": ["-march=armv8.2-a+dotprod"],
}
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
@pytest.mark.parametrize("isa", FLAGS)
def test_kernel_unit_defines_only_its_table(isa, tmp_path):
    compiler, nm = tools_for(isa)
    target = tmp_path / "unit.o"
    source = SOURCES / "kernels" / f"kernels_{isa}.cpp"
    options = ["-std=c++20", "-O0", "-w", "-fno-exceptions", *FLAGS[isa]]
    subprocess.run([compiler, *options, "-I", SOURCES, "-c", source, "-o", target], check=True)
    listing = subprocess.check_output([nm, "-C", "--defined-only", "--extern-only", target], text=True)
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    assert [name for _, name in symbols] == [f"fixmin::kernels::kernels_{isa}"]
    assert symbols[0][0] in "DR"


def test_a_unit_that_leaks_is_noticed(tmp_path):
    if not (shutil.which("g++") and shutil.which("nm")):
        pytest.skip("g++ or nm is not installed")
    source = tmp_path / "leak.cpp"
    source.write_text("inline int f(int x) { return x; }\nint g(int x) { return f(x); }\n")
    subprocess.run(["g++", "-O0", "-c", source, "-o", tmp_path / "leak.o"], check=True)
    listing = subprocess.check_output(["nm", "--defined-only", "--extern-only", tmp_path / "leak.o"], text=True)
    assert " W " in listing
