"""How far quantised files are from a float32 file of the same model, on a text.

    python bench/quality.py BASE_F32.gguf OTHER.gguf [OTHER.gguf ...] --text FILE [--window 256] [--json]

The text is cut into windows of that many tokens, each scored from its beginning. Per file: size, perplexity,
mean KL(base || file) per token in nats with its 99th percentile, and the share of tokens whose most probable successor
is the same.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from fixmin_cpp import Model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[T, V] float32 -> float64."""
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def measure(base: Model, other: Model, windows: list[np.ndarray]) -> dict[str, float]:
    divergences, agreements, losses = [], [], []
    for ids in windows:
        p, q = log_softmax(base.logits(ids)), log_softmax(other.logits(ids))
        divergences.append((np.exp(p) * (p - q)).sum(1))
        agreements.append(p.argmax(1) == q.argmax(1))
        losses.append(-q[np.arange(len(ids) - 1), ids[1:]])
    divergence = np.concatenate(divergences)
    return {
        "tokens": int(divergence.size),
        "perplexity": float(np.exp(np.concatenate(losses).mean())),
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "top1": float(np.concatenate(agreements).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("others", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    rows = {}
    with Model(arguments.base, kv_type="f32") as base:
        ids = np.array(base.encode(Path(arguments.text).read_text(encoding="utf-8")), dtype=np.uint32)
        cuts = range(0, len(ids) - arguments.window + 1, arguments.window)
        windows = [ids[i : i + arguments.window] for i in cuts][: arguments.max_windows]
        for path in [arguments.base, *arguments.others]:
            with Model(path) as other:
                rows[Path(path).name] = {"bytes": Path(path).stat().st_size, **measure(base, other, windows)}
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| file | bytes | perplexity | mean KL | 99 % KL | same top-1 |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['bytes']:,} | {row['perplexity']:.4f} | {row['kl_mean']:.6f} | {row['kl_p99']:.5f} "
            f"| {100 * row['top1']:.2f} % |"
        )


if __name__ == "__main__":
    main()
