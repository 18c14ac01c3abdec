"""The engine: right by the float64 oracle, with the same bits whatever the machine and the chunking."""

import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from engine_runs import finished, generate, score, tokens
from gguf_factory import ALL_BIASES, EVERY_TYPE, FLOAT_TYPES, QUANTIZED_TYPES, WEIGHT_TYPES, block_sizes, make_model
from hypothesis import given
from hypothesis import strategies as st
from oracle import forward, hidden_states

from fixmin_cpp import _core

ISAS = _core.system_info()["isas_supported"]

OPTIONS = {
    "plain": {},
    "rmsnorm swiglu interleaved rope": dict(norm="rmsnorm", activation="swiglu", rope_style="interleaved"),
    "rmsnorm gelu": dict(norm="rmsnorm", norm_eps=1e-6),
    "partial rope, other base": dict(rope_dim=8, rope_base=500.0, activation="gelu_tanh"),
    "no rope": dict(rope_dim=0),
    "interleaved lift, values": dict(lift="interleave", vocab_size=200, values=(-1.0, 1.0)),
    "scaled values": dict(values=(-0.3, 0.7), scale=0.11),
    "table": dict(code_kind="table"),
    "learned": dict(code_kind="learned", norm_bias=False),
    "learned swiglu": dict(code_kind="learned", norm="rmsnorm", activation="swiglu"),
    "grouped queries": dict(head_count=4, head_count_kv=2, embedding_length=96, feed_forward_length=160),
    "one kv head": dict(head_count=4, head_count_kv=1, embedding_length=128),
    "biases everywhere": dict(biases=ALL_BIASES, activation="swiglu"),
    "no bias": dict(biases=frozenset(), norm_bias=False),
    "head size 32": dict(embedding_length=128, head_count=4, context_length=96),
    "head size 48, grouped": dict(embedding_length=192, head_count=4, head_count_kv=2),
    "head size 64, grouped": dict(embedding_length=256, head_count=4, head_count_kv=1),
    "head size 80, grouped": dict(embedding_length=320, head_count=4, head_count_kv=2, rope_style="interleaved"),
    "head size 96": dict(embedding_length=192, head_count=2, rope_dim=32),
    "head size 128": dict(embedding_length=256, head_count=2),
    "five layers": dict(block_count=5, norm_eps=1e-12),
}
HEAD_SIZES = ["plain", *(name for name in OPTIONS if name.startswith("head size"))]
KV_TYPES = ("f32", "f16", "q8_0")
# Those that every type is tried with: each of a type's code paths is in them.
ALL_TYPES = ["rmsnorm swiglu interleaved rope", "learned"]
SOME_TYPES = ("Q8_0", "Q4_0", "W8A8")
# Of the matrices that multiply the same rows some with a scale for each row, some for each block.
MIXED_WITH_W8A8 = dict(
    activation="swiglu",
    weight_type="Q8_0",
    weight_types={
        "blk.1.attn_k": "W8A8",
        "blk.1.ffn_gate": "W8A8",
        "blk.0.ffn_up": "W8A8",
        "blk.0.attn_q": "W8A8",
        "blk.1.attn_output": "W8A8",
        "blk.1.ffn_down": "F16",
        "output": "W8A8",
    },
)
# Sizes that are no multiple of anything: only types without blocks can hold them.
ODD = dict(embedding_length=60, head_count=3, feed_forward_length=50, vocab_size=77)


