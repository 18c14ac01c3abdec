"""Every kernel: the same bits on every instruction set, and the right value by an independent oracle in float64."""

import math
from fractions import Fraction

import gguf
import numpy as np
import pytest
from gguf_factory import HALVES, QUANTIZED_TYPES, WEIGHT_TYPES, block_sizes, quantize, random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from fixmin_cpp import _core

ISAS = _core.system_info()["isas_supported"]
TABLES = [_core.Kernels(isa) for isa in ISAS]
LENGTHS = [1, 5, 15, 16, 17, 31, 33, 64, 192, 1000]


def on_every_isa(call):
    """call(kernels) on every ISA; asserts that all give the bytes of the scalar one, and returns its result."""
    results = [call(table) for table in TABLES]
    for isa, result in zip(ISAS, results, strict=True):
        assert bytes_of(result) == bytes_of(results[0]), f"{isa} differs from scalar"
    return results[0]


def bytes_of(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [np.asarray(part).tobytes() for part in parts]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def quantized_rows(rng, kind, rows, inner):
    """Random weights in the file's layout, uint8 [rows * row_bytes]."""
    return np.ascontiguousarray(quantize(normal(rng, rows, inner), kind)).view(np.uint8).reshape(-1)


def inner_for(kind, n_small):
    """A row length for a type: n_small, or three blocks of 256."""
    return 768 if block_sizes(kind)[0] == 256 else n_small


def dequantized(kind, data, rows, inner):
    return gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType[kind]).reshape(rows, inner)


def test_all_isas_of_this_cpu_are_tested():
    assert ISAS[0] == "scalar"
    assert set(ISAS) <= set(_core.system_info()["isas_built"])


def test_isa_that_does_not_exist():
    with pytest.raises(ValueError, match=r"unknown instruction set 'mmx'.*scalar"):
        _core.Kernels("mmx")


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_dequantize_equals_gguf_bit_for_bit(kind):
    rng = np.random.default_rng(1)
    inner = inner_for(kind, 96)
    inputs = [quantized_rows(rng, kind, 7, inner)]
    if kind in QUANTIZED_TYPES:
        n_blocks = 7 * inner // block_sizes(kind)[0]
        inputs += [random_blocks(kind, n_blocks, rng, spread).reshape(-1) for spread in (100.0, 60000.0, 1e-6)]
    for data in inputs:
        assert _core.dequantize(kind, data, 7, inner).tobytes() == dequantized(kind, data, 7, inner).tobytes()


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_weights_in_memory_are_hardly_larger_than_in_the_file(kind):
    block, size = block_sizes(kind)
    assert 1024 * 2048 // block * size <= _core.packed_bytes(kind, 1024, 2048) <= 1.04 * 1024 * 2048 // block * size


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_scales_that_are_not_finite_are_refused(kind, bad):
    for at in HALVES[kind]:
        blocks = random_blocks(kind, 5, np.random.default_rng(0))
        blocks[3, at : at + 2] = np.array([bad], np.float16).view(np.uint8)
        with pytest.raises(ValueError, match="not finite"):
            TABLES[0].matmul(kind, blocks.reshape(-1), 5, np.ones((1, block_sizes(kind)[0]), np.float32))


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_rows_must_be_whole_blocks(kind):
    block, size = block_sizes(kind)
    with pytest.raises(ValueError, match="multiple of the block"):
        _core.dequantize(kind, np.zeros(size, np.uint8), 1, block - 16)


def test_every_half_converts_exactly():
    halves = np.arange(65536, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    got = _core.dequantize("F16", halves.view(np.uint8), 1, halves.size)[0]
    assert got.tobytes() == halves.view(np.float16).astype(np.float32).tobytes()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e30]), st.integers(1, 5))
def test_quantize_activations(seed, size, n_blocks):
    x = normal(np.random.default_rng(seed), 32 * n_blocks) * np.float32(size)
    q, scale, total = on_every_isa(lambda k: k.quantize_activations(x))
    amax = np.abs(x.reshape(-1, 32)).max(1)
    assert np.array_equal(scale, amax / np.float32(127))
    expected = np.rint(x.reshape(-1, 32) * (np.float32(127) / amax)[:, None])
    assert np.array_equal(q.reshape(-1, 32), expected)
    assert np.array_equal(total, expected.sum(1))
    assert np.abs(q).max() == 127


