"""Recover the code of every token id from the rows that enter the first block."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ...inspect import gf2_rank
from ..spec import F32, Bits, CodeSpec, Lift

MAX_WIDTH = 32  # bits of a code in the file format

Rows = Callable[[NDArray[np.int64]], F32]  # ids [T] of one sequence -> inputs of block 0 [T, D]


def check_tokenwise(rows: Rows, vocab_size: int, length: int) -> None:
    """Refuse inputs of block 0 that depend on more than the token: on its position or on other tokens."""
    ids = np.arange(length, dtype=np.int64) % vocab_size
    constant = rows(np.full(length, vocab_size - 1, dtype=np.int64))
    if not np.array_equal(constant, np.broadcast_to(constant[:1], constant.shape)):
        raise CheckpointError(
            "embedding: the same token enters block 0 as different vectors at different positions (learned or "
            "sinusoidal positions are added to the input); only rotary positions can be converted"
        )
    if not np.array_equal(rows(ids)[::-1], rows(ids[::-1].copy())):
        raise CheckpointError(
            "embedding: what enters block 0 for a token depends on the tokens around it; only a vector per token can "
            "be converted"
        )


def recover_code(rows: Rows, vocab_size: int, length: int) -> CodeSpec | None:
    """The code behind the rows of all ids, or None if they are no two-valued lifted code.

    `length`: ids per sequence. Reads V rows of D floats, keeps V·D bits.
    """
    packed, values, width = [], np.empty(0, np.float32), 0
    for start in range(0, vocab_size, length):
        ids = np.arange(start, min(start + length, vocab_size), dtype=np.int64)
        part = rows(ids)
        width = part.shape[1]
        values = np.union1d(values, np.unique(part)) if len(values) < 3 else values
        if len(values) > 2:
            return None
        packed.append((part, values) if len(values) < 2 else np.packbits(part == values[1], axis=1))
    if len(values) != 2:
        return None
    # Rows seen before the second value was known.
    packed = [np.packbits(p[0] == values[1], axis=1) if isinstance(p, tuple) else p for p in packed]
    bits = np.concatenate(packed)  # [V, D/8]
    found = _lift(bits, width)
    if found is None:
        return None
    lift, columns = found
    codes = np.stack([_column(bits, c) for c in columns], axis=1)  # [V, K]
    low, high = float(values[0]), float(values[1])
    affine = fit_affine(codes)
    if affine is not None and affine[1].all():  # the bits of id 0 are ones: the other naming of the values is plainer
        codes, (low, high) = 1 - codes, (high, low)
        affine = fit_affine(codes)
    if affine is None:
        return CodeSpec("table", codes.shape[1], table=codes, lift=lift, values=(low, high))
    return CodeSpec("affine", codes.shape[1], *affine, lift=lift, values=(low, high))


def _column(bits: Bits, column: int) -> Bits:
    return np.bitwise_and(bits[:, column // 8] >> (7 - column % 8), 1)


def _lift(bits: Bits, width: int) -> tuple[Lift, list[int]] | None:
    """(lift, one column per code bit) of the smallest code that gives the packed rows; bits [V, ceil(D/8)]."""
    same: dict[bytes, int] = {}
    kind = np.array([same.setdefault(np.packbits(_column(bits, c)).tobytes(), c) for c in range(width)])
    for k in range(1, min(MAX_WIDTH, width) + 1):
        if (kind == kind[np.arange(width) % k]).all():
            return "tile", list(range(k))
        if width % k == 0 and (kind == np.repeat(kind[:: width // k], width // k)).all():
            return "interleave", list(range(0, width, width // k))
    return None


def fit_affine(codes: Bits) -> tuple[Bits, Bits] | None:
    """(A [K, K], b [K]) with codes[t] = A·bin(t) xor b for all t and A invertible, or None. codes uint8 [V, K].

    Columns of A for bits that no id has are free; they are chosen to make A invertible.
    """
    count, width = codes.shape
    used = max(count - 1, 0).bit_length()
    if used > width:
        return None
    shift = codes[0]
    columns = [codes[1 << j] ^ shift for j in range(used)]
    predicted = np.broadcast_to(shift, codes.shape).copy()
    ids = np.arange(count)
    for j, column in enumerate(columns):
        predicted[(ids >> j) & 1 == 1] ^= column
    if not np.array_equal(predicted, codes):
        return None
    for unit in np.eye(width, dtype=np.uint8):
        if len(columns) < width and gf2_rank([*columns, unit]) == len(columns) + 1:
            columns.append(unit)
    if len(columns) < width or gf2_rank(columns) < width:
        return None
    return np.stack(columns, axis=1), shift.copy()
