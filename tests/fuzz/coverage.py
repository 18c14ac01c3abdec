"""What the kept inputs of the native fuzzers reach, room by room, and which functions they never do.

    python tests/fuzz/coverage.py BUILD [--llvm -19] [--functions]

`make fuzz-coverage` builds the programs that replay inputs with clang's counters. As Markdown.
"""

import argparse
import collections
import json
import os
import subprocess
import tempfile
from pathlib import Path

from run import HERE, NATIVE, unpack

ROOT = HERE.parents[1]
#: Rooms that fuzzers have no business in: the interpreter's, a GPU's.
ELSEWHERE = ("bindings", "cuda")


def profile(build: Path, llvm: str) -> dict:
    """The export of llvm-cov over all fuzzers."""
    with tempfile.TemporaryDirectory() as folder:
        raw = []
        for name in NATIVE:
            inputs = Path(folder, name)
            unpack(name, inputs)
            for more in (HERE / "seeds" / name, HERE / "finds" / name):
                for file in more.glob("*"):
                    (inputs / f"{more.name}-{file.name}").write_bytes(file.read_bytes())
            raw.append(Path(folder, f"{name}.profraw"))
            files = sorted(map(str, inputs.iterdir()))
            environment = os.environ | {"LLVM_PROFILE_FILE": str(raw[-1])}
            subprocess.run([build / f"{name}_fuzz", "0", "0", *files], check=True, env=environment, capture_output=True)
        merged = Path(folder, "all.profdata")
        subprocess.run([f"llvm-profdata{llvm}", "merge", "-o", merged, *raw], check=True)
        programs = [str(build / f"{name}_fuzz") for name in NATIVE]
        objects = [programs[0], *(f"-object={program}" for program in programs[1:])]
        export = [f"llvm-cov{llvm}", "export", *objects, f"-instr-profile={merged}"]
        return json.loads(subprocess.run(export, check=True, capture_output=True, text=True).stdout)["data"][0]


def room_of(path: str) -> str | None:
    """The room of a file of csrc."""
    file = Path(path)
    if not file.is_relative_to(ROOT / "csrc"):
        return None
    return file.relative_to(ROOT / "csrc").parts[0]


def table(data: dict) -> str:
    sums: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for file in data["files"]:
        if (room := room_of(file["filename"])) is None:
            continue
        for kind in ("lines", "functions", "branches"):
            for what in ("count", "covered"):
                sums[room][kind, what] += file["summary"][kind][what]
    lines = ["| room | lines | functions | branches |", "|---|---|---|---|"]
    for room, n in sorted(sums.items()):
        cells = [
            f"{n[kind, 'covered']} of {n[kind, 'count']}, {100 * n[kind, 'covered'] / max(1, n[kind, 'count']):.0f} %"
            for kind in ("lines", "functions", "branches")
        ]
        lines.append(f"| {room} | {' | '.join(cells)} |")
    return "\n".join(lines)


def never_reached(data: dict) -> dict[str, list[str]]:
    """File -> names of functions without a single call, of any instance."""
    calls: dict[tuple[str, int], int] = collections.Counter()
    names: dict[tuple[str, int], str] = {}
    for function in data["functions"]:
        place = (function["filenames"][0], function["regions"][0][0])
        calls[place] += function["count"]
        names[place] = function["name"]
    missing: dict[str, list[str]] = collections.defaultdict(list)
    for (path, line), n in sorted(calls.items()):
        if n == 0 and room_of(path) is not None:
            missing[str(Path(path).relative_to(ROOT))].append(f"{line}: {_readable(names[path, line])}")
    return missing


def _readable(name: str) -> str:
    mangled = name.rpartition(":")[2]
    shown = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip() or mangled
    return shown.partition("(")[0].replace("fixmin::", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--llvm", default="-19", help="what the names of LLVM's programs end in (-19)")
    arguments = parser.parse_args()
    data = profile(arguments.build, arguments.llvm)
    print(table(data))
    print("\nNever called:\n")
    for path, functions in never_reached(data).items():
        print(f"* `{path}`: {'; '.join(functions)}")


if __name__ == "__main__":
    main()