def test_quantize_activations_of_nothing():
    x = np.zeros(64, np.float32)
    x[40] = 1e-38
    q, scale, total = on_every_isa(lambda k: k.quantize_activations(x))
    assert not q.any()
    assert not scale.any()
    assert not total.any()


# --- matrix products ---------------------------------------------------------------------------------------------


def rounded_activations(kind, x):
    """float64 [tokens, inner]: the activations as the products of a type see them."""
    if kind not in QUANTIZED_TYPES:
        return x.astype(np.float64)
    q, scale, _ = TABLES[0].quantize_activations(x.reshape(-1))
    return (q.reshape(-1, 32) * scale.astype(np.float64)[:, None]).reshape(x.shape)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize(
    ("rows", "tokens", "least"),
    [(1, 1, 160), (16, 3, 160), (40, 6, 160), (40, 13, 160), (16, 16, 32), (33, 27, 160), (100, 1, 160), (33, 70, 160)],
)
def test_matmul(kind, rows, tokens, least):
    rng = np.random.default_rng(rows * 100 + tokens)
    inner = inner_for(kind, least)
    data = quantized_rows(rng, kind, rows, inner)
    x, bias, residual = normal(rng, tokens, inner), normal(rng, rows), normal(rng, tokens, rows)
    got = on_every_isa(lambda k: k.matmul(kind, data, rows, x, bias, residual))
    w = dequantized(kind, data, rows, inner).astype(np.float64)
    expected = rounded_activations(kind, x) @ w.T + bias + residual
    assert np.abs(got - expected).max() <= 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
