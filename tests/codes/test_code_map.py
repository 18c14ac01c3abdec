"""CodeMap against a plain NumPy product over GF(2)."""

import numpy as np
import pytest
from gguf_factory import code_width, random_invertible
from hypothesis import given
from hypothesis import strategies as st

from fixmin_cpp._core import CodeMap

seeds = st.integers(0, 2**32 - 1)


def bits_of(ids, width):
    """[T] -> [T, K] of 0/1, least significant bit first."""
    return (np.asarray(ids, dtype=np.int64)[:, None] >> np.arange(width)) & 1


def all_ids(vocab_size):
    return np.arange(vocab_size, dtype=np.uint32)


def expected_codes(ids, matrix, shift):
    return (bits_of(ids, len(shift)) @ matrix.T.astype(np.int64) + shift) % 2


def zeros(width):
    return np.zeros(width, dtype=np.uint8)


@given(width=st.integers(1, 20), seed=seeds, data=st.data())
def test_affine_agrees_with_numpy_and_is_bijective(width, seed, data):
    rng = np.random.default_rng(seed)
    # Few ids where K is large, so that an example stays small; all 65,536 of K = 16 have a test of their own.
    vocab_size = data.draw(st.integers(1, min(2**width, 5000)), label="vocab_size")
    matrix, shift = random_invertible(width, rng), rng.integers(0, 2, width, dtype=np.uint8)
    code_map = CodeMap.affine(vocab_size, matrix, shift)
    assert (code_map.vocab_size, code_map.width) == (vocab_size, width)
    codes = code_map.codes(all_ids(vocab_size))
    assert codes.dtype == np.uint8
    assert codes.shape == (vocab_size, width)
    np.testing.assert_array_equal(codes, expected_codes(all_ids(vocab_size), matrix, shift))
    assert len(np.unique(codes, axis=0)) == vocab_size
    probe = int(rng.integers(vocab_size))
    assert code_map.id_of(codes[probe]) == probe


@pytest.mark.parametrize("seed", range(3))
def test_random_gl16_over_the_whole_vocabulary(seed):
    rng = np.random.default_rng(seed)
    matrix, shift = random_invertible(16, rng), rng.integers(0, 2, 16, dtype=np.uint8)
    code_map = CodeMap.affine(65536, matrix, shift)
    codes = code_map.codes(all_ids(65536))
    np.testing.assert_array_equal(codes, expected_codes(all_ids(65536), matrix, shift))
    words = codes.astype(np.int64) @ (1 << np.arange(16))
    np.testing.assert_array_equal(np.sort(words), np.arange(65536))
    assert all(code_map.id_of(code) == id for id, code in enumerate(codes))


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 100, 4096, 65535, 65536])
def test_identity_and_bit_reversal(vocab_size):
    width = code_width(vocab_size)
    ids = all_ids(vocab_size)
    identity = np.eye(width, dtype=np.uint8)
    np.testing.assert_array_equal(CodeMap.affine(vocab_size, identity, zeros(width)).codes(ids), bits_of(ids, width))
    reversal = np.ascontiguousarray(identity[::-1])
    np.testing.assert_array_equal(
        CodeMap.affine(vocab_size, reversal, zeros(width)).codes(ids), bits_of(ids, width)[:, ::-1]
    )


def test_width_32_uses_every_bit():
    rng = np.random.default_rng(5)
    matrix, shift = random_invertible(32, rng), rng.integers(0, 2, 32, dtype=np.uint8)
    ids = np.array([0, 1, 2**31, 2**32 - 2], dtype=np.uint32)
    code_map = CodeMap.affine(2**32 - 1, matrix, shift)
    codes = code_map.codes(ids)
    np.testing.assert_array_equal(codes, expected_codes(ids, matrix, shift))
    assert [code_map.id_of(code) for code in codes] == ids.tolist()


def test_id_of_a_code_beyond_the_vocabulary_is_none():
    code_map = CodeMap.affine(5, np.eye(3, dtype=np.uint8), zeros(3))
    assert code_map.id_of(np.array([0, 0, 1], dtype=np.uint8)) == 4
    assert code_map.id_of(np.array([1, 0, 1], dtype=np.uint8)) is None


@given(width=st.integers(2, 20), seed=seeds, data=st.data())
def test_singular_matrix_is_refused(width, seed, data):
    rng = np.random.default_rng(seed)
    matrix = random_invertible(width, rng)
    # One row becomes a sum of others (possibly of none), so the rank drops.
    row = data.draw(st.integers(0, width - 1), label="row")
    others = np.delete(matrix, row, axis=0)
    matrix[row] = rng.integers(0, 2, width - 1) @ others % 2
    with pytest.raises(ValueError, match="singular over GF"):
        CodeMap.affine(2, matrix, zeros(width))


