"""Writes small random FixMin models as GGUF (the keys and tensors of docs/design.md) with the `gguf` package.

Weights are drawn so that every part of the model shows in the logits: norms differ from 1, biases from 0, and
attention is far from uniform.
"""

import ctypes
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import ggml
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from numpy.typing import ArrayLike, NDArray

#: Projections that may have a bias; "output" is the logits'.
ALL_BIASES = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output"})

FLOAT_TYPES = ("F32", "F16", "BF16")
#: Where the binary16 scales and minima of a block stand, in bytes.
HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
QUANTIZED_TYPES = tuple(HALVES)
WEIGHT_TYPES = FLOAT_TYPES + QUANTIZED_TYPES


def block_sizes(kind: str) -> tuple[int, int]:
    """Elements and bytes per block of a type."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def quantize(weight: NDArray[np.float32], kind: str) -> NDArray:
    """[rows, columns] -> the rows as they stand in a file: by the gguf package, or by ggml what that only reads."""
    if kind in FLOAT_TYPES or kind in ("Q8_0", "Q4_0"):
        return quants.quantize(weight, GGMLQuantizationType[kind])
    weight = np.ascontiguousarray(weight, np.float32)
    rows, columns = weight.shape
    block, size = block_sizes(kind)
    out = np.empty((rows, columns // block * size), np.uint8)
    source = weight.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    written = ggml.ggml_quantize_chunk(int(GGMLQuantizationType[kind]), source, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes
    return out


def with_row_scales(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[rows, columns] -> codes of W8A8 and a scale for each row."""
    amax = np.abs(weight).max(1)
    return np.rint(weight * (np.float32(127) / amax)[:, None]).astype(np.int8), amax / np.float32(127)


