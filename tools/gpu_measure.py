"""What tools/gpu.py does with the package that it has built: one verb a process, which prints one JSON object.

    python tools/gpu_measure.py VERB FILE DEVICE SIZES

small, checked: make and run a few small models, for NVIDIA's sanitizers
bits: one file, all chunks and numbers of requests
mixed: requests of all kinds at once                    load, speed: figures      hot: a few steps, for ncu
"""

import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import fixmin_cpp
from fixmin_cpp import _core
from fixmin_cpp.benchmark import bench

#: Small models that between them run every kernel but those of other types.
CHECKED = {
    "layers": dict(weight_type="Q8_0"),
    "grouped": dict(weight_type="Q4_0", norm="rmsnorm", activation="swiglu", head_count_kv=2, rope_style="interleaved"),
    "super-blocks": dict(weight_type="Q4_K", embedding_length=256, feed_forward_length=512, head_count=2),
    "floats": dict(weight_type="F16", code_kind="table", activation="gelu_tanh"),
    "folded": dict(weight_type="Q6_K", embedding_length=256, feed_forward_length=256, norm="rmsnorm", values=(-1, 1)),
}


def digest(values: Any) -> str:
    data = np.ascontiguousarray(values).tobytes() if isinstance(values, np.ndarray) else repr(values).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def random_ids(vocab_size: int, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, n).astype(np.uint32)


def answers(engine: _core.Engine, prompts: list[np.ndarray], new: int) -> list[Any]:
    """Tokens and log-probabilities of requests that run together."""
    params = [_core.SamplingParams(max_new_tokens=new, temperature=0.8, seed=i) for i in range(len(prompts))]
    requests = [engine.submit(ids, p, n_logprobs=2, prefix_cache=False) for ids, p in zip(prompts, params, strict=True)]
    for request in requests:
        request.wait(1 << 62, 600.0)
    return [request.read(0) for request in requests]


