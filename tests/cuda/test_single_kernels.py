"""Single kernels on the emulator: the bits of the CPU's scalar kernels."""

import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import ROOT, run

pytestmark = pytest.mark.slow

SOURCES = ["csrc/kernels/unit.cpp", "csrc/kernels/isa.cpp", "tests/cuda/simt.cpp"]
FURTHER = {
    "attention_main": [],
    "products_main": [
        *(f"csrc/codes/{name}.cpp" for name in ("code_map", "fold", "lift")),
        *("csrc/cuda/packing.cpp", "csrc/quant/blocks.cpp", "csrc/quant/panels.cpp"),
    ],
}
OPTIONS = ["-std=c++20", "-O2", "-ffp-contract=off", "-pthread", "-DFIXMIN_ISA=scalar", "-DFIXMIN_ISAS=ISA(scalar) "]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("kernels")
    where = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda'}", '-DFIXMIN_VEC="kernels/vec_scalar.h"']
    for name, further in FURTHER.items():
        sources = [ROOT / file for file in (*SOURCES, *further, f"tests/cuda/{name}.cpp")]
        subprocess.run(["g++", *OPTIONS, *where, *sources, "-o", folder / name], check=True)
    return {name: folder / name for name in FURTHER}


@pytest.mark.parametrize("order", ["0", "1", "2"])  # of the threads; 0: in turn
@pytest.mark.parametrize(("name", "cases"), [("attention_main", "100"), ("products_main", "150")])
def test_same_bits(programs, name, cases, order):
    """Each order has cases of its own.

    attention_main: types, head sizes, groups, positions, tiles, scores kept or computed twice. products_main: products
    of every type in every size of tiles, norms, activations, codes.
    """
    done = run([programs[name], cases, order], FIXMIN_SIMT_SEED=order)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all agree\n")


def test_attention_at_every_position(programs):
    done = run([programs["attention_main"], "positions", "1"])
    assert done.returncode == 0, done.stdout + done.stderr
