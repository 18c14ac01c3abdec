"""What a caller can get wrong is refused before it reaches native code, naming the argument and the value."""

import math

import numpy as np
import pytest

import fixmin_cpp
from fixmin_cpp import ArgumentError, ArgumentTypeError, Model

INF, NAN = math.inf, math.nan

# argument, value, part of the message
OUT_OF_RANGE = [
    ("max_new_tokens", 0, "at least 1, got 0"),
    ("max_new_tokens", -1, "got -1"),
    ("temperature", -0.1, "got -0.1"),
    ("temperature", NAN, "got nan"),
    ("temperature", INF, "got inf"),
    ("temperature", 1e39, "got 1e\\+39"),
    ("temperature", np.float32("nan"), "nan"),
    ("temperature", 10**400, "temperature must be between"),
    ("top_k", -1, "got -1"),
    ("top_p", 0, "above 0"),
    ("top_p", -0.5, "got -0.5"),
    ("top_p", 1.5, "got 1.5"),
    ("top_p", NAN, "got nan"),
    ("seed", -1, "got -1"),
    ("seed", 2**64, "got 18446744073709551616"),
    ("stop", "", "must not be empty"),
    ("stop", ["a", ""], r"stop\[1\] must not be empty"),
]
WRONG_TYPE = [
    ("max_new_tokens", True, "got True"),
    ("max_new_tokens", 3.0, "got float 3.0"),
    ("max_new_tokens", "3", "got str '3'"),
    ("max_new_tokens", None, "got NoneType None"),
    ("temperature", True, "got bool True"),
    ("temperature", "hot", "got str 'hot'"),
    ("temperature", 1j, "complex"),
    ("top_k", False, "got False"),
    ("top_k", 2.5, "got float 2.5"),
    ("top_p", None, "NoneType"),
    ("top_p", [0.5], "list"),
    ("seed", 1.0, "got float 1.0"),
    ("seed", np.bool_(True), "got"),
    ("stop", 5, "got int 5"),
    ("stop", b"a", "bytes"),
    ("stop", ["a", 5], r"stop\[1\] must be a str, got int 5"),
    ("ignore_eos", 1, "got int 1"),
    ("ignore_eos", None, "NoneType"),
    ("do_sample", "no", "got str 'no'"),
]


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize(("name", "value", "message"), OUT_OF_RANGE)
def test_value_out_of_range(model, call, name, value, message):
    with pytest.raises(ArgumentError, match=f"{name}.*{message}|{message}") as caught:
        getattr(model, call)("a", **{name: value})
    assert name in str(caught.value)
    assert isinstance(caught.value, ValueError | fixmin_cpp.FixminError)


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize(("name", "value", "message"), WRONG_TYPE)
def test_value_of_the_wrong_type(model, call, name, value, message):
    with pytest.raises(TypeError, match=message) as caught:
        getattr(model, call)("a", **{name: value})
    assert name in str(caught.value)
    assert isinstance(caught.value, ArgumentTypeError)


def test_sampling_at_temperature_zero_contradicts_itself(model):
    with pytest.raises(ArgumentError, match="do_sample=True"):
        model.generate("a", do_sample=True, temperature=0.0)


def test_unknown_argument(model):
    with pytest.raises(TypeError, match="max_tokens"):
        model.generate("a", max_tokens=3)


