"""Many requests through one Model: lists, threads, event loops, saved states; each answer as if it were alone."""

import asyncio
import json
import os
import re
import struct
import threading

import numpy as np
import pytest

from fixmin_cpp import Model
from fixmin_cpp.errors import ArgumentError, ArgumentTypeError, ContextLengthError, FixminError, UnsupportedError

TEXTS = ["the cat", "a", "Question: what?", "the the the the the the", "日本", "the cat sat", "x" * 30, "éa"]


@pytest.fixture(scope="module")
def alone(model_path):
    with Model(model_path, n_threads=1) as model:
        return [model.generate(text, max_new_tokens=9 + i, stop=["zz"]) for i, text in enumerate(TEXTS)]


def same(completion, expected):
    return (completion.token_ids, completion.text, completion.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )


def test_from_threads(model_path, alone):
    with Model(model_path, n_kv=64, n_batch=16) as model:
        got = [None] * 32

        def work(i):
            got[i] = model.generate(TEXTS[i % 8], max_new_tokens=9 + i % 8, stop=["zz"])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(same(completion, alone[i % 8]) for i, completion in enumerate(got))


def test_in_an_event_loop(model_path, alone):
    async def one(model, i):
        if i % 2:
            return await model.agenerate(TEXTS[i % 8], max_new_tokens=9 + i % 8, stop=["zz"])
        texts = []
        async with model.astream(TEXTS[i % 8], max_new_tokens=9 + i % 8, stop=["zz"]) as stream:
            async for piece in stream:
                texts.append(piece.text)
        assert "".join(texts) == stream.completion.text
        return stream.completion

    async def run(model):
        return await asyncio.gather(*(one(model, i) for i in range(32)))

    with Model(model_path, n_kv=64, n_batch=16) as model:
        for _ in range(2):  # a second loop after the first
            got = asyncio.run(run(model))
            assert all(same(completion, alone[i % 8]) for i, completion in enumerate(got))


def test_a_list_in_an_event_loop(model):
    expected = model.generate(TEXTS, max_new_tokens=7)
    got = asyncio.run(model.agenerate(TEXTS, max_new_tokens=7))
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_a_cancelled_task_frees_its_place(long_model_path):
    async def run(model):
        task = asyncio.ensure_future(model.agenerate("a", max_new_tokens=10**6, ignore_eos=True))
        while model.stats()["n_running"] == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while model.stats()["n_running"]:
            await asyncio.sleep(0.001)
        return await asyncio.wait_for(model.agenerate("a", max_new_tokens=1), 30)

    with Model(long_model_path, n_parallel=1) as model:
        assert len(asyncio.run(run(model)).token_ids) <= 1


def test_close_wakes_an_event_loop(long_model_path):
    async def run(model):
        stream = model.astream("a", max_new_tokens=10**6, ignore_eos=True)
        await anext(stream)
        await asyncio.get_running_loop().run_in_executor(None, model.close)
        return await asyncio.wait_for(stream.complete(), 30)

    assert asyncio.run(run(Model(long_model_path))).finish_reason == "cancelled"


def test_scores_of_a_list_are_those_of_each(model):
    texts = [text * 2 for text in TEXTS]
    together = model.score(texts)
    for text, score in zip(texts, together, strict=True):
        assert score.logprobs.tobytes() == model.score(text).logprobs.tobytes()
    with pytest.raises(ArgumentError, match=r"text\[1\] to score must have at least 2 tokens"):
        model.score([[1, 2], [3]])


def test_scores_of_continuations(model_path):
    """Texts that begin alike read that once; the bits are those of each alone."""
    rng = np.random.default_rng(0)
    context = rng.integers(0, 200, 40).tolist()
    texts = [context + rng.integers(0, 200, n).tolist() for n in (1, 5, 1, 25)]
    with Model(model_path) as model:  # n_ctx is 64
        whole = [model.score(ids) for ids in texts]
        model.clear_prefix_cache()
        before = model.stats()["n_rows"]
        parts = model.score(texts, start=40)
        # The last token of the context is computed for each, as what follows it is scored; the last one for none.
        assert model.stats()["n_rows"] - before == 39 + sum(len(ids) - 40 for ids in texts)
        for ids, part, all_of_it in zip(texts, parts, whole, strict=True):
            assert part.token_ids == ids
            assert part.logprobs.tobytes() == all_of_it.logprobs[39:].tobytes()
            assert part.ranks.tolist() == all_of_it.ranks[39:].tolist()
            assert part.nll == pytest.approx(-float(part.logprobs.mean()))
        mixed = model.score(texts, start=[40, 1, 41 - 1, 44])
        assert [len(score.logprobs) for score in mixed] == [1, 44, 1, 21]
        assert mixed[1].logprobs.tobytes() == whole[1].logprobs.tobytes()


