"""Write the weights of a FixMin checkpoint as a GGUF that llama.cpp runs: architecture gptneox, codes as a table.

    python bench/export_gptneox.py CHECKPOINT_DIR OUT.gguf --outtype q8_0

llama.cpp has no computed codes, so the V x D table of lifted codes is materialised (read one row per token: it costs
memory, not time). It computes GELU by the tanh formula from a float16 table, and gptneox has no bias on the output
projection, so the logits are not those of fixmin. For LayerNorm, GELU, half-split rope over whole heads
and as many key as query heads only.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np

from fixmin_cpp.convert.quantize import OUT_TYPES, quantize_rows
from fixmin_cpp.convert.resolve import resolve


def lifted_codes(spec) -> np.ndarray:
    """float16 [V, D]: what `CodeMap` and the lift give for every id."""
    bits = (np.arange(spec.vocab_size)[:, None] >> np.arange(spec.code.width)) & 1
    codes = (bits @ spec.code.matrix.T.astype(np.int64) + spec.code.shift) & 1
    d, k = spec.embedding_length, spec.code.width
    index = np.arange(d) % k if spec.code.lift == "tile" else np.arange(d) // (d // k)
    return np.array(spec.code.values, np.float16)[codes[:, index]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--outtype", choices=OUT_TYPES, default="q8_0")
    arguments = parser.parse_args()

    with resolve(arguments.checkpoint, trust_remote_code=True) as resolved:
        spec = resolved.spec
        plain = spec.norm == "layernorm" and spec.activation.startswith("gelu") and spec.rope_style == "half"
        if not plain or spec.code.kind != "affine" or spec.head_count != spec.head_count_kv:
            parser.error("llama.cpp's gptneox cannot represent this checkpoint")
        d = spec.embedding_length
        outtype = OUT_TYPES[arguments.outtype]
        writer = gguf.GGUFWriter(str(arguments.out), "gptneox")
        writer.add_context_length(spec.context_length)
        writer.add_embedding_length(d)
        writer.add_block_count(spec.block_count)
        writer.add_feed_forward_length(spec.feed_forward_length)
        writer.add_rope_dimension_count(spec.rope_dim)
        writer.add_head_count(spec.head_count)
        writer.add_parallel_residual(False)
        writer.add_layer_norm_eps(spec.norm_eps)
        writer.add_vocab_size(spec.vocab_size)
        writer.add_tokenizer_model("none")
        writer.add_file_type(outtype.file_type)

        def tensor(name: str, default: float | None = None, n: int = d) -> np.ndarray:
            if name not in spec.tensors and default is not None:
                return np.full(n, default, np.float32)
            return spec.tensors[name].load()

        def matrix(name: str, weights: np.ndarray) -> None:
            raw = quantize_rows(np.ascontiguousarray(weights), outtype.ggml)
            writer.add_tensor(name, raw, raw_dtype=outtype.ggml)

        def norm(name: str) -> None:
            writer.add_tensor(f"{name}.weight", tensor(f"{name}.weight"))
            writer.add_tensor(f"{name}.bias", tensor(f"{name}.bias", 0.0))

        writer.add_tensor("token_embd.weight", lifted_codes(spec))
        for i in range(spec.block_count):
            b = f"blk.{i}."
            norm(f"{b}attn_norm")
            norm(f"{b}ffn_norm")
            matrix(f"{b}attn_qkv.weight", np.concatenate([tensor(f"{b}attn_{x}.weight") for x in "qkv"]))
            writer.add_tensor(f"{b}attn_qkv.bias", np.concatenate([tensor(f"{b}attn_{x}.bias", 0.0) for x in "qkv"]))
            for ours in ("attn_output", "ffn_up", "ffn_down"):
                weights = tensor(f"{b}{ours}.weight")
                matrix(f"{b}{ours}.weight", weights)
                writer.add_tensor(f"{b}{ours}.bias", tensor(f"{b}{ours}.bias", 0.0, len(weights)))
        norm("output_norm")
        matrix("output.weight", tensor("output.weight"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    main()
