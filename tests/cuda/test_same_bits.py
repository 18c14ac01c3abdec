"""Models on the emulated GPU: the bits of the CPU, whatever the order of the threads."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # it compiles the package

BITS = Path(__file__).with_name("bits.py")


@pytest.mark.parametrize("seed", [0, 1, 2])  # 0: threads and blocks in turn
def test_every_kind_of_model(emulated, tmp_path, seed):
    done = emulated(BITS, tmp_path, FIXMIN_SIMT_SEED=str(seed))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 2 * 3 * 26
    differ = [
        f"{name}, {how}" for name, one in found.items() for how, bits in one["cuda"].items() if bits != one["cpu"]
    ]
    assert differ == []
    # Types and options show in the logits: else this would compare nothing.
    assert len({one["cpu"] for one in found.values()}) == len(found)