def options_for(kind, name):
    """OPTIONS[name], with rows of whole blocks for the types of 256 values."""
    if kind in QUANTIZED_TYPES and block_sizes(kind)[0] == 256:
        return OPTIONS[name] | dict(embedding_length=256, feed_forward_length=512)
    return OPTIONS[name]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def get(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = str(make_model(folder / f"{len(made)}.gguf", **options))
        return made[key]

    return get


def ids_for(n, vocab=77, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.uint32)


def relative(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# --- right -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOAT_TYPES)
@pytest.mark.parametrize("name", [*OPTIONS, "odd sizes"])
def test_logits_and_hidden_states_against_float64(model_file, name, kind):
    path = model_file(weight_type=kind, seed=3, **OPTIONS.get(name, ODD))
    engine = _core.Engine(path, kv_type="f32", n_threads=2)
    ids = ids_for(40)
    assert relative(engine.logits(ids), forward(path, ids)) <= 2e-6
    for layer, expected in enumerate(hidden_states(path, ids)):
        got = engine.hidden_states(ids, layer)
        assert relative(got, expected) <= 2e-6, f"layer {layer}"
        if layer == 0:
            assert np.array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for name in OPTIONS for kind in ((*QUANTIZED_TYPES, "W8A8") if name in ALL_TYPES else SOME_TYPES)],
)
def test_quantised_logits_against_float64(model_file, name, kind):
    """The oracle has the file's weights but exact activations: what is left is their rounding to 8 bits."""
    path = model_file(weight_type=kind, seed=3, **options_for(kind, name))
    ids = ids_for(40)
    assert relative(_core.Engine(path, kv_type="f32").logits(ids), forward(path, ids)) <= 0.03


def test_mixed_weight_types(model_file):
    assert set(WEIGHT_TYPES) == set(EVERY_TYPE["weight_types"].values())
    path = model_file(**EVERY_TYPE)
    ids = ids_for(20)
    assert relative(_core.Engine(path).logits(ids), forward(path, ids)) <= 0.03


def test_mixed_with_w8a8(model_file):
    path = model_file(**MIXED_WITH_W8A8)
    ids = ids_for(20)
    for n_batch in (1, 512):
        assert relative(_core.Engine(path, n_batch=n_batch).logits(ids), forward(path, ids)) <= 0.03


@pytest.mark.parametrize(("kv_type", "bound"), [("f16", 1e-3), ("q8_0", 0.03)])
@pytest.mark.parametrize("name", [*HEAD_SIZES, "grouped queries", "odd sizes"])
def test_rounded_cache_is_close(model_file, name, kv_type, bound):
    path = model_file(weight_type="F32", seed=3, **OPTIONS.get(name, ODD))
    ids = ids_for(60)
    exact = forward(path, ids)
    with_f32 = relative(_core.Engine(path, kv_type="f32").logits(ids), exact)
    assert with_f32 < relative(_core.Engine(path, kv_type=kv_type).logits(ids), exact) < bound


def test_cache_size(model_file):
    """2 layers, 1 head for keys and values; a q8_0 block of 32 values takes 34 bytes, a last one of 16 takes 18."""
    path = model_file(embedding_length=160, head_count=2, head_count_kv=1)
    expected = {"f32": 2 * 2 * 80 * 4, "f16": 2 * 2 * 80 * 2, "q8_0": 2 * 2 * (34 + 34 + 18)}
    for kv_type in KV_TYPES:
        info = _core.Engine(path, kv_type=kv_type, n_kv=70).info
        assert info["kv_type"] == kv_type
        assert info["kv_bytes_per_position"] == expected[kv_type]
        assert info["kv_bytes"] == 96 * expected[kv_type]  # 70 positions in blocks of 32
        assert _core.Engine(path, kv_type=kv_type).info["kv_bytes"] == 16 * 64 * expected[kv_type]  # contexts


@pytest.mark.parametrize(("contexts", "share_of_blocks"), [(16, 1e6), (5, 1e6), (16, 9.5), (16, 0.5), (1000, 40.0)])
def test_cache_size_by_default(model_file, contexts, share_of_blocks):
    """So many contexts of 2 blocks, or what a share of the memory holds, but one context at least."""
    block = 32 * 2 * 2 * 64 * 2  # positions, layers, keys and values, width, bytes
    memory = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _core.cgroup_limits()["memory_bytes"])
    share = share_of_blocks * block / memory
    # Of the host's memory: on a GPU it is a share of that one's.
    engine = _core.Engine(model_file(), device="cpu", kv_contexts=contexts, kv_memory_share=min(share, 1.0))
    assert engine.info["kv_block_bytes"] == block
    assert engine.info["n_kv"] == 32 * max(2, min(2 * contexts, int(share_of_blocks)))
    if share_of_blocks < 1e6:  # a share that is asked for alone is a size
        engine = _core.Engine(model_file(), device="cpu", kv_memory_share=share)
        assert engine.info["n_kv"] == 32 * max(2, int(share_of_blocks))
    for wrong in {"kv_contexts": 0}, {"kv_memory_share": 0.0}, {"kv_memory_share": 1.1}, {"kv_memory_share": np.nan}:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            _core.Engine(model_file(), **wrong)