@pytest.mark.parametrize(("rows", "tokens"), [(16, 1), (37, 8), (37, 14)])
def test_matmul_of_any_bytes(kind, rows, tokens):
    rng = np.random.default_rng(rows)
    inner = inner_for(kind, 320)
    data = random_blocks(kind, rows * inner // block_sizes(kind)[0], rng).reshape(-1)
    x = normal(rng, tokens, inner)
    got = on_every_isa(lambda k: k.matmul(kind, data, rows, x))
    w, a = dequantized(kind, data, rows, inner).astype(np.float64), rounded_activations(kind, x)
    # Terms cancel, those of the scales and of the minima too: the bound is relative to what is added up.
    terms = np.abs(a) @ np.abs(w).T + np.abs(w).max() * np.abs(a).sum(1, keepdims=True)
    assert np.all(np.abs(got - a @ w.T) <= 3e-6 * terms)


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_a_term_is_rounded_only_by_its_fma(kind):
    """With powers of two as scales the contract of docs/numerics.md leaves no rounding at all."""
    rng = np.random.default_rng(7)
    block = block_sizes(kind)[0]
    blocks = random_blocks(kind, 16, rng)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
    x = rng.integers(-127, 128, (1, block)).astype(np.float32)
    x[0, ::32] = 127  # scale 1
    x[0, 32:] = 0  # one block of activations: one term, or two
    got = on_every_isa(lambda k: k.matmul(kind, blocks.reshape(-1), 16, x))
    w = dequantized(kind, blocks.reshape(-1), 16, block).astype(np.float64)
    assert np.array_equal(got, x.astype(np.float64) @ w.T)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_matmul_does_not_depend_on_the_batch(kind):
    rng = np.random.default_rng(5)
    inner = inner_for(kind, 64)
    data = quantized_rows(rng, kind, 48, inner)
    x = normal(rng, 29, inner)
    together = on_every_isa(lambda k: k.matmul(kind, data, 48, x))
    alone = np.concatenate([TABLES[-1].matmul(kind, data, 48, x[t : t + 1]) for t in range(29)])
    assert together.tobytes() == alone.tobytes()


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize("tokens", [1, 7, 16, 37, 43])
def test_matmul_in_parts_lays_the_tokens_out_once(kind, tokens):
    rng = np.random.default_rng(6)
    inner = inner_for(kind, 64)
    data = quantized_rows(rng, kind, 72, inner)
    x, bias, residual = normal(rng, tokens, inner), normal(rng, 72), normal(rng, tokens, 72)
    whole = TABLES[0].matmul(kind, data, 72, x, bias, residual)
    for panels in (1, 2):
        parts = on_every_isa(lambda k, n=panels: k.matmul(kind, data, 72, x, bias, residual, panels_per_call=n))
        assert parts.tobytes() == whole.tobytes()


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
@pytest.mark.parametrize("byte", [0x00, 0x0F, 0x1F, 0x7F, 0x80, 0xF0, 0xFF])
def test_extreme_quantised_values_do_not_saturate(kind, byte):
    """Codes, integer scales and minima all at an end; activations at theirs, with scale 1: sums are integers."""
    block, size = block_sizes(kind)
    data = np.full((16, size), byte, np.uint8)
    if kind == "Q6_K":
        data[8:, 192:208] = 0x80  # the most negative integer scale, -128
    for at in HALVES[kind]:
        data[:, at : at + 2] = np.array([1.0], np.float16).view(np.uint8)
    w = dequantized(kind, data.reshape(-1), 16, block).astype(np.float64)
    for signs in ([1], [-1], [1, -1], [1, 1, -1, -1, -1]):
        x = (127 * np.resize(signs, (1, block))).astype(np.float32)
        x[:, 32:] = 0
        got = on_every_isa(lambda k, x=x: k.matmul(kind, data.reshape(-1), 16, x))
        assert np.array_equal(got, x.astype(np.float64) @ w.T)


def test_matmul_of_the_float_types_is_a_chain_of_fma():
    """The contract of docs/numerics.md, with math done in exact rationals and rounded once per step."""
    rng = np.random.default_rng(2)
    w, x = normal(rng, 16, 40), normal(rng, 1, 40)
    got = on_every_isa(lambda k: k.matmul("F32", w.view(np.uint8).reshape(-1), 16, x))
    for row in range(16):
        acc = np.float32(0)
        for k in range(40):
            exact = Fraction(float(w[row, k])) * Fraction(float(x[0, k])) + Fraction(float(acc))
            acc = round_to_float32(exact)
        assert got[0, row] == acc


def round_to_float32(x):
    """Nearest float32, ties to even, of a Fraction in the normal range."""
    if x == 0:
        return np.float32(0)
    exponent = math.floor(math.log2(abs(x))) - 23
    if abs(x) < Fraction(2) ** (exponent + 23):  # log2 was rounded up
        exponent -= 1
    return np.float32(math.ldexp(round(x / Fraction(2) ** exponent), exponent))


# --- elementwise and norms ---------------------------------------------------------------------------------------


def test_exp():
    x = np.concatenate([np.linspace(-87, 88, 20001), [0, -0.0, -90, -1e30, -np.inf]]).astype(np.float32)
    got = on_every_isa(lambda k: k.unary("exp", x))
    inside = x > -87.3
    exact = np.exp(x[inside].astype(np.float64))
    assert np.abs(got[inside] / exact - 1).max() < 1.2e-7
    assert not got[~inside].any()


@pytest.mark.parametrize("n", LENGTHS)
def test_activations_against_float64(n):
    rng = np.random.default_rng(n)
    x, up = normal(rng, n) * 4, normal(rng, n)
    z = x.astype(np.float64)
    erf = np.vectorize(math.erf)
    gelu = 0.5 * z * (1 + erf(z / math.sqrt(2)))
    tanh = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    silu = z / (1 + np.exp(-z))
    bound = 2e-7 * (np.abs(z) + 1)
    assert np.all(np.abs(on_every_isa(lambda k: k.unary("gelu", x)) - gelu) < bound)
    assert np.all(np.abs(on_every_isa(lambda k: k.unary("gelu_tanh", x)) - tanh) < bound)
    assert np.all(np.abs(on_every_isa(lambda k: k.silu_mul(x, up)) - silu * up) < bound * (np.abs(up) + 1))


def test_activations_far_out():
    x = np.array([-1e30, -200, -40, 40, 200, 1e30], np.float32)
    for name in ("gelu", "gelu_tanh"):
        got = on_every_isa(lambda k, n=name: k.unary(n, x))
        np.testing.assert_allclose(got, np.maximum(x, 0), atol=1e-6)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_norm(n, rms, has_bias):
    rng = np.random.default_rng(n)
    x, weight, bias = normal(rng, n) + np.float32(3), normal(rng, n), normal(rng, n) if has_bias else None
    got = on_every_isa(lambda k: k.norm(x, weight, bias, 1e-5, rms))
    z = x.astype(np.float64)
    centred = z if rms else z - z.mean()
    expected = centred / np.sqrt((centred**2).mean() + 1e-5) * weight + (bias if has_bias else 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("dim", [2, 8, 32, 34, 64, 128])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dim, interleaved):
    rng = np.random.default_rng(dim)
    x, angle = normal(rng, dim + 6), rng.uniform(0, 6, dim // 2)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    got = on_every_isa(lambda k: k.rope(x, interleaved, cos, sin))
    pairs = x[:dim].astype(np.float64)
    z = pairs[0::2] + 1j * pairs[1::2] if interleaved else pairs[: dim // 2] + 1j * pairs[dim // 2 :]
    z = z * (cos.astype(np.float64) + 1j * sin)
    expected = x.astype(np.float64)
    if interleaved:
        expected[0:dim:2], expected[1:dim:2] = z.real, z.imag
    else:
        expected[: dim // 2], expected[dim // 2 : dim] = z.real, z.imag
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.array_equal(got[dim:], x[dim:])


# --- attention and softmax ---------------------------------------------------------------------------------------

KV_TYPES = ["f32", "f16", "q8_0"]
#: Sizes of the project's models and of common ones, then some that fill no vector and no block of 32.
HEAD_SIZES = [16, 32, 48, 64, 80, 96, 128, 7, 20, 100, 256]


def in_blocks(x):
    """[tokens, d] -> [tokens, blocks, 32], zeros behind d."""
    tokens, d = x.shape
    padded = np.zeros((tokens, -(-d // 32) * 32), np.float32)
    padded[:, :d] = x
    return padded.reshape(tokens, -1, 32)


def to_bfloat16(x):
    """Nearest, ties to even, as float32: by comparing with both neighbours."""
    low = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    high = (low.view(np.uint32) + 0x10000).view(np.float32)
    below, above = x.astype(np.float64) - low, high.astype(np.float64) - x
    odd = (low.view(np.uint32) >> 16) % 2 == 1
    return np.where((above < below) | ((above == below) & odd), high, low)


def kv_steps(x):
    """float32 [tokens, blocks, 1]: the distance of neighbouring values that a q8_0 cache has for [tokens, d]."""
    amax = np.abs(in_blocks(x)).max(-1, keepdims=True)
    return np.where(amax < 1e-30, np.float32(0), to_bfloat16(amax / np.float32(127)))


def stored(kv_type, x):
    """float64 [tokens, d]: keys or values as a cache of this type has them."""
    if kv_type != "q8_0":
        return x.astype(np.float16 if kv_type == "f16" else np.float32).astype(np.float64)
    step = kv_steps(x)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    codes = np.rint(in_blocks(x) * inverse)
    assert np.abs(codes).max() <= 127
    return (codes * step.astype(np.float64)).reshape(len(x), -1)[:, : x.shape[1]]


def seen_by_kernel(kv_type, q):
    """float64 [n, d]: a q8_0 cache is multiplied with queries of 8 bits."""
    if kv_type != "q8_0":
        return q.astype(np.float64)
    return rounded_activations("Q8_0", in_blocks(q).reshape(-1)).reshape(len(q), -1)[:, : q.shape[1]]


def attention_weights(q, k):
    """Softmax of the causal scores, float64 [n, tokens]; the queries are those of the last tokens."""
    scores = q @ k.T
    future = np.arange(len(k))[None, :] > (len(k) - len(q) + np.arange(len(q)))[:, None]
    scores[future] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def attention_case(d, tokens, queries):
    rng = np.random.default_rng(d + tokens)
    return normal(rng, queries, d) * np.float32(d**-0.5), normal(rng, tokens, d), normal(rng, tokens, d)


@pytest.mark.parametrize("d", HEAD_SIZES)
@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(
    ("tokens", "queries"), [(1, 1), (7, 7), (16, 1), (33, 20), (100, 1), (70, 70), (129, 2), (150, 140), (300, 1)]
)
def test_attention(d, kv_type, tokens, queries):
    q, k, v = attention_case(d, tokens, queries)
    got = on_every_isa(lambda table: table.attention(kv_type, q, k, v))
    expected = attention_weights(seen_by_kernel(kv_type, q), stored(kv_type, k)) @ stored(kv_type, v)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("d", [20, 32, 80, 128])
def test_attention_does_not_depend_on_the_chunk(kv_type, d):
    q, k, v = attention_case(d, 150, 150)
    together = on_every_isa(lambda table: table.attention(kv_type, q, k, v))
    for t in [*range(40), *range(120, 150)]:
        alone = TABLES[-1].attention(kv_type, q[t : t + 1], k[: t + 1], v[: t + 1])
        assert alone[0].tobytes() == together[t].tobytes()


@pytest.mark.parametrize("d", HEAD_SIZES)
def test_q8_0_cache_is_as_close_as_its_rounding_allows(d):
    """Scores move by at most δ, so weights by factors within exp(±2δ), and values by half a step."""
    tokens = 90
    q, k, v = attention_case(d, tokens, tokens)
    got = TABLES[-1].attention("q8_0", q, k, v)
    exact = attention_weights(q.astype(np.float64), k.astype(np.float64))
    # |q.k - q'.k'| <= sum |q| |k - k'| + |q - q'| |k'|, differences at most half a step, block by block.
    query_step = np.abs(in_blocks(q)).max(-1) / 127
    key_step = kv_steps(k)[..., 0]
    query_size, key_size = np.abs(in_blocks(q)).sum(-1), np.abs(in_blocks(stored("q8_0", k))).sum(-1)
    delta = (query_size @ key_step.T + query_step @ key_size.T) / 2
    delta = np.where(exact > 0, delta, 0).max(1, keepdims=True)
    bound = np.expm1(2 * delta) * (exact @ np.abs(v)) + np.repeat(kv_steps(v)[..., 0].max(0) / 2, 32)[:d]
    error = np.abs(got - exact @ v)
    assert np.all(error <= bound + 2e-6)
    assert error.max() > 1e-4  # it is 8 bits that were stored


@pytest.mark.parametrize("size", [1e-37, 0.9e-30, 1.1e-30, 1e-20, 1e-6, 1.0, 7e4, 1e9, 1e38])
def test_q8_0_cache_at_any_magnitude(size):
    """With one key its weight is 1, and what comes back is what was stored, without rounding."""
    rng = np.random.default_rng(11)
    v = (rng.uniform(-1, 1, (200, 48)) * size).astype(np.float32)
    v[0] = 0
    v[1, 1:] = 0
    v[2] = size  # all at the largest code
    for row in v:
        got = on_every_isa(lambda table, x=row[None]: table.attention("q8_0", np.ones_like(x), np.zeros_like(x), x))
        assert np.array_equal(got, stored("q8_0", row[None]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", range(48))
def test_q8_0_cache_does_not_hide_what_is_not_finite(bad, at):
    q, k, v = attention_case(48, 40, 40)
    for table in TABLES:
        for spoiled, lost in ((k, slice(0, 48)), (v, slice(0, 32) if at < 32 else slice(32, 48))):
            before = spoiled[5, at]
            spoiled[5, at] = bad
            out = table.attention("q8_0", q, k, v)
            spoiled[5, at] = before
            assert np.isfinite(out[:5]).all()
            assert np.isnan(out[5:, lost]).all()
            assert np.isfinite(np.delete(out, np.arange(48)[lost], axis=1)).all()


def test_attention_refuses_other_cache_types():
    x = np.ones((1, 16), np.float32)
    with pytest.raises(ValueError, match=r"kv_type is 'q4_0'; known: f32, f16, q8_0"):
        TABLES[0].attention("q4_0", x, x, x)


@pytest.mark.parametrize("n", [*LENGTHS, 1023, 1024, 1025, 5000])
def test_argmax(n):
    rng = np.random.default_rng(n)
    x = rng.integers(-9, 9, n).astype(np.float32)  # many equal ones: the first counts
    assert on_every_isa(lambda k: k.argmax(x)) == x.argmax()
    below = -np.abs(normal(rng, n)) - 1  # padding with zeros would win
    assert on_every_isa(lambda k: k.argmax(below)) == below.argmax()
    below[rng.integers(n)] = -np.inf
    if n > 1:
        assert on_every_isa(lambda k: k.argmax(below)) == below.argmax()
    for at in {0, n // 2, n - 1}:
        for bad in (np.nan, np.inf):
            spoiled = x.copy()
            spoiled[at] = bad
            assert on_every_isa(lambda k, y=spoiled: k.argmax(y)) is None


@pytest.mark.parametrize("n", LENGTHS)
def test_softmax_stats(n):
    x = normal(np.random.default_rng(n), n) * 10
    highest, total = on_every_isa(lambda k: k.softmax_stats(x))
    assert highest == x.max()
    assert total == pytest.approx(np.exp(x.astype(np.float64) - x.max()).sum(), rel=1e-6)
