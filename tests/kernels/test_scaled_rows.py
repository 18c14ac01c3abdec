"""W8A8, rows with one scale: exact integers, and the same bits on every instruction set. Oracle: NumPy, int64."""

import numpy as np
import pytest

from fixmin_cpp import _core

ISAS = _core.system_info()["isas_supported"]
TABLES = [_core.Kernels(isa) for isa in ISAS]


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32(a * b + c) rounded once: the product of two float32 is exact in float64's extended form (longdouble)."""
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


def in_bytes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q [T, inner] and scale [T] of docs/numerics.md."""
    amax = np.abs(x).max(1)
    empty = amax < 1e-30
    with np.errstate(divide="ignore"):
        inverse = np.where(empty, np.float32(0), np.float32(127) / amax)
    return np.rint(x * inverse[:, None]).astype(np.int64), np.where(empty, np.float32(0), amax / np.float32(127))


def stored(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows of codes, each with its scale behind it."""
    return np.concatenate([codes.view(np.uint8), scales.astype(np.float32)[:, None].view(np.uint8)], axis=1).reshape(-1)


def on_every_isa(call):
    results = [call(table) for table in TABLES]
    for isa, result in zip(ISAS, results, strict=True):
        assert result.tobytes() == results[0].tobytes(), f"{isa} differs from scalar"
    return results[0]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("rows", "tokens", "inner"),
    [
        *(
            (1, 1, 32),
            (16, 1, 1024),
            (40, 6, 160),
            (17, 13, 96),
            (33, 70, 64),
            (100, 2, 2048),
            (48, 49, 32),
            (16, 3, 8192),
        ),
        *((17, 5, 128), (20, 8, 64), (50, 31, 96), (16, 17, 128), (90, 66, 512), (700, 100, 1024)),
    ],
)
def test_matmul(rows, tokens, inner, with_bias, with_residual):
    rng = np.random.default_rng(rows * 100 + tokens)
    codes = rng.integers(-127, 128, (rows, inner)).astype(np.int8)
    scales = rng.uniform(1e-3, 2, rows).astype(np.float32)
    x = rng.standard_normal((tokens, inner)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32) if with_bias else None
    residual = rng.standard_normal((tokens, rows)).astype(np.float32) if with_residual else None
    got = on_every_isa(lambda k: k.matmul("W8A8", stored(codes, scales), rows, x, bias, residual))
    q, a_scale = in_bytes(x)
    sums = (q @ codes.T.astype(np.int64)).astype(np.float32)
    expected = fma(sums, scales * a_scale[:, None], np.zeros(rows, np.float32) if bias is None else bias)
    if residual is not None:
        expected = residual + expected
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("inner", [66_304, 132_992])
def test_the_longest_rows_do_not_overflow(inner):
    """With codes and activations at their ends the sum is the largest there is."""
    codes = np.full((3, inner), 127, np.int8)
    codes[1] = -127
    x = np.ones((2, inner), np.float32)
    x[1] = -1
    got = on_every_isa(lambda k: k.matmul("W8A8", stored(codes, np.ones(3)), 3, x))
    sums = np.float32(127 * 127 * inner) * np.array([[1, -1, 1], [-1, 1, -1]], np.float32)
    assert np.array_equal(got, sums * (np.float32(1) / np.float32(127)))


def test_rows_in_bytes():
    rng = np.random.default_rng(0)
    for size in (1e-20, 1.0, 1e30):
        x = (rng.standard_normal(96) * size).astype(np.float32)
        q, scale, total = TABLES[0].quantize_row(x)
        expected, a_scale = in_bytes(x[None])
        assert np.array_equal(q[:96], expected[0])
        assert not q[96:].any()  # up to whole lines of 64 bytes
        assert np.abs(q).max() == 127
        assert scale == a_scale[0]
        assert total == q.astype(int).sum()
        for table in TABLES[1:]:
            others = table.quantize_row(x)
            assert np.array_equal(q, others[0])
            assert (scale, total) == others[1:]


@pytest.mark.parametrize("value", [0.0, 1e-38])
def test_a_row_of_nothing_is_zero(value):
    x = np.full((2, 64), value, np.float32)
    bias = np.array([1.5, -2], np.float32)
    got = on_every_isa(lambda k: k.matmul("W8A8", stored(np.ones((2, 64), np.int8), np.ones(2)), 2, x, bias))
    assert np.array_equal(got, [bias, bias])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 33, 63])
def test_a_row_with_a_value_that_is_not_finite_gives_nan(bad, at):
    x = np.ones((3, 64), np.float32)
    x[1, at] = bad
    for table in TABLES:
        got = table.matmul("W8A8", stored(np.ones((20, 64), np.int8), np.ones(20)), 20, x)
        assert np.isnan(got[1]).all()
        assert np.isfinite(got[[0, 2]]).all()


def test_what_is_refused():
    codes = np.ones((5, 64), np.int8)
    for bad in (np.nan, np.inf):
        scales = np.ones(5)
        scales[3] = bad
        with pytest.raises(ValueError, match="not finite"):
            TABLES[0].matmul("W8A8", stored(codes, scales), 5, np.ones((1, 64), np.float32))
    codes[4, 63] = -128
    with pytest.raises(ValueError, match="not finite"):
        TABLES[0].matmul("W8A8", stored(codes, np.ones(5)), 5, np.ones((1, 64), np.float32))


def test_dequantize():
    rng = np.random.default_rng(3)
    codes = rng.integers(-127, 128, (7, 96)).astype(np.int8)
    scales = np.abs(rng.standard_normal(7)).astype(np.float32)
    got = _core.dequantize("W8A8", stored(codes, scales), 7, 96)
    assert np.array_equal(got, codes.astype(np.float32) * scales[:, None])


def test_bytes_in_memory():
    assert _core.packed_bytes("W8A8", 1024, 2048) == 1024 * (2048 + 4)