def test_a_cache_larger_than_all_memory(model_file):
    """Mapped page by page it would end the process later."""
    block = 32 * 2 * 2 * 64 * 2  # as above
    memory = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _core.cgroup_limits()["memory_bytes"])
    least = 32 * (memory // block + 1)
    for n_kv in (least, 2_000_000_000):
        asked = -(-n_kv // 32) * block
        with pytest.raises(MemoryError, match=f"n_kv is {n_kv}: such a cache takes {asked} bytes, .* {memory}$"):
            _core.Engine(model_file(), device="cpu", n_kv=n_kv)


def test_a_batch_larger_than_all_memory(model_file):
    with pytest.raises(
        MemoryError, match=r"n_batch is 2000000000: its buffers take \d+ bytes, more than all the memory"
    ):
        _core.Engine(model_file(), device="cpu", n_batch=2_000_000_000)


def test_rows_shorter_than_a_block(tmp_path):
    """The division by their quantised size ended the process."""
    path = make_model(tmp_path / "m.gguf", embedding_length=8, head_count=4, feed_forward_length=8)
    ids = np.array([1, 2, 3, 5], np.uint32)
    np.testing.assert_allclose(
        _core.Engine(str(path), n_threads=2, kv_type="f32").logits(ids), forward(path, ids), atol=1e-5
    )


def test_score_is_the_log_softmax(model_file):
    path = model_file()
    ids = ids_for(60)
    logits = forward(path, ids)
    expected = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(59), ids[1:]]
    for n_batch in (512, 7, 1):
        got = score(_core.Engine(path, kv_type="f32", n_batch=n_batch), ids)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert score(_core.Engine(path), ids[:1]).shape == (0,)


def test_codes(model_file):
    engine = _core.Engine(model_file(vocab_size=200))
    codes = engine.codes(np.arange(200, dtype=np.uint32))
    assert codes.shape == (200, 8)
    assert len({row.tobytes() for row in codes}) == 200
    with pytest.raises(ValueError, match="200"):
        engine.codes(np.array([200], np.uint32))
    with pytest.raises(_core.UnsupportedError, match="learned"):
        _core.Engine(model_file(code_kind="learned")).codes(ids_for(1))


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_unwritten_cache_never_shows(model_file, kv_type):
    """A long sequence leaves its keys and values behind; a shorter one afterwards must not see them."""
    path = model_file(context_length=300)
    used, fresh = _core.Engine(path, kv_type=kv_type), _core.Engine(path, kv_type=kv_type)
    used.logits(ids_for(300, seed=1))
    for n in (1, 15, 16, 17, 33, 127, 128, 129, 200):
        assert digest(used.logits(ids_for(n))) == digest(fresh.logits(ids_for(n)))


# --- the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ALL_TYPES for kind in (*WEIGHT_TYPES, "W8A8")),
        *((name, kind) for name in ("plain", "grouped queries") for kind in ("F32", "F16", "BF16", *SOME_TYPES)),
        ("mixed", None),
        ("mixed with W8A8", None),
    ],
)
def test_bits_do_not_depend_on_isa_threads_or_chunks(model_file, name, kind):
    mixed = {"mixed": EVERY_TYPE, "mixed with W8A8": MIXED_WITH_W8A8}.get(name)
    path = model_file(seed=4, **(mixed or options_for(kind, name) | dict(weight_type=kind)))
    ids = ids_for(50)
    digests = {}
    for isa in ISAS:
        for n_threads in (1, 2, 5) if isa in ("scalar", ISAS[-1]) else (2,):
            for n_batch in (1, 7, 512):
                engine = _core.Engine(path, isa=isa, n_threads=n_threads, n_batch=n_batch)
                digests[isa, n_threads, n_batch] = digest(engine.logits(ids))
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("name", [*HEAD_SIZES, "grouped queries"])
def test_bits_with_every_cache_type_and_head_size(model_file, name, kv_type):
    """More positions than a block of the cache has."""
    path = model_file(seed=5, weight_type="Q8_0", **OPTIONS[name] | dict(context_length=160))
    ids = ids_for(140)
    digests = {}
    for isa in ISAS:
        for n_threads, n_batch in ((1, 7), (3, 512)) if isa in ("scalar", ISAS[-1]) else ((2, 50),):
            engine = _core.Engine(path, isa=isa, n_threads=n_threads, n_batch=n_batch, kv_type=kv_type)
            digests[isa, n_threads, n_batch] = digest(engine.logits(ids))
    assert len(set(digests.values())) == 1, digests


