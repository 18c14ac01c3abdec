"""All kernels through nvcc for every architecture that a wheel has: registers, and nothing spilled; NVIDIA's header.

FIXMIN_REGISTERS=docs/benchmarks/registers.md in the environment: the table is written there.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.external

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = re.search(r"FIXMIN_CUDA_ARCHITECTURES ([\d ]+) CACHE", (ROOT / "CMakeLists.txt").read_text())[1].split()


def compiled(architecture: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Registers of a thread and spilled bytes of each kernel."""
    command = [NVCC, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "--fmad=false", "--expt-relaxed-constexpr"]
    command += ["-Wno-deprecated-gpu-targets", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    command += ["-o", folder / f"{architecture}.cubin", ROOT / "csrc" / "cuda" / "kernels.cu"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part)]
        found[part.partition("'")[0]] = (int(re.search(r"Used (\d+) registers", part)[1]), sum(spilled))
    return found


def markdown(of_all: dict[str, dict[str, tuple[int, int]]]) -> str:
    """A line for each kernel, a column for each architecture."""
    release = re.search(r"release ([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)
    lines = ["# Registers of the GPU's kernels", ""]
    lines += [
        "`FIXMIN_REGISTERS=docs/benchmarks/registers.md pytest tests/cuda/test_compile.py`, nvcc " + release[1] + "."
    ]
    lines += ["Of one thread; `+ N`: bytes that it spills.", ""]
    lines += ["| kernel | " + " | ".join(f"sm_{a}" for a in of_all) + " |", "| --- " * (1 + len(of_all)) + "|"]
    for kernel in sorted(next(iter(of_all.values()))):
        found = [of_all[a][kernel] for a in of_all]
        cells = [f"{registers}{f' + {spilled}' if spilled else ''}" for registers, spilled in found]
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_every_architecture(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        of_all = dict(zip(ARCHITECTURES, pool.map(lambda a: compiled(a, tmp_path), ARCHITECTURES), strict=True))
    if path := os.environ.get("FIXMIN_REGISTERS"):
        Path(path).write_text(markdown(of_all))
    for architecture, kernels in of_all.items():
        print(f"sm_{architecture}:", {name: registers for name, (registers, _) in kernels.items()})
        assert len(kernels) >= 6 + 3 + 2 * 12
        assert {name: spilled for name, (_, spilled) in kernels.items() if spilled} == {}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_what_is_known_of_the_driver():
    """driver.cpp repeats numbers, layouts and arguments of cuda.h."""
    folders = (Path(NVCC).resolve().parents[1] / "include", Path("/usr/local/cuda/include"))
    include = next((folder for folder in folders if (folder / "cuda.h").exists()), None)
    if include is None:
        pytest.skip("NVIDIA's header is not installed")
    command = ["c++", "-std=c++20", "-Wall", "-Werror", "-Wno-enum-compare", "-fsyntax-only", f"-I{include}"]
    command += [f"-I{ROOT / 'csrc'}", Path(__file__).with_name("driver_api.cpp")]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
