"""The compiler must not drop prefetches: GCC takes a function that does nothing else for one that does nothing.

Losing them changes no result and a quarter of the speed, so no other test would notice.
"""

import platform
import shutil
import subprocess

import pytest

from fixmin_cpp import _core

WEIGHT_TYPES = 15
VECTOR_ISAS = 5  # of x86-64; the scalar kernels prefetch nothing


def test_every_kernel_for_a_single_token_prefetches():
    if platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs objdump and x86-64")
    code = subprocess.run(["objdump", "-d", _core.__file__], check=True, capture_output=True, text=True).stdout
    far, near = code.count("prefetcht1"), code.count("prefetcht0")
    assert far >= WEIGHT_TYPES * VECTOR_ISAS
    assert near >= WEIGHT_TYPES * VECTOR_ISAS
