"""Model on the real engine: generate, stream, logits, score, codes, text, life and death."""

import contextlib
import gc
import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gguf_factory import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import byte_level, concatenating, write_model

import fixmin_cpp
from fixmin_cpp import FixminError, Model, _core
from fixmin_cpp.running import Runner

UNTRUNCATED = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
PROMPTS = ["a", "the cat", "日本 é", "Question: Who?\nAnswer:"]


@pytest.fixture(params=["model", "letters_model"])
def text_model(request: pytest.FixtureRequest) -> Model:
    return request.getfixturevalue(request.param)


# --- what generate returns -----------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_the_logits(text_model):
    ids = text_model.encode("the cat")
    completion = text_model.generate("the cat", max_new_tokens=6, ignore_eos=True)
    for token_id in completion.token_ids:
        assert token_id == int(np.argmax(text_model.logits(ids, last=True)))
        ids.append(token_id)
    assert completion.finish_reason == "length"
    assert completion.timings.n_prompt == len(text_model.encode("the cat"))
    assert completion.timings.n_generated == len(completion.token_ids) == 6
    assert completion.timings.prefill_s > 0
    assert completion.timings.decode_tok_s > 0


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_is_what_the_tokens_add_to_the_prompt(text_model, prompt):
    completion = text_model.generate(prompt, max_new_tokens=12)
    whole = text_model.decode(text_model.encode(prompt) + completion.token_ids, skip_special_tokens=True)
    assert whole == text_model.decode(text_model.encode(prompt), skip_special_tokens=True) + completion.text


def test_every_kind_of_prompt_gives_the_same_answer(model):
    ids = model.encode("the cat")
    forms = [
        "the cat",
        ids,
        tuple(ids),
        np.array(ids),
        np.array(ids, dtype=np.uint16),
        np.array(ids, dtype=np.int32)[::-1][::-1],
        [np.int64(i) for i in ids],
    ]
    answers = [model.generate(form, max_new_tokens=5).token_ids for form in forms]
    assert answers == [answers[0]] * len(forms)


def test_torch_tensor_as_prompt(model):
    torch = pytest.importorskip("torch")
    ids = model.encode("the cat")
    expected = model.generate(ids, max_new_tokens=5).token_ids
    assert model.generate(torch.tensor(ids), max_new_tokens=5).token_ids == expected