# prompt, error, part of the message; V = 269
PROMPTS = [
    ("", ArgumentError, "prompt is empty"),
    ([], ArgumentError, "prompt is empty"),
    (np.array([]), ArgumentError, "prompt is empty"),
    (np.array([], dtype=np.int64), ArgumentError, "prompt is empty"),
    ([1, -1], ArgumentError, r"prompt\[1\] is -1.*0 to 268"),
    ([1, 269], ArgumentError, r"prompt\[1\] is 269"),
    ([10**30], ArgumentError, r"prompt\[0\] is 10{30}"),
    ([2**32 + 1], ArgumentError, r"prompt\[0\] is 4294967297"),
    (np.array([1, -1]), ArgumentError, r"prompt\[1\] is -1"),
    (np.array([2**63], dtype=np.uint64), ArgumentError, "9223372036854775808"),
    (np.array([1.0, 2.0]), ArgumentTypeError, "float64"),
    (np.array([True, False]), ArgumentTypeError, "bool"),
    (np.array(["a"]), ArgumentTypeError, "array of integers"),
    (np.array([[1, 2]]), ArgumentError, r"shape \(1, 2\)"),
    (np.array(1), ArgumentError, r"shape \(\)"),
    (np.int64(1), ArgumentError, r"shape \(\)"),
    ([1, 2.0], ArgumentTypeError, r"prompt\[1\] must be an integer, got float 2.0"),
    ([1, True], ArgumentTypeError, r"prompt\[1\] must be an integer, got bool True"),
    ([1, "a"], ArgumentTypeError, r"prompt\[1\] must be an integer, got str 'a'"),
    ([1, None], ArgumentTypeError, r"prompt\[1\]"),
    ([1, [2]], ArgumentTypeError, r"prompt\[1\]"),
    (["a", 1], ArgumentTypeError, r"prompt\[1\] must be token ids, got int 1"),
    (["a", ""], ArgumentError, r"prompt\[1\] is empty"),
    (["a", []], ArgumentError, r"prompt\[1\] is empty"),
    (["a", [1, 300]], ArgumentError, r"prompt\[1\]\[1\] is 300"),
    ([["a"]], ArgumentTypeError, r"prompt\[0\]\[0\] must be an integer"),
    (None, ArgumentTypeError, "got NoneType None"),
    (5, ArgumentTypeError, "got int 5"),
    (b"abc", ArgumentTypeError, "got bytes"),
    ([b"abc"], ArgumentTypeError, "got bytes"),
    ({"a": 1}, ArgumentTypeError, "got dict"),
    ("\ud800", ArgumentError, "lone surrogate"),
]


@pytest.mark.parametrize(("prompt", "error", "message"), PROMPTS, ids=lambda value: repr(value)[:30])
def test_prompt(model, prompt, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompt)


def test_wrong_prompt_in_a_list_runs_nothing(model, monkeypatch):
    monkeypatch.setattr(model, "_engine", None)  # any use would be an AttributeError
    with pytest.raises(ArgumentError):
        model.generate(["a", "b", ""])


def test_stream_takes_one_prompt(model):
    with pytest.raises(ArgumentTypeError, match="list of prompts"):
        model.stream(["a", "b"])


@pytest.mark.parametrize("name", ["logits", "codes", "score"])
@pytest.mark.parametrize("ids", [[], [-1], [269], [1.5], None, np.ones((2, 2), dtype=int)])
def test_ids_elsewhere(model, name, ids):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"ids|text"):
        getattr(model, name)(ids)


@pytest.mark.parametrize("layer", [-1, 3, 10**20, 1.0, True, None])
def test_layer(model, layer):
    with pytest.raises(ArgumentError, match="layer must be"):
        model.hidden_states([1, 2], layer)


def test_score_needs_two_tokens(model):
    with pytest.raises(ArgumentError, match="at least 2 tokens"):
        model.score([1])


@pytest.mark.parametrize("ids", [[-1], [269], ["a"], [True], None, 1.5])
def test_decode(model, ids):
    with pytest.raises(ArgumentError, match="ids"):
        model.decode(ids)


@pytest.mark.parametrize("text", [None, 5, b"a", ["a"]])
def test_encode(model, text):
    with pytest.raises(ArgumentTypeError, match="text must be a str"):
        model.encode(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_threads": 0}, "n_threads must be between 1 and"),
        ({"n_threads": -2}, "got -2"),
        ({"n_threads": 10**6}, "n_threads"),
        ({"n_threads": 2.0}, "n_threads must be an integer"),
        ({"n_threads": True}, "n_threads"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_ctx": 65}, "n_ctx"),
        ({"n_ctx": 2**31}, "n_ctx"),
        ({"n_ctx": "64"}, "n_ctx"),
        ({"n_batch": 0}, "n_batch"),
        ({"kv_type": "q3"}, 'kv_type must be "f16", "f32" or "q8_0", got \'q3\''),
        ({"kv_type": None}, "kv_type"),
        ({"progress": 5}, "progress"),
    ],
)
def test_settings_of_a_model(model_path, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Model(model_path, **arguments)


@pytest.mark.parametrize("path", [None, 5, b"model.gguf", ["a"]])
def test_path(path):
    with pytest.raises(ArgumentTypeError, match="path must be"):
        Model(path)
    with pytest.raises(ArgumentTypeError, match="path must be"):
        fixmin_cpp.generate(path, "a")


def test_errors_are_what_their_callers_expect():
    for error in (fixmin_cpp.GGUFError, fixmin_cpp.CheckpointError, fixmin_cpp.ContextLengthError, ArgumentError):
        assert issubclass(error, fixmin_cpp.FixminError)
        assert issubclass(error, ValueError)
    assert issubclass(fixmin_cpp.UnsupportedError, fixmin_cpp.FixminError)
    assert issubclass(ArgumentTypeError, TypeError)
