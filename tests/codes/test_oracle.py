"""The float64 oracle against PyTorch: the same GGUF weights, loaded into `reference/` in float64."""

import gguf_factory
import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fixmin_cpp.reference.configuration_fixmin import FixMinConfig  # noqa: E402
from fixmin_cpp.reference.modeling_fixmin import FixMinForCausalLM  # noqa: E402

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
MLP = frozenset({"ffn_gate", "ffn_up", "ffn_down"})

MODELS = {
    "defaults": {},
    "identity_code": {"matrix": np.eye(7), "shift": np.zeros(7), "vocab_size": 128},
    "table_interleaved": {"code_kind": "table", "width": 16, "vocab_size": 90, "lift": "interleave"},
    "table_three_bytes": {"code_kind": "table", "width": 17, "lift": "tile"},
    "learned": {"code_kind": "learned"},
    "signed_values": {"values": (-0.5, 2.0), "lift": "interleave", "width": 8},
    "swiglu_rms_grouped": {"activation": "swiglu", "norm": "rmsnorm", "head_count_kv": 2, "biases": frozenset()},
    "gelu_tanh_all_biases": {"activation": "gelu_tanh", "biases": gguf_factory.ALL_BIASES},
    "swiglu_all_biases": {"activation": "swiglu", "biases": gguf_factory.ALL_BIASES, "norm_bias": False},
    "rope_interleaved_partial": {"rope_style": "interleaved", "rope_dim": 6, "rope_base": 500.0},
    "rope_half_partial": {"rope_dim": 10, "rope_base": 5e5, "head_count_kv": 1},
    "no_rope_other_scale_eps": {"rope_dim": 0, "scale": 0.1, "norm_eps": 0.02, "biases": QKV},
    "q8_0": {"weight_type": "Q8_0"},
    "q4_0": {"weight_type": "Q4_0"},
    "bf16": {"weight_type": "BF16", "biases": {"attn_output"}},
    "f16": {"weight_type": "F16", "activation": "swiglu", "biases": MLP},
}


def torch_model(path):
    """The reference model with a GGUF's weights, dequantised, in float64."""
    source = oracle.Oracle(path)
    key, tensors = source.key, source.tensors
    rms = "fixmin.attention.layer_norm_rms_epsilon" in source.meta
    kind = key("code.kind")
    coded = {}
    if kind != "learned":
        coded = {
            "code_width": key("code.width"),
            "code_lift": key("code.lift"),
            "code_values": key("code.values"),
        }
    config = FixMinConfig(
        vocab_size=key("vocab_size"),
        hidden_size=key("embedding_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=key("attention.head_count_kv"),
        intermediate_size=key("feed_forward_length"),
        max_position_embeddings=key("context_length"),
        norm_type="rmsnorm" if rms else "layernorm",
        norm_eps=key("attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"),
        norm_bias="output_norm.bias" in tensors,
        activation=key("activation"),
        rope_style=key("rope.style"),
        rope_dim=key("rope.dimension_count"),
        rope_theta=key("rope.freq_base"),
        attn_scale=key("attention.scale"),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        attn_out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        lm_head_bias="output.bias" in tensors,
        code_kind=kind,
        **coded,
    )
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("output."):
            name = "lm_head" + name.removeprefix("output")
        else:
            name = "model." + name.replace("blk.", "layers.")
        state[name] = torch.from_numpy(tensor)
    width = config.code_width
    if kind == "affine":
        matrix = np.array(key("code.affine_matrix"), dtype=np.uint8).reshape(width, width)
        state["model.code.matrix"] = torch.from_numpy(matrix)
        state["model.code.shift"] = torch.tensor(key("code.affine_shift"), dtype=torch.uint8)
    elif kind == "table":
        packed = source.code_rows.view(np.uint8)
        rows = np.stack([packed[:, i // 8] >> (i % 8) & 1 for i in range(width)], axis=1)
        state["model.code.table"] = torch.from_numpy(rows)
    model = FixMinForCausalLM(config).double().eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_oracle_agrees_with_pytorch(name, tmp_path):
    options = {"embedding_length": 64, "head_count": 4, "vocab_size": 100} | MODELS[name]
    path = gguf_factory.make_model(tmp_path / "model.gguf", seed=3, **options)
    ids = np.random.default_rng(4).integers(0, options["vocab_size"], 12)
    logits = oracle.forward(path, ids)
    states = oracle.hidden_states(path, ids)
    with torch.inference_mode():
        output = torch_model(path)(torch.from_numpy(ids)[None], output_hidden_states=True, use_cache=False)
    expected = output.logits[0].numpy()
    assert logits.shape == (12, options["vocab_size"])
    # The reference makes its rotary angles in float64 too, so what is left is the order of sums.
    assert np.linalg.norm(logits - expected) <= 1e-11 * np.linalg.norm(expected)
    # PyTorch gives the input of every block; its last entry is normed, ours is not.
    assert len(states) == len(output.hidden_states) == 3
    for ours, theirs in zip(states[:-1], output.hidden_states[:-1], strict=True):
        assert np.linalg.norm(ours - theirs[0].numpy()) <= 1e-11 * np.linalg.norm(ours)


def test_factory_is_deterministic(tmp_path):
    first = gguf_factory.make_model(tmp_path / "a.gguf", seed=1).read_bytes()
    assert first == gguf_factory.make_model(tmp_path / "b.gguf", seed=1).read_bytes()
    assert first != gguf_factory.make_model(tmp_path / "c.gguf", seed=2).read_bytes()
