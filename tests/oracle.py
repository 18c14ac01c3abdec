"""The model of docs/design.md in float64 NumPy, from a small GGUF file: no fold, no cache, nothing shared with csrc."""

import math
from pathlib import Path

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import ArrayLike, NDArray

erf = np.vectorize(math.erf, otypes=[np.float64])


def _values(tensor: ReaderTensor, scales: ReaderTensor | None) -> NDArray:
    """float64; of a W8A8 matrix the codes times the scales of their rows."""
    if scales is None:
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    return tensor.data.astype(np.float64) * scales.data.astype(np.float64)[:, None]


class Oracle:
    def __init__(self, path: str | Path) -> None:
        reader = GGUFReader(path)
        self.meta = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        self.code_rows = np.array(stored.pop("token_code.weight").data) if "token_code.weight" in stored else None
        self.tensors = {name: _values(t, stored.get(f"{name}_scale")) for name, t in stored.items()}

    def key(self, name: str):
        return self.meta["fixmin." + name]

    def embed(self, ids: NDArray) -> NDArray:
        """[T] -> x of layer 0, [T, D]."""
        if self.key("code.kind") == "learned":
            return self.tensors["token_embd.weight"][ids]
        width, length = self.key("code.width"), self.key("embedding_length")
        if self.key("code.kind") == "table":
            bits = np.unpackbits(self.code_rows.view(np.uint8)[ids], axis=1, bitorder="little")[:, :width]
        else:
            matrix = np.array(self.key("code.affine_matrix"), dtype=np.int64).reshape(width, width)
            plain = (ids[:, None] >> np.arange(width)) & 1
            bits = (plain @ matrix.T + np.array(self.key("code.affine_shift"))) % 2
        n = np.arange(length)
        index = n % width if self.key("code.lift") == "tile" else n // (length // width)
        return np.array(self.key("code.values"))[bits[:, index]]

    def norm(self, x: NDArray, name: str) -> NDArray:
        if "fixmin.attention.layer_norm_epsilon" in self.meta:
            x = x - x.mean(axis=-1, keepdims=True)
        eps = next(self.meta[key] for key in self.meta if key.endswith("_epsilon"))
        y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self.tensors[name + ".weight"]
        return y + self.tensors.get(name + ".bias", 0.0)

    def linear(self, x: NDArray, name: str) -> NDArray:
        return x @ self.tensors[name + ".weight"].T + self.tensors.get(name + ".bias", 0.0)

    def rope(self, x: NDArray) -> NDArray:
        """[T, heads, d], positions 0..T-1; the first rope dimensions of each head are rotated."""
        half = self.key("rope.dimension_count") // 2
        angle = np.arange(len(x))[:, None, None] * self.key("rope.freq_base") ** (-np.arange(half) / max(half, 1))
        pairs = (slice(0, half), slice(half, 2 * half)), (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        first, second = pairs[self.key("rope.style") == "interleaved"]
        a, b, y = x[..., first], x[..., second], x.copy()
        y[..., first] = a * np.cos(angle) - b * np.sin(angle)
        y[..., second] = a * np.sin(angle) + b * np.cos(angle)
        return y

    def attention(self, h: NDArray, block: str) -> NDArray:
        n_tokens, heads, kv_heads = len(h), self.key("attention.head_count"), self.key("attention.head_count_kv")
        q, k, v = (self.linear(h, block + name) for name in ("attn_q", "attn_k", "attn_v"))
        q = self.rope(q.reshape(n_tokens, heads, -1))
        k = self.rope(k.reshape(n_tokens, kv_heads, -1)).repeat(heads // kv_heads, axis=1)
        v = v.reshape(n_tokens, kv_heads, -1).repeat(heads // kv_heads, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) * self.key("attention.scale")
        scores[:, np.triu(np.ones((n_tokens, n_tokens), dtype=bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(axis=-1, keepdims=True), v)
        return self.linear(mixed.reshape(n_tokens, -1), block + "attn_output")

    def feed_forward(self, h: NDArray, block: str) -> NDArray:
        up, kind = self.linear(h, block + "ffn_up"), self.key("activation")
        if kind == "swiglu":
            gate = self.linear(h, block + "ffn_gate")
            return self.linear(gate / (1.0 + np.exp(-gate)) * up, block + "ffn_down")
        tanh_inner = math.sqrt(2.0 / math.pi) * (up + 0.044715 * up**3)
        curve = np.tanh(tanh_inner) if kind == "gelu_tanh" else erf(up / math.sqrt(2.0))
        return self.linear(0.5 * up * (1.0 + curve), block + "ffn_down")


def hidden_states(path: str | Path, ids: ArrayLike) -> list[NDArray]:
    """block_count + 1 times [T, D]: the lifted codes, then each block's output (the last one before output_norm)."""
    model = Oracle(path)
    states = [model.embed(np.asarray(ids, dtype=np.int64))]
    for n in range(model.key("block_count")):
        block, x = f"blk.{n}.", states[-1]
        x = x + model.attention(model.norm(x, block + "attn_norm"), block)
        states.append(x + model.feed_forward(model.norm(x, block + "ffn_norm"), block))
    return states


def forward(path: str | Path, ids: ArrayLike) -> NDArray:
    """Logits [T, V] of one sequence."""
    model = Oracle(path)
    return model.linear(model.norm(hidden_states(path, ids)[-1], "output_norm"), "output")
