"""Small models of every kind that an export knows: which architecture of llama.cpp each of them becomes."""

from typing import Any

_GPT: dict[str, Any] = {"activation": "gelu_tanh"}
_SWIGLU: dict[str, Any] = {"activation": "swiglu", "norm": "rmsnorm", "biases": set()}

#: Name -> architecture, and arguments of gguf_factory.make_model.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "affine": ("gptneox", _GPT),
    "erf": ("gptneox", {"activation": "gelu"}),
    "no biases": ("gptneox", _GPT | {"biases": set(), "norm_bias": False}),
    "no bias of the output": ("gptneox", _GPT | {"biases": {"attn_output", "ffn_up"}}),
    "all biases": ("gptneox", _GPT | {"biases": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "output"}}),
    "table": ("gptneox", _GPT | {"code_kind": "table"}),
    "learned": ("gptneox", _GPT | {"code_kind": "learned"}),
    "values": ("gptneox", _GPT | {"values": (-1.0, 1.0), "lift": "interleave", "vocab_size": 16}),
    "odd values": ("gptneox", _GPT | {"values": (0.1, 0.7)}),
    "odd width": ("gptneox", _GPT | {"embedding_length": 40, "head_count": 2}),
    "grouped": ("gptneox", _GPT | {"head_count_kv": 2}),
    "interleaved": ("gptneox", _GPT | {"rope_style": "interleaved", "biases": {"attn_q", "attn_k", "output"}}),
    "part rotated": ("gptneox", _GPT | {"rope_style": "interleaved", "rope_dim": 8}),
    "scale": ("gptneox", _GPT | {"scale": 0.1, "rope_base": 500.0, "norm_eps": 1e-3, "biases": {"attn_q"}}),
    "mixed": ("starcoder2", _GPT | {"weight_types": {"blk.1.attn_v": "F16"}, "biases": {"attn_k", "output"}}),
    "LayerNorm, SwiGLU": ("stablelm", {"activation": "swiglu", "biases": {"attn_q", "output"}, "rope_dim": 8}),
    "RMSNorm": ("qwen2", _SWIGLU | {"biases": {"attn_v", "output"}, "rope_style": "interleaved"}),
    "RMSNorm with biases": ("llama", _SWIGLU | {"biases": {"attn_output", "attn_k", "ffn_gate", "ffn_up", "ffn_down"}}),
}
