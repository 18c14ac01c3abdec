"""What the notebook studies.ipynb does to codes: other A and b in a file, one bit of one token, distances of codes."""

import shutil
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

Bits = NDArray[np.uint8]  # 0 and 1


def read_code(path: Path) -> tuple[Bits, Bits]:
    """A [K, K] and b [K] of a file whose code is affine; the fixed code is A = I, b = 0."""
    fields = GGUFReader(path).fields
    arrays = [fields[f"fixmin.code.affine_{name}"] for name in ("matrix", "shift")]
    matrix, shift = (np.concatenate([field.parts[i] for i in field.data]) for field in arrays)
    return matrix.reshape(len(shift), len(shift)), shift


def write_code(source: Path, target: Path, matrix: Bits, shift: Bits) -> Path:
    """A copy of a file with another A and b, and not one other byte changed."""
    shutil.copyfile(source, target)
    fields = GGUFReader(target, "r+").fields  # maps the file
    for name, bits in (("matrix", matrix), ("shift", shift)):
        field = fields[f"fixmin.code.affine_{name}"]
        for i, bit in zip(field.data, bits.ravel(), strict=True):
            field.parts[i][:] = bit
    return target


def inverse(matrix: Bits) -> Bits:
    """The inverse over GF(2), by Gauss and Jordan. ValueError: there is none."""
    width = len(matrix)
    rows = np.concatenate([matrix, np.eye(width, dtype=np.uint8)], axis=1)
    for column in range(width):
        pivots = column + np.flatnonzero(rows[column:, column])
        if not pivots.size:
            raise ValueError("the matrix is singular")
        rows[[column, pivots[0]]] = rows[[pivots[0], column]]
        others = np.flatnonzero(rows[:, column])
        rows[others[others != column]] ^= rows[column]
    return rows[:, width:]


def random_invertible(width: int, rng: np.random.Generator) -> Bits:
    """A matrix of GL(K, 2), all of them equally likely: drawn until one is invertible (29 % are)."""
    while True:
        matrix = rng.integers(0, 2, (width, width), dtype=np.uint8)
        try:
            inverse(matrix)
            return matrix
        except ValueError:
            continue


def flipping(matrix: Bits) -> NDArray[np.uint32]:
    """For each bit i of the code a mask [K]: id ^ mask[i] is the token whose code differs in bit i and nowhere else.

    A·bin(t ^ m) = A·bin(t) ⊕ A·bin(m), so bin(m) is the column i of the inverse of A.
    """
    powers = 1 << np.arange(len(matrix), dtype=np.uint32)
    masks: NDArray[np.uint32] = (powers @ inverse(matrix)).astype(np.uint32)
    return masks


def output_embeddings(path: Path) -> NDArray[np.float32]:
    """The rows of the output projection, [V, D]; the file is F32."""
    tensor = next(one for one in GGUFReader(path).tensors if one.name == "output.weight")
    return np.array(tensor.data, np.float32)


def hamming(codes: Bits) -> NDArray[np.int64]:
    """In how many bits each pair of codes [N, K] differs, [N, N]."""
    ones = codes.astype(np.int64)
    counts: NDArray[np.int64] = ones @ (1 - ones.T) + (1 - ones) @ ones.T
    return counts


def cosines(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each pair of rows [N, D] after their mean is taken away, [N, N]."""
    centred = rows.astype(np.float64) - rows.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    products: NDArray[np.float64] = unit @ unit.T
    return products
