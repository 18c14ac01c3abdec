"""The lift against its definition, element by element."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixmin_cpp._core import lift_codes

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    width=st.integers(1, 32),
    repeats=st.integers(1, 9),
    extra=st.integers(0, 31),
    lift=st.sampled_from(["tile", "interleave"]),
    values=st.tuples(finite, finite),
    n_tokens=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_lift_follows_its_definition(width, repeats, extra, lift, values, n_tokens, seed):
    length = width * repeats + (extra % width if lift == "tile" else 0)
    codes = np.random.default_rng(seed).integers(0, 2, (n_tokens, width), dtype=np.uint8)
    x = lift_codes(codes, length, lift, values)
    assert x.dtype == np.float32
    assert x.shape == (n_tokens, length)
    for n in range(length):
        bits = codes[:, n % width if lift == "tile" else n // repeats]
        np.testing.assert_array_equal(x[:, n], [np.float32(values[bit]) for bit in bits])


def test_strided_codes():
    codes = np.array([[1, 0, 0, 1], [0, 1, 0, 0]], dtype=np.uint8)
    np.testing.assert_array_equal(lift_codes(codes[::-1, ::2], 4, "interleave", (-1.0, 1.0))[1], [1, 1, -1, -1])
    np.testing.assert_array_equal(lift_codes(codes.T, 3, "tile", (0.0, 2.0))[0], [2, 0, 2])


BITS = np.zeros((1, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("codes", "length", "lift", "values", "message"),
    [
        (BITS, 6, "interleave", (0.0, 1.0), "multiple of the code width, got 6 and 4"),
        (BITS, 3, "tile", (0.0, 1.0), "embedding_length 3 is smaller than the code width 4"),
        (BITS, -4, "tile", (0.0, 1.0), "embedding_length must be 0..4294967295, got -4"),
        (BITS, 4, "tiles", (0.0, 1.0), 'lift must be "tile" or "interleave", got \'tiles\''),
        (BITS, 4, "tile", (0.0, np.nan), "values must be finite"),
        (BITS, 4, "tile", (-np.inf, 1.0), "values must be finite"),
        (BITS + 2, 4, "tile", (0.0, 1.0), "row 0: code bits must be 0 or 1, got 2"),
        (BITS[0], 4, "tile", (0.0, 1.0), "codes must have 2 dimensions"),
        (BITS.astype(bool), 4, "tile", (0.0, 1.0), "codes must have dtype uint8, got bool"),
        (np.zeros((1, 0), np.uint8), 4, "tile", (0.0, 1.0), "width must be 1..32, got 0"),
        (np.zeros((1, 33), np.uint8), 64, "tile", (0.0, 1.0), "width must be 1..32, got 33"),
    ],
)
def test_bad_arguments(codes, length, lift, values, message):
    with pytest.raises(ValueError, match=message):
        lift_codes(codes, length, lift, values)
