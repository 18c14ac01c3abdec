"""Attention and what it stores, on the emulator: the bits of the CPU's scalar kernels."""

import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import ROOT, run

pytestmark = pytest.mark.slow

SOURCES = ["csrc/kernels/unit.cpp", "csrc/kernels/isa.cpp", "tests/cuda/simt.cpp", "tests/cuda/attention_main.cpp"]
OPTIONS = ["-std=c++20", "-O2", "-ffp-contract=off", "-pthread", "-DFIXMIN_ISA=scalar", "-DFIXMIN_ISAS=ISA(scalar) "]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("attention") / "attention_main"
    where = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda'}", '-DFIXMIN_VEC="kernels/vec_scalar.h"']
    subprocess.run(["g++", *OPTIONS, *where, *(ROOT / name for name in SOURCES), "-o", path], check=True)
    return path


@pytest.mark.parametrize("order", ["0", "1", "2"])  # of the threads; 0: in turn
def test_same_bits(program, order):
    """Types, head sizes, groups, positions, tiles, scores kept or computed twice: each order has cases of its own."""
    done = run([program, "100", order], FIXMIN_SIMT_SEED=order)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all agree\n")


def test_every_position(program):
    done = run([program, "positions", "1"])
    assert done.returncode == 0, done.stdout + done.stderr