def test_list_of_prompts_gives_a_list_in_order_each_as_if_alone(model):
    prompts = ["a", model.encode("the cat"), np.array([1, 2, 3])]
    together = model.generate(prompts, max_new_tokens=5, temperature=1.0, seed=3)
    alone = [model.generate(p, max_new_tokens=5, temperature=1.0, seed=3) for p in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert isinstance(model.generate(["a"], max_new_tokens=1), list)


def test_context_bounds_the_answer(model):
    n_ctx = model.info["n_ctx"]
    completion = model.generate([1] * 10, max_new_tokens=10**30, ignore_eos=True)
    assert len(completion.token_ids) == n_ctx - 10
    assert completion.finish_reason == "length"
    assert len(model.generate([1] * (n_ctx - 1), ignore_eos=True).token_ids) == 1
    with pytest.raises(fixmin_cpp.ContextLengthError, match=f"prompt has {n_ctx} tokens.*holds {n_ctx}"):
        model.generate([1] * n_ctx)


def test_n_ctx_is_a_setting(model_path):
    with Model(model_path, n_ctx=16, kv_type="f32", n_threads=1, n_batch=3) as small:
        assert small.info["n_ctx"] == 16
        assert len(small.generate([1] * 10, ignore_eos=True).token_ids) == 6
        with pytest.raises(fixmin_cpp.ContextLengthError, match="larger n_ctx"):
            small.generate([1] * 17)
        with pytest.raises(fixmin_cpp.ContextLengthError, match="ids has 17 tokens"):
            small.logits([1] * 17)


def test_end_of_text_token_ends_and_is_not_part_of_the_answer(model, tmp_path):
    tokens = model.generate("the cat", max_new_tokens=12, ignore_eos=True).token_ids
    eos_id = tokens[5]
    first = tokens.index(eos_id)
    with Model(write_model(tmp_path / "eos.gguf", byte_level(), eos_id=eos_id)) as ending:
        completion = ending.generate("the cat", max_new_tokens=12)
        assert completion.token_ids == tokens[:first]
        assert completion.finish_reason == "eos"
        without = ending.generate(
            "the cat", max_new_tokens=12, ignore_eos=True, banned_ids=[model.info["eos_token_id"]]
        )
        other = model.generate("the cat", max_new_tokens=12, ignore_eos=True, banned_ids=[eos_id])
        assert without.token_ids == other.token_ids
        assert eos_id not in without.token_ids
        assert [p.token_id for p in ending.stream("the cat", max_new_tokens=12)] == tokens[:first]


def test_special_tokens_appear_in_ids_only(model, tmp_path):
    """Every token is declared special here: the text stays empty, the ids do not."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())])
    with Model(write_model(tmp_path / "special.gguf", tokenizer)) as silent:
        completion = silent.generate([1, 2], max_new_tokens=4, ignore_eos=True)
        assert len(completion.token_ids) == 4
        assert completion.text == ""
        assert silent.decode(completion.token_ids) != ""


# --- stop strings ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data())
def test_stop_strings_cut_like_the_oracle(model, letters_model, data):
    text_model = data.draw(st.sampled_from([model, letters_model]))
    prompt = data.draw(st.sampled_from(PROMPTS))
    full = text_model.generate(prompt, max_new_tokens=20, ignore_eos=True)
    start = data.draw(st.integers(0, len(full.text) - 1))
    stops = [full.text[start : start + data.draw(st.integers(1, 4))], "\N{SNOWMAN}"]
    expected = full.text[: full.text.find(stops[0])]

    completion = text_model.generate(prompt, max_new_tokens=20, ignore_eos=True, stop=stops)
    assert completion.text == expected
    assert completion.finish_reason == "stop"
    assert completion.token_ids == full.token_ids[: len(completion.token_ids)]

    stream = text_model.stream(prompt, max_new_tokens=20, ignore_eos=True, stop=stops)
    pieces = list(stream)
    assert "".join(p.text for p in pieces) == expected
    assert stream.completion.text == expected
    assert [p.token_id for p in pieces] == stream.completion.token_ids == completion.token_ids


def test_stop_ends_the_run_and_not_only_the_text(letters_model):
    full = letters_model.generate("the cat", max_new_tokens=40, ignore_eos=True)
    stop = letters_model.decode(full.token_ids[3:5], skip_special_tokens=True)
    stopped = letters_model.generate("the cat", max_new_tokens=40, ignore_eos=True, stop=stop)
    assert len(stopped.token_ids) <= 5


def test_stop_that_never_comes_changes_nothing(model):
    full = model.generate("a", max_new_tokens=15, ignore_eos=True)
    same = model.generate("a", max_new_tokens=15, ignore_eos=True, stop=["\N{SNOWMAN}", "never" * 50])
    assert (same.text, same.token_ids, same.finish_reason) == (full.text, full.token_ids, "length")


# --- sampling ----------------------------------------------------------------------------------------------------


def test_same_seed_same_tokens_and_the_seed_is_reported(model):
    free = model.generate("a", max_new_tokens=20, temperature=1.5)
    again = model.generate("a", max_new_tokens=20, temperature=1.5, seed=free.seed)
    assert again.token_ids == free.token_ids
    assert model.generate("a", max_new_tokens=20, temperature=1.5, seed=2**64 - 1).seed == 2**64 - 1
    others = {tuple(model.generate("a", max_new_tokens=20, temperature=1.5, seed=s).token_ids) for s in range(5)}
    assert len(others) > 1


def test_ways_to_say_greedy(model):
    greedy = model.generate("a", max_new_tokens=10).token_ids
    for arguments in (
        {"temperature": 0},
        {"do_sample": False},
        {"do_sample": False, "temperature": 2.0},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-9},
        {"temperature": 1e-30, "seed": 5},
        {"temperature": 1e-300},
    ):
        assert model.generate("a", max_new_tokens=10, **arguments).token_ids == greedy, arguments


def test_do_sample_samples_at_temperature_one(model):
    sampled = model.generate("a", max_new_tokens=10, do_sample=True, seed=1).token_ids
    assert sampled == model.generate("a", max_new_tokens=10, temperature=1.0, seed=1).token_ids


def test_samples_follow_the_softmax_of_the_logits(letters_model):
    """The share of each token among 2000 seeds lies within 5 standard deviations of its probability."""
    logits = letters_model.logits("the", last=True).astype(np.float64) / 0.8
    logits[letters_model.info["eos_token_id"]] = -np.inf  # which ignore_eos bans
    p = np.exp(logits - logits.max())
    p /= p.sum()
    n = 2000
    arguments = {"max_new_tokens": 1, "temperature": 0.8, **UNTRUNCATED, "ignore_eos": True}
    draws = [letters_model.generate("the", **arguments, seed=s) for s in range(n)]
    counts = np.bincount([c.token_ids[0] for c in draws], minlength=len(p))
    assert np.all(np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1)


def test_top_k_keeps_the_most_probable(letters_model):
    best = set(np.argsort(letters_model.logits("the", last=True))[-3:].tolist())
    arguments = {"max_new_tokens": 1, "temperature": 5.0, **UNTRUNCATED, "top_k": 3}
    ends = letters_model.info["eos_token_id"]
    drawn = {(letters_model.generate("the", **arguments, seed=s).token_ids or [ends])[0] for s in range(60)}
    assert drawn == best
    assert letters_model.generate("the", max_new_tokens=3, temperature=5.0, top_k=10**18, seed=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_p": 0.1, "top_n_sigma": 2.0, "typical_p": 0.9, "xtc_probability": 0.5, "min_keep": 2},
        {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
        {"dynatemp_range": 0.3, "dynatemp_exponent": 2.0, "top_k": 0},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repeat_last_n": -1},
        {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 1, "dry_penalty_last_n": 20},
        {"logit_bias": {3: 2.5, 4: -math.inf}, "bad_ids": [5, 6], "allowed_ids": range(200), "stop_ids": [7]},
    ],
    ids=lambda value: next(iter(value)),
)
def test_every_option_reaches_the_sampler(model, arguments):
    """Token for token what a Sampler with the same settings draws from the logits of the tokens so far."""
    ids = model.encode("the cat the cat")
    completion = model.generate(ids, max_new_tokens=8, temperature=1.2, seed=6, ignore_eos=True, **arguments)
    names = {"repetition_penalty": "repeat_penalty", "bad_ids": "banned_ids"}
    values = {names.get(name, name): value for name, value in {"temperature": 1.2, "seed": 6, **arguments}.items()}
    values["banned_ids"] = [*values.get("banned_ids", ()), model.info["eos_token_id"]]
    if "dry_multiplier" in arguments:
        texts = [model.decode(i) for i in range(model.info["vocab_size"])]
        values["dry_sequence_breakers"] = [[i] for i, text in enumerate(texts) if set(text) & set('\n:"*')]
    sampler = _core.Sampler(_core.SamplingParams(**values), ids)
    expected = []
    for step in range(8):
        token = sampler.sample(model.logits(ids + expected, last=True), step)
        if token in arguments.get("stop_ids", ()):
            break
        sampler.accept(token)
        expected.append(token)
    assert completion.token_ids == expected


def test_min_new_tokens_holds_back_the_end(model, tmp_path):
    eos_id = model.generate("the cat", max_new_tokens=1, ignore_eos=True).token_ids[0]
    with Model(write_model(tmp_path / "eos.gguf", byte_level(), eos_id=eos_id)) as ending:
        assert ending.generate("the cat", max_new_tokens=5).token_ids == []
        held = ending.generate("the cat", max_new_tokens=5, min_new_tokens=3).token_ids
        assert len(held) >= 3
        assert eos_id not in held


def test_nothing_left_to_draw(model):
    with pytest.raises(FixminError, match="no token is left to draw"):
        model.generate("a", allowed_ids=[1, 2], banned_ids=[1, 2])


def test_dry_breaks_at_strings(letters_model):
    """Tokens that hold the string, and tokens that begin it together with those that complete it."""
    encode = letters_model.encode
    sequences = letters_model.text_tokenizer.sequences_with("th")
    single = {encode("th")[0], encode("the")[0]}
    assert {s[0] for s in sequences if len(s) == 1} == single
    assert sorted(s for s in sequences if len(s) > 1) == sorted([[encode(t)[0], encode("h")[0]] for t in ("t", " t")])
    # "bcb" would go on with "c", which the bias makes probable and DRY improbable, unless "b" is a breaker.
    b, c = encode("bc")
    arguments = {"max_new_tokens": 1, "dry_multiplier": 1e6, "dry_allowed_length": 1, "logit_bias": {c: 1e5}}
    assert letters_model.generate([b, c, b], **arguments, dry_sequence_breakers=[]).token_ids != [c]
    assert letters_model.generate([b, c, b], **arguments, dry_sequence_breakers=["b"]).token_ids == [c]


def test_dry_strings_need_a_tokenizer(bare_model):
    arguments = {"max_new_tokens": 2, "dry_multiplier": 1.0}
    assert len(bare_model.generate([1, 2, 3], **arguments).token_ids) == 2
    assert len(bare_model.generate([1, 2, 3], **arguments, dry_sequence_breakers=[[1, 2]]).token_ids) == 2
    with pytest.raises(fixmin_cpp.UnsupportedError, match="no tokenizer"):
        bare_model.generate([1, 2, 3], **arguments, dry_sequence_breakers=["a"])


# --- streams -----------------------------------------------------------------------------------------------------


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_until_idle(model: Model) -> None:
    wait_until(lambda: model.stats()["n_running"] + model.stats()["n_waiting"] == 0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stream_gives_what_generate_gives(text_model, prompt):
    arguments = {"max_new_tokens": 20, "temperature": 0.9, "seed": 4}
    whole = text_model.generate(prompt, **arguments)
    stream = text_model.stream(prompt, **arguments)
    pieces = list(stream)
    assert [p.token_id for p in pieces] == whole.token_ids
    assert "".join(p.text for p in pieces) == whole.text == stream.completion.text
    assert stream.completion.finish_reason == whole.finish_reason
    assert list(stream) == []
    wait_until_idle(text_model)


def test_leaving_a_stream_ends_its_run(long_model_path):
    with Model(long_model_path) as slow:
        for i, _ in enumerate(slow.stream("a", max_new_tokens=10**6, ignore_eos=True)):
            if i == 2:
                break
        gc.collect()  # where a traceback or a debugger kept the iterator alive
        wait_until_idle(slow)  # minutes if the run went on
        assert slow.generate("a", max_new_tokens=1)

        stream = slow.stream("a", max_new_tokens=10**6, ignore_eos=True)
        first = next(stream)
        stream.close()
        stream.close()
        wait_until_idle(slow)
        assert stream.completion.finish_reason == "cancelled"
        assert stream.completion.token_ids[0] == first.token_id
        assert list(stream) == []

        with slow.stream("a", max_new_tokens=10**6, ignore_eos=True) as stream:
            next(stream)
        wait_until_idle(slow)


def test_closing_a_stream_interrupts_the_prompt(long_model_path):
    """Reading 99,000 tokens takes minutes; the close must not wait for it."""
    with Model(long_model_path) as slow:
        stream = slow.stream([1] * 99_000)
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        wait_until(lambda: slow.stats()["n_running"] == 1)
        stream.close()
        reader.join()
        assert stream.completion.token_ids == []
        assert stream.completion.finish_reason == "cancelled"


def test_stream_that_is_never_read_starts_nothing(model):
    finished = model.stats()["n_finished"]
    stream = model.stream("a")
    stream.close()
    assert list(stream) == []
    assert model.stats()["n_finished"] == finished
    assert stream.completion is None


def test_other_calls_work_while_a_stream_is_being_read(model):
    alone = model.generate("the cat", max_new_tokens=10)
    pieces, scores = [], []
    for piece in model.stream("the cat", max_new_tokens=10):
        pieces.append(piece)
        scores.append(model.score("the cat").nll)
    assert [p.token_id for p in pieces] == alone.token_ids
    assert len(set(scores)) == 1


def test_error_in_the_run_reaches_the_reader(model, monkeypatch):
    class Broken:
        def submit(self, *_: object, **__: object) -> None:
            raise MemoryError("no room")

    monkeypatch.setattr(Runner, "lease", lambda runner: contextlib.nullcontext(Broken()))
    stream = model.stream("a")
    with pytest.raises(MemoryError, match="no room"):
        next(stream)
    assert list(stream) == []


# --- scores and insides ------------------------------------------------------------------------------------------


def test_score_equals_the_log_softmax_of_the_logits(model):
    ids = model.encode("the cat")
    logits = model.logits(ids).astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_softmax = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    expected = log_softmax[np.arange(len(ids) - 1), ids[1:]]
    score = model.score("the cat")
    assert score.token_ids == ids
    assert score.logprobs.dtype == np.float32
    np.testing.assert_allclose(score.logprobs, expected, rtol=1e-5, atol=1e-5)
    assert score.nll == pytest.approx(-expected.mean(), rel=1e-5)
    assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-4)
    assert model.score(ids).nll == score.nll


def test_shapes_and_types(model):
    info = model.info
    logits = model.logits("the cat")
    n = len(model.encode("the cat"))
    assert logits.shape == (n, info["vocab_size"])
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(model.logits("the cat", last=True), logits[-1])
    for layer in range(info["block_count"] + 1):
        hidden = model.hidden_states("the cat", layer)
        assert hidden.shape == (n, info["embedding_length"])
        assert hidden.dtype == np.float32
    codes = model.codes([0, 1, 2])
    assert codes.shape == (3, info["code_width"])
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(model.hidden_states([0, 1, 2], 0)[:, : info["code_width"]], codes)  # tiled 0 and 1
    assert model.codes([1] * (info["n_ctx"] + 5)).shape[0] == info["n_ctx"] + 5  # codes need no context


def test_learned_table_has_no_codes(tmp_path):
    with (
        Model(make_model(tmp_path / "learned.gguf", code_kind="learned")) as learned,
        pytest.raises(fixmin_cpp.UnsupportedError, match="learned"),
    ):
        learned.codes([1])


# --- text --------------------------------------------------------------------------------------------------------


def test_encode_and_decode(text_model):
    ids = text_model.encode("the cat 日本 é")
    assert text_model.decode(ids) == "the cat 日本 é"
    assert text_model.decode(np.array(ids)) == "the cat 日本 é"
    assert text_model.decode(ids[0]) == text_model.decode(ids[:1])
    assert text_model.decode([]) == ""
    assert text_model.encode("") == []
    end = text_model.info["eos_token_id"]
    assert text_model.decode([*ids, end]) == "the cat 日本 é</s>"
    assert text_model.decode([*ids, end], skip_special_tokens=True) == "the cat 日本 é"


def test_nothing_is_added_to_a_prompt_unless_asked(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = concatenating()
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    with Model(write_model(tmp_path / "template.gguf", tokenizer)) as loaded:
        plain = loaded.encode("the cat is here")
        assert loaded.encode("the cat is here", add_special_tokens=True) == [start, *plain]
        assert loaded.decode(plain) == "the cat is here"


def test_without_a_tokenizer_ids_still_work(bare_model):
    completion = bare_model.generate([1, 2, 3], max_new_tokens=4)
    assert len(completion.token_ids) == 4
    assert completion.text == ""
    assert [p.token_id for p in bare_model.stream([1, 2, 3], max_new_tokens=4)] == completion.token_ids
    assert bare_model.score([1, 2, 3]).nll > 0
    for call in (
        lambda: bare_model.generate("text"),
        lambda: bare_model.generate([1], stop="a"),
        lambda: bare_model.encode("text"),
        lambda: bare_model.decode([1]),
        lambda: bare_model.score("text"),
    ):
        with pytest.raises(fixmin_cpp.UnsupportedError, match=r"bare\.gguf holds no tokenizer"):
            call()


@pytest.mark.parametrize("content", ["{", "{}", "null", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_unreadable_tokenizer_is_a_gguf_error(tmp_path, content):
    with pytest.raises(fixmin_cpp.GGUFError, match=r"tokenizer\.huggingface\.json"):
        Model(make_model(tmp_path / "m.gguf", tokenizer_json=content))


def test_wrong_end_of_text_id_is_a_gguf_error(tmp_path):
    with pytest.raises(fixmin_cpp.GGUFError, match=r"eos_token_id is 4711"):
        Model(write_model(tmp_path / "m.gguf", byte_level(), eos_id=4711))


# --- life --------------------------------------------------------------------------------------------------------


def test_progress_is_reported(model_path):
    seen: list[float] = []
    Model(model_path, progress=seen.append).close()
    assert seen
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    assert seen[0] >= 0


def test_error_in_progress_reaches_the_caller(model_path):
    def fail(_: float) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        Model(model_path, progress=fail)


def test_closed_model_says_so(model_path):
    loaded = Model(model_path)
    with loaded as same:
        assert same is loaded
    assert loaded.closed
    loaded.close()
    for call in (
        lambda: loaded.generate("a"),
        lambda: loaded.stream("a"),
        lambda: loaded.logits("a"),
        lambda: loaded.hidden_states("a", 0),
        lambda: loaded.score("ab"),
        lambda: loaded.codes([1]),
        lambda: loaded.encode("a"),
        lambda: loaded.decode([1]),
        loaded.__enter__,
    ):
        with pytest.raises(fixmin_cpp.FixminError, match=r"byte_level\.gguf is closed"):
            call()
    assert loaded.info["vocab_size"] > 0
    assert "closed" in repr(loaded)


def test_a_stream_begun_after_close_fails_at_the_first_piece(model_path):
    loaded = Model(model_path)
    stream = loaded.stream("a")
    loaded.close()
    with pytest.raises(fixmin_cpp.FixminError, match="closed"):
        next(stream)


def test_close_cancels_what_runs(long_model_path):
    slow = Model(long_model_path)
    stream = slow.stream("a", max_new_tokens=10**6, ignore_eos=True)
    next(stream)
    slow.close()
    list(stream)
    assert stream.completion.finish_reason == "cancelled"


@pytest.mark.parametrize("path", ["missing.gguf", "."])
def test_file_that_cannot_be_read(tmp_path, path):
    with pytest.raises(OSError, match=r"gguf|folder"):
        Model(tmp_path / path)


def test_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Model(tmp_path / "missing.gguf")
    assert "missing.gguf" in str(caught.value)


def test_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("once upon a time there was a file that was no GGUF file")
    with pytest.raises(fixmin_cpp.GGUFError):
        Model(path)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_comes_back(tmp_path):
    path = make_model(tmp_path / "large.gguf", vocab_size=30_000, embedding_length=256, head_count=8)
    size = path.stat().st_size
    Model(path, n_threads=1).close()
    before = resident_bytes()
    for _ in range(10):
        Model(path, n_threads=1).close()
    assert resident_bytes() - before < 3 * size


def test_a_model_that_is_dropped_is_freed(model_path):
    import weakref

    loaded = Model(model_path)
    for _ in loaded.stream("a", max_new_tokens=3):
        pass
    reference = weakref.ref(loaded)
    del loaded
    gc.collect()
    assert reference() is None
