"""What a caller can get wrong is refused before it reaches native code, naming the argument and the value."""

import asyncio
import dataclasses
import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest

import fixmin_cpp
from fixmin_cpp import ArgumentError, ArgumentTypeError, Model, _core, generation_options
from fixmin_cpp.generation_options import GenerationOptions
from fixmin_cpp.load_options import LOAD_FIELDS, LoadOptions, on_ray
from fixmin_cpp.running import Runner
from fixmin_cpp.sampling_fields import FIELDS

INF, NAN = math.inf, math.nan
ROOT = Path(__file__).parents[2]

# argument, value, part of the message
OUT_OF_RANGE = [
    ("max_new_tokens", 0, "at least 1, or -1: until the context ends, got 0"),
    ("max_new_tokens", -3, "got -3"),
    ("temperature", -0.1, "got -0.1"),
    ("temperature", NAN, "got nan"),
    ("temperature", INF, "got inf"),
    ("temperature", 1e39, "got 1e\\+39"),
    ("temperature", np.float32("nan"), "nan"),
    ("temperature", 10**400, "temperature must be between"),
    ("top_k", -2, "got -2"),
    ("top_p", -0.5, "got -0.5"),
    ("top_p", 1.5, "got 1.5"),
    ("top_p", NAN, "got nan"),
    ("min_p", -0.1, "got -0.1"),
    ("min_p", 1.1, "got 1.1"),
    ("typical_p", -0.1, "got -0.1"),
    ("timeout", -1, "got -1"),
    ("timeout", NAN, "got nan"),
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
    ("logit_bias", {3: 1.0, "3": 2.0}, "token id 3 twice"),
    ("logit_bias", {"269": 1.0}, "token id 269"),
    ("logit_bias", dict.fromkeys(range(269), -INF), "no token is left to draw.*logit_bias"),
    ("banned_ids", range(269), "no token is left to draw.*banned_ids"),
    ("banned_ids", [1, 269], r"banned_ids\[1\] is 269, but token ids run from 0 to 268"),
    ("banned_ids", [-1], r"banned_ids\[0\] is -1"),
    ("allowed_ids", [], "allowed_ids is empty"),
    ("allowed_ids", [10**30], r"allowed_ids\[0\] is 10{30}"),
    ("stop_ids", [2**32], r"stop_ids\[0\] is 4294967296"),
    ("seed", -2, "got -2"),
    ("seed", 2**64, "or -1 for a random one, got 18446744073709551616"),
    ("dry_sequence_breakers", ["a", "\ud800"], r"dry_sequence_breakers\[1\] is not valid Unicode"),
    ("stop", "a\udfffb", r"stop\[0\] is not valid Unicode: lone surrogate '\\udfff' at character 1"),
    ("stop", "", "must not be empty"),
    ("stop", ["a", ""], r"stop\[1\] must not be empty"),
]
OUT_OF_RANGE += [
    ("timeout", -(10**400), "timeout must be between 0"),
    ("top_n_sigma", -(10**400), "top_n_sigma must be between"),
]
WRONG_TYPE = [
    ("temperature", np.array([0.5]), "temperature must be a number"),
    ("top_k", np.array([5]), "top_k must be an integer"),
    ("top_k", np.array(True), "top_k must be an integer"),
    ("min_p", np.array(True), "min_p must be a number"),
    ("max_new_tokens", True, "got True"),
    ("max_new_tokens", 3.0, "got float 3.0"),
    ("max_new_tokens", "3", "got str '3'"),
    ("temperature", True, "got bool True"),
    ("temperature", "hot", "got str 'hot'"),
    ("temperature", 1j, "complex"),
    ("top_k", False, "got False"),
    ("top_k", 2.5, "got float 2.5"),
    ("top_p", [0.5], "list"),
    ("min_p", "0.1", "got str '0.1'"),
    ("mirostat", 2.0, "got float 2.0"),
    ("mirostat", True, "got True"),
    ("dry_sequence_breakers", "ab", "must be a list of str or token ids, got str 'ab'"),
    ("dry_sequence_breakers", [5], r"dry_sequence_breakers\[0\] must be a list or .* got int 5"),
    ("logit_bias", [(3, 1.0, 2)], "must be a dict of token id to bias, got list"),
    ("logit_bias", [3], "must be a dict of token id to bias, got list"),
    ("logit_bias", {"three": 1.0}, "logit_bias key must be an integer, got str 'three'"),
    ("logit_bias", {"³": 1.0}, "logit_bias key must be an integer, got str '³'"),
    ("logit_bias", {3: False}, r"logit_bias\[3\] must be a number, got bool False"),
    ("banned_ids", True, "banned_ids must be a list .* got bool True"),
    ("banned_ids", 2.5, "banned_ids must be a list .* got float 2.5"),
    ("stop_ids", np.array(2.5), "stop_ids must be token ids, got"),
    ("stop_ids", np.array(True), "stop_ids must be token ids, got"),
    ("stop_ids", {3, "a"}, r"stop_ids\[.\] must be an integer, got str 'a'"),
    ("stop_ids", {"a": 1}, "got dict"),
    ("seed", [[1]], r"seed\[0\] must be an integer, got list"),
    ("stop", {"a", 5}, r"stop\[.\] must be a str, got int 5"),
    ("stop", (text for text in "ab"), "got generator"),
    ("timeout", "1", "got str '1'"),
    ("logit_bias", {3: "1"}, r"logit_bias\[3\] must be a number, got str '1'"),
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


@pytest.mark.parametrize(
    "given",
    [
        lambda n: {"max_new_tokens": -n},
        lambda n: {"min_new_tokens": n},
        lambda n: {"temperature": n},
        lambda n: {"seed": n},
        lambda n: {"seed": [n]},
        lambda n: {"mirostat": n},
        lambda n: {"logit_bias": {n: 1.0}},
        lambda n: {"logit_bias": {3: n}},
        lambda n: {"banned_ids": [n]},
        lambda n: {"stop": n},
        lambda n: {"stop": [[n]]},
        lambda n: {"do_sample": n},
    ],
)
def test_numbers_that_python_does_not_write(model, given):
    """More than 4,300 digits, of which str() makes an error of its own."""
    with pytest.raises(ArgumentError, match=r"must|an integer of 16610 bits"):
        model.generate("a", **given(10**5000))
    with pytest.raises(ArgumentError, match=r"prompt.*an integer of 16610 bits"):
        model.generate([10**5000])


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
        ("max_length", "max_new_tokens"),
        ("n_predict", "max_new_tokens"),
        ("num_return_sequences", "n"),
        ("eos_token_id", "stop_ids"),
        ("stop_sequences", "stop"),
        ("streamer", "on_token"),
        ("temp", "temperature"),
    ],
)
def test_unknown_argument(model, name, meant):
    for call in (model.generate, model.stream):
        with pytest.raises(TypeError, match=f"there is no argument '{name}': did you mean '{meant}'"):
            call("a", **{name: 3})


