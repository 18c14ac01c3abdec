"""Time and memory to load a model that is in the page cache: fixmin beside PyTorch and llama.cpp.

    python bench/loading.py --fixmin A-Q8_0.gguf --checkpoint DIR --torch float32 --torch bfloat16 \
        --llama neox-q8_0.gguf --llama-python PEER_VENV/bin/python

Every load is a process of its own; the engines take turns (A B C A B C ...), and a first round, which fills the page
cache, does not count. Per engine, medians:

    load     until the constructor has returned; imports are not counted
    ready    and until the first token's logits: what a load that only maps the file puts off
    memory   resident after both, less what was resident after the imports: pages of its own, and pages of files

Before the clock starts a worker touches and frees as much memory as it may need. The host of a virtual machine may take
back what is free for a few seconds, huge pages first, and gives it again page by page when it is touched: that is the
host's time, and which engine meets it is chance. --cold leaves this out.
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def resident() -> dict[str, int]:
    """Resident bytes of this process: "own" (anonymous) and "file" (mapped files)."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: 1024 * int(fields[key].split()[0]) for kind, key in (("own", "RssAnon"), ("file", "RssFile"))}


# --- what happens in the processes: (path, threads) -> (load, first token), after the imports ------------------------


def fixmin(path: str, threads: int):
    import fixmin_cpp

    def load():
        return fixmin_cpp.Model(path, n_threads=threads)

    return load, lambda model: model.logits([5], last=True)


def torch(path: str, threads: int, dtype: str):
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=True, dtype=getattr(torch, dtype)
        )

    def first(model) -> None:
        with torch.inference_mode():
            model(torch.tensor([[5]]))

    return load, first


def llama(path: str, threads: int, extra_buffers: str):
    from llama_cpp import llama_cpp as api

    silent = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(silent, None)
    api.llama_backend_init()

    def load():
        options = api.llama_model_default_params()
        options.use_extra_bufts = extra_buffers == "repacked"
        model = api.llama_model_load_from_file(path.encode(), options)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 1024, threads, threads
        return silent, model, api.llama_init_from_model(model, settings)

    def first(loaded) -> None:
        batch = api.llama_batch_get_one((api.llama_token * 1)(5), 1)
        if api.llama_decode(loaded[-1], batch) != 0:
            raise RuntimeError("llama_decode failed")
        api.llama_synchronize(loaded[-1])

    return load, first


ENGINES = {"fixmin": fixmin, "torch": torch, "llama": llama}


def touch_memory(n: int) -> None:
    """Has the machine back n bytes, in huge pages where it has them, and frees them again."""
    with mmap.mmap(-1, n, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, n, mmap.PAGESIZE):
            pages[at] = 1


def measure(engine: str, path: str, threads: int, memory_to_touch: int, *options: str) -> dict[str, float]:
    load, first = ENGINES[engine](path, threads, *options)
    if memory_to_touch:
        touch_memory(memory_to_touch)
    before, start = resident(), time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    first(model)
    ready, after = time.perf_counter(), resident()
    memory = {kind: after[kind] - before[kind] for kind in after}
    return {"load_s": loaded - start, "ready_s": ready - start, **{f"{k}_bytes": v for k, v in memory.items()}}


# --- the conductor ---------------------------------------------------------------------------------------------------


def in_a_process(python: str, *worker: object) -> dict[str, float]:
    command = [python, __file__, "--worker", *map(str, worker)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{worker} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def file_bytes(path: str) -> int:
    """Of a GGUF file, or of the weights in a checkpoint's folder."""
    found = Path(path)
    return sum(p.stat().st_size for p in found.glob("*.safetensors")) if found.is_dir() else found.stat().st_size


def table(rows: dict[str, tuple[str, list[dict[str, float]]]]) -> str:
    lines = [
        "| engine | file, MB | load, s | min - max | until the first token, s | own memory, MB | mapped, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (path, runs) in rows.items():
        loads = [run["load_s"] for run in runs]
        load, ready, own, mapped = (
            float(np.median([run[key] for run in runs])) for key in ("load_s", "ready_s", "own_bytes", "file_bytes")
        )
        lines.append(
            f"| {name} | {file_bytes(path) / 1e6:.0f} | {load:.2f} | {min(loads):.2f} - {max(loads):.2f} "
            f"| {ready:.2f} | {own / 1e6:.0f} | {mapped / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixmin", action="append", default=[], metavar="GGUF")
    parser.add_argument("--checkpoint", help="for PyTorch")
    parser.add_argument("--torch", action="append", default=[], choices=("float32", "bfloat16"))
    parser.add_argument("--llama", action="append", default=[], metavar="GGUF")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="do not touch memory before the clock starts")
    parser.add_argument("--json", type=Path, help="file for all the figures")
    arguments = parser.parse_args()

    here, threads = sys.executable, arguments.threads
    workers: dict[str, tuple] = {}

    def add(name: str, python: str, engine: str, path: str, *options: str) -> None:
        touched = 0 if arguments.cold else 2 * file_bytes(path)
        workers[name] = (python, engine, path, threads, touched, *options)

    for path in arguments.fixmin:
        add(f"fixmin {Path(path).stem}", here, "fixmin", path)
    for dtype in arguments.torch:
        add(f"PyTorch {dtype}", here, "torch", arguments.checkpoint, dtype)
    for path in arguments.llama:
        for how in ("repacked", "mapped"):
            add(f"llama.cpp {Path(path).stem}, {how}", arguments.llama_python, "llama", path, how)

    rows: dict[str, tuple[str, list]] = {name: (worker[2], []) for name, worker in workers.items()}
    for turn in range(arguments.rounds + 1):
        for name, worker in workers.items():
            answer = in_a_process(*worker)
            print(f"round {turn} {name}: {answer}", file=sys.stderr, flush=True)
            if turn > 0:
                rows[name][1].append(answer)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({name: runs for name, (_, runs) in rows.items()}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, path, n, touched, *options = sys.argv[2:]
        # Some libraries read these when they are imported, so they stand before that.
        os.environ["OMP_NUM_THREADS"] = n
        print(json.dumps(measure(kind, path, int(n), int(touched), *options)))
    else:
        main()
