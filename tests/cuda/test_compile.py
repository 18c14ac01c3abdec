"""All kernels through nvcc for every architecture that a wheel has: registers, nothing spilled, and instructions of the
loop that reads prompts; NVIDIA's header.

FIXMIN_REGISTERS=docs/benchmarks/registers.md in the environment: the table is written there.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sass import disassemble, innermost_loops

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


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[Path, dict[str, dict[str, tuple[int, int]]]]:
    """A folder of cubins, and what the compiler said."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("kernels")
    with ThreadPoolExecutor(2) as pool:
        said = dict(zip(ARCHITECTURES, pool.map(lambda a: compiled(a, folder), ARCHITECTURES), strict=True))
    return folder, said


def test_no_register_is_spilled(everything):
    _, of_all = everything
    if path := os.environ.get("FIXMIN_REGISTERS"):
        Path(path).write_text(markdown(of_all))
    for architecture, kernels in of_all.items():
        print(f"sm_{architecture}:", {name: registers for name, (registers, _) in kernels.items()})
        assert len(kernels) >= 6 + 3 + 2 * 12
        assert {name: spilled for name, (_, spilled) in kernels.items() if spilled} == {}


def nvdisasm() -> Path:
    """NVIDIA's disassembler: the package, or that of a toolkit."""
    packages = [Path(path) / "nvidia" for path in sys.path]
    found = [path for package in packages for path in package.glob("*/bin/nvdisasm")]
    beside = Path(NVCC).resolve().with_name("nvdisasm")
    if not found and not beside.exists():
        pytest.skip("nvdisasm is not installed")
    return found[0] if found else beside


def test_instructions_of_the_loop_that_reads_prompts(everything):
    """Thirteen of them for a product are the chain itself: docs/cuda.md, "Products"."""
    folder, _ = everything
    found = {}
    for architecture in ARCHITECTURES:
        kernels = disassemble(nvdisasm(), folder / f"{architecture}.cubin")
        for kernel in ("many_q8_0", "many_q4_0"):
            wide = max(innermost_loops(kernels[kernel]), key=lambda loop: loop.count("IMMA"))
            found[architecture, kernel] = wide.per_mma
    print({" ".join(key): round(n, 2) for key, n in found.items()})
    assert all(n <= (20 if architecture == "75" else 16) for (architecture, _), n in found.items()), found


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
