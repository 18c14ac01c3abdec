"""Write the weights of a FixMin checkpoint as a model that other engines know: GPT-NeoX, with the codes as a table.

    python bench/export_gptneox.py CHECKPOINT_DIR OUT.gguf --outtype q8_0    # for llama.cpp
    python bench/export_gptneox.py CHECKPOINT_DIR OUT_DIR --outtype hf       # for what converts from transformers

No other engine has computed codes, so the V x D table of lifted codes is materialised: one row of it is read per
token, which costs memory and no time. GPT-NeoX has no bias on the output projection: it is left out, so logits differ
from fixmin's by exactly that bias (and, in llama.cpp, by its tanh formula for GELU).
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from fixmin_cpp.convert.gguf_file.formats import OUT_TYPES, quantize_rows
from fixmin_cpp.convert.resolve import resolve
from fixmin_cpp.convert.spec import ModelSpec

F32 = NDArray[np.float32]

# Name of a linear layer or norm within a block: in a fixmin or llama.cpp file -> in Hugging Face's GPTNeoX.
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LINEAR = {"attn_output": "attention.dense", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}


def obstacles(spec: ModelSpec) -> list[str]:
    """What of this model GPT-NeoX cannot represent; empty if it can all be done."""
    head_dim = spec.embedding_length // spec.head_count
    facts = {
        "a norm other than LayerNorm": spec.norm != "layernorm",
        "an activation other than GELU": spec.activation != "gelu",
        "rotation of neighbouring elements": spec.rope_style != "half",
        "fewer key than query heads": spec.head_count != spec.head_count_kv,
        "an attention scale other than 1/sqrt(head size)": not np.isclose(spec.attention_scale, head_dim**-0.5),
        "a learned embedding": spec.code.kind == "learned",
    }
    return [name for name, true in facts.items() if true]


@dataclass
class Weights:
    """Tensors of a spec by their fixmin names; biases that the model does not have are zeros."""

    spec: ModelSpec

    def matrix(self, name: str) -> F32:
        return self.spec.tensors[f"{name}.weight"].load()

    def bias(self, name: str) -> F32:
        if f"{name}.bias" in self.spec.tensors:
            return self.spec.tensors[f"{name}.bias"].load()
        return np.zeros(self.spec.tensors[f"{name}.weight"].shape[0], np.float32)

    def table(self) -> F32:
        """The lifted code of every id, [V, D]."""
        code = self.spec.code
        return code.lift_codes(code.codes(np.arange(self.spec.vocab_size)), self.spec.embedding_length)


def write_gguf(spec: ModelSpec, out: Path, outtype: str) -> None:
    weights, form = Weights(spec), OUT_TYPES[outtype]
    writer = gguf.GGUFWriter(str(out), "gptneox")
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.embedding_length)
    writer.add_block_count(spec.block_count)
    writer.add_feed_forward_length(spec.feed_forward_length)
    writer.add_rope_dimension_count(spec.rope_dim)
    writer.add_rope_freq_base(spec.rope_base)
    writer.add_head_count(spec.head_count)
    writer.add_parallel_residual(False)
    writer.add_layer_norm_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(form.file_type)

    def matrix(name: str, values: F32) -> None:
        writer.add_tensor(f"{name}.weight", quantize_rows(np.ascontiguousarray(values), form.ggml), raw_dtype=form.ggml)

    writer.add_tensor("token_embd.weight", weights.table().astype(np.float16))
    for block in (f"blk.{i}" for i in range(spec.block_count)):
        for name in NORMS:
            writer.add_tensor(f"{block}.{name}.weight", weights.matrix(f"{block}.{name}"))
            writer.add_tensor(f"{block}.{name}.bias", weights.bias(f"{block}.{name}"))
        qkv = [f"{block}.attn_{x}" for x in "qkv"]
        matrix(f"{block}.attn_qkv", np.concatenate([weights.matrix(name) for name in qkv]))
        writer.add_tensor(f"{block}.attn_qkv.bias", np.concatenate([weights.bias(name) for name in qkv]))
        for name in LINEAR:
            matrix(f"{block}.{name}", weights.matrix(f"{block}.{name}"))
            writer.add_tensor(f"{block}.{name}.bias", weights.bias(f"{block}.{name}"))
    writer.add_tensor("output_norm.weight", weights.matrix("output_norm"))
    writer.add_tensor("output_norm.bias", weights.bias("output_norm"))
    matrix("output", weights.matrix("output"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hf_tensors(spec: ModelSpec) -> Iterator[tuple[str, F32]]:
    """Name and values of every tensor of GPTNeoXForCausalLM."""
    weights = Weights(spec)
    yield "gpt_neox.embed_in.weight", weights.table()
    for i in range(spec.block_count):
        ours, theirs = f"blk.{i}.", f"gpt_neox.layers.{i}."
        for name, other in (NORMS | LINEAR).items():
            yield f"{theirs}{other}.weight", weights.matrix(ours + name)
            yield f"{theirs}{other}.bias", weights.bias(ours + name)
        # Rows of the fused projection: q, k and v of the first head, then of the second, ...
        heads = (spec.head_count, 1, -1)
        for part, load in (("weight", weights.matrix), ("bias", weights.bias)):
            qkv = [load(f"{ours}attn_{x}") for x in "qkv"]
            fused = np.concatenate([values.reshape(heads) for values in qkv], axis=1)
            yield f"{theirs}attention.query_key_value.{part}", fused.reshape(-1, *qkv[0].shape[1:])
    yield "gpt_neox.final_layer_norm.weight", weights.matrix("output_norm")
    yield "gpt_neox.final_layer_norm.bias", weights.bias("output_norm")
    yield "embed_out.weight", weights.matrix("output")


def write_hf(spec: ModelSpec, out: Path) -> None:
    """config.json, model.safetensors (float32, held in memory) and a tokenizer with the word "t<id>" for each id."""
    rotated = spec.rope_dim / (spec.embedding_length // spec.head_count)
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embedding_length,
        "num_hidden_layers": spec.block_count,
        "num_attention_heads": spec.head_count,
        "intermediate_size": spec.feed_forward_length,
        "max_position_embeddings": spec.context_length,
        "hidden_act": "gelu",
        # As transformers 4 spells it, then as 5 does.
        "rotary_pct": rotated,
        "rotary_emb_base": spec.rope_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rope_base,
            "partial_rotary_factor": rotated,
        },
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": False,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    # safetensors writes memory as it lies there: an array in another order than C's would be shuffled.
    tensors = {name: np.ascontiguousarray(values) for name, values in hf_tensors(spec)}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    words = {f"t{i}": i for i in range(spec.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(out / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t0", "eos_token": "t0"}
    (out / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--outtype", choices=[*OUT_TYPES, "hf"], default="q8_0")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's code to find out more")
    arguments = parser.parse_args()
    with resolve(arguments.checkpoint, trust_remote_code=arguments.trust_remote_code) as resolved:
        if found := obstacles(resolved.spec):
            parser.error(f"GPT-NeoX cannot represent this checkpoint: it has {', '.join(found)}")
        if arguments.outtype == "hf":
            write_hf(resolved.spec, arguments.out)
        else:
            write_gguf(resolved.spec, arguments.out, arguments.outtype)


if __name__ == "__main__":
    main()
