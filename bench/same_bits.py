"""sha256 of the logits of 40 tokens on every instruction set of this machine, numbers of threads, chunks and caches.

    python bench/same_bits.py FILE.gguf ...

One line per file and type of cache; ends with status 1 if any two hashes of a line differ. Each run is a process of its
own, since a process has one instruction set.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import fixmin_cpp

N_TOKENS = 40
# Threads and tokens of a chunk: more threads than cores, a token at a time, chunks that leave some over.
SPLITS = ((1, 40), (2, 7), (3, 16), (4, 17), (8, 1))


def digest(path: str, n_threads: int, n_batch: int, kv_type: str) -> str:
    """Of float32 logits [40, V] in C order."""
    with fixmin_cpp.Model(path, n_threads=n_threads, n_batch=n_batch, n_ctx=N_TOKENS, kv_type=kv_type) as model:
        ids = np.random.default_rng(5).integers(0, model.info["vocab_size"], N_TOKENS)
        logits = model.logits([int(token) for token in ids])
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


def in_a_process(isa: str, *worker: object) -> str:
    command = [sys.executable, __file__, "--worker", isa, *map(str, worker)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FIXMIN_ISA": isa})
    if done.returncode != 0:
        raise SystemExit(f"{isa}, {worker} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout.strip()


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        isa, path, n_threads, n_batch, kv_type = sys.argv[2:]
        if (used := fixmin_cpp.system_info()["isa"]) != isa:
            raise SystemExit(f"asked for {isa}, got {used}")
        print(digest(path, int(n_threads), int(n_batch), kv_type))
        return 0
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    isas = fixmin_cpp.system_info()["isas_supported"]
    runs = [(isa, 2, N_TOKENS) for isa in isas] + [(isas[-1], *split) for split in SPLITS]
    same = True
    for path in sys.argv[1:]:
        for kv_type in ("f16", "q8_0", "f32"):
            found = {in_a_process(isa, path, *split, kv_type) for isa, *split in runs}
            same = same and len(found) == 1
            print(f"{Path(path).name}, cache {kv_type}: {len(runs)} runs, {', '.join(sorted(found))}", flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
