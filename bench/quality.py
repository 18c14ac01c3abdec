"""What a number format costs: size, perplexity, divergence from float32 and speed for every type and recipe.

    python bench/quality.py measure BASE_F32.gguf --text heldout.txt --importance-text other.txt --json fixed.json
    python bench/quality.py measure FULL_F32.gguf --random-ids 512 --bench DIR --json full.json
    python bench/quality.py report fixed.json affine.json full.json --plot docs/benchmarks/quality.png

`measure` quantises the float32 file to each type (into --files, where those of an earlier run are used again), reads
the text in windows from an empty context, each token but a window's first predicted, and compares with the base on the
same windows. An importance matrix is collected on the text given for that, which should not be the one measured; types
of fewer than 5 bits are then made with and without it. Speeds come from files of `fixmin bench --json`, DIR/TYPE.json.
`report` prints the tables as Markdown and draws KL divergence and perplexity against size.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

TYPES = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "w8a8",
    "q6_k",
    "q5_k_m",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_1",
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "q3_k_m",
    "q3_k",
    "q2_k",
)
LOW_BIT = ("q4_k_m", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_m", "q3_k", "q2_k")
WITH_IMATRIX = " + imatrix"


# --- measure ---------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> None:
    from fixmin_cpp import Model, perplexity
    from fixmin_cpp.quantization.imatrix import collect
    from fixmin_cpp.quantization.requantize import quantize

    base_path = Path(arguments.base)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.files or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        logits = Path(temporary, "logits")  # of the base, once for all files
        windows = {"ctx": arguments.window, "max_windows": arguments.max_windows}
        variants = {name: None for name in arguments.types}
        with Model(base_path, kv_type="f32") as base:
            text = text_of(arguments, base.info["vocab_size"])
            perplexity(base, text, save_logits=logits, **windows)
            if arguments.importance_text:
                imatrix = folder / f"{base_path.stem}.imatrix.gguf"
                collect(base, Path(arguments.importance_text).read_text(encoding="utf-8"), imatrix)
                variants |= {name + WITH_IMATRIX: imatrix for name in LOW_BIT if name in arguments.types}

        rows = {}
        for variant, importance in variants.items():
            plain = variant.removesuffix(WITH_IMATRIX)
            path = folder / f"{base_path.stem}-{variant.replace(WITH_IMATRIX, '-imatrix')}.gguf"
            if not path.exists():
                quantize(base_path, path, plain, imatrix=importance)
            found = perplexity(path, text, base_logits=logits, **windows)
            rows[variant] = {**sizes(path), **dataclasses.asdict(found)}
            bench = Path(arguments.bench or "", f"{variant}.json")
            if arguments.bench and bench.exists():
                rows[variant]["bench"] = json.loads(bench.read_text())
            print(f"{variant}: KL {rows[variant]['divergence']['kl_mean']:.6f}", file=sys.stderr, flush=True)
    result = {"base": base_path.stem, "random_ids": arguments.random_ids, "rows": rows}
    Path(arguments.json).write_text(json.dumps(result, indent=1))


def text_of(arguments: argparse.Namespace, vocab_size: int):
    """What is predicted: text, or uint32 ids."""
    if arguments.random_ids:
        return np.random.default_rng(0).integers(0, vocab_size, arguments.random_ids).astype(np.uint32)
    return Path(arguments.text).read_text(encoding="utf-8")


def sizes(path: Path) -> dict:
    """Bytes and bits per weight of a file, and what share of its weights has which type."""
    from fixmin_cpp import _core

    tensors = [(int(np.prod(t.shape)), t.n_bytes, t.type) for t in _core.GgufFile(str(path)).tensors]
    n_weights = sum(n for n, _, _ in tensors)
    shares: dict[str, float] = {}
    for n, _, kind in tensors:
        shares[kind] = shares.get(kind, 0) + n / n_weights
    return {
        "bytes": path.stat().st_size,
        "bits_per_weight": 8 * sum(n_bytes for _, n_bytes, _ in tensors) / n_weights,
        "types": dict(sorted(shares.items(), key=lambda item: -item[1])),
    }


# --- report ----------------------------------------------------------------------------------------------------------


def made_of(row: dict) -> str:
    """The types that hold at least 1 % of the weights, largest share first."""
    return ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in row["types"].items() if share >= 0.01)


def quality_table(result: dict) -> str:
    lines = [
        "| type | bits per weight | MB | perplexity | mean KL | 99 % KL | same top-1 | made of |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        far = row["divergence"]
        lines.append(
            f"| {name} | {row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.2f} "
            f"| {row['perplexity']:.4f} ± {row['perplexity_error']:.4f} | {far['kl_mean']:.6f} ± {far['kl_error']:.6f} "
            f"| {far['kl_quantiles']['99']:.5f} | {100 * far['top1']:.2f} % | {made_of(row)} |"
        )
    return "\n".join(lines)


def speed_table(result: dict) -> str:
    lines = [
        "| type | bits per weight | MB | mean KL | same top-1 | decode tok/s | prefill tok/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        far, bench = row["divergence"], row.get("bench")
        speeds = f"{bench['decode_tok_s']:.1f} | {bench['prefill_tok_s']:.0f}" if bench else "|"
        lines.append(
            f"| {name} | {row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.0f} | {far['kl_mean']:.5f} "
            f"| {100 * far['top1']:.1f} % | {speeds} |"
        )
    return "\n".join(lines)


def plot(results: list[dict], target: Path) -> None:
    """KL divergence, and for models of a text perplexity, against bits per weight: a panel for each."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (result, value)
        for result in results
        for value in (divergence, text_perplexity)
        if value(result, "f32") is not None
    ]
    figure, grid = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 5), layout="constrained", squeeze=False)
    for axes, (result, value) in zip(grid[0], panels, strict=True):
        draw(axes, result, value)
        axes.set(title=f"{result['base']}: {value.__doc__}", xlabel="bits per weight")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(target, dpi=80)