def test_ranks_are_those_of_the_logits(model):
    ids = model.encode("the cat sat")
    logits = model.logits(ids)
    expected = [int((row > row[token]).sum()) + 1 for row, token in zip(logits, ids[1:], strict=False)]
    assert model.score(ids).ranks.tolist() == expected
    greedy = ids + model.generate(ids, max_new_tokens=4, ignore_eos=True).token_ids
    assert model.score(greedy, start=len(ids)).ranks.tolist()[:4] == [1, 1, 1, 1]


def test_the_last_token_needs_no_place_in_the_context(model):
    ids = np.random.default_rng(0).integers(0, 200, model.info["n_ctx"] + 1)
    assert model.score(ids).logprobs[:-1].tobytes() == model.score(ids[:-1]).logprobs.tobytes()
    with pytest.raises(ContextLengthError):
        model.score([*ids, 1])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (0, r"start of text\[0\] must be between 1 and 2, got 0"),
        ([1, 3], r"start of text\[1\] must be between 1 and 2, got 3"),
        ([1], "start has 1 entries, but there are 2 texts"),
        (1.0, "start must be an integer or a list"),
        ([1, True], r"start of text\[1\] must be an integer"),
    ],
)
def test_bad_starts(model, start, message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        model.score([[1, 2, 3], [4, 5, 6]], start=start)


def test_logits_of_some_rows(model):
    ids = model.encode("the cat sat on")
    every = model.logits(ids)
    for rows in ([0], [2, 5, 6], [6, 2, 2, -1, -len(ids)], np.array([3, 1]), []):
        got = model.logits(ids, rows=rows)
        assert got.tobytes() == every[np.array(rows, int)].tobytes()
        assert got.shape == (len(rows), every.shape[1])
    for rows, message in [
        ([len(ids)], r"rows\[0\] must be between"),
        ([0, -len(ids) - 1], r"rows\[1\] must be"),
        ([0.5], r"rows\[0\] must be an integer"),
    ]:
        with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
            model.logits(ids, rows=rows)
    with pytest.raises(ArgumentError, match="give one"):
        model.logits(ids, last=True, rows=[1])


def test_stop_string_in_a_list_frees_its_place(model_path):
    """The other requests of the list go on; the text is cut as if alone."""
    with Model(model_path, n_parallel=2) as model:
        free = model.generate("the cat", max_new_tokens=30, ignore_eos=True)
        stop = next(c for c in free.text[2:] if c.isprintable())
        expected = model.generate("the cat", max_new_tokens=30, ignore_eos=True, stop=stop)
        got = model.generate(["the cat"] * 5, max_new_tokens=30, ignore_eos=True, stop=stop)
        assert all(same(completion, expected) for completion in got)


def test_timings_say_what_was_known(model_path):
    with Model(model_path) as model:
        first, again = (model.generate(TEXTS[6], max_new_tokens=2).timings for _ in range(2))
        assert first.n_cached == 0
        assert again.n_cached == again.n_prompt - 1
        stats = model.stats()
        assert stats["n_cached_prompt_tokens"] == again.n_cached
        model.clear_prefix_cache()
        assert model.generate(TEXTS[6], max_new_tokens=2).timings.n_cached == 0


# --- form --------------------------------------------------------------------------------------------------------


def test_constrained_outputs_beside_free_ones(model):
    """From a random model, which would not say any of this by itself."""
    pytest.importorskip("llguidance")
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    forms = [
        {"regex": r"[0-9]{3}-[a-f]{2}"},
        {"choices": ["yes", "no", "maybe"]},
        {"json_schema": {"type": "boolean"}},
        {},
    ]
    expected = [model.generate("a", **form, **settings) for form in forms]
    assert re.fullmatch(forms[0]["regex"], expected[0].text)
    assert expected[1].text in forms[1]["choices"]
    assert json.loads(expected[2].text) in (True, False)
    assert all(completion.finish_reason == "eos" for completion in expected[:3])

    async def together():
        return await asyncio.gather(*(model.agenerate("a", **form, **settings) for form in forms * 4))

    assert all(same(a, b) for a, b in zip(asyncio.run(together()), expected * 4, strict=True))
    guessed = [model.generate("a", prompt_lookup_num_tokens=5, **form, **settings) for form in forms]
    assert all(same(a, b) for a, b in zip(guessed, expected, strict=True))


def test_bad_forms_are_refused_before_anything_runs(model):
    pytest.importorskip("llguidance")
    with pytest.raises(ArgumentError, match="regex"):
        model.generate("a", regex="(")
    with pytest.raises(ArgumentError, match="only one of"):
        model.stream("a", regex="a", choices=["a"])


def test_a_form_without_a_tokenizer(bare_model):
    with pytest.raises(UnsupportedError, match="tokenizer"):
        bare_model.generate([1, 2], regex="a")


def test_logprobs_and_drafts(model):
    ids = model.encode("the cat the cat the cat")
    plain = model.generate(ids, max_new_tokens=20, logprobs=2, prompt_logprobs=0)
    drafted = model.generate(ids, max_new_tokens=20, logprobs=2, prompt_logprobs=0, prompt_lookup_num_tokens=6)
    assert same(plain, drafted)
    assert plain.logprobs == drafted.logprobs
    assert [t.token_id for t in plain.logprobs] == plain.token_ids
    # Greedy: what was taken is the most probable.
    assert all(t.rank == 1 and t.top[0] == (t.token_id, t.logprob) and len(t.top) == 2 for t in plain.logprobs)
    score = model.score(ids)
    assert [t.logprob for t in plain.prompt_logprobs] == score.logprobs.tolist()
    assert plain.timings.n_cached == 0  # scores need every token
    assert model.generate(ids).logprobs is None


def test_timeout_ends_a_run(long_model_path):
    with Model(long_model_path) as slow:
        completion = slow.generate("a", max_new_tokens=10**6, ignore_eos=True, timeout=0.3)
        assert completion.finish_reason == "timeout"
        assert len(completion.token_ids) < 10**6


# --- beams -------------------------------------------------------------------------------------------------------


def plain_beams(model, ids, n_beams, length, penalty, eos):
    """The same search by the logits of every beam from the beginning, in float64."""
    live, found = [([], 0.0)], []
    for _ in range(length):
        candidates = []
        for tokens, total in live:
            logits = model.logits(ids + tokens, last=True).astype(np.float64)
            logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            candidates += [(total + logprobs[i], tokens, i) for i in range(len(logprobs))]
        candidates.sort(key=lambda c: -c[0])
        live = []
        for rank, (total, tokens, i) in enumerate(candidates[: 2 * n_beams]):
            if i == eos:
                if rank < n_beams:
                    found.append((total / (len(tokens) + 1) ** penalty, tokens))
            elif len(live) < n_beams:
                live.append(([*tokens, i], total))
        found = sorted(found, key=lambda f: -f[0])[:n_beams]
        if len(found) == n_beams and max(t for _, t in live) / len(live[0][0]) ** penalty <= found[-1][0]:
            return found
    found += [(total / length**penalty, tokens) for tokens, total in live]
    return sorted(found, key=lambda f: -f[0])[:n_beams]


@pytest.mark.parametrize(("n_beams", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (5, 2.0)])
def test_beam_search(model, n_beams, penalty):
    ids = model.encode("the cat")
    eos = model.info["eos_token_id"]
    expected = plain_beams(model, ids, n_beams, 6, penalty, eos)
    got = model.beam_search(ids, num_beams=n_beams, max_new_tokens=6, length_penalty=penalty)
    assert [beam.token_ids for beam in got] == [[int(i) for i in tokens] for _, tokens in expected]
    assert [beam.score for beam in got] == pytest.approx([score for score, _ in expected], rel=1e-4)
    if n_beams == 1:
        assert got[0].token_ids == model.generate(ids, max_new_tokens=6).token_ids
    with pytest.raises(ArgumentError, match="num_beams"):
        model.beam_search(ids, num_beams=0)


# --- saved states --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "prompt.kv"
    ids = np.random.default_rng(0).integers(0, 200, 60).tolist()
    with Model(model_path, n_threads=1) as model:
        assert model.save_state(path, ids[:50]) == 32
        answer = model.generate(ids, max_new_tokens=5)
    return path, ids, answer


def test_a_saved_state_is_not_computed_again(model_path, saved):
    path, ids, answer = saved
    with Model(model_path) as model:
        assert model.load_state(path) == ids[:50]
        got = model.generate(ids, max_new_tokens=5)
        assert got.timings.n_cached == 32
        assert same(got, answer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "does not fit"),
        (lambda b: b + b"x", "does not fit"),
        (lambda b: b[:-5] + b"wrong", "damaged"),
        (lambda b: b"x" + b[1:], "not a saved state"),
        (lambda b: b[:9], "not a saved state"),
        (lambda b: b"", "not a saved state"),
        (lambda b: b[:8] + b"\x02" + b[9:], "version 2"),
        (lambda b: b[:12] + b"\xff\xff\xff\x7f" + b[16:], "damaged"),
        (lambda b: b[:16] + b"[" + b[17:], "damaged"),
        (lambda b: b[:12] + struct.pack("<I", 60_000) + b"[" * 60_000, "damaged"),
        (lambda b: b.replace(b'"n_tokens": 50', b'"n_tokens": 5e'), "damaged"),
        (lambda b: b.replace(b'"n_blocks": 1', b'"n_blocks": 2'), "does not fit"),
        (lambda b: b.replace(b'"kv_type": "f16"', b'"kv_type": "f32"'), "another model or cache"),
    ],
)
def test_a_damaged_state_is_refused(model, saved, tmp_path, damage, message):
    path = tmp_path / "bad.kv"
    path.write_bytes(damage(saved[0].read_bytes()))
    with pytest.raises(ArgumentError, match=message):
        model.load_state(path)


