"""Mistakes that fuzzers have to find: name of a fuzzer -> file of csrc, what stands there, what is put in its place.

    python tests/fuzz/planted.py BUILD [--minutes 5] [--only gguf]

plants each in a copy of the source, builds that fuzzer (BUILD is what `make fuzzers` has built) and runs it from
nothing: without the kept inputs. Prints how long it took to find the mistake.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

PLANTED = {
    # A read of one byte too many.
    "gguf": ("gguf/gguf_file.cpp", "if (size > left()) {", "if (size > left() + 1) {"),
    # Sizes of a state that nobody compares with its tokens.
    "state": (
        "engine/engine.cpp",
        "if (blocks.size() != n * size || ids.size() != n * quant::kv_block_tokens)",
        "if (blocks.size() % size)",
    ),
    # A block that is given back twice.
    "scheduler": (
        "engine/scheduler.cpp",
        "        pool_.remove_user(known.more);\n    }\n    if (sequence.start(",
        "        pool_.remove_user(known.more), pool_.remove_user(known.more);\n    }\n    if (sequence.start(",
    ),
    # An id that does not exist.
    "codes": (
        "codes/code_map.cpp",
        "return id < vocab_size_ ? std::optional(id) : std::nullopt;",
        "return id <= vocab_size_ ? std::optional(id) : std::nullopt;",
    ),
    # A token more than asked for.
    "sampler": (
        "sampling/sampler.cpp",
        "if (p.top_k > 0) candidates_.top_k(p.top_k);",
        "if (p.top_k > 0) candidates_.top_k(size_t(p.top_k) + 1);",
    ),
    # Queries of chunks that are rotated by the place in the chunk.
    "model": (
        "cpu/decoder.cpp",
        "rotate(queries + t * stride, chunk.position + t);",
        "rotate(queries + t * stride, t);",
    ),
}


def find(build: Path, name: str, minutes: float) -> str:
    """Plants, builds, runs; says what came of it."""
    file, right, wrong = PLANTED[name]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        for part in ("csrc", "tests", "cmake", "CMakeLists.txt"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, _made(tree / part))
        place = tree / "csrc" / file
        text = place.read_text()
        if text.count(right) != 1:
            return "the source has changed: plant another one"
        place.write_text(text.replace(right, wrong))
        # The objects of the folder that is there, but for the changed file.
        compiler = re.search(r"CMAKE_CXX_COMPILER:\w+=(.*)", (build / "CMakeCache.txt").read_text())[1]
        flags = (
            "-std=c++20 -O1 -g1 -fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=all -DFIXMIN_ISAS="
        )
        changed = Path(folder, "changed.o")
        command = [compiler, *flags.split(), f"-I{tree / 'csrc'}", "-c", str(place), "-o", str(changed)]
        subprocess.run(command, check=True, capture_output=True)
        (own,) = (build / "CMakeFiles" / f"{name}_fuzz.dir").rglob(f"{name}_fuzz.cpp.o")
        program = Path(folder, "fuzzer")
        link = [
            compiler,
            "-fsanitize=address,undefined,fuzzer",
            own,
            changed,
            build / "libfixmin_engine.a",
            "-lpthread",
        ]
        subprocess.run([*link, "-o", program], check=True)
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        seeds = [str(HERE / "seeds" / name)] if (HERE / "seeds" / name).is_dir() else []
        options = [
            f"-max_total_time={int(60 * minutes)}",
            f"-dict={HERE / 'dictionaries' / name}.dict",
            "-detect_leaks=0",
        ]
        start = time.monotonic()
        done = subprocess.run(
            [program, corpus, *seeds, *options],
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        seconds = time.monotonic() - start
        if done.returncode == 0:
            return f"not found in {seconds:.0f} s"
        runs = re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
        reason = re.search(r"broken promise: .*|ERROR: AddressSanitizer: \S+|runtime error: .*", done.stderr)
        return f"found in {seconds:.0f} s, {int(runs[-1]) if runs else 0:,} executions: {reason[0] if reason else '?'}"


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    found = {name: find(arguments.build.resolve(), name, arguments.minutes) for name in arguments.only or PLANTED}
    for name, what in found.items():
        print(f"{name}: {what}", flush=True)
    return 0 if all(what.startswith("found") for what in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
