"""csrc/numerics/elementary.inl compiled for one lane, as a device does, gives the bits of the 16 lanes of a CPU."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fixmin_cpp import _core

ROOT = Path(__file__).resolve().parents[2]
SCALAR = _core.Kernels("scalar")


@pytest.fixture(scope="module")
def one_lane(tmp_path_factory):
    """one_lane(function, float32 arrays...) -> float32"""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("one-lane") / "one_lane"
    source = Path(__file__).with_name("one_lane.cpp")
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    subprocess.run(["g++", *options, f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)

    def run(function, *arrays):
        given = b"".join(np.asarray(a, np.float32).tobytes() for a in arrays)
        answer = subprocess.run([program, function], input=given, capture_output=True, check=True).stdout
        return np.frombuffer(answer, np.float32)

    return run


def bits(x):
    """All NaN are one value: which of them comes out is not promised (docs/numerics.md)."""
    return np.where(np.isnan(x), np.float32(np.nan), x).astype(np.float32).tobytes()


def all_kinds_of_floats():
    """Every 4,099th float: all exponents, both signs, subnormals, infinities, NaN."""
    return np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        ("gelu", lambda x: SCALAR.unary("gelu", x)),
        ("gelu_tanh", lambda x: SCALAR.unary("gelu_tanh", x)),
        ("silu", lambda x: SCALAR.silu_mul(x, np.ones_like(x))),
    ],
)
def test_activations(one_lane, function, kernel):
    x = all_kinds_of_floats()
    assert bits(one_lane(function, x)) == bits(kernel(x))


def test_norm(one_lane):
    rng = np.random.default_rng(1)
    for scale in (1e-4, 1, 1e4):
        x, weight, bias = (rng.standard_normal((3, 192)) * scale).astype(np.float32)
        assert bits(one_lane("norm", x, weight, bias)) == bits(SCALAR.norm(x, weight, bias, 1e-5, rms=False))


def test_rope(one_lane):
    rng = np.random.default_rng(2)
    x, angle = rng.standard_normal(64).astype(np.float32), rng.uniform(0, 7, 32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    expected = SCALAR.rope(x, False, cos, sin)
    assert bits(one_lane("rope", x, cos, sin)) == bits(expected)
    pairs = np.stack([x[:32], x[32:]], axis=1).reshape(-1)  # the same pairs, as the interleaved style has them
    turned = SCALAR.rope(pairs, True, cos, sin).reshape(32, 2)
    assert bits(np.concatenate([turned[:, 0], turned[:, 1]])) == bits(expected)
