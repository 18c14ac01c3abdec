"""What a caller can get wrong is refused before it reaches native code, naming the argument and the value."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest

import fixmin_cpp
from fixmin_cpp import ArgumentError, ArgumentTypeError, Model, _core, arguments
from fixmin_cpp.arguments import GenerationOptions

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
    ("min_p", -0.1, "got -0.1"),
    ("min_p", 1.1, "got 1.1"),
    ("typical_p", 0.0, "above 0"),
    ("top_n_sigma", NAN, "got nan"),
    ("xtc_probability", 2, "got 2"),
    ("xtc_threshold", -1, "got -1"),
    ("min_keep", -1, "got -1"),
    ("dynatemp_range", -0.5, "got -0.5"),
    ("dynatemp_exponent", INF, "got inf"),
    ("mirostat", 3, "between 0 and 2, got 3"),
    ("mirostat_tau", -1.0, "got -1.0"),
    ("mirostat_eta", NAN, "got nan"),
    ("repeat_penalty", 0.0, "above 0, got 0.0"),
    ("repeat_penalty", -1.0, "got -1.0"),
    ("repeat_last_n", -2, "at least -1, got -2"),
    ("presence_penalty", INF, "got inf"),
    ("frequency_penalty", -INF, "got -inf"),
    ("dry_multiplier", -1.0, "got -1.0"),
    ("dry_base", 0.5, "got 0.5"),
    ("dry_allowed_length", -1, "got -1"),
    ("dry_penalty_last_n", -2, "got -2"),
    ("dry_sequence_breakers", ["a", ""], r"dry_sequence_breakers\[1\] must not be empty"),
    ("dry_sequence_breakers", [[1, 269]], r"dry_sequence_breakers\[0\]\[1\] is 269"),
    ("dry_sequence_breakers", [[]], "is empty"),
    ("min_new_tokens", -1, "got -1"),
    ("min_new_tokens", 129, "min_new_tokens is 129, above max_new_tokens, which is 128"),
    ("logit_bias", {269: 1.0}, "token id 269, but token ids run from 0 to 268"),
    ("logit_bias", {-1: 1.0}, "got -1"),
    ("logit_bias", {3: NAN}, r"logit_bias\[3\].*got nan"),
    ("logit_bias", {3: INF}, r"logit_bias\[3\].*got inf"),
    ("banned_ids", [1, 269], r"banned_ids\[1\] is 269, but token ids run from 0 to 268"),
    ("banned_ids", [-1], r"banned_ids\[0\] is -1"),
    ("allowed_ids", [], "allowed_ids is empty"),
    ("allowed_ids", [10**30], r"allowed_ids\[0\] is 10{30}"),
    ("stop_ids", [2**32], r"stop_ids\[0\] is 4294967296"),
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
    ("min_p", "0.1", "got str '0.1'"),
    ("mirostat", 2.0, "got float 2.0"),
    ("mirostat", True, "got True"),
    ("repeat_last_n", None, "NoneType"),
    ("dry_sequence_breakers", "ab", "must be a list of str or token ids, got str 'ab'"),
    ("dry_sequence_breakers", [5], r"dry_sequence_breakers\[0\] must be token ids, got int 5"),
    ("logit_bias", [(3, 1.0)], "must be a dict of token id to bias, got list"),
    ("logit_bias", {"3": 1.0}, "logit_bias key must be an integer, got str '3'"),
    ("logit_bias", {3: "1"}, r"logit_bias\[3\] must be a number, got str '1'"),
    ("banned_ids", 5, "banned_ids must be token ids, got int 5"),
    ("banned_ids", None, "NoneType"),
    ("banned_ids", [1.0], r"banned_ids\[0\] must be an integer, got float 1.0"),
    ("banned_ids", "ab", "got str 'ab'"),
    ("allowed_ids", [True], r"allowed_ids\[0\] must be an integer, got bool True"),
    ("stop_ids", [[1]], r"stop_ids\[0\]"),
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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_tokens", "max_new_tokens"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("typical", "typical_p"),
        ("repetion_penalty", "repetition_penalty"),
        ("dry_sequence_breaker", "dry_sequence_breakers"),
        ("do_samples", "do_sample"),
        ("bad_id", "bad_ids"),
    ],
)
def test_unknown_argument(model, name, meant):
    for call in (model.generate, model.stream):
        with pytest.raises(TypeError, match=f"there is no argument '{name}': did you mean '{meant}'"):
            call("a", **{name: 3})


def test_unknown_argument_unlike_any(model):
    with pytest.raises(TypeError, match=r"no argument 'zzz'; there are max_new_tokens, .*allowed_ids"):
        model.generate("a", zzz=3)


@pytest.mark.parametrize(
    "given", [{"repeat_penalty": 1.1, "repetition_penalty": 1.1}, {"bad_ids": [1], "banned_ids": [1]}]
)
def test_one_argument_under_two_names(model, given):
    with pytest.raises(ArgumentError, match="are one argument"):
        model.generate("a", **given)


def test_documented_arguments_are_those_that_are_checked():
    """GenerationArguments is what type checkers and readers see; its comments begin with the defaults."""
    options = {field.name: field.default for field in dataclasses.fields(GenerationOptions)}
    aliases = {"repetition_penalty", "bad_ids"}
    forms = {"json_schema", "regex", "grammar", "choices"}
    given = set(options) - {"constraint"} | forms | aliases | {"do_sample"}
    assert set(fixmin_cpp.GenerationArguments.__annotations__) == given
    documented = dict(
        re.findall(r"^    (\w+): .*?  # (-?\d+(?:\.\d+)?)[.\s]", inspect.getsource(arguments), re.MULTILINE)
    )
    numbers = {name: value for name, value in options.items() if type(value) in (int, float) and name != "temperature"}
    assert {name: float(documented[name]) for name in numbers} == numbers


def test_defaults_are_those_of_the_engine():
    native, options = _core.SamplingParams(), GenerationOptions()
    for field in dataclasses.fields(options):
        if type(field.default) in (int, float) and field.name != "prompt_lookup_num_tokens":  # of the request
            assert getattr(native, field.name) == pytest.approx(field.default), field.name


def test_what_is_too_large_for_the_engine_means_the_same(model):
    huge = {"top_k": 10**30, "min_keep": 10**20, "repeat_last_n": 10**20, "dry_allowed_length": 10**20, "top_p": 1e-300}
    huge |= {"dry_penalty_last_n": 10**20, "max_new_tokens": 10**20, "repeat_penalty": 1e-300, "dry_multiplier": 1.0}
    options = GenerationOptions.check(huge, 269)
    params = options.native(seed=1, eos_id=None, breakers=[])
    assert params.top_k == params.min_keep == params.repeat_last_n == params.max_new_tokens == 2**31 - 1
    _core.Sampler(params)


@pytest.mark.parametrize("ids", [[3, 4], (3, 4), {3, 4}, range(3, 5), np.array([3, 4]), frozenset([4, 3])])
def test_ids_may_come_in_any_form(ids):
    options = GenerationOptions.check({"banned_ids": ids, "allowed_ids": ids, "stop_ids": ids}, 269)
    assert options.banned_ids == options.allowed_ids == options.stop_ids == (3, 4)
    params = options.native(seed=2, eos_id=7, breakers=[[1]])
    assert (params.banned_ids, params.stop_ids, params.seed) == ([3, 4], [3, 4, 7], 2)
    params = dataclasses.replace(options, ignore_eos=True).native(seed=2, eos_id=7, breakers=[])
    assert (params.banned_ids, params.stop_ids) == ([3, 4, 7], [3, 4])


def test_none_where_it_stands_for_a_default():
    names = ("temperature", "do_sample", "seed", "stop", "allowed_ids")
    assert GenerationOptions.check(dict.fromkeys(names), 269) == GenerationOptions()
    assert GenerationOptions.check({"banned_ids": [], "stop_ids": (), "logit_bias": {}}, 269) == GenerationOptions()


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
