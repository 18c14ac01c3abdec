"""Microseconds that choosing a token takes, for the settings that people use: one row of logits after another.

python bench/sampler.py [--vocab 65536] [--isa avx2]

Rows are like a language model's: a few probable tokens over a long tail. Best and median of the repetitions.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fixmin_cpp import _core

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, repeat_penalty": {"temperature": 0.0, "repeat_penalty": 1.1},
    "defaults (top_k 40, top_p 0.95, min_p 0.05)": {},
    "top_k 40 alone": OFF | {"top_k": 40},
    "top_k 1000 alone": OFF | {"top_k": 1000},
    "min_p 0.05 alone": OFF | {"min_p": 0.05},
    "top_p 0.95 alone": OFF | {"top_p": 0.95},
    "temperature alone": OFF,
    "top_n_sigma 1 alone": OFF | {"top_n_sigma": 1.0},
    "typical_p 0.95 alone": OFF | {"typical_p": 0.95},
    "typical_p 0.95 and defaults": {"typical_p": 0.95},
    "min_p 0.02, XTC": OFF | {"min_p": 0.02, "xtc_probability": 0.5},
    "dynatemp and defaults": {"dynatemp_range": 0.5},
    "mirostat 1": {"mirostat": 1},
    "mirostat 2": {"mirostat": 2},
    "repetition penalties and defaults": {"repeat_penalty": 1.1, "presence_penalty": 0.2},
    "DRY on 1000 tokens and defaults": {"dry_multiplier": 0.8},
    "a mask of allowed tokens and defaults": {"masked": True},
}


def rows(size: int, n: int) -> list[np.ndarray]:
    """Gaussian noise with a Zipf-like head of 2000 tokens in random places."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(n):
        x = rng.normal(-4, 1.5, size)
        head = rng.permutation(size)[:2000]
        x[head] += 12 - 1.3 * np.log(np.arange(1, len(head) + 1))
        made.append(x.astype(np.float32))
    return made


def microseconds(call: Callable[[int], object], repeat: int) -> list[float]:
    times = []
    for i in range(repeat):
        start = time.perf_counter()
        call(i)
        times.append(1e6 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=65_536)
    parser.add_argument("--isa", help="default: the best of this CPU")
    parser.add_argument("--repeat", type=int, default=200)
    arguments = parser.parse_args()
    data = rows(arguments.vocab, 8)
    history = np.random.default_rng(1).integers(0, arguments.vocab, 1000).tolist()
    mask = np.random.default_rng(2).integers(0, 2**32, (arguments.vocab + 31) // 32, dtype=np.uint32)

    def show(name: str, times: list[float]) -> None:
        print(f"| {name} | {min(times):.0f} | {statistics.median(times):.0f} |")

    print("| setting | best, µs | median, µs |\n|---|---|---|")
    for name, values in SETTINGS.items():
        given = {key: value for key, value in ({"temperature": 0.8} | values).items() if key != "masked"}
        params = _core.SamplingParams(**given)
        sampler = _core.Sampler(params, history, arguments.isa)
        allowed = mask if values.get("masked") else None
        show(name, microseconds(lambda i, s=sampler, a=allowed: s.sample(data[i % 8], i, a), arguments.repeat))
    for k in (0, 5, 20, 1000):
        call = lambda i, k=k: _core.top_logprobs(data[i % 8], k, i, arguments.isa)  # noqa: E731
        show(f"top_logprobs, k = {k}", microseconds(call, arguments.repeat))


if __name__ == "__main__":
    main()
