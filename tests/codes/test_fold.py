"""The layer-0 fold against norm and projection in float64 NumPy, which know nothing of codes."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixmin_cpp._core import FoldBuilder, lift_codes

# K + 2 float32 terms per output, each rounded once, and as many roundings in their sum.
TOLERANCE = 2e-6


def expected(x, weight, bias, norm_weight, norm_bias, eps, rms):
    """x [T, D] -> [T, M] float64."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    if not rms:
        x = x - x.mean(axis=1, keepdims=True)
    h = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * norm_weight
    if norm_bias is not None:
        h = h + norm_bias
    return h @ weight.T + (0.0 if bias is None else bias)


def random_layer(rng, rows, length, *, bias, norm_bias):
    def vector(n, mean=0.0):
        return (mean + 0.3 * rng.standard_normal(n)).astype(np.float32)

    return {
        "weight": (rng.standard_normal((rows, length)) / np.sqrt(length)).astype(np.float32),
        "bias": vector(rows) if bias else None,
        "norm_weight": vector(length, 1.0),
        "norm_bias": vector(length) if norm_bias else None,
    }


def all_codes(width, rng, limit=64):
    """The constant codes and random ones, [T, K]."""
    random_codes = rng.integers(0, 2, (limit, width), dtype=np.uint8)
    return np.concatenate([np.zeros((1, width), np.uint8), np.ones((1, width), np.uint8), random_codes])


def folded(weight, bias, **norm_and_code):
    builder = FoldBuilder(len(weight), **norm_and_code)
    builder.add_rows(0, weight, bias)
    return builder.finish()


def check(layer, width, lift, values, *, rms, eps, rng, tolerance=TOLERANCE):
    fold = folded(**layer, eps=eps, rms=rms, width=width, lift=lift, values=values)
    codes = all_codes(width, rng)
    y = fold.apply(codes)
    x = lift_codes(codes, layer["weight"].shape[1], lift, values)
    y_expected = expected(x, **layer, eps=eps, rms=rms)
    assert y.dtype == np.float32
    assert y.shape == y_expected.shape
    # Per token, against the typical length of a row: a constant code is normalised to (almost) nothing.
    error = np.linalg.norm(y - y_expected, axis=1)
    scale = np.sqrt(np.mean(np.sum(y_expected**2, axis=1)))
    assert error.max() <= tolerance * scale


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 20),
    repeats=st.integers(2, 12),
    extra=st.integers(0, 19),
    rows=st.integers(1, 40),
    lift=st.sampled_from(["tile", "interleave"]),
    values=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (0.0, 0.25), (-3.0, 5.0)]),
    rms=st.booleans(),
    bias=st.booleans(),
    norm_bias=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 1e-3]),
)
def test_fold_agrees_with_float64(seed, width, repeats, extra, rows, lift, values, rms, bias, norm_bias, eps):
    rng = np.random.default_rng(seed)
    length = width * repeats + (extra % width if lift == "tile" else 0)
    layer = random_layer(rng, rows, length, bias=bias, norm_bias=norm_bias and not rms)
    check(layer, width, lift, values, rms=rms, eps=eps, rng=rng)


@pytest.mark.parametrize("lift", ["tile", "interleave"])
@pytest.mark.parametrize("rms", [False, True])
def test_fold_at_full_width(lift, rms):
    rng = np.random.default_rng(7)
    layer = random_layer(rng, 256, 1024, bias=False, norm_bias=not rms)
    check(layer, 16, lift, (0.0, 1.0), rms=rms, eps=1e-5, rng=rng, tolerance=5e-7)


def test_offset_values_lose_nothing_under_layernorm():
    # Only v1 - v0 matters; a float32 norm of 1000 and 1001 would be off by 1e-4.
    rng = np.random.default_rng(8)
    layer = random_layer(rng, 64, 192, bias=True, norm_bias=True)
    check(layer, 12, "tile", (1000.0, 1001.0), rms=False, eps=1e-5, rng=rng)


