"""The tensors of an architecture of llama.cpp, each read lazily from those of a fixmin file.

What keeps its values keeps its bytes. What changes (the folded output projection, queries with another scale) is
computed from the dequantised rows and stored in the type of its source, or in the one asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from ..convert.fold import Fold
from ..convert.gguf_file.formats import F16, F32, I8, Q4_0, bits_per_weight
from ..convert.gguf_file.readback import StoredModel
from ..convert.gguf_file.writer import TensorPlan
from ..convert.spec import CodeSpec, ModelSpec, TensorRecipe
from ..errors import ArgumentError
from ..quantization.requantize import Chooser, stored_rows
from .architecture import QKV, Architecture

_FLOATS = (F32, F16, GGMLQuantizationType.BF16)


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of the new file: its values as they are meant, float32, and how they are stored."""

    values: TensorRecipe
    plan: TensorPlan
    rounds_twice: bool = False  # other values than those of a quantised source, quantised again

    @property
    def name(self) -> str:
        return self.plan.name


def export_tensors(
    source: Path, stored: StoredModel, architecture: Architecture, outtype: str | None
) -> list[ExportTensor]:
    """All tensors in file order.

    outtype: one of quantization.requantize.TYPES but w8a8, or None for the types of the source.
    """
    return list(_Exporter(source, stored, architecture, outtype).tensors())


