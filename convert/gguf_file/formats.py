"""ggml number formats: which one a tensor gets, and rows of float32 turned into its bytes.

A file is what llama.cpp's tools would have written. F16, BF16, Q8_0 and Q4_0, all that a conversion writes, come from
`gguf.quants`; the other formats, which `gguf` can only read, and what an importance matrix weighs, from ggml itself
(`ggml_quantize_chunk` of the ggml-python package, which has to be compiled: `fixmin quantize` needs it). Both
give the same bytes where both can, for float formats round-to-nearest-even of NumPy and PyTorch
(tests/convert/test_writer.py).
A further format is one more line in `OUT_TYPES`. W8A8 is ours: signed bytes in a tensor of type I8 and a float32 scale
for each row in a vector of its own, NAME + `SCALE_SUFFIX` (docs/numerics.md).
"""

import ctypes
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quants
from numpy.typing import NDArray

F32 = GGMLQuantizationType.F32
F16 = GGMLQuantizationType.F16
BF16 = GGMLQuantizationType.BF16
Q8_0 = GGMLQuantizationType.Q8_0
Q4_0 = GGMLQuantizationType.Q4_0
I8 = GGMLQuantizationType.I8

# The scales of a matrix of type I8, and the key that says by which rules they are meant.
SCALE_SUFFIX = "_scale"
W8A8_KEY = "fixmin.w8a8.version"
W8A8_VERSION = 1
_W8A8_LONGEST = 133_000  # a sum of so many products of two bytes fits 32 bits

# A float16 from here up rounds to infinity: half a unit above the largest finite one, 65504.
_F16_OVERFLOW = 65520.0


@dataclass(frozen=True)
class OutType:
    """A value of `--outtype`.

    `limit`: magnitudes from here up cannot be stored (the number or its block scale would become infinite).
    `block_error`: largest |stored - true| that correct rounding allows, as a fraction of the largest magnitude of the
    block (of the element itself when a block is one element). `floor`: the same, absolute, for blocks whose scale
    is a subnormal float16 (spacing 2^-24, so half a step is 2^-25, times the largest code).
    `logit_tolerance`: what the certificate allows end to end, ‖Δlogits‖ / ‖logits‖. For the float types rounding bounds
    it. For the quantised ones it is the loss of the format, no proof (see certify.py): it stops files of no use.
    """

    ggml: GGMLQuantizationType
    file_type: LlamaFileType
    limit: float
    block_error: float
    floor: float
    logit_tolerance: float


# Q8_0: half a step of amax/127, plus the float16 rounding of the scale (2^-11) times at most 127 steps.
# W8A8: the same of a whole row, with the rounding of a float32 scale and of its product. GGUF has no number for it:
# "guessed" is what it calls a file whose tensors say their types themselves.
# Q4_0: codes -8..7 with scale -extreme/8: the far end misses one whole step, again plus the rounding of the scale.
OUT_TYPES: dict[str, OutType] = {
    "f32": OutType(F32, LlamaFileType.ALL_F32, np.inf, 0.0, 0.0, 1e-4),
    "f16": OutType(F16, LlamaFileType.MOSTLY_F16, _F16_OVERFLOW, 2.0**-11, 2.0**-25, 2e-3),
    "bf16": OutType(BF16, LlamaFileType.MOSTLY_BF16, 2.0**128 * (1 - 2.0**-9), 2.0**-8, 0.0, 2e-2),
    "q8_0": OutType(Q8_0, LlamaFileType.MOSTLY_Q8_0, 127 * _F16_OVERFLOW, 0.5 / 127 + 2.0**-11, 127 * 2.0**-25, 5e-2),
    "w8a8": OutType(I8, LlamaFileType.GUESSED, np.inf, 0.5 / 127 + 2.0**-22, 1e-30, 5e-2),
    "q4_0": OutType(Q4_0, LlamaFileType.MOSTLY_Q4_0, 8 * _F16_OVERFLOW, 1 / 8 + 2.0**-11, 8 * 2.0**-25, 0.5),
}
BY_GGML_TYPE: dict[GGMLQuantizationType, OutType] = {t.ggml: t for t in OUT_TYPES.values()}


