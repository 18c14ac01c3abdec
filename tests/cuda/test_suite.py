"""Everything above the door on the emulated GPU: tests of its own, and the project's with FIXMIN_DEVICE=cuda.

Files are chosen for what they reach, and within them what the emulator can do in seconds.
"""

import re

import pytest
from emulation import ROOT

pytestmark = pytest.mark.slow  # it compiles the package

#: Files of tests/ and what is run of them: an expression for -k.
PROJECT = {
    "engine/test_scheduler.py": "not together_as_alone",
}


def passed(done, expression=""):
    """How many tests did; demands that none failed."""
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.parametrize("file", ["on_both_devices.py", "faults.py"])
def test_of_its_own(emulated, file):
    assert passed(emulated("-m", "pytest", "-q", ROOT / "tests" / "cuda" / file)) >= 7
