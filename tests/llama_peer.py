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


# A task: samplers by name with their arguments, tokens that they have accepted, rows of logits.
_SAMPLERS = """
import ctypes, json, math, sys
import llama_cpp.llama_cpp as C
answers = sys.stdout.fileno()
model = C.llama_model_load_from_file(sys.argv[1].encode(), MODEL)
vocab = C.llama_model_get_vocab(model)

def made(name, arguments, n_vocab):
    if name == "penalties":
        arguments = [n_vocab, *arguments]
    elif name == "mirostat":
        arguments = [n_vocab, *arguments]
    elif name == "dry":
        texts = [text.encode() for text in arguments[-1]]
        arguments = [vocab, *arguments[:-1], (ctypes.c_char_p * len(texts))(*texts), len(texts)]
    elif name == "logit_bias":
        pairs = arguments[0]
        arguments = [n_vocab, len(pairs), (C.llama_logit_bias * len(pairs))(*map(tuple, pairs))]
    return getattr(C, "llama_sampler_init_" + name)(*arguments)

for line in sys.stdin:
    task = json.loads(line)
    n_vocab = len(task["rows"][0])
    samplers = [made(name, arguments, n_vocab) for name, *arguments in task["samplers"]]
    for one in samplers:
        for token in task["accepted"]:
            C.llama_sampler_accept(one, token)
    steps = []
    for row in task["rows"]:
        tokens = (C.llama_token_data * n_vocab)(*((i, x, 0.0) for i, x in enumerate(row)))
        array = C.llama_token_data_array(tokens, n_vocab, -1, False)
        for one in samplers:
            C.llama_sampler_apply(one, ctypes.byref(array))
        left = [(array.data[i].id, array.data[i].logit) for i in range(array.size)]
        drawn = left[array.selected][0] if array.selected >= 0 else None
        steps.append({"left": [one for one in left if one[1] > -math.inf], "drawn": drawn})
        if drawn is not None:
            for one in samplers:
                C.llama_sampler_accept(one, drawn)
    for one in samplers:
        C.llama_sampler_free(one)
    print(json.dumps(steps), flush=True)
""".replace("MODEL", "(lambda p: (setattr(p, 'vocab_only', True), p)[1])(C.llama_model_default_params())")


class Samplers:
    """llama.cpp's samplers in a process of their own, with the vocabulary of a file that llama.cpp reads."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [PYTHON, "-c", _SAMPLERS, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "Samplers":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def __call__(
        self, samplers: Sequence[Sequence[object]], rows: Sequence[NDArray[np.float32]], accepted: Sequence[int] = ()
    ) -> list[tuple[dict[int, float], int | None]]:
        """For each row: the logits by id of the tokens that are left, and the one that was drawn, if one was.

        Args:
            samplers: each its name behind llama_sampler_init_ and its arguments, without the vocabulary or its size.
            accepted: tokens before.
        """
        task = {"samplers": samplers, "rows": [row.tolist() for row in rows], "accepted": list(map(int, accepted))}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(task), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"llama.cpp ended with {self._process.wait(60)} at {samplers}"
        return [({i: x for i, x in one["left"]}, one["drawn"]) for one in json.loads(line)]
