"""Logits of small models of every kind on the CPU and on the emulated GPU of this package, as one JSON object.

    python bits.py FOLDER [CASE ...]

{"models": {name of a case: {"cpu": sha256, "cuda": {how it was computed: sha256}}}, "launches": {kernel: how often}},
the latter of the emulated GPU only. Run by test_same_bits.py and tools/gpu.py.
"""

import hashlib
import json
import sys
from pathlib import Path

import emulated_state
import numpy as np
from gguf_factory import ALL_BIASES, WEIGHT_TYPES, block_sizes, make_model

from fixmin_cpp import _core

TYPES = (*WEIGHT_TYPES, "W8A8")
N_TOKENS = 60  # more than tiles of few tokens hold, and two blocks of the cache

#: One case of every option that a kernel knows.
OPTIONS = {
    "rmsnorm swiglu grouped interleaved": dict(
        norm="rmsnorm", activation="swiglu", head_count_kv=2, rope_style="interleaved", biases=ALL_BIASES
    ),
    "tanh, table of codes, part of a head rotated": dict(activation="gelu_tanh", code_kind="table", rope_dim=8),
    "learned embedding": dict(code_kind="learned", biases=frozenset()),
    "interleaved lift of -1 and 1, norm without bias": dict(
        lift="interleave", width=8, values=(-1.0, 1.0), norm_bias=False, weight_type="Q4_0"
    ),
    "rmsnorm fold": dict(norm="rmsnorm", values=(-1.0, 1.0)),
    "head of 20": dict(embedding_length=160, head_count=8, feed_forward_length=64),
    "head of 48": dict(embedding_length=96, head_count=2, feed_forward_length=64),
    "head of 128": dict(embedding_length=256, head_count=2, feed_forward_length=64),
    "nothing rotated": dict(rope_dim=0),
    "sizes that are no multiple of anything": dict(
        embedding_length=60, head_count=3, feed_forward_length=50, vocab_size=77, weight_type="F32"
    ),
    "mixed types": dict(weight_types={"blk.1.attn_q": "F16", "blk.1.ffn_up": "Q4_1", "output": "Q5_0"}),
    "mixed with W8A8": dict(
        activation="swiglu",
        weight_types={"blk.1.attn_k": "W8A8", "blk.1.ffn_gate": "W8A8", "blk.0.ffn_up": "W8A8", "output": "W8A8"},
    ),
    "W8A8, learned embedding, rows of an odd number of blocks": dict(
        code_kind="learned", embedding_length=96, head_count=3, feed_forward_length=160, weight_type="W8A8"
    ),
}


def cases() -> dict[str, dict]:
    of_types = {}
    for kind in TYPES:
        super_blocks = kind in WEIGHT_TYPES and block_sizes(kind)[0] == 256
        shape = dict(embedding_length=256, feed_forward_length=512, head_count=8) if super_blocks else {}
        of_types[kind] = dict(weight_type=kind, **shape)
    return of_types | {name: {"weight_type": "Q8_0", **options} for name, options in OPTIONS.items()}


def wide_cases() -> dict[str, dict]:
    """Rows and tokens enough for wide tiles of products, of the types that have them (has_wide_tiles), on the two
    multiprocessors of the emulated GPU: launch_product chooses by their number.
    """
    shape = dict(feed_forward_length=512, context_length=256, block_count=1)
    return {f"{k}, wide": {**options, **shape} for k, options in cases().items() if k in TYPES}


def digest(logits: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


def computed(path: Path, device: str, kv_type: str, n_batch: int, ids: np.ndarray) -> str:
    engine = _core.Engine(str(path), device=device, kv_type=kv_type, n_batch=n_batch, n_threads=1)
    assert engine.info["device"] == device
    return digest(engine.logits(ids, prefix_cache=False))


def generated(path: Path, device: str, kv_type: str, ids: np.ndarray) -> str:
    """What requests side by side draw, with log-probabilities: in the end the same step again and again."""
    engine = _core.Engine(str(path), device=device, kv_type=kv_type, n_threads=1)
    lengths = (3, 20, 40)
    params = [_core.SamplingParams(max_new_tokens=6, temperature=0.8, seed=n) for n in lengths]
    requests = [engine.submit(ids[:n], p, n_logprobs=3) for n, p in zip(lengths, params, strict=True)]
    for request in requests:
        while not request.wait(6, 60.0):  # more than there will be: the end
            pass
    return hashlib.sha256(str([request.read(0) for request in requests]).encode()).hexdigest()


def main() -> None:
    folder = Path(sys.argv[1])
    found = {}
    # Holds the device's context, so that it is made once and not for each model.
    context = _core.Engine(str(make_model(folder / "context.gguf")), device="cuda", n_threads=1)
    for name, options in cases().items():
        if sys.argv[2:] and not any(wanted in name for wanted in sys.argv[2:]):
            continue
        path = make_model(folder / "model.gguf", **{"vocab_size": 100, **options})
        ids = np.random.default_rng(3).integers(0, 77, N_TOKENS).astype(np.uint32)
        for kv_type in ("f16", "q8_0", "f32"):
            on_gpu = {f"{n_batch} at a time": computed(path, "cuda", kv_type, n_batch, ids) for n_batch in (512, 7)}
            found[f"{name}, cache {kv_type}"] = {"cpu": computed(path, "cpu", kv_type, 512, ids), "cuda": on_gpu}
            found[f"{name}, cache {kv_type}, generated"] = {
                "cpu": generated(path, "cpu", kv_type, ids),
                "cuda": {"side by side": generated(path, "cuda", kv_type, ids)},
            }
    for name, options in wide_cases().items():
        if not sys.argv[2:]:
            path = make_model(folder / "model.gguf", **{"vocab_size": 100, **options})
            ids = np.random.default_rng(4).integers(0, 100, 250).astype(np.uint32)
            of_device = {device: computed(path, device, "f16", 512, ids) for device in ("cpu", "cuda")}
            found[name] = {"cpu": of_device["cpu"], "cuda": {"512 at a time": of_device["cuda"]}}
    kernels = [f"{of}_{kind.lower()}" for of in ("few", "many", "floats") for kind in TYPES]
    launches = {}
    if context.info["device_name"] == "emulated":
        launches = {name: emulated_state.launches(name) for name in kernels}
        launches |= {f"{name}, wide": emulated_state.launches(name, True) for name in kernels}
    context.close()
    print(json.dumps({"models": found, "launches": launches}))


if __name__ == "__main__":
    main()
