"""The engine under load: many requests at once beside llama.cpp, guessed tokens, scoring, and what Python costs.

    python bench/batching.py [--data out/bench] [--rounds 3] [--sequences 1,2,4,8,16,32,64,128] \
        [--parts batch,lookup,score,python] [--json FILE] [--markdown FILE]

Needs what `make bench-peers` or bench/prepare.py made. Engines of the first part take turns in processes of their own,
as in bench/compare.py; what the others compare alternates in this one. Medians of the rounds; a first one warms up.

batch:  prompts of 64 tokens and 64 new ones each, all of them submitted at once. Generated tokens per second, prompts
        included; `of prefill`: prompt and generated tokens per second divided by those of one prompt of 512.
lookup: prompt_lookup_num_tokens=16 against plain decoding, 192 tokens after 4 prompts. The weights are random, so what
        they write repeats itself only where that is made likely. repeating: greedy, 64 tokens allowed; greedy: all
        tokens allowed; sampled: at temperature 1, which hardly repeats anything. The outputs are compared.
score:  Model.score() of 16 texts of 512 tokens against reading them as prompts.
python: Model.stream() of 128 tokens against the same request on the native engine alone.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compare import Worker
from engines import ENGINES

from fixmin_cpp import Model, _core

PEER_SEQUENCES = (1, 4, 16, 64)  # of --sequences: 64 take it minutes
#: What is measured, and the llama.cpp that it is compared with.
PEERS = {"q8_0": "llama-q8_0", "w8a8": "llama-q8_0", "q4_0": "llama-q4_0"}
BATCHED = (*(f"fixmin-{form}" for form in PEERS), "llama-q8_0", "llama-q4_0")
PROMPT = NEW = 64
LONG = 512


def batch(data: Path, sequences: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One record for each engine and number of sequences."""
    config = json.loads((data / "full" / "config.json").read_text(encoding="utf-8"))
    shape = {"vocab_size": config["vocab_size"], "context": max(sequences) * PROMPT}
    engines = [engine for engine in ENGINES if engine.name in BATCHED]
    workers = {engine.name: Worker(engine, data, shape, 2) for engine in engines}
    times: dict[tuple[str, int], list[float]] = {}
    long_prompts: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, worker in workers.items():
            if name.startswith("fixmin"):
                answer = worker.ask({"threads": 2, "prompt": LONG, "depth": 0, "decode": 0})
                if turn > 0:
                    long_prompts.setdefault(name, []).append(answer["prefill_s"])
        for n, (name, worker) in itertools.product(sequences, workers.items()):
            if (turn == 0 and n > 4) or (name.startswith("llama") and n not in PEER_SEQUENCES):
                continue  # 4 are enough to warm up
            seconds = worker.ask({"threads": 2, "sequences": n, "prompt": PROMPT, "decode": NEW})["batch_s"]
            if turn > 0:
                times.setdefault((name, n), []).append(seconds)
                print(f"round {turn}: {n:3} x {name:12} {n * NEW / seconds:7.1f} tok/s", flush=True)
    for worker in workers.values():
        worker.close()
    records = []
    for (name, n), seconds in times.items():
        rates = sorted(n * NEW / s for s in seconds)
        record = {"engine": name, "sequences": n, "tok_s": statistics.median(rates), "range": [rates[0], rates[-1]]}
        if name in long_prompts:
            prefill = LONG / statistics.median(long_prompts[name])
            record["of_prefill"] = record["tok_s"] * (PROMPT + NEW) / NEW / prefill
        records.append(record)
    return records


def alternating(rounds: int, *runs: Callable[[], float]) -> list[list[float]]:
    """Seconds of each run in each round, after a round that warms up."""
    found = [[run() for run in runs] for _ in range(rounds + 1)][1:]
    return [list(column) for column in zip(*found, strict=True)]


def lookup(model: Model, rounds: int) -> dict[str, Any]:
    """For each kind of text: times that plain decoding takes as long, lowest and highest of four prompts too."""
    vocab_size = model.info["vocab_size"]
    found: dict[str, Any] = {}
    for kind in ("repeating", "greedy", "sampled"):
        speed_ups, same, counters = [], True, np.zeros(2, int)
        for seed in range(4):
            rng = np.random.default_rng(seed)
            settings: dict[str, Any] = {"max_new_tokens": 192, "ignore_eos": True, "prefix_cache": False}
            if kind == "repeating":
                settings["allowed_ids"] = rng.integers(0, vocab_size, 64).tolist()
            elif kind == "sampled":
                settings |= {"temperature": 1.0, "seed": seed}
            ids = rng.integers(0, vocab_size, 32)
            done: dict[int, Any] = {}

            def run(n_draft: int, ids=ids, settings=settings, done=done) -> float:
                done[n_draft] = model.generate(ids, prompt_lookup_num_tokens=n_draft, **settings)
                return done[n_draft].timings.decode_s

            plain, guessed = alternating(rounds, lambda run=run: run(0), lambda run=run: run(16))
            speed_ups.append(statistics.median(p / g for p, g in zip(plain, guessed, strict=True)))
            same &= done[0].token_ids == done[16].token_ids
            counters += done[16].timings.n_accepted, done[16].timings.n_drafted
        accepted, drafted = counters.tolist()
        found[kind] = {
            "speed_up": statistics.median(speed_ups),
            "range": [min(speed_ups), max(speed_ups)],
            "identical": same,
            "accepted": accepted,
            "drafted": drafted,
        }
    return found