def test_unknown_argument_unlike_any(model):
    with pytest.raises(ArgumentTypeError, match=r"no argument 'zzz'; fixmin_cpp.GenerationArguments lists all"):
        model.generate("a", zzz=3)
    with pytest.raises(ArgumentTypeError, match="there is no argument 'zz") as caught:
        model.generate("a", **{"z" * 1_000_000: 3})
    assert len(str(caught.value)) < 200


def test_hints_name_arguments_that_there_are():
    known = {*fixmin_cpp.GenerationArguments.__annotations__, *inspect.signature(Model.generate).parameters}
    assert set(generation_options._OTHER_NAMES.values()) <= known
    assert not known & {*generation_options._OTHER_NAMES, *generation_options._OTHER_WAYS}


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ({"num_beams": 4}, r"Model.beam_search\(prompt, num_beams=...\)"),
        ({"stream": True}, r"Model.stream\(prompt\)"),
        ({"n_ctx": 8}, r"Model\(path, ...\)"),
        ({"attention_mask": [1]}, "need no padding"),
    ],
)
def test_what_is_done_in_another_way(model, given, way):
    with pytest.raises(ArgumentTypeError, match=way):
        model.generate("a", **given)


def test_arguments_have_names(model):
    for call in (model.generate, model.stream, model.astream):
        with pytest.raises(ArgumentTypeError, match=r"takes the prompt alone without a name, got 5 too"):
            call("a", 5)
    with pytest.raises(ArgumentTypeError, match=r"agenerate\(\) takes the prompt alone"):
        asyncio.run(model.agenerate("a", 5))


