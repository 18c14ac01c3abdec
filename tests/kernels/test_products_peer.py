"""Products of quantised weights against gguf.quants: any shape, any blocks, activations of any size.

The peer: weights by gguf.quants.dequantize, activations rounded as docs/numerics.md says (written here in NumPy), and
their product in float64. The bound is what the roundings of docs/numerics.md can add up to, not what was measured.
"""

from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from gguf_factory import FLOAT_TYPES, HALVES, QUANTIZED_TYPES, WEIGHT_TYPES, block_sizes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fixmin_cpp import _core

ISAS = _core.system_info()["isas_supported"]
TABLES = [_core.Kernels(isa) for isa in ISAS]

U = 2.0**-24  # the relative error of a rounding to float32
TINY = 2.0**-150  # and the absolute one where the result is a denormal number
LARGEST = float(np.finfo(np.float32).max)
EMPTY = np.float32(1e-30)  # blocks of activations below it are zero

#: Where the codes of a type with minima stand in a block: all zero, the minimum alone is left.
CODES = {
    "Q4_1": slice(4, 20),
    "Q5_1": slice(4, 24),
    "Q2_K": slice(16, 80),
    "Q4_K": slice(16, 144),
    "Q5_K": slice(16, 176),
}
#: Scales and minima in binary16: none, the smallest denormal and normal numbers, usual and the largest ones.
SCALES = [0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 1e-3, -1e-3, 0.02, -0.5, 1.0, 300.0, -65504.0, 65504.0]


@dataclass(frozen=True)
class Case:
    """What a product is asked for."""

    rows: int
    n_blocks: int
    tokens: int
    seed: int
    scales: tuple[float, ...]  # some of SCALES
    sizes: tuple[float, ...]  # of activations, block by block
    empty_rows: bool  # zeros among rows and tokens

    def __str__(self) -> str:
        return f"{self.rows}x{self.n_blocks} blocks, {self.tokens} tokens"


SIZES = [0.0, 1e-44, 1e-39, 9.9e-31, 1.01e-30, 1e-20, 1e-3, 1.0, 50.0, 1e6, 1e20]
cases = st.builds(
    Case,
    rows=st.one_of(st.integers(1, 70), st.sampled_from([1, 15, 16, 17, 32, 48, 64])),
    n_blocks=st.integers(1, 5),
    tokens=st.one_of(st.just(1), st.integers(2, 9), st.integers(10, 70)),
    seed=st.integers(0, 2**32 - 1),
    scales=st.lists(st.sampled_from(SCALES), min_size=1, max_size=4).map(tuple),
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4).map(tuple),
    empty_rows=st.booleans(),
)


def weights(kind: str, case: Case, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, row bytes]: any bytes, with scales of the case."""
    n_blocks = case.rows * case.n_blocks
    blocks = rng.integers(0, 256, (n_blocks, block_sizes(kind)[1]), dtype=np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = rng.choice(case.scales, (n_blocks, 1)).astype(np.float16).view(np.uint8)
    data = blocks.reshape(case.rows, -1)
    if case.empty_rows:
        data[:: max(2, case.rows // 3)] = 0
    return data


def float_weights(kind: str, case: Case, rng: np.random.Generator) -> np.ndarray:
    """The same of a type without blocks: also denormal numbers of that type."""
    inner = 32 * case.n_blocks
    sizes = np.clip(np.abs(case.scales), 0, 6e4).astype(np.float32)
    w = rng.uniform(-1, 1, (case.rows, inner)).astype(np.float32) * rng.choice(sizes, (case.rows, inner))
    w[:: max(2, case.rows // 3)] *= np.float32(2.0**-130 if kind != "F16" else 2.0**-12)
    if case.empty_rows:
        w[-1] = 0
    return gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind]).view(np.uint8).reshape(case.rows, -1)


def activations(case: Case, inner: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((case.tokens, inner // 32, 32)).astype(np.float32)
    x *= rng.choice(np.array(case.sizes, np.float32), (case.tokens, inner // 32, 1))
    x = x.reshape(case.tokens, inner)
    if case.empty_rows:
        x[:: max(2, case.tokens // 2)] = 0
    return x


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of activations, float64 [tokens, inner] each: docs/numerics.md, "Activations"."""
    blocks = x.reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        codes = np.where(amax < EMPTY, np.float32(0), np.rint(blocks * (np.float32(127) / amax)))
    scales = np.where(amax < EMPTY, np.float32(0), amax / np.float32(127))
    return tuple(np.broadcast_to(part, blocks.shape).reshape(x.shape).astype(np.float64) for part in (codes, scales))


def dequantized(kind: str, data: np.ndarray) -> np.ndarray:
    """float64 [rows, inner], by the peer."""
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float64)


