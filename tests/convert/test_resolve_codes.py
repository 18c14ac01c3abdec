"""Codes recovered from the rows that enter block 0."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixmin_cpp.convert.checkpoint.codes import check_tokenwise, fit_affine, recover_code
from fixmin_cpp.convert.spec import CodeSpec
from fixmin_cpp.errors import CheckpointError

SEEDS = st.integers(0, 2**32 - 1)


def invertible(width: int, rng: np.random.Generator) -> np.ndarray:
    """A random invertible 0/1 matrix: lower times upper triangular with ones on the diagonals, rows permuted."""
    lower = np.tril(rng.integers(0, 2, (width, width)), -1) + np.eye(width, dtype=np.int64)
    upper = np.triu(rng.integers(0, 2, (width, width)), 1) + np.eye(width, dtype=np.int64)
    return ((lower @ upper) % 2)[rng.permutation(width)].astype(np.uint8)


def rank(matrix: np.ndarray) -> int:
    matrix, found = matrix.copy() % 2, 0
    for column in range(matrix.shape[1]):
        pivots = np.flatnonzero(matrix[found:, column])
        if len(pivots):
            matrix[[found, found + pivots[0]]] = matrix[[found + pivots[0], found]]
            others = np.flatnonzero(matrix[:, column])
            for row in others[others != found]:
                matrix[row] ^= matrix[found]
            found += 1
            if found == len(matrix):
                break
    return found


def rows_of(code: CodeSpec, width: int):
    return lambda ids: code.lift_codes(code.codes(ids), width)


@given(width=st.integers(1, 16), share=st.floats(0.01, 1), seed=SEEDS)
def test_affine_maps_are_found(width: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size = max(2, int(2**width * share))
    code = CodeSpec("affine", width, invertible(width, rng), rng.integers(0, 2, width).astype(np.uint8))
    codes = code.codes(np.arange(vocab_size))
    found = fit_affine(codes)
    assert found is not None
    matrix, shift = found
    assert rank(matrix) == width
    again = CodeSpec("affine", width, matrix, shift)
    np.testing.assert_array_equal(again.codes(np.arange(vocab_size)), codes)
    used = (vocab_size - 1).bit_length()
    np.testing.assert_array_equal(matrix[:, :used], code.matrix[:, :used])


@given(width=st.integers(3, 10), seed=SEEDS)
def test_one_flipped_bit_is_no_affine_map(width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    code = CodeSpec("affine", width, invertible(width, rng), np.zeros(width, np.uint8))
    codes = code.codes(np.arange(2**width))
    codes[rng.integers(2**width), rng.integers(width)] ^= 1
    assert fit_affine(codes) is None


def test_singular_maps_are_no_affine_code() -> None:
    codes = ((np.arange(16)[:, None] >> np.array([0, 1, 2, 2])) & 1).astype(np.uint8)
    assert fit_affine(codes) is None


def test_more_bits_than_columns() -> None:
    codes = ((np.arange(16)[:, None] >> np.arange(3)) & 1).astype(np.uint8)
    assert fit_affine(codes) is None


@given(
    width=st.sampled_from([2, 4, 8]), lift=st.sampled_from(["tile", "interleave"]),
    values=st.sampled_from([(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (0.25, -3.0)]), chunk=st.integers(1, 40), seed=SEEDS,
)  # fmt: skip
def test_lift_and_values(width: int, lift: str, values: tuple[float, float], chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, shift = invertible(width, rng), rng.integers(0, 2, width).astype(np.uint8)
    vocab_size = int(rng.integers(2 ** (width - 1) + 1, 2**width + 1))
    rows = rows_of(CodeSpec("affine", width, matrix, shift, lift=lift, values=values), 32)
    found = recover_code(rows, vocab_size, chunk)
    assert found is not None
    assert found.kind == "affine"
    ids = np.arange(vocab_size)
    np.testing.assert_array_equal(found.lift_codes(found.codes(ids), 32), rows(ids))


def test_natural_codes_are_the_identity() -> None:
    code = CodeSpec("affine", 6, np.eye(6, dtype=np.uint8), np.zeros(6, np.uint8), values=(1.0, -1.0))
    found = recover_code(rows_of(code, 20), 64, 10)
    assert found is not None
    assert (found.width, found.lift, found.values) == (6, "tile", (1.0, -1.0))
    np.testing.assert_array_equal(found.matrix, np.eye(6))
    np.testing.assert_array_equal(found.shift, np.zeros(6))


def test_scrambled_codes_are_a_table() -> None:
    ids = np.random.default_rng(0).permutation(64)[:50]
    table = ((ids[:, None] >> np.arange(6)) & 1).astype(np.uint8)
    found = recover_code(rows_of(CodeSpec("table", 6, table=table, lift="interleave"), 48), 50, 7)
    assert found is not None
    assert (found.kind, found.width, found.lift) == ("table", 6, "interleave")
    np.testing.assert_array_equal(found.table, table)


@pytest.mark.parametrize("rows", [
    lambda ids: np.random.default_rng(0).standard_normal((50, 48)).astype(np.float32)[ids],  # no code
    lambda ids: (np.random.default_rng(0).random((50, 48)) < 0.5).astype(np.float32)[ids],  # 48 different columns
    lambda ids: np.ones((len(ids), 48), np.float32),  # one value
])  # fmt: skip
def test_rows_that_are_no_lifted_code(rows) -> None:
    assert recover_code(rows, 50, 16) is None


def test_inputs_that_depend_on_more_than_the_token() -> None:
    table = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    check_tokenwise(lambda ids: table[ids], 20, 8)
    with pytest.raises(CheckpointError, match="positions"):
        check_tokenwise(lambda ids: table[ids] + np.arange(len(ids), dtype=np.float32)[:, None], 20, 8)
    with pytest.raises(CheckpointError, match="tokens around"):
        check_tokenwise(lambda ids: table[ids] + table[np.roll(ids, 1)], 20, 8)
