"""Teams of a fixed size and of one found by trying, alone and beside busy processes.

    python bench/threads.py out/demo/fixed.gguf out/bench/full-q8_0.gguf --middle

Every round asks all of them in turn, each in a process of its own: processes that only burn a CPU run beside it. A
ratio is that of one round, to the best of the fixed sizes there; the table has the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fixmin_cpp
from fixmin_cpp import _core

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("decode", "prefill")


def middle(path: Path) -> Path:
    """Random weights, 8 layers of width 512."""
    sys.path.insert(0, str(ROOT / "tests"))
    from gguf_factory import make_model

    shape = {"embedding_length": 512, "feed_forward_length": 2048, "head_count": 8, "block_count": 8}
    return make_model(path, weight_type="Q8_0", vocab_size=16384, context_length=1024, **shape)


def measure(path: str, n_threads: int, part: str, seconds: float) -> float:
    """Tokens per second. Short texts one after the other, so that a size has to be found as it is in use."""
    engine = _core.Engine(path, n_threads=n_threads)
    rng = np.random.default_rng(0)
    n_prompt = min(256, engine.info["n_ctx"])
    params = _core.SamplingParams(max_new_tokens=min(64, engine.info["n_ctx"] - 2))
    n, spent = 0, 0.0
    while n == 0 or spent < seconds:
        ids = rng.integers(0, engine.info["vocab_size"], n_prompt, dtype=np.uint32)
        start = time.perf_counter()
        if part == "decode":
            request = engine.submit(ids[:1], params)
            request.wait(1 << 62, 600.0)
            n += len(request.read(0)[0])
        else:
            engine.logits(ids, last=True, prefix_cache=False)
            n += n_prompt
        spent += time.perf_counter() - start
    return n / spent


def in_a_process(path: Path, team: str, n_threads: int, part: str, seconds: float) -> float:
    command = [sys.executable, __file__, str(path), "--measure", part, "--threads", str(n_threads)]
    out = subprocess.run(
        [*command, "--seconds", str(seconds)],
        env=os.environ | {"FIXMIN_TEAM": team},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return float(json.loads(out))


def compare(path: Path, busy: int, part: str, args: argparse.Namespace) -> str:
    sizes = {f"fixed {n}": ("fixed", n) for n in sorted({1, args.threads})} | {"auto": ("auto", args.threads)}
    rates: dict[str, list[float]] = {name: [] for name in sizes}
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        for _ in range(args.rounds):
            for name, (team, n) in sizes.items():
                rates[name].append(in_a_process(path, team, n, part, args.seconds))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    rounds = zip(*(rates[name] for name in sizes if name != "auto"), strict=True)
    shares = [auto / max(fixed) for auto, fixed in zip(rates["auto"], rounds, strict=True)]
    speeds = " | ".join(f"{statistics.median(rates[name]):,.0f}" for name in sizes)
    spread = f"{min(shares):.2f} to {max(shares):.2f}"
    return f"| {path.stem} | {part} | {busy} | {speeds} | {statistics.median(shares):.2f} ({spread}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--middle", action="store_true", help="also a random model of 8 layers of width 512")
    parser.add_argument("--threads", type=int, default=fixmin_cpp.system_info()["default_threads"])
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 1, 2], help="numbers of busy processes")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3, help="that each measurement takes at least")
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(str(args.models[0]), args.threads, args.measure, args.seconds)))
        return
    fixed = " | ".join(f"fixed {n}" for n in sorted({1, args.threads}))
    print(f"| model | | busy | {fixed} | auto | auto / best fixed |")
    print("|---" * (5 + len({1, args.threads})) + "|")
    with tempfile.TemporaryDirectory() as folder:
        models = [*args.models, *([middle(Path(folder) / "middle.gguf")] if args.middle else [])]
        for path in models:
            for busy in args.busy:
                for part in PARTS:
                    print(compare(path, busy, part, args), flush=True)


if __name__ == "__main__":
    main()
