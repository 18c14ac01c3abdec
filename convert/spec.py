"""What a checkpoint computes, in the terms of the file format: what is between resolving and writing.

Nothing here knows file formats or PyTorch. A `ModelSpec` holds numbers and, per GGUF tensor, a `TensorRecipe` that
reads the values lazily, so a spec of a 2 GB checkpoint costs kilobytes until its tensors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError

F32 = NDArray[np.float32]
Bits = NDArray[np.uint8]
Lift = Literal["tile", "interleave"]
Activation = Literal["gelu", "gelu_tanh", "swiglu"]


@dataclass(frozen=True)
class CodeSpec:
    """How a token id becomes the input of the first block.

    affine: code = matrix · bin(id) xor shift over GF(2), bin least significant bit first, invertible matrix.
    table:  code of id v is `table[v]`.
    learned: no code; the rows are the tensor `token_embd.weight`, and width is 0.
    Bit i of a code is the one with lift index i: x[n] = values[code[n % K]] for lift "tile",
    values[code[n // (D // K)]] for "interleave".
    """

    kind: Literal["affine", "table", "learned"]
    width: int = 0  # K
    matrix: Bits | None = None  # [K, K] of 0/1, affine only
    shift: Bits | None = None  # [K] of 0/1, affine only
    table: Bits | None = None  # [V, K] of 0/1, table only
    lift: Lift = "tile"
    values: tuple[float, float] = (0.0, 1.0)  # of a 0 bit and of a 1 bit

    def codes(self, ids: NDArray[Any]) -> Bits:
        """Codes of token ids [T] as uint8 0/1 [T, K]. ValueError for kind learned."""
        ids = np.asarray(ids, dtype=np.int64)
        if self.kind == "table":
            assert self.table is not None
            return self.table[ids]
        if self.kind == "affine":
            assert self.matrix is not None
            assert self.shift is not None
            bits = (ids[:, None] >> np.arange(self.width)[None, :]) & 1
            return ((bits @ self.matrix.T.astype(np.int64) + self.shift) & 1).astype(np.uint8)
        raise ValueError("a learned embedding has no codes")

    def lift_codes(self, codes: Bits, embedding_length: int) -> F32:
        """Lifted codes: uint8 0/1 [T, K] -> float32 [T, D]."""
        n = np.arange(embedding_length)
        index = n % self.width if self.lift == "tile" else n // (embedding_length // self.width)
        return np.asarray(self.values, dtype=np.float32)[codes[:, index]]


@dataclass(frozen=True)
class TensorRecipe:
    """How to obtain one GGUF tensor from the checkpoint, transposes, slices and permutations already applied.

    `shape` is NumPy order: (out, in) for matrices, (n,) for vectors. `read_rows(start, stop)` returns float32 rows
    start..stop (elements for vectors) and reads no more of the checkpoint than it needs.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...]  # checkpoint tensor names; empty if the checkpoint's code computes the values
    read_rows: Callable[[int, int], NDArray[Any]] = field(repr=False, compare=False)

    def load_rows(self, start: int, stop: int) -> F32:
        """Rows start..stop as a C-contiguous float32 array [stop - start, ...]."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}..{stop} of a tensor with {self.shape[0]} rows")
        rows = np.ascontiguousarray(self.read_rows(start, stop), dtype=np.float32)
        if rows.shape != (stop - start, *self.shape[1:]):
            raise ValueError(f"{self.sources}: read {rows.shape}, expected {(stop - start, *self.shape[1:])}")
        return rows

    def load(self) -> F32:
        """The whole tensor, float32, of `shape`."""
        return self.load_rows(0, self.shape[0])


def check_shapes(tensors: Mapping[str, TensorRecipe], blocks: int, vocab_size: int, width: int) -> None:
    """CheckpointError, with both shapes, for a tensor in another shape than the model needs, or that it does not have.

    The sizes of keys and values and of the feed-forward layer are those of block 0. width: embedding length.
    """
    kv, inner = (
        tensors[name].shape[axis] if name in tensors and len(tensors[name].shape) == 2 else 0
        for name, axis in (("blk.0.attn_k.weight", 0), ("blk.0.ffn_down.weight", 1))
    )
    block: dict[str, tuple[int, ...]] = {
        **{"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_output": (width, width)},
        **{"attn_k": (kv, width), "attn_v": (kv, width), "ffn_up": (inner, width), "ffn_gate": (inner, width)},
        "ffn_down": (width, inner),
    }
    needed = {"output_norm": (width,), "output": (vocab_size, width), "token_embd": (vocab_size, width)}
    needed |= {f"blk.{i}.{role}": shape for i in range(blocks) for role, shape in block.items()}
    for name, recipe in tensors.items():
        stem, _, kind = name.rpartition(".")
        where = f"{name} ({' + '.join(recipe.sources)})" if recipe.sources else name
        if stem not in needed or kind not in ("weight", "bias") or name == "token_embd.bias":
            raise CheckpointError(f"{where}: the file format has no tensor of this name")
        shape = needed[stem] if kind == "weight" else needed[stem][:1]
        if recipe.shape != shape:
            raise CheckpointError(f"{where} has the shape {recipe.shape}, but the model needs {shape}")


@dataclass
class ModelSpec:
    """Everything a `fixmin` GGUF file holds, before quantisation."""

    vocab_size: int
    context_length: int
    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    attention_scale: float
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    rope_dim: int
    rope_base: float
    rope_style: Literal["half", "interleaved"]
    activation: Activation
    code: CodeSpec
    tensors: dict[str, TensorRecipe]  # GGUF name -> recipe, in file order
    conventions: dict[str, tuple[Any, str]]  # name -> (value, where it came from)
    name: str
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # each of them ends a text
    pad_token_id: int | None = None
    tokenizer_json: Path | None = None
    weights_sha256: Callable[[], str] = field(default=lambda: "", repr=False)  # reads the weight files when called


@dataclass
class Resolved:
    """Result of `resolve`."""

    spec: ModelSpec
    source: Any  # source.Source, to be closed by the caller; a context manager
    reference_logits: Callable[[NDArray[Any]], F32] | None  # ids [T] -> float32 [T, V] by the checkpoint's own code
    reference_input: Callable[[NDArray[Any]], F32] | None = None  # ids [T] -> input of block 0 by own code, [T, D]
    report: list[str] = field(default_factory=list)  # one line per convention: name, value, provenance
    warnings: tuple[str, ...] = ()  # what whoever converts should know

    def close(self) -> None:
        """Release the files and the checkpoint's model."""
        self.source.close()
        self.reference_logits = None
        self.reference_input = None

    def __enter__(self) -> Resolved:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