def score(model: Model, rounds: int) -> dict[str, float]:
    """Tokens per second of scoring and of reading prompts."""
    texts = list(np.random.default_rng(1).integers(0, model.info["vocab_size"], (16, LONG)))

    def scoring() -> float:
        start = time.perf_counter()
        model.score(texts)
        return time.perf_counter() - start

    def reading() -> float:
        start = time.perf_counter()
        model.generate(texts, max_new_tokens=1, prefix_cache=False)
        return time.perf_counter() - start

    scored, read = (statistics.median(seconds) for seconds in alternating(rounds, scoring, reading))
    n = sum(len(text) for text in texts)
    return {"score_tok_s": n / scored, "prefill_tok_s": n / read, "share": read / scored}


def python(path: Path, rounds: int) -> dict[str, float]:
    """The share of a decoded token's time that is Python's."""
    ids = np.arange(16, dtype=np.uint32)
    with Model(path, n_threads=2) as model:

        def stream() -> float:
            start = time.perf_counter()
            for _ in model.stream(ids, max_new_tokens=128, ignore_eos=True, prefix_cache=False):
                pass
            return time.perf_counter() - start

        def native() -> float:
            params = _core.SamplingParams(max_new_tokens=128)
            start = time.perf_counter()
            with model.native() as engine:
                engine.submit(ids, params, prefix_cache=False).wait(1 << 62, 600.0)
            return time.perf_counter() - start

        streamed, alone = alternating(rounds, stream, native)
    shares = [s / n - 1 for s, n in zip(streamed, alone, strict=True)]
    return {"share": statistics.median(shares), "ms_per_token": 1e3 * statistics.median(alone) / 128}


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = [
        "# The engine under load",
        "",
        f"Made by `bench/batching.py`, {result['rounds']} rounds; it says what is measured.",
    ]
    if records := result.get("batch"):
        rates = {(r["engine"], r["sequences"]): r for r in records}
        lines += ["", "Generated tokens per second (lowest and highest round):", ""]
        head = [f"{kind} {form}" for form in PEERS for kind in ("fixmin", "llama.cpp", "ratio", "of prefill")]
        lines += [f"| requests | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
        for n in sorted({r["sequences"] for r in records}):
            row = [str(n)]
            for form in PEERS:
                own, peer = rates[f"fixmin-{form}", n], rates.get((PEERS[form], n))
                for r in (own, peer):
                    row.append(f"{r['tok_s']:.0f} ({r['range'][0]:.0f}-{r['range'][1]:.0f})" if r else "")
                row += [f"{own['tok_s'] / peer['tok_s']:.1f}" if peer else "", f"{own['of_prefill']:.2f}"]
            lines.append(f"| {' | '.join(row)} |")
    for form, part in result.get("lookup", {}).items():
        for name, found in part.items():
            low, high = found["range"]
            lines += [
                "",
                f"Prompt lookup, {form}, {name}: {found['speed_up']:.2f} x plain decoding ({low:.2f} to {high:.2f}), "
                f"{found['accepted']} of {found['drafted']} guesses right, output "
                f"{'identical' if found['identical'] else 'DIFFERENT'}.",
            ]
    for form, found in result.get("score", {}).items():
        lines += [
            "",
            f"Scoring, {form}: {found['score_tok_s']:.0f} tok/s, {found['share']:.2f} of reading the same prompts.",
        ]
    for form, found in result.get("python", {}).items():
        lines += ["", f"Python, {form}: {found['share']:+.1%} of a token's {found['ms_per_token']:.1f} ms."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("out/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--parts", default="batch,lookup,score,python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    result: dict[str, Any] = {"rounds": arguments.rounds}
    if "batch" in parts:
        result["batch"] = batch(arguments.data, [int(n) for n in arguments.sequences.split(",")], arguments.rounds)
    for form in PEERS:
        path = arguments.data / f"full-{form}.gguf"
        with Model(path, n_threads=2) as model:
            if "lookup" in parts:
                result.setdefault("lookup", {})[form] = lookup(model, arguments.rounds)
            if "score" in parts:
                result.setdefault("score", {})[form] = score(model, arguments.rounds)
        if "python" in parts:
            result.setdefault("python", {})[form] = python(path, arguments.rounds)
    text = markdown(result)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