def divergence(result: dict, name: str) -> float | None:
    """mean KL divergence to f32, nats per token"""
    return result["rows"][name]["divergence"]["kl_mean"]


def text_perplexity(result: dict, name: str) -> float | None:
    """perplexity"""
    return None if result["random_ids"] else result["rows"][name]["perplexity"]


def draw(axes, result: dict, value) -> None:
    """Quantised files as points with names, those with an importance matrix hollow; perplexity with that of f32."""
    names = [name for name, row in result["rows"].items() if row["bits_per_weight"] < 10]
    names.sort(key=lambda name: result["rows"][name]["bits_per_weight"])
    for hollow in (False, True):
        mine = [name for name in names if name.endswith(WITH_IMATRIX) == hollow]
        x = [result["rows"][name]["bits_per_weight"] for name in mine]
        y = [value(result, name) for name in mine]
        colour, fill = ("#d55e00", "none") if hollow else ("#0072b2", "#0072b2")
        label = "with importance matrix" if hollow else "without"
        if mine:
            axes.plot(x, y, "o", ms=6, color=colour, mfc=fill, label=label)
    if value is text_perplexity:
        axes.axhline(value(result, "f32"), color="grey", ls="--", lw=1, label="f32")
    else:
        axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.legend()
    plain = [name for name in names if not name.endswith(WITH_IMATRIX)]
    label_points(axes, {name: (result["rows"][name]["bits_per_weight"], value(result, name)) for name in plain})


def label_points(axes, points: dict[str, tuple[float, float]]) -> None:
    """Names to the right of their points, or to the left where another point is in the way; coincident ones share."""
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    groups: list[list[str]] = []
    for name in points:
        near = [group for group in groups if np.abs(pixels[group[-1]] - pixels[name]).max() < 12]
        if near:
            near[0].append(name)
        else:
            groups.append([name])
    for group in groups:
        ways = [pixels[other] - pixels[group[-1]] for other in points if other not in group]
        blocked = any(0 < right < 60 and abs(up) < 8 for right, up in ways)
        name, offset, side = (group[0], -6, "right") if blocked else (group[-1], 6, "left")
        text = ", ".join(group)
        axes.annotate(text, points[name], (offset, 0), textcoords="offset points", ha=side, va="center", fontsize=9)


def report(arguments: argparse.Namespace) -> None:
    results = [json.loads(Path(path).read_text()) for path in arguments.results]
    for result in results:
        table = speed_table if result["random_ids"] else quality_table
        print(f"{result['base']}\n\n{table(result)}\n")
    if arguments.plot:
        plot(results, Path(arguments.plot))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure")
    command.add_argument("base", help="GGUF file in F32")
    text = command.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="what is predicted, UTF-8")
    text.add_argument("--random-ids", type=int, metavar="N", help="for a model without a tokenizer")
    command.add_argument("--importance-text", help="for importance matrices")
    command.add_argument("--window", type=int, default=256, help="tokens")
    command.add_argument("--max-windows", type=int, default=40)
    command.add_argument("--types", nargs="+", default=TYPES, help="default: %(default)s")
    command.add_argument("--files", metavar="DIR", help="where the quantised files stay")
    command.add_argument("--bench", metavar="DIR", help="with TYPE.json from `fixmin bench --json`")
    command.add_argument("--json", required=True)
    command.set_defaults(run=measure)
    command = commands.add_parser("report")
    command.add_argument("results", nargs="+", help="JSON files of `measure`")
    command.add_argument("--plot", metavar="PNG")
    command.set_defaults(run=report)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
