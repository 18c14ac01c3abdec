"""Exported files in llama.cpp itself."""

from pathlib import Path
from typing import Any

import llama_peer
import numpy as np
import oracle
import pytest
from gguf_factory import make_model

from fixmin_cpp.export.llama_cpp import export

pytestmark = [pytest.mark.external, llama_peer.needs_python]

PUBLISHED = Path(__file__).parents[3] / "shared" / "tokenizers" / "bvv241-2-3" / "tokenizer.json"

# Architecture, and the models that it is chosen for.
GPT: dict[str, Any] = {"activation": "gelu_tanh"}
SWIGLU: dict[str, Any] = {"activation": "swiglu", "norm": "rmsnorm", "biases": set()}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "affine": ("gptneox", GPT),
    "no biases": ("gptneox", GPT | {"biases": set(), "norm_bias": False}),
    "all biases": ("gptneox", GPT | {"biases": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "output"}}),
    "table": ("gptneox", GPT | {"code_kind": "table"}),
    "learned": ("gptneox", GPT | {"code_kind": "learned"}),
    "values": ("gptneox", GPT | {"values": (-1.0, 1.0), "lift": "interleave", "vocab_size": 16}),
    "odd values": ("gptneox", GPT | {"values": (0.1, 0.7)}),
    "grouped": ("gptneox", GPT | {"head_count_kv": 2}),
    "interleaved": ("gptneox", GPT | {"rope_style": "interleaved", "biases": {"attn_q", "attn_k", "output"}}),
    "part rotated": ("gptneox", GPT | {"rope_style": "interleaved", "rope_dim": 8}),
    "scale": ("gptneox", GPT | {"scale": 0.1, "rope_base": 500.0, "norm_eps": 1e-3}),
    "mixed": ("starcoder2", GPT | {"weight_types": {"blk.1.attn_v": "F16"}, "biases": {"attn_k", "output"}}),
    "LayerNorm, SwiGLU": ("stablelm", {"activation": "swiglu", "biases": {"attn_q", "output"}, "rope_dim": 8}),
    "RMSNorm": ("qwen2", SWIGLU | {"biases": {"attn_v", "output"}, "rope_style": "interleaved"}),
    "RMSNorm with biases": ("llama", SWIGLU | {"biases": {"attn_output", "attn_k", "ffn_gate", "ffn_up", "ffn_down"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_model_does(case: str, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    source = make_model(tmp_path / "in.gguf", **options)
    report = export(source, tmp_path / "out.gguf")
    assert report.architecture == architecture
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, options.get("vocab_size", 100), n) for n in (1, 5, 40)]
    for ours, ids in zip(llama_peer.logits(report.path, prompts), prompts, strict=True):
        true = oracle.forward(source, ids)
        # llama.cpp reads GELU from a table in F16 and keeps probabilities of attention in F32: measured 2e-4 and 2e-6.
        limit = 1e-3 if "gelu" in options["activation"] else 1e-5
        assert np.linalg.norm(ours - true) < limit * np.linalg.norm(true)
