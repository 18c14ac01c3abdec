"""What llama.cpp computes from a file, in float64 NumPy: its graphs of gptneox, starcoder2, stablelm, qwen2 and llama.

Written from src/models/*.cpp, with the keys and tensors that those read. They differ in the norm, in which biases they
add, in how they rotate, and in whether q, k and v are one matrix; everything else is one graph.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from .. import _core
from ..convert.gguf_file.readback import tensor_recipe
from ..convert.spec import TensorRecipe

F64 = NDArray[np.float64]

_ROWS = 4096  # of a matrix in float64 at a time: 32 MB at width 1024
_erf = np.frompyfunc(math.erf, 1, 1)


def gelu_tanh(x: F64) -> F64:
    """llama.cpp's GELU, which it reads from a table in F16."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: F64) -> F64:
    """The GELU that its name stands for."""
    return 0.5 * x * (1 + np.asarray(_erf(x / math.sqrt(2)), np.float64))


@dataclass(frozen=True)
class Weights:
    """Keys and tensors of an exported model."""

    keys: dict[str, Any]
    tensors: dict[str, TensorRecipe]

    @classmethod
    def of_file(cls, path: Path) -> "Weights":
        """What a GGUF file holds."""
        file = _core.GgufFile(str(path))
        recipes = {t.name: tensor_recipe(path, t, GGMLQuantizationType[t.type]) for t in file.tensors}
        return cls(file.metadata, recipes)


def logits(
    weights: Weights, prompts: Sequence[NDArray[np.uint32]], gelus: Sequence[Callable[[F64], F64]] = (gelu_tanh,)
) -> list[list[F64]]:
    """For each GELU the logits [T, V] of each prompt of ids [T].

    All of them in one pass: reading a matrix takes longer than multiplying with it. An architecture without a GELU
    gives the same for each.
    """
    graph = _Graph(weights, prompts)
    states = [graph.embedded] * len(gelus)
    for n in range(graph.key("block_count")):
        states = graph.block(f"blk.{n}.", states, gelus)
    normed = [graph.norm(x, "output_norm") for x in states]
    return [graph.by_prompt(y) for y in graph.linear(normed, "output")]


class _Graph:
    def __init__(self, weights: Weights, prompts: Sequence[NDArray[np.uint32]]) -> None:
        self._keys, self._tensors = weights.keys, weights.tensors
        self.arch = self._keys["general.architecture"]
        ends = np.cumsum([len(ids) for ids in prompts])
        self._slices = [slice(end - len(ids), end) for ids, end in zip(prompts, ends, strict=True)]
        rows = self._tensors["token_embd.weight"]
        ids, back = np.unique(np.concatenate(prompts), return_inverse=True)
        self.embedded = np.concatenate([rows.load_rows(int(i), int(i) + 1) for i in ids]).astype(np.float64)[back]
        self._cos, self._sin = self._angles(max(map(len, prompts)))

    def key(self, name: str) -> Any:
        return self._keys[f"{self.arch}.{name}"]

    def by_prompt(self, rows: F64) -> list[F64]:
        return [rows[part] for part in self._slices]

    def block(self, block: str, states: list[F64], gelus: Sequence[Callable[[F64], F64]]) -> list[F64]:
        """[T, D] for each GELU -> the same after one block."""
        normed = [self.norm(x, f"{block}attn_norm") for x in states]
        mixed = [self._attention(qkv) for qkv in zip(*self._qkv(normed, block), strict=True)]
        states = [x + y for x, y in zip(states, self.linear(mixed, f"{block}attn_output"), strict=True)]
        normed = [self.norm(x, f"{block}ffn_norm") for x in states]
        inner = self.linear(normed, f"{block}ffn_up")
        if f"{block}ffn_gate.weight" in self._tensors:
            gates = self.linear(normed, f"{block}ffn_gate")
            inner = [gate / (1 + np.exp(-gate)) * up for gate, up in zip(gates, inner, strict=True)]
        else:
            inner = [gelu(x) for gelu, x in zip(gelus, inner, strict=True)]
        return [x + y for x, y in zip(states, self.linear(inner, f"{block}ffn_down"), strict=True)]

    def norm(self, x: F64, name: str) -> F64:
        gain = self._tensors[f"{name}.weight"].load().astype(np.float64)
        if self.arch in ("qwen2", "llama"):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.key("attention.layer_norm_rms_epsilon")) * gain
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.key("attention.layer_norm_epsilon"))
        return x * gain + self._tensors[f"{name}.bias"].load()

    def linear(self, inputs: Sequence[F64], name: str) -> list[F64]:
        """[T, in] -> [T, out] for each."""
        recipe = self._tensors[f"{name}.weight"]
        x, ends = np.concatenate(inputs), np.cumsum([len(y) for y in inputs])
        out = np.empty((len(x), recipe.shape[0]))
        for start in range(0, recipe.shape[0], _ROWS):
            stop = min(start + _ROWS, recipe.shape[0])
            out[:, start:stop] = x @ recipe.load_rows(start, stop).astype(np.float64).T
        if f"{name}.bias" in self._tensors:
            out += self._tensors[f"{name}.bias"].load()
        return np.split(out, ends[:-1])

    def _qkv(self, inputs: Sequence[F64], block: str) -> list[list[F64]]:
        if f"{block}attn_qkv.weight" not in self._tensors:
            return [self.linear(inputs, f"{block}attn_{part}") for part in "qkv"]
        wide = self.key("embedding_length")
        ends = [wide, wide + wide // self.key("attention.head_count") * self.key("attention.head_count_kv")]
        parts = [np.split(y, ends, axis=1) for y in self.linear(inputs, f"{block}attn_qkv")]
        return [list(column) for column in zip(*parts, strict=True)]

    def _angles(self, length: int) -> tuple[F64, F64]:
        half = self.key("rope.dimension_count") // 2
        frequencies = float(self.key("rope.freq_base")) ** (-np.arange(half) / max(half, 1))
        angles = np.arange(length)[:, None, None] * frequencies
        return np.cos(angles), np.sin(angles)

    def _rotated(self, x: F64) -> F64:
        """[T, heads, d] from position 0 on."""
        half, y = self._cos.shape[-1], x.copy()
        first, second = slice(0, half), slice(half, 2 * half)
        if self.arch == "llama":  # LLAMA_ROPE_TYPE_NORM; the others: NEOX
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        cos, sin = self._cos[: len(x)], self._sin[: len(x)]
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., first] * sin + x[..., second] * cos
        return y

    def _attention(self, qkv: Sequence[F64]) -> F64:
        heads, kv_heads = self.key("attention.head_count"), self.key("attention.head_count_kv")
        mixed = []
        for part in self._slices:
            n = part.stop - part.start
            q, k, v = (x[part].reshape(n, h, -1) for x, h in zip(qkv, (heads, kv_heads, kv_heads), strict=True))
            q, k = self._rotated(q), self._rotated(k)
            k, v = (x.repeat(heads // kv_heads, axis=1) for x in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
            scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1))
        return np.concatenate(mixed)
