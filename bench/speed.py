"""Decode and prefill speed of fixmin beside PyTorch and llama.cpp, in alternating runs (A B C A B C ...).

    python bench/speed.py --checkpoint DIR --fixmin A-Q8_0.gguf --fixmin A-Q4_0.gguf \
        --torch float32 --torch bfloat16 --llama neox-q8_0.gguf --llama-python PEER_VENV/bin/python

Every engine is a process of its own that loads once and then waits for its turn, so that slow phases of a noisy
machine hit all of them. A turn reads a prompt of --prompt tokens (time to its last logits) and then decodes --decode
tokens after a prompt of 16. Reported: medians and their ratio to the first engine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

# --- workers: load, answer "run\n" on stdin with a line of JSON ------------------------------------------------------


def serve(run) -> None:
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


def worker_fixmin(path: str, threads: int, n_prompt: int, n_decode: int) -> None:
    from fixmin_cpp import _core

    engine = _core.Engine(path, n_threads=threads)
    ids = np.random.default_rng(0).integers(0, engine.info["vocab_size"], n_prompt).astype(np.uint32)
    params = _core.SamplingParams()
    params.max_new_tokens = n_decode + 1

    def run() -> dict[str, float]:
        start = time.perf_counter()
        engine.logits(ids, last=True)
        prefill = n_prompt / (time.perf_counter() - start)
        return {"prefill": prefill, "decode": n_decode / engine.generate(ids[:16], params).decode_s}

    serve(run)


def worker_torch(checkpoint: str, dtype: str, threads: int, n_prompt: int, n_decode: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=getattr(torch, dtype)).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, n_prompt)))

    @torch.inference_mode()
    def run() -> dict[str, float]:
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        prefill = n_prompt / (time.perf_counter() - start)
        out = model(ids[:, :16], use_cache=True)
        start = time.perf_counter()
        for _ in range(n_decode):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return {"prefill": prefill, "decode": n_decode / (time.perf_counter() - start)}

    serve(run)


def worker_llama(path: str, threads: int, n_prompt: int, n_decode: int) -> None:
    from llama_cpp import llama_cpp as llama

    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    # LLAMA_EXTRA_BUFTS=0 leaves out repacked and AMX weight buffers; a native build crashed in them (docs/speed.md).
    options.use_extra_bufts = os.environ.get("LLAMA_EXTRA_BUFTS", "1") == "1"
    model = llama.llama_model_load_from_file(path.encode(), options)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, n_prompt, n_prompt
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    memory = llama.llama_get_memory(context)
    ids = np.random.default_rng(0).integers(0, 65536, n_prompt)

    def decode(tokens: list[int], position: int) -> None:
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, int(i == len(tokens) - 1)
        if llama.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        llama.llama_synchronize(context)
        llama.llama_batch_free(batch)

    def run() -> dict[str, float]:
        llama.llama_memory_clear(memory, True)
        start = time.perf_counter()
        decode([int(t) for t in ids], 0)
        prefill = n_prompt / (time.perf_counter() - start)
        llama.llama_memory_clear(memory, True)
        decode([int(t) for t in ids[:16]], 0)
        start = time.perf_counter()
        for i in range(n_decode):
            decode([int(ids[i])], 16 + i)
        return {"prefill": prefill, "decode": n_decode / (time.perf_counter() - start)}

    serve(run)


# --- the conductor ---------------------------------------------------------------------------------------------------


def start(python: str, kind: str, threads: int, *arguments: object) -> subprocess.Popen:
    command = [python, __file__, "--worker", kind, *map(str, arguments)]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{kind} {arguments} did not start")
    return process


def table(results: dict[str, list[dict[str, float]]]) -> str:
    def median(name: str, key: str) -> float:
        return float(np.median([run[key] for run in results[name]]))

    first = next(iter(results))
    lines = [
        "| engine | prefill tok/s | ratio | decode tok/s | min - max | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        decodes = [run["decode"] for run in runs]
        lines.append(
            f"| {name} | {median(name, 'prefill'):.0f} | {median(name, 'prefill') / median(first, 'prefill'):.2f} "
            f"| {median(name, 'decode'):.1f} | {min(decodes):.1f} - {max(decodes):.1f} "
            f"| {median(name, 'decode') / median(first, 'decode'):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="for PyTorch")
    parser.add_argument("--fixmin", action="append", default=[], metavar="GGUF")
    parser.add_argument("--torch", action="append", default=[], choices=("float32", "bfloat16"))
    parser.add_argument("--llama", action="append", default=[], metavar="GGUF")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all the figures")
    arguments = parser.parse_args()
    sizes = (arguments.threads, arguments.prompt, arguments.decode)

    engines = {}
    for path in arguments.fixmin:
        engines[f"fixmin {Path(path).stem}"] = start(sys.executable, "fixmin", sizes[0], path, *sizes)
    for dtype in arguments.torch:
        engines[f"PyTorch {dtype}"] = start(sys.executable, "torch", sizes[0], arguments.checkpoint, dtype, *sizes)
    for path in arguments.llama:
        engines[f"llama.cpp {Path(path).stem}"] = start(arguments.llama_python, "llama", sizes[0], path, *sizes)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    try:
        for turn in range(arguments.rounds + 1):
            for name, process in engines.items():
                process.stdin.write("run\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                if turn > 0:  # the first round warms up
                    results[name].append(answer)
                print(f"round {turn} {name}: {answer}", file=sys.stderr, flush=True)
    finally:
        for process in engines.values():
            process.stdin.close()
            process.wait()
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({"sizes": vars(arguments) | {"json": None}, "results": results}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, *rest = sys.argv[2:]
        strings = [x for x in rest if not x.isdigit()]
        {"fixmin": worker_fixmin, "torch": worker_torch, "llama": worker_llama}[kind](
            *strings, *(int(x) for x in rest if x.isdigit())
        )
    else:
        main()
