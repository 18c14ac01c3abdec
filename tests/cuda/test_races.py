"""The kernels under the sanitizers: no access outside of a buffer, no two threads at one place without a barrier."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulation import EMULATED_GPU, SEARCH_PATH, build, run
from gguf_factory import make_model

pytestmark = pytest.mark.slow

#: Together they use every kernel of the forward pass: few and many tokens of types with halves, minima and floats.
MODELS = {
    "q2_k": dict(weight_type="Q2_K", embedding_length=256, feed_forward_length=256, block_count=2, head_count=8),
    "q4_0 swiglu": dict(weight_type="Q4_0", activation="swiglu", norm="rmsnorm", block_count=2),
    "f16": dict(weight_type="F16", block_count=2),
}
#: Barriers of blocks in the kernels; each is left out once.
N_BARRIERS = 10
#: The first of these are in attention, where not each matters for every shape.
N_BARRIERS_OF_ATTENTION = 5


def program(sanitizer: str) -> Path:
    options = ("-DFIXMIN_PYTHON=OFF", "-DFIXMIN_NATIVE_TESTS=ON", f"-DFIXMIN_SANITIZE={sanitizer}")
    return build(f"emulated-{sanitizer}", "-DCMAKE_BUILD_TYPE=Debug", *EMULATED_GPU, *options) / "logits_main"


def compute(
    path: Path,
    model: Path,
    out: Path,
    kv_type: str = "q8_0",
    n_tokens: int = 10,
    n_batch: int = 512,
    **environment: str,
):
    ids = np.random.default_rng(1).integers(0, 100, n_tokens)
    line = f"- 1 {n_batch} {kv_type} {model} {out} {' '.join(map(str, ids))}\n"
    env = {"PATH": SEARCH_PATH, "FIXMIN_DEVICE": "cuda", "TSAN_OPTIONS": "halt_on_error=1", **environment}
    return subprocess.run([path, "logits"], input=line, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    return make_model(tmp_path / "model.gguf", vocab_size=100, **MODELS[request.param])


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_clean(sanitizer, model, tmp_path):
    for kv_type, n_tokens in (("q8_0", 10), ("f16", 40)):  # the kernels for few tokens and for many
        done = compute(program(sanitizer), model, tmp_path / "out", kv_type, n_tokens, FIXMIN_SIMT_SEED="3")
        assert done.returncode == 0, done.stderr[-3000:]
        assert np.isfinite(np.fromfile(tmp_path / "out", np.float32)).all()
    for step in ("graph", "persistent"):  # the step of one token, again and again
        done = compute(
            program(sanitizer), model, tmp_path / "out", n_batch=1, FIXMIN_SIMT_SEED="4", FIXMIN_CUDA_STEP=step
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("sanitizer", "cases"), [("address,undefined", "25"), ("thread", "12")])
def test_attention_is_clean(sanitizer, cases):
    """All shapes of tiles, with scores that are kept and such that are computed again."""
    path = program(sanitizer).with_name("attention_main")
    done = run([path, cases, "7"], TSAN_OPTIONS="halt_on_error=1", FIXMIN_SIMT_SEED="5")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_products_are_clean(sanitizer):
    """Of every type in every size of tiles; norms, activations, codes."""
    path = program(sanitizer).with_name("products_main")
    done = run([path, "30", "7"], TSAN_OPTIONS="halt_on_error=1", FIXMIN_SIMT_SEED="5")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    # More blocks of 32 than are handed over at a time, heads for more than one warp: so every barrier matters.
    path = tmp_path_factory.mktemp("planted") / "model.gguf"
    # Heads of 64 are two buffers of keys.
    sizes = dict(embedding_length=128, feed_forward_length=1024, head_count=2)
    return make_model(path, vocab_size=100, weight_type="Q8_0", **sizes)


def compute_planted(model: Path, out: Path, left_out: int):
    """Some steps of one token: single launches first, then as one kernel whose blocks wait for each other."""
    environment = {"FIXMIN_SIMT_LEAVE_OUT": str(left_out), "FIXMIN_CUDA_STEP": "persistent"}
    return compute(program("thread"), model, out, n_batch=1, n_tokens=4, **environment)


def assert_found(done: "subprocess.CompletedProcess[str]") -> None:
    """In a kernel of this folder, and not somewhere in the engine."""
    assert done.returncode != 0
    in_a_kernel = r"csrc/cuda/\w+\.cuh|#0 fixmin::cuda::Attention"
    assert re.search(rf"WARNING: ThreadSanitizer: data race.*?({in_a_kernel})", done.stderr, re.DOTALL)


@pytest.mark.parametrize("barrier", range(1, N_BARRIERS_OF_ATTENTION + 1))
def test_a_missing_barrier_of_attention_is_found(barrier):
    path = program("thread").with_name("attention_main")
    assert_found(run([path, "25", "7"], TSAN_OPTIONS="halt_on_error=1", FIXMIN_SIMT_LEAVE_OUT=str(barrier)))


@pytest.mark.parametrize("barrier", range(N_BARRIERS_OF_ATTENTION + 1, N_BARRIERS + 1))
def test_a_missing_barrier_is_found(barrier, planted, tmp_path):
    assert_found(compute_planted(planted, tmp_path / "out", barrier))


def test_there_are_so_many_barriers(planted, tmp_path):
    """The one after the last is met by nothing: leaving it out changes nothing."""
    done = compute_planted(planted, tmp_path / "out", N_BARRIERS + 1)
    assert done.returncode == 0, done.stderr[-3000:]