def random_blocks(kind: str, n: int, rng: np.random.Generator, spread: float = 100.0) -> NDArray[np.uint8]:
    """[n, bytes per block]: any bytes, also such that no quantiser writes, but finite scales."""
    blocks = rng.integers(0, 256, (n, block_sizes(kind)[1]), dtype=np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = rng.uniform(-spread, spread, (n, 1)).astype(np.float16).view(np.uint8)
    return blocks


def code_width(vocab_size: int) -> int:
    """K = ceil(log2 V), at least 1."""
    return max(1, (vocab_size - 1).bit_length())


def random_invertible(width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random matrix of GL(K, 2), uint8 [K, K] of 0/1: unit lower times unit upper triangular, rows permuted."""
    lower = np.tril(rng.integers(0, 2, (width, width)), -1) + np.eye(width, dtype=np.int64)
    upper = np.triu(rng.integers(0, 2, (width, width)), 1) + np.eye(width, dtype=np.int64)
    return ((lower @ upper) % 2)[rng.permutation(width)].astype(np.uint8)


def pack_rows(bits: ArrayLike) -> NDArray[np.uint8]:
    """[V, K] of 0/1 -> [V, ceil(K/8)]: bit i of a row is bit i % 8 of byte i // 8."""
    return np.packbits(np.asarray(bits, dtype=np.uint8), axis=1, bitorder="little")


def make_model(
    path: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = 100,
    embedding_length: int = 64,
    block_count: int = 2,
    head_count: int = 4,
    head_count_kv: int | None = None,
    feed_forward_length: int = 96,
    context_length: int = 64,
    norm: str = "layernorm",
    norm_eps: float = 1e-5,
    norm_bias: bool = True,
    activation: str = "gelu",
    rope_style: str = "half",
    rope_dim: int | None = None,
    rope_base: float = 10000.0,
    scale: float | None = None,
    biases: Collection[str] = frozenset({"ffn_up", "ffn_down", "output"}),
    code_kind: str = "affine",
    width: int | None = None,
    matrix: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    table: ArrayLike | None = None,
    lift: str = "tile",
    values: tuple[float, float] = (0.0, 1.0),
    weight_type: str = "F32",
    weight_types: Mapping[str, str] | None = None,
    tokenizer_json: str | None = None,
    edit: Callable[[GGUFWriter], None] | None = None,
) -> Path:
    """Write one model and return its path. The same arguments give the same bytes.

    Args:
        norm: "layernorm" or "rmsnorm"; norm_bias counts for layernorm only.
        biases: what has a bias: a part of `ALL_BIASES` (in every block), or one projection such as "blk.1.attn_q".
        rope_dim: leading elements of each head that are rotated (None: all). scale: factor on q·k (None: d^-0.5).
        code_kind: "affine" (matrix [K, K], shift [K]; random where None), "table" (table [V, K]; random distinct rows
            where None) or "learned".
        weight_type: ggml type of all 2-D weights, or "W8A8". As the converter does, layer 0's q, k and v are kept at
            Q8_0 for types below it, and so is a learned embedding for W8A8. weight_types: the type of single tensors,
            by name without ".weight".
        tokenizer_json: text for tokenizer.huggingface.json.
        edit: called with the writer before the file is written, to add keys or tensors or to spoil some.

    Quantised types need embedding_length and feed_forward_length to be multiples of their block (32, or 256 for the
    K types and IQ4_XS).
    """
    rng = np.random.default_rng(seed)
    path = Path(path)
    width = code_width(vocab_size) if width is None else width
    head_count_kv = head_count if head_count_kv is None else head_count_kv
    head_dim = embedding_length // head_count

    writer = GGUFWriter(path, "fixmin")
    for key, count in {
        "vocab_size": vocab_size,
        "context_length": context_length,
        "embedding_length": embedding_length,
        "block_count": block_count,
        "feed_forward_length": feed_forward_length,
        "attention.head_count": head_count,
        "attention.head_count_kv": head_count_kv,
        "rope.dimension_count": head_dim if rope_dim is None else rope_dim,
    }.items():
        writer.add_uint32("fixmin." + key, count)
    writer.add_float32("fixmin.attention.scale", head_dim**-0.5 if scale is None else scale)
    epsilon_key = {"layernorm": "layer_norm_epsilon", "rmsnorm": "layer_norm_rms_epsilon"}[norm]
    writer.add_float32("fixmin.attention." + epsilon_key, norm_eps)
    writer.add_float32("fixmin.rope.freq_base", rope_base)
    writer.add_string("fixmin.rope.style", rope_style)
    writer.add_string("fixmin.activation", activation)
    writer.add_string("fixmin.code.kind", code_kind)
    if code_kind != "learned":
        writer.add_uint32("fixmin.code.width", width)
        writer.add_string("fixmin.code.lift", lift)
        writer.add_array("fixmin.code.values", [float(v) for v in values])
    writer.add_string("tokenizer.ggml.model", "none")
    if tokenizer_json is not None:
        writer.add_string("tokenizer.huggingface.json", tokenizer_json)

    def add_matrix(name: str, rows: int, columns: int, spread: float) -> None:
        weight = (rng.standard_normal((rows, columns)) * spread).astype(np.float32)
        type_name = (weight_types or {}).get(name, weight_type)
        layer_0 = name in ("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v")
        if layer_0 and type_name not in FLOAT_TYPES and name not in (weight_types or {}):
            type_name = "Q8_0"
        if type_name == "W8A8" and name != "token_embd":
            codes, scales = with_row_scales(weight)
            writer.add_tensor(name + ".weight", codes)
            writer.add_tensor(name + ".weight_scale", scales)
            return
        type_name = "Q8_0" if type_name == "W8A8" else type_name
        writer.add_tensor(name + ".weight", quantize(weight, type_name), raw_dtype=GGMLQuantizationType[type_name])

    def add_vector(name: str, length: int, mean: float) -> None:
        writer.add_tensor(name, (mean + 0.3 * rng.standard_normal(length)).astype(np.float32))

    def add_norm(name: str) -> None:
        add_vector(name + ".weight", embedding_length, 1.0)
        if norm == "layernorm" and norm_bias:
            add_vector(name + ".bias", embedding_length, 0.0)

    def add_linear(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        add_matrix(name, rows, columns, gain / np.sqrt(columns))
        if name in biases or name.rpartition(".")[2] in biases:
            add_vector(name + ".bias", rows, 0.0)

    if code_kind == "learned":
        add_matrix("token_embd", vocab_size, embedding_length, 1.0)
    elif code_kind == "table":
        if table is None:
            table = (rng.permutation(2**width)[:vocab_size, None] >> np.arange(width)) & 1
        writer.add_tensor("token_code.weight", pack_rows(table).view(np.int8))
    else:
        matrix = random_invertible(width, rng) if matrix is None else matrix
        shift = rng.integers(0, 2, width) if shift is None else shift
        for key, bits in (("affine_matrix", matrix), ("affine_shift", shift)):
            entries = np.asarray(bits, dtype=np.uint8).tobytes()
            writer.add_key_value("fixmin.code." + key, entries, GGUFValueType.ARRAY, GGUFValueType.UINT8)

    for n in range(block_count):
        block = f"blk.{n}."
        add_norm(block + "attn_norm")
        add_linear(block + "attn_q", embedding_length, embedding_length, gain=1.5)
        add_linear(block + "attn_k", head_count_kv * head_dim, embedding_length, gain=1.5)
        add_linear(block + "attn_v", head_count_kv * head_dim, embedding_length)
        add_linear(block + "attn_output", embedding_length, embedding_length)
        add_norm(block + "ffn_norm")
        if activation == "swiglu":
            add_linear(block + "ffn_gate", feed_forward_length, embedding_length)
        add_linear(block + "ffn_up", feed_forward_length, embedding_length)
        add_linear(block + "ffn_down", embedding_length, feed_forward_length)
    add_norm("output_norm")
    add_linear("output", vocab_size, embedding_length)

    if any(tensor.endswith(".weight_scale") for tensors in writer.tensors for tensor in tensors):
        writer.add_uint32("fixmin.w8a8.version", 1)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


#: Arguments of `make_model`: every type, also in the matrices that the fold of layer 0 takes.
EVERY_TYPE: dict = dict(
    embedding_length=256,
    feed_forward_length=512,
    activation="swiglu",
    weight_type="F32",
    weight_types={
        "blk.0.attn_q": "Q6_K",
        "blk.0.attn_k": "Q5_1",
        "blk.0.attn_v": "IQ4_XS",
        "blk.0.attn_output": "Q4_1",
        "blk.0.ffn_gate": "Q5_K",
        "blk.0.ffn_up": "F16",
        "blk.0.ffn_down": "Q3_K",
        "blk.1.attn_q": "Q8_0",
        "blk.1.attn_k": "F32",
        "blk.1.attn_v": "BF16",
        "blk.1.attn_output": "IQ4_NL",
        "blk.1.ffn_gate": "Q4_K",
        "blk.1.ffn_up": "Q2_K",
        "blk.1.ffn_down": "Q5_0",
        "output": "Q4_0",
    },
)
