"""A body means the same as a request to the server and as a line of a batch job."""

import json
from typing import Any

import pytest

from fixmin_cpp.arguments import GenerationOptions
from fixmin_cpp.batch_lines import Line, Settings, parse_line
from fixmin_cpp.errors import ArgumentError
from fixmin_cpp.openai_fields import USUAL

schemas = pytest.importorskip("fixmin_cpp.serve.schemas")

VOCAB_SIZE = 1000
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
# Values of every field that both know, right and wrong ones.
COUNTS = (5, 5.0, 0, -1, -2, 1.5, "5", True, None, [5], 2**70)
NUMBERS = (0.5, 1, 0, -1, 3.0, "1", True, None, [1])
FLAGS = (True, False, None, 1, "true")
IDS = ([1, 2], [], [1.5], [True], ["a"], [10**6], None, {})
TEXTS = ("a", ["a", "b"], [], [""], 5, [5], None)
VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict"), COUNTS),
    **dict.fromkeys(("min_tokens", "min_new_tokens", "top_k", "min_keep", "mirostat", "repeat_last_n"), COUNTS),
    **dict.fromkeys(("dry_allowed_length", "dry_penalty_last_n", "prompt_lookup_num_tokens"), COUNTS),
    "seed": (*COUNTS, -5, -(2**63), -(2**63) - 1, 2**53, 2**63, 2**64 - 1, 2**64),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "top_n_sigma", "timeout"), NUMBERS),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "repeat_penalty", "repetition_penalty"), NUMBERS),
    **dict.fromkeys(("dry_base", "dry_multiplier", "dynatemp_exponent", "dynatemp_range"), NUMBERS),
    **dict.fromkeys(("mirostat_eta", "mirostat_tau", "xtc_probability", "xtc_threshold"), NUMBERS),
    **dict.fromkeys(("ignore_eos", "do_sample", "openai_penalties", "parse_special"), FLAGS),
    **dict.fromkeys(("prefix_cache", "cache_prompt"), FLAGS),
    **dict.fromkeys(("stop_ids", "stop_token_ids", "banned_ids", "bad_ids"), IDS),
    **dict.fromkeys(("allowed_ids", "allowed_token_ids"), IDS),
    "stop": TEXTS,
    "choices": (["a", "b"], [], [5], None),
    "dry_sequence_breakers": (["a"], [[1, 2]], '["a"]', "a", "{}", [5], None, []),
    "logit_bias": (
        {"5": 1.5},
        {"5": -100},
        {},
        {"x": 1},
        {"5": "1"},
        {"5": True},
        {"-1": 1},
        {"1000": 1},
        [[5, 1]],
        None,
    ),
    "regex": ("[a-z]+", "(", "", 5, None),
    "grammar": ('start: "a"', "", 5, None),
    "json_schema": (SCHEMA, json.dumps(SCHEMA), True, "{", 5, [], None),
    "response_format": (
        *(FORM, {"type": "text"}, {"type": "json_object"}, {"type": "json_object", "schema": SCHEMA}, None),
        *({"type": "json_schema", "schema": SCHEMA}, {"type": "json_schema"}, {"type": "xml"}, {}, "json", []),
        *({"type": "text", "schema": SCHEMA}, {"type": "json_object", "schema": None, "json_schema": None}),
        *({**FORM, "schema": SCHEMA}, {**FORM, "other": 1}, {"type": "json_schema", "json_schema": 5}),
        *({"type": "json_schema", "json_schema": {"schema": 5}}, {"type": "json_schema", "json_schema": {"x": {}}}),
        *({"type": "json_schema", "json_schema": {"schema": False}}, {"type": None}),
    ),
    # What is accepted because it asks for nothing, and what is not because it does.
    "best_of": (1, None),
    "n": (1, None),
    "echo": (False, None),
    "stream": (False, None),
    "suffix": ("", None),
    "logprobs": (False, None),
    "user": ("u", None),
    "metadata": ({"a": "b"}, None),
    "tools": ([], [1], None),
    "store": (False, True, None),
    "skip_special_tokens": (True, False),
    "return_token_ids": (False, None),
    "temprature": (1,),
}
# Those of the form of an answer, which a record of a job has its own way to say.
_ONLY_SERVED = {"stream_options", "model", "prompt"}


def served(body: dict[str, Any]) -> GenerationOptions:
    request = schemas.CompletionRequest.model_validate(body)
    return GenerationOptions.check({"max_new_tokens": 16, **USUAL, **request.arguments()}, VOCAB_SIZE)


def in_a_job(body: dict[str, Any]) -> GenerationOptions:
    line = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body}
    (request,) = parse_line(Line(1, 0, json.dumps(line).encode())).requests(Settings("generate", 0, {}, False))
    return GenerationOptions.check(request.arguments, VOCAB_SIZE)


def outcome(read: Any, body: dict[str, Any]) -> Any:
    """The options, None for what is refused."""
    try:
        return read(body)
    except (ArgumentError, ValueError, TypeError):
        return None


def test_all_fields_are_looked_at() -> None:
    aliases = {field.alias or name for name, field in schemas.CompletionRequest.model_fields.items()}
    assert aliases - VALUES.keys() == _ONLY_SERVED


@pytest.mark.parametrize("name", VALUES)
def test_a_field_means_the_same(name: str) -> None:
    accepted = []
    for value in VALUES[name]:
        body = {"prompt": "a", "seed": 3, name: value}
        expected = outcome(served, body)
        got = outcome(in_a_job, body)
        if name == "seed" and value in (-1, None):  # a random one; in a job one that depends on it and the line
            assert expected is not None
            assert got is not None
        else:
            assert got == expected, value
        accepted.append(expected is not None)
    assert any(accepted) or name == "temprature"
