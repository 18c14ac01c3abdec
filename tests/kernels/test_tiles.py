"""Products on AMX tiles, whatever CPU runs the tests: csrc/kernels/tiles.inl with the tiles of emulated_amx.h.

The tests of kernels and of models compare the instruction set `amx` with `scalar` by bytes; here they run on a build in
which the one exists everywhere and stands on the other.
"""

import pytest
from emulation import EMULATED_TILES, ROOT, package, passed

pytestmark = pytest.mark.slow  # it compiles the package

#: Files in tests/, and what of them: an expression for -k.
FILES = {
    "kernels/test_kernels.py": "matmul or attention",
    "kernels/test_scaled_rows.py": "matmul or overflow or nothing or finite",
    "engine/test_engine.py": "isa or chunk or cache_type",
}


@pytest.fixture(scope="session")
def emulated_tiles(tmp_path_factory):
    return package(tmp_path_factory.mktemp("tiles"), "tiles", *EMULATED_TILES)


def test_they_are_there(emulated_tiles):
    done = emulated_tiles("-c", "from fixmin_cpp import _core; print(_core.system_info()['isas_supported'])")
    assert done.stdout.strip() == "['scalar', 'amx']", done.stderr


@pytest.mark.parametrize("file", FILES)
def test_same_bits(emulated_tiles, file):
    path = ROOT / "tests" / file
    assert passed(emulated_tiles("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", FILES[file], path)) >= 5