@pytest.mark.parametrize(
    "given", [{"repeat_penalty": 1.1, "repetition_penalty": 1.1}, {"bad_ids": [1], "banned_ids": [1]}]
)
def test_one_argument_under_two_names(model, given):
    with pytest.raises(ArgumentError, match="are one argument"):
        model.generate("a", **given)


def test_documented_arguments_are_those_that_are_checked():
    """The table makes the checks, and help() shows it; docs/sampling.md was written by hand."""
    options = {field.name: field.default for field in dataclasses.fields(GenerationOptions)}
    aliases = {"repetition_penalty", "bad_ids"}
    forms = {"json_schema", "regex", "grammar", "choices"}
    given = set(options) - {"constraint"} | forms | aliases | {"do_sample"}
    assert set(fixmin_cpp.GenerationArguments.__annotations__) == given
    assert given - aliases <= set(re.findall(r"^    (\w+): ", fixmin_cpp.GenerationArguments.__doc__, re.MULTILINE))
    text = (ROOT / "docs/sampling.md").read_text().replace("−", "-")
    rows = re.findall(r"((?:`\w+`,\s)*`\w+`)\*{0,2}\s\((-?\d[\d.]*)\b", text)  # names, a default in brackets
    numbers = {name: float(default) for names, default in rows for name in re.findall(r"\w+", names)}
    numbers = {name: number for name, number in numbers.items() if name in options}
    assert len(numbers) > 18
    assert {name: options[name] for name in numbers} == numbers


def test_the_engine_gets_every_number_of_the_table():
    """Whatever the table has that the engine knows under the same name arrives there, with the value given."""
    known = {name for name in vars(_core.SamplingParams) if not name.startswith("_")}
    made = {"logit_bias", "banned_ids", "allowed_ids", "stop_ids", "dry_sequence_breakers", "seed"}
    given = {name: FIELDS[name].low + 1 if FIELDS[name].low in (0, -1) else 1 for name in known - made}
    given |= {"openai_penalties": True, "max_new_tokens": 5}
    params = GenerationOptions.check(given, 269).native(eos_ids=(), breakers=[])
    assert {name: getattr(params, name) for name in given} == given