class _Exporter:
    def __init__(self, source: Path, stored: StoredModel, architecture: Architecture, outtype: str | None) -> None:
        self._source, self._stored, self._spec, self._arch = source, stored, stored.spec, architecture
        spec = stored.spec
        # The types that `fixmin quantize` gives the same matrices.
        self._chooser = outtype and Chooser(outtype, [], None, spec.block_count, spec.code.kind != "learned")
        head = spec.embedding_length // spec.head_count
        self._order = head_order(spec.rope_style, architecture.rope, spec.rope_dim, head)
        # llama.cpp's factor on q·k is 1/sqrt(head size); another one goes into the queries.
        self._scale = np.float64(spec.attention_scale) * np.sqrt(head)
        if abs(self._scale - 1) < 1e-6:  # 1/sqrt(head size) rounded to float32
            self._scale = np.float64(1)

    def tensors(self) -> Iterator[ExportTensor]:
        spec = self._spec
        yield self._embedding()
        for n in range(spec.block_count):
            block = f"blk.{n}."
            yield from self._norm(f"{block}attn_norm")
            fused = [[f"{block}{part}" for part in QKV]] if self._arch.fuses_qkv else [[f"{block}{p}"] for p in QKV]
            for parts in fused:
                name = f"{block}attn_qkv" if len(parts) > 1 else parts[0]
                yield self._heads(f"{name}.weight", parts)
                if any(self._wants_bias(part) for part in parts):
                    biases = [_scaled(self._turned(self._bias(part), part), self._scale_of(part)) for part in parts]
                    yield _vector(f"{name}.bias", _joined(biases))
            yield from self._linear(f"{block}attn_output")
            yield from self._norm(f"{block}ffn_norm")
            for part in ("ffn_gate", "ffn_up", "ffn_down"):
                if part != "ffn_gate" or spec.activation == "swiglu":
                    yield from self._linear(f"{block}{part}")
        yield from self._head()

    def _embedding(self) -> ExportTensor:
        if self._spec.code.kind == "learned":
            return self._matrix("token_embd.weight", self._spec.tensors["token_embd.weight"], ["token_embd.weight"])
        return code_table(self._spec)

    def _norm(self, name: str) -> Iterator[ExportTensor]:
        yield _vector(f"{name}.weight", self._spec.tensors[f"{name}.weight"])
        if self._arch.norm == "layernorm":
            yield _vector(f"{name}.bias", self._bias(name))

    def _linear(self, name: str) -> Iterator[ExportTensor]:
        yield self._matrix(f"{name}.weight", self._spec.tensors[f"{name}.weight"], [f"{name}.weight"])
        if self._wants_bias(name):
            yield _vector(f"{name}.bias", self._bias(name))

    def _heads(self, name: str, parts: Sequence[str]) -> ExportTensor:
        """q, k and v, or one of them: rows in the order in which llama.cpp rotates them."""
        weights = [f"{part}.weight" for part in parts]
        values = [
            _scaled(self._turned(self._spec.tensors[f"{part}.weight"], part), self._scale_of(part)) for part in parts
        ]
        same = all(self._scale_of(part) == 1 for part in parts)
        copies = [self._turned(self._bytes(f"{part}.weight"), part) for part in parts] if same else None
        return self._matrix(name, _joined(values), weights, copies)

    def _head(self) -> Iterator[ExportTensor]:
        tensors = self._spec.tensors
        if "output.bias" not in tensors or self._arch.output_bias:
            yield from self._norm("output_norm")
            yield self._matrix("output.weight", tensors["output.weight"], ["output.weight"])
            if "output.bias" in tensors:
                yield _vector("output.bias", tensors["output.bias"])
            return
        fold = Fold.of(tensors["output_norm.weight"].load(), self._bias("output_norm").load())
        yield _vector("output_norm.weight", _constant(fold.new_gain.astype(np.float32)))
        yield _vector("output_norm.bias", _constant(fold.new_bias.astype(np.float32)))
        W, b = tensors["output.weight"], tensors["output.bias"]
        sources = ("output.weight", "output.bias", "output_norm.weight")

        def rows(start: int, stop: int) -> NDArray[np.float32]:
            return fold.rows(W.load_rows(start, stop), b.load_rows(start, stop))

        yield self._matrix("output.weight", TensorRecipe(W.shape, sources, rows), ["output.weight"], None)

    # --- parts ---

    def _wants_bias(self, name: str) -> bool:
        return f"{name}.bias" in self._spec.tensors or name.rpartition(".")[2] in self._arch.required

    def _bias(self, name: str) -> TensorRecipe:
        """Zeros where the architecture demands a bias and the model has none."""
        found = self._spec.tensors.get(f"{name}.bias")
        return found or _constant(np.zeros(self._spec.tensors[f"{name}.weight"].shape[0], np.float32))

    def _scale_of(self, part: str) -> np.float64:
        return self._scale if part.endswith("attn_q") else np.float64(1)

    def _turned(self, recipe: TensorRecipe, part: str) -> TensorRecipe:
        if self._order is None or part.endswith("attn_v"):
            return recipe
        return _reordered(recipe, self._order)

    def _bytes(self, name: str) -> TensorRecipe:
        return stored_rows(self._source, name)

    def _type(self, name: str) -> GGMLQuantizationType:
        if self._chooser:
            return self._chooser.plan(name, self._spec.tensors[name]).type
        kind = self._stored.types[name]
        if kind == I8:
            raise ArgumentError(
                f"{self._source}: {name} is W8A8, which llama.cpp does not have: say in which type it shall be stored, "
                "such as --outtype q8_0"
            )
        return kind

    def _matrix(
        self,
        name: str,
        values: TensorRecipe,
        weights: Sequence[str],
        copies: Sequence[TensorRecipe] | None = (),
    ) -> ExportTensor:
        """A matrix from those of `weights`. copies: their bytes, if another order than theirs; None: new values."""
        have = {self._stored.types[weight] for weight in weights}
        kind = max((self._type(weight) for weight in weights), key=bits_per_weight)
        if copies is not None and have == {kind}:
            stored = _joined(copies or [self._bytes(weight) for weight in weights])
            return ExportTensor(values, TensorPlan(name, values.shape, kind, stored, is_stored=True))
        again = kind not in _FLOATS and not have <= set(_FLOATS)
        return ExportTensor(values, TensorPlan(name, values.shape, kind, values), rounds_twice=again)


# --- the table of codes ------------------------------------------------------------------------------------------


def code_table(spec: ModelSpec) -> ExportTensor:
    """The lifted codes as an embedding [V, D], exactly: Q4_0 where its blocks hold both values, else F16 or F32.

    A block of Q4_0 is 32 numbers d·(q - 8), 0 ≤ q ≤ 15, with one binary16 d: 4.5 bits for each, where F16 takes 16.
    """
    code, shape = spec.code, (spec.vocab_size, spec.embedding_length)

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        return code.lift_codes(code.codes(np.arange(start, stop)), spec.embedding_length)

    values = TensorRecipe(shape, (), rows)
    unit = q4_0_unit(code.values)
    if unit is None or spec.embedding_length % 32:
        pair = np.asarray(code.values, np.float32)
        exact = np.array_equal(pair.astype(np.float16), pair)
        return ExportTensor(values, TensorPlan("token_embd.weight", shape, F16 if exact else F32, values))
    blocks = TensorRecipe(shape, (), lambda start, stop: _q4_0_blocks(code, rows(start, stop), unit))
    return ExportTensor(values, TensorPlan("token_embd.weight", shape, Q4_0, blocks, is_stored=True))


