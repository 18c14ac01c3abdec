"""Runs the fuzzers of this folder, keeps what they found, and says what they have done.

    python tests/fuzz/run.py BUILD [--minutes 5] [--only gguf scheduler] [--jobs 2] [--keep]

`make fuzz MINUTES=5 ONLY="gguf scheduler"` builds them before. Every fuzzer starts from corpus/NAME.zip, and goes on
after a find until its time is over. Inputs of interest stay in out/fuzz/NAME, finds in out/fuzz/finds; --keep puts the
smallest set of inputs that reaches the same into corpus/NAME.zip.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "out" / "fuzz"

#: Name of a fuzzer -> longest input, bytes. Those of Python run in Atheris, which is libFuzzer too.
NATIVE = {"gguf": 3000, "model": 400, "state": 200, "codes": 400, "sampler": 600, "scheduler": 100}
PYTHON = {"requests": 2000, "state_file": 200}
FUZZERS = NATIVE | PYTHON

MOST_FINDS = 20
# A stack of its own for every function would take four fifths of the time where exceptions are thrown.
SANITIZER = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:malloc_context_size=4"}


@dataclass
class Result:
    """What one fuzzer did."""

    name: str
    executions: int = 0
    seconds: float = 0.0
    edges: int = 0  # of the code that it is built from, of Python's code for those of Python
    features: int = 0  # edges by how often they were taken, and the like
    inputs: int = 0  # of interest
    finds: list[str] = field(default_factory=list)


def command(build: Path, name: str) -> list[str]:
    return [str(build / f"{name}_fuzz")] if name in NATIVE else [sys.executable, str(HERE / f"{name}_fuzz.py")]


def unpack(name: str, folder: Path) -> None:
    """The inputs that are kept, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = HERE / "corpus" / f"{name}.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as kept:
            kept.extractall(folder)


def pack(name: str, folder: Path) -> int:
    """Keeps the files of a folder; the same files give the same archive. Returns how many."""
    archive = HERE / "corpus" / f"{name}.zip"
    archive.parent.mkdir(exist_ok=True)
    files = sorted(folder.iterdir())
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as kept:
        for file in files:
            kept.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)
    return len(files)


def fuzz(build: Path, name: str, seconds: float) -> Result:
    """Runs one fuzzer for so long."""
    result = Result(name)
    corpus, finds, seeds = OUT / name, OUT / "finds", OUT / "seeds" / name
    unpack(name, seeds)
    for folder in (corpus, finds):
        folder.mkdir(parents=True, exist_ok=True)
    folders = [str(corpus), str(seeds), *(str(p) for p in [HERE / "seeds" / name, HERE / "finds" / name] if p.is_dir())]
    dictionary = HERE / "dictionaries" / f"{name}.dict"
    start = time.monotonic()
    while (left := seconds - (time.monotonic() - start)) >= 1 and len(result.finds) < MOST_FINDS:
        options = [
            f"-max_total_time={int(left)}",
            f"-max_len={FUZZERS[name]}",
            f"-artifact_prefix={finds}/{name}-",
            f"-dict={dictionary}",
            "-timeout=60",
            "-rss_limit_mb=4096",
            "-print_final_stats=1",
            "-detect_leaks=0",
        ]
        done = subprocess.run(
            [*command(build, name), *folders, *options],
            env=os.environ | SANITIZER,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        log = done.stderr
        (OUT / f"{name}.log").write_text(log, "utf-8")
        result.executions += int((re.findall(r"stat::number_of_executed_units:\s*(\d+)", log) or [0])[-1])
        for line in re.findall(r"cov: (\d+) ft: (\d+)", log)[-1:]:
            result.edges, result.features = int(line[0]), int(line[1])
        if done.returncode == 0:
            break
        reason = re.search(r"broken promise: .*|ERROR: .*|.*Error: .*|runtime error: .*|=+ .*", log)
        saved = re.findall(r"Test unit written to (\S+)", log)
        result.finds.append(f"{reason.group().strip() if reason else done.returncode}: {' '.join(saved)}")
        if not saved:  # it did not even start
            print(log[-2000:], file=sys.stderr)
            break
    result.seconds = time.monotonic() - start
    result.inputs = len(list(corpus.iterdir()))
    return result


def keep(build: Path, name: str) -> int:
    """The smallest set of inputs that reaches what all reach becomes the corpus; in Python all of interest."""
    with tempfile.TemporaryDirectory() as folder:
        sources = [OUT / name, OUT / "seeds" / name, HERE / "seeds" / name]
        folders = [str(source) for source in sources if source.is_dir()]
        if name in PYTHON:  # Atheris cannot start itself again for a merge
            for file in (file for source in folders for file in Path(source).iterdir()):
                shutil.copy(file, folder)
            return pack(name, Path(folder))
        # An input that ends a fuzzer is left out of the merge, and written down once more.
        prefix = f"-artifact_prefix={OUT}/finds/{name}-"
        options = ["-set_cover_merge=1", f"-max_len={FUZZERS[name]}", "-detect_leaks=0", prefix]
        merge = [*command(build, name), *options, folder, *folders]
        subprocess.run(merge, env=os.environ | SANITIZER, capture_output=True, check=True)
        return pack(name, Path(folder))


def table(results: list[Result]) -> str:
    lines = ["| fuzzer | executions | minutes | edges | features | inputs | finds |", "|---|---|---|---|---|---|---|"]
    for r in results:
        numbers = f"{r.executions:,} | {r.seconds / 60:.1f} | {r.edges:,} | {r.features:,} | {r.inputs:,}"
        lines.append(f"| {r.name} | {numbers} | {len(r.finds)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="folder of the compiled fuzzers")
    parser.add_argument("--minutes", type=float, default=5, help="of each fuzzer (5)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(FUZZERS)}")
    parser.add_argument("--jobs", type=int, default=2, help="fuzzers at a time (2)")
    parser.add_argument("--keep", action="store_true", help="renew corpus/NAME.zip")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(FUZZERS):
        parser.error(f"no fuzzer is called {', '.join(sorted(unknown))}; there are {', '.join(FUZZERS)}")
    names = arguments.only or list(FUZZERS)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda name: fuzz(arguments.build, name, 60 * arguments.minutes), names))
    print(table(results))
    for result in results:
        for find in result.finds:
            print(f"{result.name}: {find}")
    (OUT / "report.json").write_text(json.dumps([asdict(result) for result in results], indent=1), "utf-8")
    if arguments.keep:
        for name in names:
            print(f"corpus/{name}.zip: {keep(arguments.build, name)} inputs")
    return 1 if any(result.finds for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
