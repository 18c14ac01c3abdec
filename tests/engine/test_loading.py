"""Loading: what is told meanwhile, how it is cancelled; and how much memory a model and scoring take."""

import itertools
import json
import os
import re
import subprocess
import sys

import gguf
import pytest
from gguf_factory import ALL_BIASES, EVERY_TYPE, make_model

import fixmin_cpp

# Sanitizers take several times the memory and cannot run in a limited address space.
as_it_runs = pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="make asan has its own memory")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("loading") / "model.gguf")


# --- progress ----------------------------------------------------------------------------------------------------


def test_progress_rises_to_one(path):
    seen = []
    fixmin_cpp.Model(path, progress=seen.append).close()
    # One for each matrix that is packed: not layer 0's queries, keys and values.
    assert len(seen) == 2 * 6 - 3 + 1
    assert all(0 < a < b for a, b in itertools.pairwise(seen))
    assert seen[-1] == 1.0


@pytest.mark.parametrize("value", [None, True, 0, "", 1])
def test_only_false_cancels(path, value):
    with fixmin_cpp.Model(path, progress=lambda done: value) as model:
        assert model.logits([1, 2]).shape[0] == 2


def test_false_cancels(path):
    seen = []
    with pytest.raises(fixmin_cpp.FixminError, match=r"model.gguf.*cancelled: progress returned False"):
        fixmin_cpp.Model(path, progress=lambda done: len(seen) < 3 if seen.append(done) is None else None)
    assert len(seen) == 3


def test_an_exception_of_progress_reaches_the_caller(path):
    def fail(done):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fixmin_cpp.Model(path, progress=fail)
    with pytest.raises(TypeError):
        fixmin_cpp.Model(path, progress=lambda: None)
    fixmin_cpp.Model(path).close()


def test_progress_must_be_callable(path):
    with pytest.raises(fixmin_cpp.ArgumentTypeError, match="progress must be callable, got int"):
        fixmin_cpp.Model(path, progress=3)


# --- bytes by kind -----------------------------------------------------------------------------------------------

FOLDED = ("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_norm")
ROLES = {"attn_norm": "norms", "ffn_norm": "norms", "output_norm": "norms", "output": "output"}


def expected_bytes(path):
    """(by role, by type), from the sizes in the file. Rows are multiples of 16 here, so that panels pad nothing."""
    roles, types = dict.fromkeys(("attention", "mlp", "output", "norms"), 0), {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.name.rsplit(".", 1)[0]
        if name in FOLDED or name.startswith("token_"):
            continue
        part = name.split(".")[-1]
        role = ROLES.get(part, "attention" if part.startswith("attn") else "mlp")
        roles[role] += tensor.n_bytes
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + tensor.n_bytes
    return roles, types


@pytest.mark.parametrize("kind", ["affine", "table"])
def test_bytes_by_kind(tmp_path, kind):
    options = EVERY_TYPE | dict(code_kind=kind, vocab_size=112, biases=ALL_BIASES)
    path = make_model(tmp_path / "m.gguf", **options)
    with fixmin_cpp.Model(path, n_ctx=20, n_batch=4) as model:
        info = model.info
    roles, types = expected_bytes(path)
    got = info["bytes"]
    width, qkv = info["code_width"], 3 * info["embedding_length"]
    fold = 4 * (width + 2) * qkv
    code_map = 4 * 2 * width if kind == "affine" else 4 * info["vocab_size"]
    # Scales of 6 bits have bytes of their own in memory: up to 4 % more than in the file.
    exact = {name: n for name, n in types.items() if name not in ("F32", "Q3_K", "Q4_K", "Q5_K", "IQ4_XS")}
    assert exact
    assert {name: got["weights_by_type"][name] for name in exact} == exact
    assert got["weights_by_type"]["F32"] == types["F32"] + fold
    assert got["weights_by_type"]["I32"] == code_map
    for name, n in types.items():
        assert n <= got["weights_by_type"][name] <= 1.04 * n + fold
    assert got["weights_by_role"]["norms"] == roles["norms"]
    assert got["weights_by_role"]["codes"] == fold + code_map
    for name in ("attention", "mlp", "output"):
        assert roles[name] <= got["weights_by_role"][name] <= 1.04 * roles[name]
    assert got["weights"] == sum(got["weights_by_role"].values()) == sum(got["weights_by_type"].values())
    assert got["memory"] == got["weights"] + got["kv_cache"] + got["buffers"]
    assert got["kv_cache"] >= 20 * info["kv_bytes_per_position"]
    assert got["file"] == os.path.getsize(path)
    assert got["mapped"] == 0


def test_a_learned_embedding_stays_in_the_file(tmp_path):
    path = make_model(tmp_path / "m.gguf", code_kind="learned", weight_type="Q8_0", vocab_size=112)
    table = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    with fixmin_cpp.Model(path) as model:
        found = model.info["bytes"]
    assert found["mapped"] == table.n_bytes
    assert found["weights_by_role"]["codes"] == 0
    assert "I32" not in found["weights_by_type"]


# --- memory ------------------------------------------------------------------------------------------------------

MEMORY_PROGRAM = """
import json, sys
from fixmin_cpp import _core

def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return {key: 1024 * int(lines[key].split()[0]) for key in ("RssAnon", "RssFile", "VmHWM")}

before = memory()
engine = _core.Engine(sys.argv[1], n_threads=2, n_batch=8, n_ctx=16, device="cpu")  # whose memory this is
print(json.dumps([before, memory(), engine.info["bytes"]]))
"""


@as_it_runs
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_resident_memory_after_load(tmp_path, kind):
    """At most 1.1 times the file and the cache; while loading, also what two threads have mapped of the file."""
    path = make_model(
        tmp_path / "m.gguf",
        weight_type=kind,
        embedding_length=1024,
        feed_forward_length=4096,
        head_count=16,
        vocab_size=4096,
        context_length=16,
    )
    environment = dict(os.environ, OPENBLAS_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, path], capture_output=True, text=True, env=environment, check=True
    )
    before, after, found = json.loads(done.stdout)
    grown = sum(after[key] - before[key] for key in ("RssAnon", "RssFile"))
    size = os.path.getsize(path)
    assert size > 20e6
    assert 0.8 * size < grown <= 1.1 * size + found["kv_cache"]
    assert after["VmHWM"] - before["RssAnon"] - before["RssFile"] <= 1.1 * size + found["kv_cache"] + (16 << 20)


