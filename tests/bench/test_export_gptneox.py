"""The GPT-NeoX export computes what the checkpoint computes: the reference model is the judge."""

import gguf
import numpy as np
import pytest
import torch
from export_gptneox import obstacles, write_gguf, write_hf
from make_checkpoint import write_checkpoint
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from fixmin_cpp.convert.resolve import resolve
from fixmin_cpp.reference.configuration_fixmin import FixMinConfig
from fixmin_cpp.reference.modeling_fixmin import FixMinForCausalLM

IDS = torch.tensor([[3, 0, 149, 7, 7, 20, 81, 2, 111, 54]])


def checkpoint(folder, **options) -> None:
    shape = {"vocab_size": 150, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FixMinConfig(**shape, max_position_embeddings=32, code_kind="affine", **options)
    write_checkpoint(folder, config)


@pytest.mark.parametrize(
    "options",
    [
        {"lm_head_bias": False},
        {"lm_head_bias": True, "qkv_bias": True, "attn_out_bias": True, "code_lift": "interleave", "rope_dim": 12},
        {"lm_head_bias": False, "mlp_bias": False, "norm_bias": False, "norm_eps": 1e-3, "rope_theta": 500.0,
         "code_values": (-0.5, 2.0)},
    ],
    ids=["published", "all biases", "no biases"],
)  # fmt: skip
def test_logits_of_the_hugging_face_export(tmp_path, options):
    checkpoint(tmp_path / "own", **options)
    with resolve(tmp_path / "own") as resolved:
        assert obstacles(resolved.spec) == []
        write_hf(resolved.spec, tmp_path / "neox")
    own = FixMinForCausalLM.from_pretrained(tmp_path / "own").eval()
    neox = AutoModelForCausalLM.from_pretrained(tmp_path / "neox").eval()
    assert isinstance(neox, GPTNeoXForCausalLM)
    with torch.no_grad():
        expected, found = own(IDS).logits, neox(IDS).logits
        if own.lm_head.bias is not None:
            expected = expected - own.lm_head.bias  # what GPT-NeoX does not have
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gguf_export_holds_the_same_tensors(tmp_path):
    checkpoint(tmp_path / "own", qkv_bias=True)
    with resolve(tmp_path / "own") as resolved:
        write_gguf(resolved.spec, tmp_path / "neox.gguf", "f32")
    state = FixMinForCausalLM.from_pretrained(tmp_path / "own").state_dict()
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "neox.gguf").tensors}
    for i in range(2):
        qkv = [state[f"model.layers.{i}.attn_{x}.weight"].numpy() for x in "qkv"]
        assert np.array_equal(found[f"blk.{i}.attn_qkv.weight"], np.concatenate(qkv))
        assert np.array_equal(found[f"blk.{i}.ffn_up.bias"], state[f"model.layers.{i}.ffn_up.bias"].numpy())
    assert np.array_equal(found["output.weight"], state["lm_head.weight"].numpy())
    # The row of id 5 is A times its bits, plus b, repeated to the width.
    bits = (5 >> np.arange(8)) & 1
    code = (state["model.code.matrix"].numpy().astype(int) @ bits + state["model.code.shift"].numpy()) % 2
    assert np.array_equal(found["token_embd.weight"][5], np.tile(code, 12).astype(np.float16))


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"norm_type": "rmsnorm"}, "LayerNorm"),
        ({"activation": "swiglu"}, "GELU"),
        ({"rope_style": "interleaved"}, "neighbouring"),
        ({"num_key_value_heads": 2}, "fewer key"),
        ({"attn_scale": 0.5}, "attention scale"),
    ],
)
def test_what_gpt_neox_cannot_represent_is_named(tmp_path, options, obstacle):
    checkpoint(tmp_path / "own", **options)
    with resolve(tmp_path / "own") as resolved:
        assert any(obstacle in text for text in obstacles(resolved.spec))