def small(path: Path, device: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Writes the models that `checked` runs."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from gguf_factory import make_model

    return {name: str(make_model(path / f"{name}.gguf", **options)) for name, options in CHECKED.items()}


def checked(path: Path, device: str, sizes: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name in CHECKED:
        engine = _core.Engine(str(path / f"{name}.gguf"), device=device, kv_type="q8_0", n_batch=32, n_threads=1)
        ids = random_ids(engine.info["vocab_size"], 40)
        found[name] = digest(engine.logits(ids, prefix_cache=False)) + digest(answers(engine, [ids[:5], ids], 6))
        engine.close()
    return found


def bits(path: Path, device: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Hashes of logits and of answers, from the CPU once and from the GPU twice for every chunk and number."""
    most, differ, n_runs = sizes["most"], [], 0
    caches = ("f16", "q8_0", "f32") if os.environ.get("FIXMIN_CUDA_STEP") == "graph" else ("f16",)
    context = _core.Engine(str(path), device=device, n_ctx=32)  # as long as it lives the others need not make one
    vocab_size = context.info["vocab_size"]
    for kv_type in caches:
        expected = None
        for where, chunks in (("cpu", (most,)), (device, (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, most))):
            for n_batch in chunks:
                engine = _core.Engine(str(path), device=where, kv_type=kv_type, n_batch=n_batch, n_ctx=2 * most)
                for _ in range(1 if where == "cpu" else 2):
                    found = digest(engine.logits(random_ids(vocab_size, most), prefix_cache=False))
                    expected, n_runs = expected or found, n_runs + 1
                    if found != expected:
                        differ.append(f"cache {kv_type}, chunks of {n_batch}")
                engine.close()
    prompts = [random_ids(vocab_size, 1 + i % 9, seed=i) for i in range(most)]
    with_all = _core.Engine(str(path), device="cpu", n_ctx=2 * most, n_kv=64 * most)
    alone = answers(with_all, prompts, 6)
    with_all.close()
    engine = _core.Engine(str(path), device=device, n_ctx=2 * most, n_kv=64 * most)
    for n in [n for n in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64) if n <= most]:
        for _ in range(2):
            n_runs += 1
            if answers(engine, prompts[:n], 6) != alone[:n]:
                differ.append(f"{n} requests at once")
    return {"runs": n_runs, "differ": differ, "logits of the last cache": expected, "answers": digest(alone)}


def mixed(path: Path, device: str, sizes: dict[str, Any]) -> dict[str, Any]:
    def requests(vocab_size: int) -> list[tuple[list[int], dict[str, Any]]]:
        rng, made = random.Random(4), []
        for i in range(sizes["mixed"]):
            prompt = [rng.randrange(vocab_size) for _ in range(rng.choice([1, 3, 30, sizes["depth"]]))]
            options = dict(max_new_tokens=rng.choice([1, 8, 40]), temperature=rng.choice([0, 0.7, 1.3]), seed=i)
            options |= dict(top_k=rng.choice([0, 40]), prompt_lookup_num_tokens=rng.choice([0, 4]), logprobs=2)
            made.append((prompt, options))
        return made

    def answered(where: str) -> list[Any]:
        with fixmin_cpp.Model(path, device=where, n_kv=20000) as model, ThreadPoolExecutor(32) as pool:
            done = [pool.submit(model.generate, p, **o) for p, o in requests(model.info["vocab_size"])]
            return [(c.result().token_ids, [t.logprob for t in c.result().logprobs]) for c in done]

    gpu = answered(device)
    return {"requests": len(gpu), "differ": [] if gpu == answered("cpu") else ["answers"], "answers": digest(gpu)}


def load(path: Path, device: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Seconds: the first load makes the context on the device, too; the model stays, and with it the context."""

    def timed() -> tuple[float, fixmin_cpp.Model]:
        start = time.perf_counter()
        model = fixmin_cpp.Model(path, device=device)
        return time.perf_counter() - start, model

    first_s, first = timed()
    again = []
    for _ in range(3):
        taken, model = timed()
        again.append(taken)
        model.close()
    first.close()
    return {"first_s": first_s, "again_s": statistics.median(again)}


def seconds(run: Callable[[], Any], repeat: int) -> float:
    """Median, after a run that warms up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def speed(path: Path, device: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, and what `fixmin bench` says of the ceilings."""
    depth, new, n, context, repeat = (sizes[k] for k in ("depth", "new", "sequences", "context", "repeat"))
    where = "cpu" if sizes["bench_on_cpu"] else device
    report = bench(path, device=where, n_prompt=min(512, context), n_generate=new, depth=depth, repeat=repeat)
    found: dict[str, Any] = {"bench": vars(report), "decode": report.decode_tok_s}
    print(json.dumps(found), flush=True)  # what a time-out would lose
    engine = _core.Engine(str(path), device=device, n_kv=n * (context + 32))
    vocab_size = engine.info["vocab_size"]
    for length in sizes["prefill"]:
        ids = random_ids(vocab_size, length)
        found[f"prefill {length}"] = length / seconds(
            lambda ids=ids: engine.logits(ids, last=True, prefix_cache=False), repeat
        )
    prompts = [random_ids(vocab_size, context - new, seed=i) for i in range(n)]

    def run(n_new: int) -> None:
        params = _core.SamplingParams(max_new_tokens=n_new)
        requests = [engine.submit(ids, params, prefix_cache=False) for ids in prompts]
        for request in requests:
            request.wait(1 << 62, 600.0)
            request.result()

    # Steps of n sequences alone: the time of long answers less that of short ones.
    short, long = seconds(lambda: run(1), repeat), seconds(lambda: run(new + 1), repeat)
    found["batch"] = n * new / max(long - short, 1e-9)
    found["batch with prompts"] = n * (new + 1) / long
    return found


def hot(path: Path, device: str, sizes: dict[str, Any]) -> dict[str, Any]:
    engine = _core.Engine(str(path), device=device)
    vocab_size = engine.info["vocab_size"]
    engine.logits(random_ids(vocab_size, min(512, engine.info["n_ctx"])), last=True, prefix_cache=False)
    answers(engine, [random_ids(vocab_size, 8)], 4)
    return {}


def main() -> None:
    verb, path, device, sizes = sys.argv[1:]
    verbs: dict[str, Callable[[Path, str, dict[str, Any]], dict[str, Any]]] = {
        f.__name__: f for f in (small, checked, bits, mixed, load, speed, hot)
    }
    print(json.dumps(verbs[verb](Path(path), device, json.loads(sizes))))


if __name__ == "__main__":
    main()