def test_a_state_may_have_any_name_that_a_file_may_have(model, tmp_path):
    for name in ("n" * 255, "é" * 127):
        model.save_state(tmp_path / name, "a cat sat")
        model.load_state(tmp_path / name)
    assert sorted(map(len, os.listdir(tmp_path))) == [127, 255]


def test_a_pipe_is_no_state(model, tmp_path):
    """Opening it would wait until somebody writes."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArgumentError, match="pipe is not a saved state: it is no file"):
        model.load_state(tmp_path / "pipe")


def test_a_state_of_another_model_is_refused(letters_model, bare_model, saved):
    for other in (letters_model, bare_model):
        with pytest.raises(ArgumentError, match="another model"):
            other.load_state(saved[0])
    with pytest.raises(FileNotFoundError):
        letters_model.load_state("no-such-file")


def test_closed_models_refuse_the_new_calls_too(model_path):
    model = Model(model_path)
    model.close()
    for call in (
        model.stats,
        model.clear_prefix_cache,
        lambda: model.save_state("x", "ab"),
        lambda: model.score(["ab"]),
    ):
        with pytest.raises(FixminError, match="closed"):
            call()


def test_blocks_of_known_prompts_that_nobody_uses_are_counted(long_model_path):
    """Those that a running request shares with the cache are not among them."""
    with Model(long_model_path, n_kv=100_000) as model:
        model.generate([1] * 640, max_new_tokens=1)
        idle = model.stats()
        assert idle["n_evictable_blocks"] == idle["n_cached_blocks"] >= 20
        with model.stream([1] * 640, max_new_tokens=90_000, ignore_eos=True) as stream:
            next(stream)
            busy = model.stats()
            assert busy["n_cached_blocks"] - busy["n_evictable_blocks"] >= 19
        after = model.stats()
        assert after["n_evictable_blocks"] == after["n_cached_blocks"]