def test_load_options_are_arguments_of_model_and_of_the_engine(model_path):
    parameters = inspect.signature(Model).parameters
    shown = {name: p.default for name, p in parameters.items() if name not in ("path", "progress")}
    assert shown == {name: row.default for name, row in LOAD_FIELDS.items()}
    described = inspect.cleandoc(Model.__doc__)  # CPython 3.13 has taken the indentation away already
    assert all(f"    {name}: " in described for name in shown)
    given = {"n_threads": 1, "n_ctx": 64, "n_kv": 96, "kv_type": "q8_0"}
    with Model(model_path, **given, n_batch=7, n_parallel=3) as model:
        assert {name: model.info[name] for name in given} == given
    with Model(model_path, kv_contexts=3, kv_memory_share=1.0) as model:
        assert model.info["n_kv"] == -(-3 * model.n_ctx // 32) * 32
    for name, value in {"n_kv": 0, "n_parallel": 0, "kv_memory_share": 1.5, "kv_type": "f8", "n_batch": None}.items():
        with pytest.raises(ArgumentError, match=name):
            Model(model_path, **{name: value})
    with pytest.raises(ArgumentError, match="kv_memory_share must be above 0, got 0"):
        Model(model_path, kv_memory_share=0)
    with pytest.raises(ArgumentTypeError, match=r"Model\(\) has no argument 'threads'"):
        Model(model_path, threads=3)


def test_load_options_mean_the_same_however_they_are_written():
    assert LoadOptions.check({"n_threads": -1, "n_ctx": 0}) == LoadOptions.check({"n_threads": 0, "n_ctx": None})
    options = LoadOptions.check({"n_kv": np.int64(64), "kv_type": "f32"})
    assert LoadOptions.check(options.given()) == options != LoadOptions()
    assert len({options, LoadOptions.check(options.given())}) == 1


def test_defaults_are_those_of_the_engine():
    native, options = _core.SamplingParams(), GenerationOptions()
    for field in dataclasses.fields(options):
        if type(field.default) in (int, float) and field.name != "prompt_lookup_num_tokens":  # of the request
            assert getattr(native, field.name) == pytest.approx(field.default), field.name


def test_what_is_too_large_for_the_engine_means_the_same(model):
    huge = {"top_k": 10**30, "min_keep": 10**20, "repeat_last_n": 10**20, "dry_allowed_length": 10**20, "top_p": 1e-300}
    huge |= {"dry_penalty_last_n": 10**20, "max_new_tokens": 10**20, "repeat_penalty": 1e-300, "dry_multiplier": 1.0}
    options = GenerationOptions.check(huge, 269)
    params = options.native(eos_ids=(), breakers=[])
    assert params.top_k == params.min_keep == params.repeat_last_n == params.max_new_tokens == 2**31 - 1
    _core.Sampler(params)


def test_numbers_of_other_libraries():
    """Arrays without dimensions, and PyTorch's, are the number that they hold."""
    torch = pytest.importorskip("torch")
    for array in (np.array, torch.tensor):
        given = {"temperature": array(0.5), "top_k": array(5), "seed": array(7), "logit_bias": {3: array(1.5)}}
        options = GenerationOptions.check(given, 269)
        assert (options.temperature, options.top_k, options.seed) == (0.5, 5, 7)
        assert options.logit_bias == ((3, 1.5),)
        for name in ("top_k", "temperature"):
            with pytest.raises(ArgumentTypeError, match=name):
                GenerationOptions.check({name: array(True)}, 269)


@pytest.mark.parametrize("rows", [1, None.__class__, {0}, np.array(0), np.zeros((1, 1), int)], ids=str)
def test_rows_that_are_no_list(model, rows):
    with pytest.raises(ArgumentTypeError, match="rows must be a list"):
        model.logits([1, 2], rows=rows)


@pytest.mark.parametrize("ids", [[3, 4], (3, 4), {3, 4}, range(3, 5), np.array([3, 4]), frozenset([4, 3])])
def test_ids_may_come_in_any_form(ids):
    options = GenerationOptions.check({"banned_ids": ids, "stop_ids": ids}, 269)
    assert options.banned_ids == options.stop_ids == GenerationOptions.check({"allowed_ids": ids}, 269).allowed_ids
    assert options.banned_ids == (3, 4)
    with pytest.raises(ArgumentError, match="no token is left to draw"):
        GenerationOptions.check({"banned_ids": ids, "allowed_ids": ids}, 269)
    params = options.native(eos_ids=(7,), breakers=[[1]])
    assert (params.banned_ids, params.stop_ids, params.dry_sequence_breakers) == ([3, 4], [3, 4, 7], [[1]])
    params = dataclasses.replace(options, ignore_eos=True).native(eos_ids=(7,), breakers=[])
    assert (params.banned_ids, params.stop_ids) == ([3, 4, 7], [3, 4])


def test_one_id_and_none_at_all():
    options = GenerationOptions.check({"banned_ids": 3, "stop_ids": np.array(4), "allowed_ids": 5}, 269)
    assert (options.banned_ids, options.stop_ids, options.allowed_ids) == ((3,), (4,), (5,))
    for none in ([], (), set(), range(0), np.array([])):
        assert GenerationOptions.check({"banned_ids": none, "stop_ids": none}, 269) == GenerationOptions()


def test_none_stands_for_the_default():
    names = fixmin_cpp.GenerationArguments.__annotations__.keys() - {"repetition_penalty", "bad_ids"}
    assert GenerationOptions.check(dict.fromkeys(names), 269) == GenerationOptions()
    assert GenerationOptions.check({"banned_ids": [], "stop_ids": (), "logit_bias": {}}, 269) == GenerationOptions()


def test_values_of_other_programs(model):
    """llama.cpp's, transformers' and OpenAI's, with what they mean there."""

    def check(**given):
        return GenerationOptions.check(given, 269)

    assert check(top_k=-1).top_k == check(top_k=0).top_k == 0
    assert 0 < check(top_p=0).top_p == check(typical_p=0.0).typical_p < 1e-30
    assert check(timeout=INF) == check()
    assert check(seed=-1) == check()
    assert check(seed=[7, -1, None]).seed == (7, None, None)
    assert check(logit_bias={"3": 1}).logit_bias == check(logit_bias=[[3, 1.0]]).logit_bias == ((3, 1.0),)
    assert check(stop={"b", "a"}).stop in (("a", "b"), ("b", "a"))
    full = model.generate("the cat", max_new_tokens=10**9, ignore_eos=True)
    for value in (-1, -2):
        assert model.generate("the cat", max_new_tokens=value, ignore_eos=True).token_ids == full.token_ids
    assert len(full.token_ids) + len(model.encode("the cat")) == model.n_ctx


def test_a_share_of_nothing_is_greedy(model):
    greedy = model.generate("the cat", max_new_tokens=12).token_ids
    assert model.generate("the cat", max_new_tokens=12, temperature=5.0, seed=1, top_p=0).token_ids == greedy


def test_seeds_at_random_differ(model):
    completions = [model.generate("the", max_new_tokens=9, temperature=3.0, seed=-1) for _ in range(4)]
    assert len({c.seed for c in completions}) > 1  # equal ones: once in 2^96
    for completion in completions:
        again = model.generate("the", max_new_tokens=9, temperature=3.0, seed=completion.seed)
        assert again.token_ids == completion.token_ids
    first, second = model.generate(["the", "the"], max_new_tokens=1, temperature=1.0, seed=[-1, 8])
    assert (0 <= first.seed < 2**32, second.seed) == (True, 8)


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
    (np.array(["a", 5], dtype=object), ArgumentTypeError, r"prompt\[1\] must be a str or token ids, got 5"),
    (np.array([b"a"]), ArgumentTypeError, "array of integers"),
    (np.array([[1, 2], [3, 4]]), ArgumentError, r"shape \(2, 2\).*without padding"),
    (np.array([[[1, 2]]]), ArgumentError, r"shape \(1, 1, 2\)"),
    (np.zeros((1, 0), int), ArgumentError, "prompt is empty"),
    ([np.array(1), np.array(1.5)], ArgumentTypeError, r"prompt\[1\] must be an integer, got ndarray"),
    ([1, np.array([2])], ArgumentTypeError, r"prompt\[1\] must be an integer"),
    (np.array([1, None]), ArgumentTypeError, "dtype object"),
    (iter([1, 2]), ArgumentTypeError, "pass a list"),
    ({1, 2}, ArgumentTypeError, "got set {1, 2}: pass a list"),
    ({"input_ids": []}, ArgumentError, "prompt is empty"),
    ({"input_ids": [1, 269]}, ArgumentError, r"prompt\[1\] is 269"),
    ({"input_ids": "ab"}, ArgumentTypeError, "input_ids that are no token ids: str 'ab'"),
    ({"input_ids": None}, ArgumentTypeError, "input_ids that are no token ids"),
    ({"input_ids": ["a"]}, ArgumentTypeError, "input_ids that are no token ids"),
    ({"input_ids": [None]}, ArgumentTypeError, r"prompt\[0\] must be a list"),
    ({"input_ids": [1, 2], "attention_mask": [1]}, ArgumentError, "2 input_ids, but an attention_mask of shape"),
    ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, ArgumentError, "2 rows of input_ids, but 1"),
    ({"input_ids": [1, 2], "attention_mask": [0, 0]}, ArgumentError, "prompt is empty"),
    (np.array(1), ArgumentError, r"shape \(\)"),
    (np.int64(1), ArgumentError, r"shape \(\)"),
    ([1, 2.0], ArgumentTypeError, r"prompt\[1\] must be an integer, got float 2.0"),
    ([1, True], ArgumentTypeError, r"prompt\[1\] must be an integer, got bool True"),
    ([1, "a"], ArgumentTypeError, r"prompt\[1\] must be an integer, got str 'a'"),
    ([1, None], ArgumentTypeError, r"prompt\[1\]"),
    ([1, [2]], ArgumentTypeError, r"prompt\[1\]"),
    (["a", 1], ArgumentTypeError, r"prompt\[1\] must be a str or token ids, got 1"),
    (["a", ""], ArgumentError, r"prompt\[1\] is empty"),
    (["a", []], ArgumentError, r"prompt\[1\] is empty"),
    (["a", [1, 300]], ArgumentError, r"prompt\[1\]\[1\] is 300"),
    ([["a"]], ArgumentTypeError, r"prompt\[0\] must be one text"),
    (None, ArgumentTypeError, "got NoneType None"),
    (5, ArgumentTypeError, "got int 5"),
    (b"abc", ArgumentTypeError, "got bytes"),
    ([b"abc"], ArgumentTypeError, "got bytes"),
    ({"a": 1}, ArgumentTypeError, "got dict"),
    ("\ud800", ArgumentError, "lone surrogate"),
]