def q4_0_unit(values: tuple[float, float]) -> float | None:
    """A binary16 number of which both values are a multiple from -8 to 7; None if there is none."""
    pair = np.asarray(values, np.float32).astype(np.float64)
    for steps in range(1, 9):
        for value in pair:
            for unit in (value / steps, -value / steps):
                if unit == 0 or float(np.float16(unit)) != unit:
                    continue
                counts = pair / unit
                if np.array_equal(counts, np.rint(counts)) and counts.min() >= -8 and counts.max() <= 7:
                    return float(unit)
    return 1.0 if not pair.any() else None


def _q4_0_blocks(code: CodeSpec, rows: NDArray[np.float32], unit: float) -> NDArray[np.uint8]:
    """float32 [n, D] -> bytes [n, D / 32 · 18]: d, then 16 bytes of which the low halves are the first 16 numbers."""
    q = (np.rint(rows / np.float32(unit)) + 8).astype(np.uint8).reshape(-1, 2, 16)
    blocks = np.empty((len(q), 18), np.uint8)
    blocks[:, :2] = np.array([unit], "<f2").view(np.uint8)
    blocks[:, 2:] = q[:, 0] | q[:, 1] << 4
    return blocks.reshape(len(rows), -1)


# --- recipes from recipes ----------------------------------------------------------------------------------------


def head_order(have: str, want: str, rope_dim: int, head: int) -> NDArray[np.intp] | None:
    """Which row of a head comes where, so that rotating in the other way turns the same pairs; None: as it is.

    "half" rotates element i with i + rope_dim / 2, "interleaved" 2i with 2i + 1; elements from rope_dim on stay.
    """
    if have == want:
        return None
    order = np.arange(head)
    if want == "half":
        order[:rope_dim] = [*range(0, rope_dim, 2), *range(1, rope_dim, 2)]
    else:
        order[:rope_dim] = np.arange(rope_dim).reshape(2, -1).T.ravel()
    return order


def _reordered(recipe: TensorRecipe, order: NDArray[np.intp]) -> TensorRecipe:
    """Rows of every head in another order."""
    head = len(order)

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        first, end = start // head * head, -(-stop // head) * head  # whole heads
        rows = recipe.read_rows(first, end)
        rows = rows.reshape(-1, head, *rows.shape[1:])[:, order].reshape(rows.shape)
        return rows[start - first : stop - first]

    return TensorRecipe(recipe.shape, recipe.sources, read_rows)


def _scaled(recipe: TensorRecipe, scale: np.float64) -> TensorRecipe:
    if scale == 1:
        return recipe
    return TensorRecipe(
        recipe.shape,
        recipe.sources,
        lambda start, stop: (recipe.load_rows(start, stop) * scale).astype(np.float32),
    )


def _joined(recipes: Sequence[TensorRecipe]) -> TensorRecipe:
    """Rows of one after those of the other."""
    if len(recipes) == 1:
        return recipes[0]
    ends = np.cumsum([recipe.shape[0] for recipe in recipes])

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        parts = []
        for recipe, end in zip(recipes, ends, strict=True):
            first = int(end) - recipe.shape[0]
            if start < end and stop > first:
                parts.append(recipe.read_rows(max(start, first) - first, min(stop, int(end)) - first))
        return np.concatenate(parts)

    shape = (int(ends[-1]), *recipes[0].shape[1:])
    return TensorRecipe(shape, tuple(s for recipe in recipes for s in recipe.sources), read_rows)


def _constant(values: NDArray[np.float32]) -> TensorRecipe:
    return TensorRecipe(values.shape, (), lambda start, stop: values[start:stop])


def _vector(name: str, values: TensorRecipe) -> ExportTensor:
    return ExportTensor(values, TensorPlan(name, values.shape, F32, values))