def test_rows_so_long_that_a_chunk_takes_several_passes(model_file):
    """W8A8 has smaller rows in 8 bits than the other types, so that more tokens go through a product at once: all have
    to fit what kernels lay them out in. Wrong memory shows with `make asan`, if not here."""
    shape = {"embedding_length": 32, "head_count": 1, "feed_forward_length": 8192, "context_length": 512}
    path = model_file(seed=9, weight_type="W8A8", block_count=1, **shape)
    ids = ids_for(500)
    digests = {digest(_core.Engine(path, n_threads=2, n_batch=n).logits(ids)) for n in (48, 512)}
    assert len(digests) == 1


@given(data=st.data())
def test_logits_of_a_prefix_are_a_prefix_of_the_logits(model_file, data):
    engine = _core.Engine(model_file(weight_type="Q8_0"), n_batch=13, n_threads=1)
    ids = ids_for(64, seed=data.draw(st.integers(0, 5)))
    n = data.draw(st.integers(1, 64))
    assert digest(engine.logits(ids[:n])) == digest(engine.logits(ids)[:n])
    assert digest(engine.logits(ids[:n], last=True)) == digest(engine.logits(ids)[n - 1])


def test_flush_to_zero_of_the_caller_changes_nothing(model_file):
    torch = pytest.importorskip("torch")
    engine = _core.Engine(model_file(weight_type="Q4_0"), n_threads=2)
    before = digest(engine.logits(ids_for(30)))
    torch.set_flush_denormal(True)
    try:
        assert digest(engine.logits(ids_for(30))) == before
    finally:
        torch.set_flush_denormal(False)


def test_environment_chooses_the_isa():
    code = "from fixmin_cpp import _core; print(_core.system_info()['isa'])"
    for isa in ISAS:
        env = dict(os.environ, FIXMIN_ISA=isa)
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == isa
    failed = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ, FIXMIN_ISA="z80"), capture_output=True, text=True
    )
    assert failed.returncode != 0
    assert "FIXMIN_ISA: unknown instruction set 'z80'" in failed.stderr


# --- generation --------------------------------------------------------------------------------------------------


def params(**values):
    return _core.SamplingParams(**values)


def test_greedy_generation_is_the_argmax_of_the_logits(model_file):
    engine = _core.Engine(model_file(), n_batch=5)
    prompt = ids_for(12)
    request = finished(engine.submit(prompt, params(max_new_tokens=20)))
    assert request.result()["finish_reason"] == "length"
    assert request.result()["n_prompt"] == 12
    token_ids = np.array(request.read(0)[0], np.uint32)
    logits = engine.logits(np.concatenate([prompt, token_ids]))
    assert np.array_equal(token_ids, logits[11:-1].argmax(1))