# An address space with a little more room each time: loading fails at one allocation after the other, until it works.
NO_MEMORY_PROGRAM = """
import os, resource, sys
import fixmin_cpp
from fixmin_cpp import _core

def size():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))

def attempt(settings):
    with fixmin_cpp.Model(sys.argv[1], device="cpu", n_threads=2, **settings) as model:  # whose memory lacks
        return model.logits([1, 2, 3]).tobytes()

settings = eval(sys.argv[2])
step = int(sys.argv[3])
expected = attempt(settings)
seen = set()
for room in range(0, 1 << 40, step):
    resource.setrlimit(resource.RLIMIT_AS, (size() + room, resource.RLIM_INFINITY))
    try:
        got = attempt(settings)
    except (MemoryError, fixmin_cpp.FixminError, OSError) as error:
        got = None
        name, text = type(error).__name__, str(error).replace(sys.argv[1], "PATH")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if got is not None:
        break
    if (name, text) not in seen:
        seen.add((name, text))
        print(name, text)
assert got == expected
assert attempt(settings) == expected
assert not [n for n in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{n}")
            and os.readlink(f"/proc/self/fd/{n}") == sys.argv[1]], "a failed loading keeps nothing open"
print("loaded")
"""


@as_it_runs
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS as Linux has it")
@pytest.mark.parametrize(
    ("options", "settings", "what"),
    [
        ({"vocab_size": 4096, "embedding_length": 256}, {}, "for the file"),
        ({"vocab_size": 4096, "embedding_length": 256}, {}, "for the weights"),
        ({}, {"n_kv": 1 << 20}, r"for the KV cache \(n_kv, n_ctx and kv_type make it smaller\)"),
        ({"context_length": 512}, {"n_batch": 20_000}, "PATH: not enough memory$"),
    ],
)
def test_memory_that_is_lacking_is_an_exception(tmp_path, options, settings, what):
    path = make_model(tmp_path / "m.gguf", **options)
    environment = dict(os.environ, OPENBLAS_NUM_THREADS="1", MALLOC_ARENA_MAX="1")
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY_PROGRAM, str(path), repr(settings), str(1 << 20)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *errors, last = done.stdout.splitlines()
    assert last == "loaded"
    assert any(re.search(f"^MemoryError .*{what}", line) for line in errors), errors
    for line in errors:
        assert re.match("(MemoryError PATH: not enough memory|FixminError the system (refuses|starts))", line), line


SCORE_PROGRAM = """
import sys
import fixmin_cpp

def peak():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

with fixmin_cpp.Model(sys.argv[1], device="cpu", n_ctx=1024, n_threads=2) as model:  # whose memory this is
    size = model.info["vocab_size"]
    tokens = [(7 * position + 3) % size for position in range(1001)]
    model.score(tokens[:65])  # what is made only once
    before = peak()
    score = model.score(tokens)
    grown = peak() - before
    assert len(score.logprobs) == 1000
    model.logits(tokens)
    print(grown, peak() - before)
"""


@as_it_runs
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_score_never_holds_all_logits(tmp_path):
    """A long text takes its keys and values and some rows of logits, not a row for every position."""
    vocab = 65536
    path = make_model(tmp_path / "m.gguf", weight_type="Q8_0", vocab_size=vocab, context_length=1024)
    done = subprocess.run([sys.executable, "-c", SCORE_PROGRAM, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scoring, with_logits = map(int, done.stdout.split())
    row = 4 * vocab  # bytes
    assert scoring < 32 * row
    assert with_logits > 900 * row  # the measure sees what it should
