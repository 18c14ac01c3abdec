"""Faults of memory, files and threads, one after the other: a clear error, nothing lost, and the next request is right.

The programs beside this file do the work, each in a process of its own with the shim loaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from injected import build

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shim"))


def run(shim: Path, program: str, *arguments: object) -> Any:
    environment = os.environ | {"LD_PRELOAD": str(shim), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}  # else its writes fail too, and libraries are damaged from then on
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["load", "generate", "serve"])
def test_every_allocation_fails_in_turn(shim: Path, tmp_path: Path, work: str) -> None:
    done = run(shim, "allocations.py", work, tmp_path)
    assert done
    for name, counts in done.items():
        assert counts["n_faults"] >= 2, (name, counts)
    if work == "load":  # of the others errors are answers
        assert all(counts["n_errors"] >= 1 for counts in done.values()), done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "step"),
    [("quantize", 1), ("state", 1), ("imatrix", 1), ("batch", 1), ("export", 5), ("rewrap", 3), ("convert", 5)],
)
def test_every_call_on_a_file_fails_in_turn(shim: Path, tmp_path: Path, work: str, step: int) -> None:
    pytest.importorskip("torch" if work in ("rewrap", "convert") else "gguf")
    counts = run(shim, "files.py", work, tmp_path, step)[work]
    assert set(counts) == {"disk full", "I/O error", "killed before", "killed within", "killed after"}
    assert all(n >= 3 for n in counts.values()), counts


@pytest.mark.slow
def test_short_reads(shim: Path, tmp_path: Path) -> None:
    assert run(shim, "short_reads.py", tmp_path) > 1000
