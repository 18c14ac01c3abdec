"""llama.cpp where it is installed: its programs (FIXMIN_LLAMA_CPP, or `make llama-cpp`) and the package llama_cpp
(FIXMIN_LLAMA_PYTHON: a Python that has it, or `make bench-peers`)."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("FIXMIN_LLAMA_PYTHON", ROOT / "out/bench/peers/llama/bin/python"))
PROGRAMS = Path(os.environ.get("FIXMIN_LLAMA_CPP", ROOT / "out/llama.cpp/bin"))

needs_python = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no llama_cpp: no {PYTHON} (FIXMIN_LLAMA_PYTHON, make bench-peers)"
)

# One thread: those of llama.cpp wait for each other in a loop, which takes minutes where others use the cores too.
_SCRIPT = """
import json, sys
import numpy as np
from llama_cpp import Llama
task = json.load(open(sys.argv[1]))
if task["what"] == "tokens":
    model = Llama(task["model"], vocab_only=True, verbose=False)
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in task["inputs"]]
    json.dump(ids, open(sys.argv[2], "w"))
elif task["what"] == "greedy":
    model = Llama(task["model"], n_ctx=task["n_ctx"], n_threads=task["n_threads"], verbose=False)
    found = []
    for ids in task["inputs"]:
        model.reset()
        new = []
        for token in model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            new.append(int(token))
            if len(new) == task["n"]:
                break
        found.append(new)
    json.dump(found, open(sys.argv[2], "w"))
else:
    longest = max(map(len, task["inputs"]))
    model = Llama(task["model"], n_ctx=max(64, longest), logits_all=True, n_threads=task["n_threads"], verbose=False,
                  type_k=0, type_v=0)  # keys and values in float32
    rows = []
    for ids in task["inputs"]:
        model.reset()
        model.eval(ids)
        rows.append(model.scores[:len(ids)].copy())
    np.savez(open(sys.argv[2], "wb"), *rows)
"""


def _run(**task: object) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fixmin-"))
    (folder / "task.json").write_text(json.dumps(task))
    done = subprocess.run(
        [PYTHON, "-c", _SCRIPT, folder / "task.json", folder / "out"], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "out"


def token_ids(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """By llama.cpp's own tokenizer, names of special tokens found."""
    return json.loads(_run(what="tokens", model=str(model), inputs=list(texts)).read_text())


def greedy(model: Path, prompts: Sequence[Sequence[int]], n: int, n_ctx: int) -> list[list[int]]:
    """The most likely tokens, n after each prompt."""
    inputs = [list(map(int, ids)) for ids in prompts]
    return json.loads(_run(what="greedy", model=str(model), inputs=inputs, n=n, n_ctx=n_ctx, n_threads=1).read_text())


def logits(model: Path, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """[T, V] of each prompt of ids."""
    inputs = [list(map(int, ids)) for ids in prompts]
    with np.load(_run(what="logits", model=str(model), inputs=inputs, n_threads=1)) as rows:
        return [rows[name] for name in rows.files]


def program(name: str) -> Path:
    """One of llama.cpp's programs; skips a test where it is missing."""
    path = PROGRAMS / name
    if not path.exists():
        pytest.skip(f"no {path} (FIXMIN_LLAMA_CPP, make llama-cpp)")
    return path
