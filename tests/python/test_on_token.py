"""generate(on_token=...): told of every token, may end a completion, may fail."""

import asyncio
import threading

import pytest

from fixmin_cpp import Model
from fixmin_cpp.errors import ArgumentTypeError

SETTINGS = {"max_new_tokens": 20, "ignore_eos": True}


def call(model, how, *args, **arguments):
    if how == "generate":
        return model.generate(*args, **arguments)
    return asyncio.run(model.agenerate(*args, **arguments))


both = pytest.mark.parametrize("how", ["generate", "agenerate"])


@both
def test_pieces_are_those_of_a_stream(model, how):
    expected = list(model.stream("the cat", **SETTINGS))
    pieces = []
    completion = call(model, how, "the cat", on_token=pieces.append, **SETTINGS)
    assert pieces == expected
    assert "".join(p.text for p in pieces) == completion.text
    assert completion.finish_reason == "length"


@both
@pytest.mark.parametrize("n", [1, 2, 7, 19, 20])
def test_false_ends_a_completion_with_this_token(model, how, n):
    """However many tokens the engine had computed by then."""
    free = model.generate("the cat", logprobs=0, **SETTINGS)
    expected = list(model.stream("the cat", **SETTINGS))[:n]
    pieces = []

    def on_token(piece):
        pieces.append(piece)
        return len(pieces) < n

    completion = call(model, how, "the cat", on_token=on_token, logprobs=0, **SETTINGS)
    assert [(p.token_id, p.text) for p in pieces] == [(p.token_id, p.text) for p in expected]
    assert completion.token_ids == free.token_ids[:n]
    assert completion.text == "".join(p.text for p in expected)
    assert completion.logprobs == free.logprobs[:n]
    assert [p.logprob for p in pieces] == completion.logprobs
    assert completion.finish_reason == "stop"
    assert completion.timings.n_generated == n


def test_only_false_itself_ends(model):
    for value in (None, 0, "", True):
        assert len(model.generate("a", on_token=lambda piece, value=value: value, **SETTINGS).token_ids) == 20


def test_tokens_held_back_come_to_an_end_one_by_one(letters_model):
    """A stop string that never comes holds tokens back, which then are told together."""
    free = letters_model.generate("the cat", **SETTINGS)
    stop = free.text[:-1] + "\0"  # all but the last letter could begin it
    seen = []

    def on_token(piece):
        seen.append(piece.token_id)
        return len(seen) < 3

    completion = letters_model.generate("the cat", stop=stop, on_token=on_token, **SETTINGS)
    assert seen == completion.token_ids == free.token_ids[:3]
    assert completion.finish_reason == "stop"


@both
def test_one_of_many(model_path, how):
    """Each piece says where it belongs; the end of one changes nothing for the others."""
    prompts = ["the cat", "a", "x" * 20]
    options = {"temperature": 1.5, "n": 2, "seed": 4, **SETTINGS}
    with Model(model_path, n_parallel=4, n_kv=128) as model:
        free = model.generate(prompts, **options)
        told = {}

        def on_token(piece):
            ids = told.setdefault((piece.index, piece.candidate), [])
            ids.append(piece.token_id)
            return not ((piece.index, piece.candidate) == (1, 1) and len(ids) == 5)

        got = call(model, how, prompts, on_token=on_token, **options)
    assert told == {(i, j): c.token_ids for i, one in enumerate(got) for j, c in enumerate(one.candidates)}
    for i, one in enumerate(got):
        for j, candidate in enumerate(one.candidates):
            expected = free[i].candidates[j]
            ended = (i, j) == (1, 1)
            assert candidate.token_ids == (expected.token_ids[:5] if ended else expected.token_ids)
            assert candidate.finish_reason == ("stop" if ended else expected.finish_reason)


@both
@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
def test_an_exception_ends_all(long_model_path, how, prompt):
    def on_token(piece):
        if piece.index == (0 if prompt == "a" else 2):
            raise LookupError("mine")

    with Model(long_model_path) as model:
        with pytest.raises(LookupError, match="mine"):
            call(model, how, prompt, on_token=on_token, max_new_tokens=10**6, ignore_eos=True)
        model.clear_prefix_cache()  # waits until nothing runs
        assert model.stats()["n_running"] == 0


@both
@pytest.mark.parametrize("signal", [StopIteration, StopAsyncIteration])
def test_an_exception_that_ends_loops_is_no_end_of_the_text(model, how, signal):
    def on_token(piece):
        raise signal("mine")

    with pytest.raises((RuntimeError, signal)) as caught:
        call(model, how, "a", on_token=on_token, **SETTINGS)
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, signal)
    assert str(error) == "mine"


@both
def test_it_is_called_in_the_calling_thread(model, how):
    threads = set()
    call(model, how, ["a", "b"], on_token=lambda piece: threads.add(threading.get_ident()), **SETTINGS)
    assert threads == {threading.get_ident()}


def test_it_must_be_callable(model):
    with pytest.raises(ArgumentTypeError, match="on_token must be callable, got int"):
        model.generate("a", on_token=3)
