"""How far quantised files are from a float32 file of the same model, on a text.

    python bench/quality.py BASE_F32.gguf OTHER.gguf [...] --text FILE [--window 256] [--kv-type q8_0] [--json]

The text is cut into windows of that many tokens, each scored from its beginning as by `fixmin perplexity`, with the
base in memory for all files. Per file: size, perplexity, mean KL(base || file) per token in nats with its 99th
percentile, and the share of tokens whose most probable successor is the same.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from fixmin_cpp import Model, perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("others", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=60)
    parser.add_argument("--kv-type", default="f16", help="of the others; the base has f32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    text = Path(arguments.text).read_text(encoding="utf-8")
    rows = {}
    with Model(arguments.base, kv_type="f32") as base:
        for path in [arguments.base, *arguments.others]:
            with Model(path, kv_type=arguments.kv_type) as model:
                found = perplexity(model, text, ctx=arguments.window, max_windows=arguments.max_windows, base=base)
            rows[Path(path).name] = {"bytes": Path(path).stat().st_size, **dataclasses.asdict(found)}
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| file | bytes | perplexity | mean KL | 99 % KL | same top-1 |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        far = row["divergence"]
        print(
            f"| {name} | {row['bytes']:,} | {row['perplexity']:.4f} | {far['kl_mean']:.6f} "
            f"| {far['kl_quantiles']['99']:.5f} | {100 * far['top1']:.2f} % |"
        )


if __name__ == "__main__":
    main()
