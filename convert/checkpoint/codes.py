"""Recover the code of every token id from the rows that enter the first block."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ...inspect import gf2_rank
from ..overrides import option
from ..spec import F32, Bits, CodeSpec, Lift
from .source import shown

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


# --- what the user states ------------------------------------------------------------------------------------------


def load_stated(pair: Sequence[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(A, b) of --affine: each an array, or the path of a .npy file, which is mapped: its header may promise any size.

    CheckpointError for what cannot be read.
    """
    return _loaded(pair[0]), _loaded(pair[1])


def _loaded(value: Any) -> NDArray[Any]:
    try:
        array = np.load(value, mmap_mode="r") if isinstance(value, (str, os.PathLike)) else np.asarray(value)
    except (OSError, ValueError, EOFError, MemoryError, SyntaxError) as error:
        raise CheckpointError(f"--affine {shown(value)}: {error}") from None
    if not isinstance(array, np.ndarray):
        raise CheckpointError(f"--affine {shown(value)}: is no .npy file of one array")
    return array


def check_affine(
    a: NDArray[Any], b: NDArray[Any], vocab_size: int, declared: int | None, origin: str
) -> tuple[Bits, Bits]:
    """A [K, K] and b [K] as bits. CheckpointError if they are none, too few for the ids or not as declared, or A is
    singular."""
    good = a.ndim == 2 and a.shape[0] == a.shape[1] <= MAX_WIDTH and b.shape == a.shape[:1]
    good = good and a.dtype.kind in "biuf" and b.dtype.kind in "biuf"
    if not good or not set(np.unique(a)) | set(np.unique(b)) <= {0, 1}:
        raise CheckpointError(
            f"{origin}: A {a.shape} and b {b.shape} are no square 0/1 matrix and 0/1 vector of its size"
        )
    if len(a) < (vocab_size - 1).bit_length() or declared not in (None, len(a)):
        said = "" if declared is None else f", and config.json says code_width {declared}"
        raise CheckpointError(f"{origin}: codes of {len(a)} bits for {vocab_size} token ids{said}")
    a, b = a.astype(np.uint8), b.astype(np.uint8)
    if gf2_rank(list(a.T)) < len(a):
        raise CheckpointError(f"{origin}: A is singular over GF(2), so that ids would share their codes")
    return a, b


def check_stated_code(stated: Mapping[str, Any], code: CodeSpec, vocab_size: int) -> None:
    """CheckpointError if --affine, read in any way that the other options leave open, or --values are not `code`.

    Which of two values is called 0 is a matter of naming: the complement of all codes with the values exchanged is
    the same code.
    """
    if code.kind == "learned":
        if given := [name for name in ("affine", "values") if name in stated]:
            raise CheckpointError(
                f"{option(given[0])} is stated, but the checkpoint's code looks vectors up in a table"
            )
        return
    straight, exchanged = code.values, code.values[::-1]
    values = tuple(float(np.float32(v)) for v in stated["values"]) if "values" in stated else None
    if values not in (None, straight, exchanged):
        raise CheckpointError(f"--values {values} is stated, but the checkpoint's code computes {code.values}")
    if "affine" not in stated:
        return
    a, b = check_affine(*load_stated(stated["affine"]), vocab_size, None, "given with --affine")
    ids = np.arange(vocab_size)
    seen = code.codes(ids)
    if seen.shape[1] == len(a):
        orders = [stated["bit_order"]] if "bit_order" in stated else ["lsb", "msb"]
        ways = [stated["affine_orientation"]] if "affine_orientation" in stated else ["Ac", "cA"]
        for order, way in itertools.product(orders, ways):
            matrix = oriented(a, way, order)
            flips = (CodeSpec("affine", len(a), matrix, b).codes(ids) ^ seen).astype(bool)
            if (not flips.any() and values in (None, straight)) or (flips.all() and values in (None, exchanged)):
                return
    raise CheckpointError(f"--affine is stated, but the checkpoint's code computes other codes of {seen.shape[1]} bits")


def oriented(a: Bits, orientation: str | None, bit_order: str) -> Bits:
    """A as `CodeSpec` wants it, from one for rows of bits ("cA") or for codes whose first bit is the highest."""
    a = a.T if orientation == "cA" else a
    return np.ascontiguousarray(a[:, ::-1] if bit_order == "msb" else a)