@pytest.mark.parametrize(("values", "rms"), [((0.0, 1.0), False), ((-1.0, 1.0), False), ((0.0, 1.0), True)])
def test_constant_code_gives_exactly_the_constant(values, rms):
    # norm1 of a constant x is its bias; 1/sqrt(eps) = 316 must not magnify what is left of S - sum of F.
    rng = np.random.default_rng(9)
    layer = random_layer(rng, 64, 100, bias=True, norm_bias=not rms)
    fold = folded(**layer, eps=1e-5, rms=rms, width=7, lift="tile", values=values)
    constant = layer["bias"].astype(np.float64)
    if not rms:
        constant = constant + layer["weight"].astype(np.float64) @ layer["norm_bias"].astype(np.float64)
    code = np.zeros((1, 7), np.uint8)
    np.testing.assert_array_equal(fold.apply(code)[0], constant.astype(np.float32))
    if not rms:
        np.testing.assert_array_equal(fold.apply(code + 1)[0], constant.astype(np.float32))


def test_eps_zero_is_allowed():
    layer = random_layer(np.random.default_rng(10), 8, 16, bias=False, norm_bias=False)
    fold = folded(**layer, eps=0.0, rms=False, width=4, lift="tile", values=(0.0, 1.0))
    assert np.isfinite(fold.apply(all_codes(4, np.random.default_rng(0)))).all()


def test_strided_arguments():
    rng = np.random.default_rng(11)
    layer = random_layer(rng, 12, 32, bias=True, norm_bias=True)
    options = {"eps": 1e-5, "rms": False, "width": 4, "lift": "interleave", "values": (0.0, 1.0)}
    codes = all_codes(4, rng)
    strided = {
        "weight": np.asfortranarray(layer["weight"]),
        **{name: np.repeat(layer[name], 2)[::2] for name in ("bias", "norm_weight", "norm_bias")},
    }
    np.testing.assert_array_equal(
        folded(**strided, **options).apply(np.asfortranarray(codes)),
        folded(**layer, **options).apply(codes),
    )


def test_apply_is_the_documented_float32_chain():
    """What SIMD kernels repeat with the same bits: shift * S, + column j in order, one fma at the end."""
    rng = np.random.default_rng(12)
    layer = random_layer(rng, 50, 100, bias=True, norm_bias=True)
    fold = folded(**layer, eps=1e-5, rms=False, width=7, lift="tile", values=(-0.5, 1.5))
    assert fold.columns.shape == (7, 50)
    assert fold.sum.shape == fold.constant.shape == (50,)
    codes = all_codes(7, rng)
    scales, y = fold.scales(codes), fold.apply(codes)
    assert scales.dtype == fold.columns.dtype == np.float32
    for code, (shift, rstd), row in zip(codes, scales, y, strict=True):
        acc = shift * fold.sum
        for j in np.flatnonzero(code):
            acc = acc + fold.columns[j]
        exact = [
            Fraction(float(a)) * Fraction(float(rstd)) + Fraction(float(c))
            for a, c in zip(acc, fold.constant, strict=True)
        ]
        np.testing.assert_array_equal(row, [round_to_float32(value) for value in exact])


