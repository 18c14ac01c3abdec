"""Writes the seed files in seeds/gguf: small, sound, and different. Run it when gguf_bytes or the list changes."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "gguf"))

from gguf_bytes import (  # noqa: E402
    ARRAY,
    BOOL,
    F32,
    STRING,
    T_BF16,
    T_F32,
    T_I8,
    T_Q4_0,
    T_Q8_0,
    U8,
    U32,
    array,
    build,
    kv,
    raw_kv,
    sample,
    tensor,
)

FOLDER = HERE / "seeds" / "gguf"


def seeds() -> dict[str, bytes]:
    """File name -> content."""
    model = [
        kv("general.architecture", STRING, "fixmin"),
        kv("fixmin.block_count", U32, 1),
        kv("fixmin.attention.layer_norm_epsilon", F32, 1e-5),
        kv("fixmin.code.kind", STRING, "affine"),
        raw_kv("fixmin.code.affine_matrix", ARRAY, array(U8, [1, 0, 1, 1])),
        raw_kv("fixmin.code.values", ARRAY, array(F32, [0.0, 1.0])),
        raw_kv("tokenizer.ggml.tokens", ARRAY, array(STRING, ["a", "bc", ""])),
    ]
    weights = [
        tensor("blk.0.attn_norm.weight", [32], T_F32, 0),
        tensor("blk.0.attn_q.weight", [32, 2], T_Q8_0, 128),
        tensor("output.weight", [32, 3], T_Q4_0, 224),
        tensor("token_code.weight", [1, 3], T_I8, 288),
    ]
    aligned = [kv("general.alignment", U32, 8), raw_kv("flags", ARRAY, array(BOOL, [1, 0]))]
    small = [tensor("a", [], T_F32, 0), tensor("b", [3, 1, 1, 1], T_BF16, 8)]
    return {
        "nothing": build(),
        "every_value_type": sample(),
        "model": build(model, weights, bytes(291)),
        "alignment_8": build(aligned, small, bytes(14), alignment=8),
        "version_2": build([kv("k", U8, 1)], version=2),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in seeds().items():
        (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    main()