@pytest.mark.parametrize(
    ("prompt", "error", "message"), PROMPTS, ids=lambda value: repr(value)[:30].partition(" at 0x")[0]
)
def test_prompt(model, prompt, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompt)


class _Unreadable:
    """As a tensor on a device that this process cannot read."""

    def __array__(self, *arguments, **keywords):
        raise RuntimeError("elsewhere")


def test_array_that_cannot_be_read(model):
    with pytest.raises(ArgumentTypeError, match="prompt cannot be read as an array of token ids: elsewhere"):
        model.generate(_Unreadable())


@pytest.mark.parametrize(
    "prompt",
    [
        np.array([[5, 6]]),
        np.array([5, 6], dtype=">i8"),
        np.array([0, 5, 0, 6])[1::2],
        [np.array(5), np.int32(6)],
        range(5, 7),
        memoryview(np.array([5, 6])),
        {"input_ids": [5, 6]},
        {"input_ids": np.array([[5, 6]]), "attention_mask": np.array([[1, 1]])},
        {"input_ids": np.array([[9, 9, 5, 6]]), "attention_mask": np.array([[0, 0, 1, 1]])},
        {"input_ids": [5, 6, 9], "attention_mask": [1, 1, 0]},
    ],
    ids=lambda value: repr(value)[:40].partition(" at 0x")[0],
)
def test_forms_of_one_prompt(model, prompt):
    assert model.generate(prompt, max_new_tokens=4).token_ids == model.generate([5, 6], max_new_tokens=4).token_ids
    assert np.array_equal(model.logits(prompt), model.logits([5, 6]))
    if not isinstance(prompt, dict):
        assert np.array_equal(model.codes(prompt), model.codes([5, 6]))


