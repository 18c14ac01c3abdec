r"""Shares of what the machine can do, as docs/benchmarks/roofline.md has them: its first two tables, as Markdown.

    python bench/roofline.py q8_0=out/bench/full-q8_0.gguf q4_0=out/bench/full-q4_0.gguf \
        q4_k_m=out/bench/full-q4_k_m.gguf f16=out/bench/full-f16.gguf

Every cell is a run of `fixmin bench`: decoding with each file; the first one also deep in the context and with one
thread; prompts, with the first two files, on every instruction set of this machine. Nothing else should run on it.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from typing import Any

from fixmin_cpp import system_info


@functools.cache
def bench(isa: str, path: str, repeat: int, *options: str) -> dict[str, Any]:
    """What `fixmin bench --json` says."""
    command = ["bench", "-m", path, "-r", str(repeat), "--json", *options]
    print(isa, *command, file=sys.stderr, flush=True)
    program = [sys.executable, "-c", "from fixmin_cpp.cli import main; main()"]
    done = subprocess.run([*program, *command], stdout=subprocess.PIPE, text=True, env=os.environ | {"FIXMIN_ISA": isa})
    if done.returncode != 0:
        raise SystemExit(f"fixmin bench ended with {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def decoding(files: dict[str, str], isas: list[str], repeat: int, depth: int) -> str:
    """Each token's turn against passes of the read loop before and after it."""
    first, best = next(iter(files)), isas[0]
    variants = {name: bench(best, path, repeat) for name, path in files.items()}
    variants[f"{first}, depth {depth}"] = bench(best, files[first], repeat, "--depth", str(depth))
    variants[f"{first}, 1 thread"] = bench(best, files[first], repeat, "--threads", "1")
    if "avx2" in isas[1:]:
        variants |= {f"{name}, avx2": bench("avx2", files[name], repeat) for name in [*files][:2]}
    shares = [f"{report['decode_roofline']:.2f}" for report in variants.values()]
    speeds = [f"{report['decode_tok_s']:.1f}" for report in variants.values()]
    return table(["", *variants], [["share of the read loop", *shares], ["tok/s", *speeds]])


def prompts(files: dict[str, str], isas: list[str], repeat: int) -> str:
    """Shares of the integer peak of the vector instructions of the same kernels in the same turns."""
    rows = []
    for name in [*files][:2]:
        reports = [bench(isa, files[name], repeat) for isa in isas]
        rows.append([name, *(f"{shares(r)} ({r['prefill_tok_s']:,.0f} tok/s)" for r in reports)])
    return table(["", *isas], rows)


def shares(report: dict[str, Any]) -> str:
    """Of the peak of vectors, and of that of tiles where there are some."""
    tiles = report["prefill_tile_peak_fraction"]
    return f"{report['prefill_peak_fraction']:.2f}" + (f", tiles {tiles:.2f}" if tiles is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE", help="what the table calls a model, and where it is")
    parser.add_argument("-r", "--repeat", type=int, default=5, help="turns of a run; figures are medians (5)")
    parser.add_argument("--depth", type=int, default=896, help="of the column deep in the context (896)")
    arguments = parser.parse_args()
    files = dict(part.split("=", 1) for part in arguments.files if "=" in part)
    if len(files) != len(arguments.files):
        parser.error("files are given as NAME=FILE, each name once")
    isas = [isa for isa in reversed(system_info()["isas_supported"]) if isa != "scalar"]
    print(f"## Decoding: share of the read loop\n\n{decoding(files, isas, arguments.repeat, arguments.depth)}\n")
    print(f"## Prompts: share of the integer peak\n\n{prompts(files, isas, arguments.repeat)}")


if __name__ == "__main__":
    main()
