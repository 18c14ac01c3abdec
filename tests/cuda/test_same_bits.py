"""Models on the emulated GPU: the bits of the CPU, whatever the order of the threads."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # it compiles the package

BITS = Path(__file__).with_name("bits.py")
WIDE = ("q8_0", "q4_0", "q4_k", "q6_k", "w8a8")  # has_wide_tiles in csrc/cuda/args.h


# Of the orders of threads; in turn, which is seed 0, single kernels run (test_single_kernels.py).
@pytest.mark.parametrize(("seed", "step"), [("1", "graph"), ("2", "persistent")])
def test_every_kind_of_model(emulated, tmp_path, seed, step):
    done = emulated(BITS, tmp_path, FIXMIN_SIMT_SEED=seed, FIXMIN_CUDA_STEP=step)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)
    found = printed["models"]
    assert len(found) >= 2 * 3 * 29 + 16
    differ = [
        f"{name}, {how}" for name, one in found.items() for how, bits in one["cuda"].items() if bits != one["cpu"]
    ]
    assert differ == []
    # Types and options show in the logits: else this would compare nothing.
    assert len({one["cpu"] for one in found.values()}) == len(found)
    # Every kernel of products ran (-1: there is none of this name).
    ran = {name for name, n in printed["launches"].items() if n > 0}
    assert {name for name in ran if "wide" in name} == {f"many_{kind}, wide" for kind in WIDE}
    assert len([name for name in ran if "wide" not in name]) == 13 * 2 + 3


def test_a_token_reads_the_weights_once(emulated, tmp_path):
    done = emulated(Path(__file__).with_name("weight_reads.py"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(found)
    for read, matrices in found.values():
        # Not those of layer 0 that the fold stands for.
        assert 0.8 * matrices < read <= 1.03 * matrices