def test_tensors_and_encodings_of_other_libraries(model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    expected = model.generate("the cat", max_new_tokens=4).token_ids
    ids = model.encode("the cat")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model.tokenizer, pad_token="<pad>")
    one = fast("the cat", return_tensors="pt")
    for prompt in (
        torch.tensor(ids),
        one.input_ids,
        one,
        fast("the cat"),
        list(torch.tensor(ids)),
        model.tokenizer.encode("the cat"),
    ):
        assert model.generate(prompt, max_new_tokens=4).token_ids == expected
    padded = fast(["the cat", "a"], return_tensors="pt", padding=True)
    assert padded.input_ids.shape[0] == 2
    for prompts in (padded, fast(["the cat", "a"]), [torch.tensor(ids), torch.tensor([model.encode("a")])]):
        answers = model.generate(prompts, max_new_tokens=4)
        assert [a.token_ids for a in answers] == [expected, model.generate("a", max_new_tokens=4).token_ids]
    with pytest.raises(ArgumentTypeError, match=r"prompt\[0\] must be an integer, got Tensor"):
        model.generate(list(torch.tensor([1.5])))


def test_columns_of_texts(model):
    expected = [c.token_ids for c in model.generate(["the", "cat"], max_new_tokens=3)]
    for column in (np.array(["the", "cat"]), np.array(["the", "cat"], dtype=object), ("the", "cat")):
        assert [c.token_ids for c in model.generate(column, max_new_tokens=3)] == expected