class NotFiniteError(OverflowError):
    """Some of the values are NaN or infinite; `index` is where the first of them is among those given."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        flat = int(np.flatnonzero(~np.isfinite(rows))[0])
        self.index = tuple(int(i) for i in np.unravel_index(flat, rows.shape))
        value = rows[self.index]
        super().__init__("holds NaN" if np.isnan(value) else "holds infinity")


def row_bytes(n: int, ggml_type: GGMLQuantizationType) -> int:
    """Bytes of a row of n elements; n must be a multiple of the block of the type."""
    block, size = GGML_QUANT_SIZES[ggml_type]
    if n % block:
        raise ValueError(f"a row of {n} elements does not divide into {ggml_type.name} blocks of {block}")
    return n // block * size


def bits_per_weight(ggml_type: GGMLQuantizationType) -> float:
    """Stored bits per element, scales included: 8.5 for Q8_0."""
    block, size = GGML_QUANT_SIZES[ggml_type]
    return size * 8 / block


def choose_type(name: str, shape: tuple[int, ...], outtype: str) -> tuple[GGMLQuantizationType, str | None]:
    """The ggml type in which a tensor is stored, and why it is not the one asked for (None if it is).

    Vectors (norms, biases) stay F32: they are a thousandth of the file. The queries, keys and values of layer 0 are
    folded with the code into K + 2 columns at load and never read again, so nothing is saved by storing them in
    fewer bits than Q8_0, and no product with them is rounded as W8A8's are. Rows of a learned embedding are read, not
    multiplied.
    """
    wanted = OUT_TYPES[outtype].ggml
    if len(shape) == 1:
        return F32, None
    reason = None
    if name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight") and (
        bits_per_weight(wanted) < bits_per_weight(Q8_0)
    ):
        wanted, reason = Q8_0, "layer 0 is folded at load"
    if name == "token_embd.weight" and wanted == I8:
        wanted, reason = Q8_0, "rows of an embedding are not multiplied"
    if why := unfit(wanted, shape[-1]):
        return F16, why
    return wanted, reason


def unfit(ggml_type: GGMLQuantizationType, row: int) -> str | None:
    """Why rows of so many weights cannot have a type, or None."""
    block = 32 if ggml_type == I8 else GGML_QUANT_SIZES[ggml_type][0]
    if row % block:
        return f"rows of {row} do not divide into blocks of {block}"
    if ggml_type == I8 and row > _W8A8_LONGEST:
        return f"rows of {row} are longer than the {_W8A8_LONGEST} of W8A8"
    return None


def quantize_rows(
    rows: NDArray[np.float32], ggml_type: GGMLQuantizationType, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """float32 [m, n] -> bytes [m, row_bytes(n)]. Releases the GIL, so chunks run in threads.

    importance [n]: mean squares of the inputs that each column meets; the error is weighed with them, in the formats
    that can use it.

    Raises OverflowError if a value is not finite or too large for the type; the caller names the tensor.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if rows.size:
        # min and max propagate NaN and need no temporary array, unlike abs or isfinite.
        low, high = float(rows.min()), float(rows.max())
        extreme = max(-low, high)
        if not np.isfinite(low) or not np.isfinite(high):
            raise NotFiniteError(rows)
        # Where no exact bound is known: what a float16 minimum can hold.
        if extreme >= (BY_GGML_TYPE[ggml_type].limit if ggml_type in BY_GGML_TYPE else _F16_OVERFLOW):
            raise OverflowError(f"holds the value {extreme:.6g}, which overflows {ggml_type.name}")
    if ggml_type == F32:
        return rows.view(np.uint8)
    if ggml_type == I8:
        return row_codes(rows).view(np.uint8)
    if importance is None and ggml_type in BY_GGML_TYPE:
        return quants.quantize(rows, ggml_type).view(np.uint8)
    return _quantized_by_ggml(rows, ggml_type, importance)


def row_scales(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """W8A8's scale of each row [m, n] -> [m]: largest magnitude / 127, and 0 below 1e-30."""
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    return np.where(largest < 1e-30, np.float32(0), largest / np.float32(127))


def row_codes(rows: NDArray[np.float32]) -> NDArray[np.int8]:
    """W8A8's codes [m, n]: row * (127 / largest magnitude), rounded to nearest, ties to even."""
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest < 1e-30, np.float32(0), np.float32(127) / largest)
    return np.rint(rows * inverse[:, None]).astype(np.int8)


def _quantized_by_ggml(
    rows: NDArray[np.float32], ggml_type: GGMLQuantizationType, importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    import ggml

    weights = None
    if importance is not None:
        if importance.shape != rows.shape[1:]:
            raise ValueError(f"importance {importance.shape} for rows of {rows.shape[1]}")
        importance = floored(importance)
        weights = importance.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    out = np.empty((rows.shape[0], row_bytes(rows.shape[1], ggml_type)), dtype=np.uint8)
    written = ggml.ggml_quantize_chunk(
        int(ggml_type),
        rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        out.ctypes.data,
        0,
        rows.shape[0],
        rows.shape[1],
        weights,
    )
    if written != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes for {ggml_type.name}, expected {out.nbytes}")
    if importance is not None and not np.isfinite(quants.dequantize(out, ggml_type)).all():
        raise OverflowError(f"and its importance give {ggml_type.name} scales that are not finite")
    return out


def floored(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Importance [n] without zeros, and of a size that float32 can compute with.

    A column whose inputs were all zero in the text still has weights. ggml divides by the importance of a block and
    writes NaN where that is zero: so such columns count a millionth of the mean. Only the ratio of the values matters.
    """
    values = np.asarray(importance, dtype=np.float64)
    mean = values.mean()
    if mean == 0:
        return np.ones(values.shape, np.float32)
    if not 1e-10 < mean < 1e10:
        values, mean = values / mean, 1.0
    return np.maximum(values, 1e-6 * mean).astype(np.float32)


def shown(kind: GGMLQuantizationType) -> str:
    """What people call a type of matrix: of signed bytes, which have scales of rows, W8A8."""
    return "W8A8" if kind == I8 else kind.name
