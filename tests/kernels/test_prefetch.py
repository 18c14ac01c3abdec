"""The compiler must not drop prefetches: GCC takes a function that does nothing else for one that does nothing.

Losing them changes no result and a quarter of the speed, so no other test would notice.
"""

import platform
import shutil
import subprocess

import pytest

from fixmin_cpp import _core

QUANTISED_TYPES = 12
TILES = 3  # whose panels come from memory: one token, two, and the widest
LINES = 4  # of a block that a tile fetches, on average at least; 8 were seen
VECTOR_ISAS = 4  # of x86-64, which tiles stand on; the scalar kernels prefetch nothing


def test_tiles_that_read_memory_prefetch():
    if platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs objdump and x86-64")
    code = subprocess.run(["objdump", "-d", _core.__file__], check=True, capture_output=True, text=True).stdout
    far, near = code.count("prefetcht1"), code.count("prefetcht0")
    assert far >= QUANTISED_TYPES * VECTOR_ISAS * TILES * LINES
    assert near >= QUANTISED_TYPES * VECTOR_ISAS * LINES  # one token only