def test_wrong_prompt_in_a_list_runs_nothing(model, monkeypatch):
    monkeypatch.setattr(Runner, "lease", None)  # any use of the engine would be a TypeError
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


@pytest.mark.parametrize(
    "ids", [[-1], [269], ["a"], [True], None, 1.5, True, "ab", b"ab", {3, 4}, [[1], [269]], [[1], None], iter([1])]
)
def test_decode(model, ids):
    with pytest.raises(ArgumentError, match="ids"):
        model.decode(ids)


def test_decode_one_id_one_text_or_several(model):
    ids, more = model.encode("the cat"), model.encode("a")
    assert model.decode(ids) == model.decode(np.array(ids)) == model.decode({"input_ids": ids}) == "the cat"
    assert (
        model.decode(ids[0])
        == model.decode(np.array(ids[0]))
        == model.decode(np.int64(ids[0]))
        == model.decode(ids[:1])
    )
    assert model.decode([]) == model.decode(np.array([])) == ""
    assert model.decode([ids, more, []]) == model.decode((tuple(ids), np.array(more), ())) == ["the cat", "a", ""]
    assert model.decode(np.array([ids, ids])) == ["the cat", "the cat"]
    assert model.decode(np.array([ids])) == ["the cat"]


@pytest.mark.parametrize("text", [None, 5, b"a", {"a"}])
def test_encode(model, text):
    with pytest.raises(ArgumentTypeError, match="text must be a str"):
        model.encode(text)


def test_encode_several(model):
    texts = ["the cat", "", "é日"]
    assert model.encode(texts) == model.encode(tuple(texts)) == [model.encode(text) for text in texts]
    assert model.encode([]) == []
    with pytest.raises(ArgumentTypeError, match=r"text\[1\] must be a str, got int"):
        model.encode(["a", 5])


def test_length_of_what_is_scored(model):
    with pytest.raises(
        fixmin_cpp.ContextLengthError,
        match=f"text has {model.n_ctx + 2} tokens, but at most {model.n_ctx + 1} can be scored",
    ):
        model.score([5] * (model.n_ctx + 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_threads": -2}, "n_threads must be between -1 and 1024, got -2"),
        ({"n_threads": 10**6}, "n_threads"),
        ({"n_threads": 2.0}, "n_threads must be an integer"),
        ({"n_threads": True}, "n_threads"),
        ({"n_ctx": -1}, "n_ctx"),
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


def test_a_context_of_0_is_the_models(model, model_path):
    with Model(model_path, n_ctx=0) as whole:
        assert whole.n_ctx == model.n_ctx


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


def test_devices_on_ray(monkeypatch):
    monkeypatch.delenv("FIXMIN_DEVICE", raising=False)
    assert on_ray(None, None) == on_ray("cpu", 0) == ("cpu", 0.0)
    assert on_ray("cuda", None) == ("cuda", 1.0)
    assert (on_ray("cuda", 0.25), on_ray("cuda", 2)) == (("cuda", 0.25), ("cuda", 2.0))
    monkeypatch.setenv("FIXMIN_DEVICE", "cuda")
    assert (on_ray(None, None), on_ray("cpu", None)) == (("cuda", 1.0), ("cpu", 0.0))
    for device in ("auto", "cuda:0", "cuda:1"):
        with pytest.raises(ArgumentError, match=f"on Ray device must be .* got '{device}'"):
            on_ray(device, None)
    for device, gpus in (("cpu", 1), ("cuda", 0)):
        with pytest.raises(ArgumentError, match=f"ray_gpus is {gpus} and device '{device}'"):
            on_ray(device, gpus)
    for gpus in (-1, 1.5):
        with pytest.raises(ArgumentError, match=f"ray_gpus.*{gpus}"):
            on_ray("cuda", gpus)


@pytest.mark.parametrize("texts", [["a", "b"], [[1, 2], [3]], ("a", [1])])
def test_one_text_where_a_list_of_them_means_nothing(model, texts):
    for call in (model.logits, lambda text: model.hidden_states(text, 0), model.codes, model.beam_search):
        with pytest.raises(ArgumentTypeError, match=f"must be one text, .* got a list of {len(texts)}"):
            call(texts)