def test_matrix_singular_over_gf2_only():
    # Determinant 2 over the integers: a floating-point check would let it pass.
    matrix = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=np.uint8)
    assert round(np.linalg.det(matrix)) == 2
    with pytest.raises(ValueError, match="column 2 is a sum"):
        CodeMap.affine(8, matrix, zeros(3))


@given(width=st.integers(1, 32), vocab_size=st.integers(1, 300), seed=seeds)
def test_table_returns_its_rows(width, vocab_size, seed):
    rows = np.random.default_rng(seed).integers(0, 2, (vocab_size, width), dtype=np.uint8)
    code_map = CodeMap.table(rows)
    assert (code_map.vocab_size, code_map.width) == (vocab_size, width)
    np.testing.assert_array_equal(code_map.codes(all_ids(vocab_size)), rows)
    first = next(id for id in range(vocab_size) if (rows[id] == rows[-1]).all())
    assert code_map.id_of(rows[-1]) == first  # rows may repeat: the lowest id is given


def test_id_of_a_code_absent_from_the_table_is_none():
    assert CodeMap.table(np.zeros((3, 4), dtype=np.uint8)).id_of(np.ones(4, dtype=np.uint8)) is None


@pytest.mark.parametrize("kind", ["affine", "table"])
def test_ids_beyond_the_vocabulary_are_refused(kind):
    identity = np.eye(3, dtype=np.uint8)
    rows = np.ones((5, 3), dtype=np.uint8)
    code_map = CodeMap.affine(5, identity, zeros(3)) if kind == "affine" else CodeMap.table(rows)
    for bad in (5, 7, 2**32 - 1):
        with pytest.raises(ValueError, match=f"token id {bad} at position 1 is outside the vocabulary 0..4"):
            code_map.codes(np.array([4, bad], dtype=np.uint32))


def test_empty_and_strided_ids():
    code_map = CodeMap.affine(8, np.eye(3, dtype=np.uint8), zeros(3))
    assert code_map.codes(np.empty(0, dtype=np.uint32)).shape == (0, 3)
    strided = np.arange(8, dtype=np.uint32)[::-3]
    np.testing.assert_array_equal(code_map.codes(strided), bits_of([7, 4, 1], 3))
    fortran = np.asfortranarray(np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=np.uint8))
    np.testing.assert_array_equal(CodeMap.affine(8, fortran, zeros(3)).codes(strided)[0], [0, 1, 1])


EYE = np.eye(3, dtype=np.uint8)


@pytest.mark.parametrize(
    ("vocab_size", "matrix", "shift", "message"),
    [
        (9, EYE, zeros(3), "width 3 is too small for vocab_size 9"),
        (0, EYE, zeros(3), "vocab_size must be at least 1"),
        (-1, EYE, zeros(3), "vocab_size must be 0..4294967295, got -1"),
        (2**32, EYE, zeros(3), "vocab_size must be 0..4294967295"),
        (4, EYE[:2], zeros(3), "matrix must be square"),
        (4, EYE[0], zeros(3), "matrix must have 2 dimensions, got 1"),
        (4, EYE, zeros(2), "shift must have width = 3 entries, got 2"),
        (4, EYE, zeros(3)[None], "shift must have 1 dimension, got 2"),
        (4, EYE * 2, zeros(3), "got 2 at row 0, column 0"),
        (4, EYE, zeros(3) + 7, "shift: code bits must be 0 or 1, got 7 at bit 0"),
        (4, EYE.astype(np.int64), zeros(3), "matrix must have dtype uint8, got int64"),
        (4, EYE, zeros(3).astype(np.float32), "shift must have dtype uint8, got float32"),
        (1, np.empty((0, 0), np.uint8), zeros(0), "width must be 1..32, got 0"),
        (1, np.eye(33, dtype=np.uint8), zeros(33), "width must be 1..32, got 33"),
    ],
)
def test_bad_affine_arguments(vocab_size, matrix, shift, message):
    with pytest.raises(ValueError, match=message):
        CodeMap.affine(vocab_size, matrix, shift)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((0, 3), np.uint8), "vocab_size must be at least 1"),
        (np.zeros((2, 0), np.uint8), "width must be 1..32, got 0"),
        (np.zeros((2, 33), np.uint8), "at most 32 bits, got 33"),
        (np.zeros(3, np.uint8), "rows must have 2 dimensions"),
        (np.zeros((2, 3), np.float32), "rows must have dtype uint8, got float32"),
        (np.array([[0, 1], [0, 3]], np.uint8), "row 1: code bits must be 0 or 1, got 3 at bit 1"),
    ],
)
def test_bad_tables(rows, message):
    with pytest.raises(ValueError, match=message):
        CodeMap.table(rows)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(2, np.int64), "ids must have dtype uint32, got int64"),
        (np.zeros(2, ">u4"), "ids must have dtype uint32"),
        (np.zeros((2, 1), np.uint32), "ids must have 1 dimension"),
        (np.array(1, np.uint32), "ids must have 1 dimension, got 0"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        CodeMap.table(np.zeros((5, 3), np.uint8)).codes(ids)