def test_stop_ids_reading_and_context_end(model_file):
    engine = _core.Engine(model_file())
    prompt = ids_for(12)
    free = generate(engine, prompt, params(max_new_tokens=10))
    first = free.index(free[4])

    stopped = finished(engine.submit(prompt, params(max_new_tokens=10, stop_ids=[free[4]])))
    assert stopped.result()["finish_reason"] == "eos"
    assert stopped.result()["last"][0] == free[4]
    assert stopped.read(0)[0] == free[:first]

    read = engine.submit(prompt, params(max_new_tokens=10))
    seen = list(itertools.islice(tokens(read), 3))
    read.cancel()
    assert finished(read).result()["finish_reason"] in ("cancelled", "length")  # the engine does not wait for a reader
    assert seen == free[:3] == read.read(0)[0][:3]

    full = finished(engine.submit(prompt, params(max_new_tokens=1000)))
    assert full.result()["finish_reason"] == "length"
    assert len(full.read(0)[0]) == 64 - 12


def test_sampling_follows_the_distribution(model_file):
    """The first token of many seeds against the softmax, filtered as documented; chi-squared far from its limit."""
    engine = _core.Engine(model_file(vocab_size=16, width=4))
    prompt = ids_for(5, vocab=16)
    logits = engine.logits(prompt, last=True).astype(np.float64)
    order = np.argsort(-logits)
    for top_k, top_p, temperature in [(0, 1.0, 1.0), (4, 1.0, 0.7), (0, 0.6, 1.5), (8, 0.8, 1.0)]:
        keep = list(order[: top_k or 16])
        p = np.exp(logits[keep] - logits.max())
        p /= p.sum()
        if top_p < 1:
            keep = keep[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
        expected = np.zeros(16)
        expected[keep] = np.exp((logits[keep] - logits.max()) / temperature)
        expected /= expected.sum()
        n = 1500
        settings = dict(max_new_tokens=1, top_k=top_k, top_p=top_p, min_p=0, temperature=temperature)
        got = [generate(engine, prompt, params(seed=s, **settings))[0] for s in range(n)]
        counts = np.bincount(got, minlength=16)
        assert set(np.flatnonzero(counts)) <= set(keep)
        chi2 = ((counts[keep] - n * expected[keep]) ** 2 / (n * expected[keep])).sum()
        assert chi2 < 3 * len(keep) + 20


def test_same_seed_same_tokens(model_file):
    settings = dict(max_new_tokens=30, temperature=1.0, seed=2**63 + 5)
    runs = {
        tuple(generate(_core.Engine(model_file(), isa=isa, n_threads=n), ids_for(6), params(**settings)))
        for isa in ISAS
        for n in (1, 3)
    }
    assert len(runs) == 1
    other = generate(_core.Engine(model_file()), ids_for(6), params(**{**settings, "seed": 6}))
    assert tuple(other) not in runs


def test_penalties_count_the_prompt_and_what_was_generated(model_file):
    """A penalty that no difference of logits makes up for: nothing comes up twice until everything has."""
    engine = _core.Engine(model_file(vocab_size=32, width=5))
    prompt = np.array([3, 7, 7, 11], np.uint32)
    token_ids = generate(engine, prompt, params(max_new_tokens=29, presence_penalty=1e6))
    assert sorted(token_ids) == sorted(set(range(32)) - {3, 7, 11})


def test_stop_ids_wait_for_min_new_tokens(model_file):
    engine = _core.Engine(model_file())
    free = generate(engine, ids_for(12), params(max_new_tokens=10))
    held = generate(engine, ids_for(12), params(max_new_tokens=10, stop_ids=[free[0]], min_new_tokens=4))
    assert len(held) >= 4
    assert free[0] not in held


def test_an_exception_of_the_reader_leaves_the_engine_as_it_was(model_file):
    engine = _core.Engine(model_file())

    def read():
        for _ in tokens(engine.submit(ids_for(3), params(max_new_tokens=50))):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read()
    assert len(generate(engine, ids_for(3), params(max_new_tokens=5))) == 5


def test_cancelled_while_it_is_read(model_file):
    engine = _core.Engine(model_file(context_length=60000, embedding_length=256, feed_forward_length=1024), n_threads=1)
    request = engine.submit(ids_for(3), params(max_new_tokens=50000))
    seen = []
    for token in tokens(request):
        seen.append(token)
        request.cancel()
    assert finished(request).result()["finish_reason"] == "cancelled"
    assert 1 <= len(seen) < 50000  # the engine does not wait for the reader
    assert request.read(0)[0] == seen


def test_ctrl_c_stops_waiting(model_file):
    engine = _core.Engine(model_file(context_length=60000, embedding_length=256, feed_forward_length=1024), n_threads=1)
    request = engine.submit(ids_for(3), params(max_new_tokens=50000))
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        request.wait(2**62, 60.0)
    timer.join()
    request.cancel()
    assert finished(request).result()["finish_reason"] == "cancelled"


def test_ctrl_c_stops_a_computation(model_file):
    engine = _core.Engine(model_file(context_length=60000, embedding_length=256, feed_forward_length=1024), n_threads=1)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    start = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.logits(ids_for(59999), last=True)  # minutes without the interruption
    timer.join()
    assert time.monotonic() - start < 20
    assert engine.logits(ids_for(3)).shape == (3, 100)


# --- misuse ------------------------------------------------------------------------------------------------------


def test_bad_ids(model_file):
    engine = _core.Engine(model_file())
    with pytest.raises(ValueError, match="no token ids"):
        engine.logits(np.array([], np.uint32))
    with pytest.raises(ValueError, match=r"token id 100 at position 1 .*100"):
        engine.logits(np.array([3, 100], np.uint32))
    with pytest.raises(_core.ContextLengthError, match="65 tokens do not fit the context of 64"):
        engine.logits(ids_for(65))
    with pytest.raises(_core.ContextLengthError, match="no room"):
        engine.submit(ids_for(64), params())
    with pytest.raises(ValueError, match="dimension"):
        engine.logits(np.zeros((2, 2), np.uint32))
    with pytest.raises(ValueError, match="layer is 3"):
        engine.hidden_states(ids_for(2), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n_ctx=65), "n_ctx is 65"),
        (dict(kv_type="q9"), "kv_type is 'q9'"),
        (dict(n_batch=0), "n_batch"),
        (dict(isa="mmx"), "unknown instruction set"),
        (dict(n_threads=5000), "n_threads"),
    ],
)
def test_bad_options(model_file, options, message):
    with pytest.raises(ValueError, match=message):
        _core.Engine(model_file(), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_temperature(model_file, value):
    with pytest.raises(ValueError, match="temperature"):
        _core.Engine(model_file()).submit(ids_for(2), params(temperature=value))


def test_closed_engine(model_file):
    engine = _core.Engine(model_file())
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.logits(ids_for(2))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        _core.Engine(str(tmp_path / "none.gguf"))


def test_weights_that_overflow_are_reported_not_sampled(model_file):
    path = model_file(weight_type="F32", values=(1e38, -3e38), norm="rmsnorm")
    with pytest.raises(_core.FixminError, match="not finite"):
        generate(_core.Engine(path), ids_for(4), params(max_new_tokens=2))


# --- processes and threads ---------------------------------------------------------------------------------------


def test_calls_from_many_threads(model_file):
    engine = _core.Engine(model_file(), n_threads=2)
    expected = [digest(engine.logits(ids_for(20, seed=i))) for i in range(8)]
    got = [None] * 8

    def work(i):
        for _ in range(5):
            got[i] = digest(engine.logits(ids_for(20, seed=i)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == expected


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_fork_keeps_working(model_file):
    engine = _core.Engine(model_file(), n_threads=3, device="cpu")  # CUDA does not work after a fork
    expected = digest(engine.logits(ids_for(20)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(digest(engine.logits(ids_for(20)))))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(timeout=60)
    assert child.exitcode == 0
    assert digest(engine.logits(ids_for(20))) == expected


def test_progress(model_file):
    seen = []
    _core.Engine(model_file(), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
