"""Thousands of short requests with random ends, as a program of its own: python soak.py MODEL N.

Prints the resident memory, in KiB, after every tenth of the requests, and the scheduler's counters at the end, as JSON.
"""

import asyncio
import contextlib
import gc
import json
import random
import sys
import threading
from pathlib import Path

import fixmin_cpp

WORDS = ["the cat sat", "on the mat", "and then", "the cat", "ran", " "]


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def settings(rng: random.Random) -> dict[str, object]:
    chosen: dict[str, object] = {"max_new_tokens": rng.randint(1, 12), "ignore_eos": True}
    if rng.random() < 0.5:
        chosen |= {"temperature": 1.0, "seed": rng.randint(0, 99)}
    if rng.random() < 0.2:
        chosen["timeout"] = rng.random() * 0.02
    if rng.random() < 0.2:
        chosen["prompt_lookup_num_tokens"] = 4
    return chosen


def prompt(rng: random.Random) -> str:
    # Few enough that the tokenizer's own cache of 10,000 words does not grow with the requests.
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))


def one(model: fixmin_cpp.Model, rng: random.Random) -> None:
    kind = rng.random()
    if kind < 0.4:
        model.generate(prompt(rng), **settings(rng))
    elif kind < 0.8:
        with model.stream(prompt(rng), **settings(rng)) as stream:
            for _ in range(rng.randint(0, 6)):
                if next(stream, None) is None:
                    break
    else:
        model.score(prompt(rng) + " end")


async def one_in_a_loop(model: fixmin_cpp.Model, rng: random.Random) -> None:
    task = asyncio.ensure_future(model.agenerate(prompt(rng), **settings(rng)))
    if rng.random() < 0.4:
        await asyncio.sleep(rng.random() * 0.01)
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def loop(model: fixmin_cpp.Model, n: int, rng: random.Random) -> None:
    for _ in range(n // 10):
        await asyncio.gather(*(one_in_a_loop(model, rng) for _ in range(10)))


def run(model: fixmin_cpp.Model, n: int, seed: int) -> None:
    """n requests: half of them from four threads, half of them from an event loop."""

    def work(index: int) -> None:
        rng = random.Random(seed * 10 + index)
        for _ in range(n // 8):
            one(model, rng)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(loop(model, n // 2, random.Random(seed * 10 + 4)))
    for thread in threads:
        thread.join()


def main() -> None:
    path, n = sys.argv[1], int(sys.argv[2])
    resident = []
    # A small cache, so that requests wait and are sent back, and what is remembered is evicted.
    with fixmin_cpp.Model(path, n_threads=2, n_kv=512, n_parallel=8) as model:
        for tenth in range(10):
            run(model, n // 10, tenth)
            gc.collect()
            resident.append(resident_kib())
        print(json.dumps({"resident_kib": resident, "stats": model.stats()}))


if __name__ == "__main__":
    main()