def parts(kind: str, data: np.ndarray) -> np.ndarray:
    """float64 [rows, inner]: |what a code is multiplied by| + |minimum|, of which a weight is the rounded sum."""
    whole = dequantized(kind, data)
    if kind not in CODES:
        return np.abs(whole)
    blocks = data.reshape(-1, block_sizes(kind)[1]).copy()
    blocks[:, CODES[kind]] = 0
    minima = dequantized(kind, blocks.reshape(data.shape))
    return np.abs(whole - minima) + np.abs(minima)


def on_every_isa(call):
    results = [call(table) for table in TABLES]
    for isa, result in zip(ISAS, results, strict=True):
        assert result.tobytes() == results[0].tobytes(), f"{isa} differs from scalar"
    return results[0]


def check(got: np.ndarray, exact: np.ndarray, bound: np.ndarray, sizes: np.ndarray) -> None:
    """`sizes`: of all that is added up. Where it could leave float32 nothing is asked."""
    inside = sizes < LARGEST / 2
    assert np.isfinite(got[inside]).all()
    error = np.abs(got - exact)
    worst = np.where(inside & (error > bound))
    assert not worst[0].size, (got[worst][:3], exact[worst][:3], bound[worst][:3])


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases)
# Tiles of AMX are 16 rows and 16 tokens; what is left over goes other ways.
@example(case=Case(33, 3, 33, 1, (0.02,), (1.0,), False))
@example(case=Case(64, 4, 64, 2, (65504.0, 2.0**-24), (1e20, 1.01e-30), True))
def test_products_are_those_of_gguf(kind, case):
    rng = np.random.default_rng(case.seed)
    data = weights(kind, case, rng)
    inner = case.n_blocks * block_sizes(kind)[0]
    x = activations(case, inner, rng)
    got = on_every_isa(lambda k: k.matmul(kind, data.reshape(-1), case.rows, x))
    w, pieces = dequantized(kind, data), parts(kind, data)
    codes, scales = rounded(x)
    exact = (codes * scales) @ w.T
    # Of a block of 32: the peer's weights were rounded twice, the factor in front of its sum once or twice, and each of
    # its one or two fma rounds a sum that is no larger than all that is added up. A factor below float32's normal
    # numbers is wrong by TINY, times the largest sum of a block.
    n_fma = inner // 32 * 2
    sizes = np.abs(codes * scales) @ pieces.T
    bound = (n_fma + 8) * U * sizes + n_fma * TINY * 2.0**25
    check(got, exact, bound, sizes)


@pytest.mark.parametrize("kind", FLOAT_TYPES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases)
def test_products_of_floats(kind, case):
    rng = np.random.default_rng(case.seed)
    data = float_weights(kind, case, rng)
    x = activations(case, 32 * case.n_blocks, rng)
    got = on_every_isa(lambda k: k.matmul(kind, data.reshape(-1), case.rows, x))
    w, a = dequantized(kind, data), x.astype(np.float64)
    sizes = np.abs(a) @ np.abs(w).T
    check(got, a @ w.T, (a.shape[1] + 1) * (U * sizes + TINY), sizes)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases)
def test_bias_and_residual_are_added(kind, case):
    """After the product: each is one rounding of a sum."""
    rng = np.random.default_rng(case.seed)
    data = (float_weights if kind in FLOAT_TYPES else weights)(kind, case, rng)
    inner = case.n_blocks * (32 if kind in FLOAT_TYPES else block_sizes(kind)[0])
    x = activations(case, inner, rng)
    bias = rng.standard_normal(case.rows).astype(np.float32)
    residual = (rng.standard_normal((case.tokens, case.rows)) * 10).astype(np.float32)
    plain = on_every_isa(lambda k: k.matmul(kind, data.reshape(-1), case.rows, x)).astype(np.float64)
    both = on_every_isa(lambda k: k.matmul(kind, data.reshape(-1), case.rows, x, bias, residual))
    sizes = np.abs(plain) + np.abs(bias) + np.abs(residual)
    check(both, plain + bias + residual, 4 * U * sizes, sizes)


@pytest.mark.parametrize("kind", CODES)
def test_without_codes_the_minimum_is_left(kind):
    """What `parts` relies on: a weight minus that is its code times a factor, and grows with the code."""
    block, size = block_sizes(kind)
    blocks = np.zeros((3, size), np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
    if block == 256:
        blocks[:, 4:16] = 0x11
        if kind == "Q2_K":
            blocks[:, :16] = 0x11
    blocks[1, CODES[kind]] = 0x11
    blocks[2, CODES[kind]] = 0xFF
    none, some, all_of_them = dequantized(kind, blocks)
    assert np.ptp(none.reshape(-1, 16), axis=1).max() == 0
    assert none.all()
    assert np.all(some - none >= 0)
    assert np.all(all_of_them - none >= (some - none))
    assert np.all(all_of_them > none)