def round_to_float32(value):
    """The float32 nearest to a Fraction, ties to even (np.float32(float(value)) would round twice)."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1))


def test_columns_are_the_definition_rounded_once():
    rng = np.random.default_rng(13)
    layer = random_layer(rng, 9, 23, bias=True, norm_bias=True)
    fold = folded(**layer, eps=1e-5, rms=False, width=5, lift="tile", values=(1.0, 3.0))
    weight, gamma, beta, bias = (layer[k].astype(np.float64) for k in ("weight", "norm_weight", "norm_bias", "bias"))
    for j in range(5):
        np.testing.assert_array_equal(fold.columns[j], (2.0 * (weight * gamma)[:, j::5].sum(axis=1)).astype(np.float32))
    np.testing.assert_allclose(fold.sum, (weight * gamma).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(fold.constant, weight @ beta + bias, rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_builder_in_blocks_gives_the_same_bits(bias):
    rng = np.random.default_rng(14)
    layer = random_layer(rng, 20, 48, bias=bias, norm_bias=True)
    norm = {"norm_weight": layer["norm_weight"], "norm_bias": layer["norm_bias"], "eps": 1e-5, "rms": False}
    code = {"width": 6, "lift": "interleave", "values": (0.0, 1.0)}
    builder = FoldBuilder(20, **norm, **code)
    for begin, end in ((7, 20), (0, 3), (3, 3), (3, 7)):
        builder.add_rows(begin, layer["weight"][begin:end], layer["bias"][begin:end] if bias and begin < end else None)
    whole = folded(**layer, eps=1e-5, rms=False, **code)
    codes = all_codes(6, rng)
    np.testing.assert_array_equal(builder.finish().apply(codes), whole.apply(codes))


def test_builder_refuses_missing_repeated_and_foreign_rows():
    def make():
        return FoldBuilder(4, np.ones(6, np.float32), None, eps=1e-5, rms=True, width=3, lift="tile", values=(0.0, 1.0))

    rows = np.ones((2, 6), np.float32)
    builder = make()
    builder.add_rows(0, rows, None)
    with pytest.raises(ValueError, match="row 2 was never added"):
        builder.finish()
    with pytest.raises(ValueError, match="row 1 was added twice"):
        builder.add_rows(1, rows, None)
    builder.add_rows(2, rows, None)  # the call that was refused has added none of its rows
    builder.finish()
    for begin in (3, 5, 2**32 - 1):
        with pytest.raises(ValueError, match="lie outside the 4 rows"):
            make().add_rows(begin, rows, None)
    with pytest.raises(ValueError, match="weight must have 6 columns, got 5"):
        make().add_rows(0, rows[:, :5], None)
    with pytest.raises(ValueError, match="bias must have 2 elements, got 3"):
        make().add_rows(0, rows, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="at least one row"):
        FoldBuilder(0, np.ones(6, np.float32), None, eps=1e-5, rms=True, width=3, lift="tile", values=(0.0, 1.0))


GOOD = {
    "weight": np.ones((3, 8), np.float32),
    "bias": np.ones(3, np.float32),
    "norm_weight": np.ones(8, np.float32),
    "norm_bias": np.ones(8, np.float32),
    "eps": 1e-5,
    "rms": False,
    "width": 4,
    "lift": "tile",
    "values": (0.0, 1.0),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones(8, np.float32)}, "weight must have 2 dimensions"),
        ({"weight": np.ones((3, 8))}, "weight must have dtype float32, got float64"),
        ({"weight": np.ones((0, 8), np.float32)}, "at least one row"),
        ({"weight": np.ones((3, 7), np.float32)}, "weight must have 8 columns, got 7"),
        ({"bias": np.ones(4, np.float32)}, "bias must have 3 elements, got 4"),
        ({"bias": np.ones(0, np.float32)}, "bias is empty"),
        ({"bias": np.ones((3, 1), np.float32)}, "bias must have 1 dimension"),
        ({"norm_weight": np.ones(7, np.float32)}, "norm bias must have 7 elements, got 8"),
        ({"norm_bias": np.ones(9, np.float32)}, "norm bias must have 8 elements, got 9"),
        ({"norm_bias": np.ones(8, np.float16)}, "norm_bias must have dtype float32, got float16"),
        ({"rms": True}, "rmsnorm has no bias"),
        ({"eps": -1e-5}, "eps must be finite and not negative"),
        ({"eps": np.nan}, "eps must be finite"),
        ({"width": 9}, "embedding_length 8 is smaller than the code width 9"),
        ({"width": 0}, "width must be 1..32, got 0"),
        ({"width": 3, "lift": "interleave"}, "multiple of the code width"),
        ({"lift": "stack"}, "lift must be"),
        ({"values": (0.0, np.inf)}, "values must be finite"),
    ],
)
def test_bad_arguments(change, message):
    folded(**GOOD)
    with pytest.raises(ValueError, match=message):
        folded(**(GOOD | change))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((1, 5), np.uint8), "codes must have 4 columns, got 5"),
        (np.zeros(4, np.uint8), "codes must have 2 dimensions"),
        (np.zeros((1, 4), np.int32), "codes must have dtype uint8"),
        (np.full((2, 4), 9, np.uint8), "row 0: code bits must be 0 or 1, got 9"),
    ],
)
def test_bad_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        folded(**GOOD).apply(codes)
