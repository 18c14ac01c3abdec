"""A body is answered, or refused, the same by the server and as a line of a batch job, field for field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from servers import Server

from fixmin_cpp.batch import run_batch

schemas = pytest.importorskip("fixmin_cpp.serve.schemas")

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the"}]
GIVEN: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "the a", "max_tokens": 3},
    CHAT: {"messages": MESSAGES, "max_tokens": 3},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
# Values of every field, right and wrong ones.
COUNTS = (5, 5.0, 0, -1, -2, 1.5, "5", True, None, [5], 2**70)
NUMBERS = (0.5, 1, 0, -1, 3.0, "1", True, None, [1])
FLAGS = (True, False, None, 1, "true")
IDS = (5, [1, 2], [], [1.5], [True], ["a"], [10**6], None, {})
TEXTS = ("a", ["a", "b"], [], [""], 5, [5], None)
ALIASES_OF_LENGTH = dict.fromkeys(("max_completion_tokens", "max_new_tokens", "n_predict"), "max_tokens")
VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict"), COUNTS),
    **dict.fromkeys(("min_tokens", "min_new_tokens", "top_k", "min_keep", "mirostat", "repeat_last_n"), COUNTS),
    **dict.fromkeys(("dry_allowed_length", "dry_penalty_last_n", "prompt_lookup_num_tokens"), COUNTS),
    "seed": (*COUNTS, -5, -(2**63), -(2**63) - 1, 2**53, 2**63, 2**64 - 1, 2**64),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "top_n_sigma"), NUMBERS),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "repeat_penalty", "repetition_penalty"), NUMBERS),
    **dict.fromkeys(("dry_base", "dry_multiplier", "dynatemp_exponent", "dynatemp_range"), NUMBERS),
    **dict.fromkeys(("mirostat_eta", "mirostat_tau", "xtc_probability", "xtc_threshold"), NUMBERS),
    **dict.fromkeys(("ignore_eos", "do_sample", "openai_penalties", "parse_special"), FLAGS),
    **dict.fromkeys(("prefix_cache", "cache_prompt"), FLAGS),
    **dict.fromkeys(("stop_ids", "stop_token_ids", "banned_ids", "bad_ids"), IDS),
    **dict.fromkeys(("allowed_ids", "allowed_token_ids"), IDS),
    "timeout": (600, -1, "1", True, None, [1]),
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
    "model": ("m", 5, None),
    "n": (1, 2, 3.0, 0, "1", True, None),
    "best_of": (1, 3, 0, None),
    "echo": (True, False, 1, None),
    "logprobs": (0, 2, 3.0, False, True, -1, "1", None),
    "top_logprobs": (0, 2, -1, None),
    "suffix": ("", "a", None),
    "return_token_ids": (True, False, "yes", None),
    "stream": (False, 1, None),
    "stream_options": ({}, {"include_usage": True}, 5, None),
    "add_generation_prompt": (True, False, 1, None),
    "continue_final_message": (True, False, 1, None),
    "prompt": (
        "the",
        [5, 6],
        ["the", "abc"],
        [[5], [6, 7]],
        "",
        [],
        [1.5],
        [True],
        [[]],
        {},
        5,
        {"input_ids": [5]},
        None,
    ),
    "messages": (
        *(MESSAGES, [], {}, [5], [{"role": "user"}], [{"role": 5}], [{"content": "a"}], None),
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        *([{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": [{"type": "text"}]}]),
        [*MESSAGES, {"role": "assistant", "content": "abc"}],
    ),
    # What is accepted because it asks for nothing, and what is not because it does.
    "user": ("u", None),
    "metadata": ({"a": "b"}, None),
    "tools": ([], [1], None),
    "store": (False, True, None),
    "skip_special_tokens": (True, False),
    "prompt_logprobs": (2, None),
    "temprature": (1,),
}
# Several fields at once, and what bench/hostile.py sends, small enough for a record.
TOGETHER: list[dict[str, Any]] = [
    {"prompt": ["the abc", "the q"], "n": 2, "echo": True, "logprobs": 2, "seed": 3, "return_token_ids": True},
    {"prompt": ["the", "a"], "n": 1, "best_of": 3, "seed": 3, "logprobs": 0},
    {"prompt": "the", "echo": True, "logprobs": 1, "max_tokens": 0},
    {"prompt": "the", "max_tokens": 0},
    {"n": 2, "temperature": 0},
    {"n": 3, "best_of": 2},
    {"max_tokens": 3, "max_new_tokens": 5},
    {"max_tokens": 3, "max_completion_tokens": 2},
    {"max_tokens": 4, "max_completion_tokens": -7},
    {"min_tokens": 9},
    {"logprobs": True, "top_logprobs": 2, "seed": 1},
    {"logit_bias": {"5": 1000}, "stop": ["zz"], "seed": 1},
    {"regex": "a", "choices": ["a"]},
    {"response_format": FORM, "regex": "a"},
    {"response_format": {"type": "json_schema", "schema": {"uniqueItems": True}}},
    {"allowed_ids": [5], "banned_ids": [5]},
    {"allowed_ids": [5], "regex": "[^a-z]+"},
    {"frequency_penalty": -3e38, "max_tokens": 9},
    {"repeat_last_n": 5, "presence_penalty": 1.0, "seed": 4},
    {"prompt": "the " * 300},
    {"messages": [{"role": "user", "content": "the " * 300}]},
    {"prompt": ["", "the"]},
    {"prompt": [10**90]},
    {"logit_bias": {f"x{i}": 1 for i in range(50)}},
    {"dry_multiplier": 1, "dry_sequence_breakers": "[" * 90 + "]" * 90},
    {"regex": "(" * 500 + "a" + ")*" * 500},
    {"grammar": "start: start start"},
    {"json_schema": {"$ref": "#/" + "x" * 5000}},
    {"json_schema": {"const": "\ue123" * 3000}},
    {"q" * 5000: 1},
    {"add_generation_prompt": True, "continue_final_message": True},
]


def bodies(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The field that each is about, "" for several; with a seed, as a job makes its own for lines without one."""
    for name, values in VALUES.items():
        given = {key: value for key, value in GIVEN[path].items() if key != ALIASES_OF_LENGTH.get(name)}
        for value in values:
            yield name, {**given, "seed": 3, name: value}
    for fields in TOGETHER:
        yield "", {**GIVEN[path], "seed": 3, **fields}


def outcome(status: int, answer: dict[str, Any]) -> Any:
    """What both have to have in common of an answer: all but names and dates, and what was cached."""
    if status != 200:
        return status, answer["error"]
    answer = {name: value for name, value in answer.items() if name not in ("id", "created", "model")}
    return status, {**answer, "usage": {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"}}


class Compared(NamedTuple):
    """What the server says to a body, and what a job does: status and answer."""

    about: str
    body: dict[str, Any]
    served: tuple[int, Any]
    ran: tuple[int, Any]


@pytest.fixture(scope="module", params=[COMPLETIONS, CHAT])
def both(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[Compared]]:
    """An endpoint, and every body there."""
    path, folder = request.param, tmp_path_factory.mktemp("both")
    sent = list(bodies(path))
    line = {"custom_id": "x", "method": "POST", "url": path}
    (folder / "in").write_text("".join(json.dumps({**line, "body": body}) + "\n" for _, body in sent))
    run_batch(server.model, folder / "in", folder / "out", n_threads=1)
    records = (folder / "out").read_bytes().splitlines()
    results = []
    with server.client() as client:
        for number, ((about, body), record) in enumerate(zip(sent, records, strict=True), 1):
            headers = {"Content-Type": "application/json"}
            answer = client.post(path, content=json.dumps(body).encode(), headers=headers)
            response = json.loads(record)["response"]
            if "error" in response["body"]:
                error = response["body"]["error"]
                error["message"] = error["message"].removeprefix(f"line {number}: ")
            served, ran = outcome(answer.status_code, answer.json()), outcome(response["status_code"], response["body"])
            results.append(Compared(about, body, served, ran))
    return path, results


def test_all_fields_are_looked_at() -> None:
    for path in (COMPLETIONS, CHAT):
        assert schemas.BODIES[path].model_fields.keys() <= VALUES.keys()


def test_a_body_means_the_same(both: tuple[str, list[Compared]]) -> None:
    for one in both[1]:
        if one.body["seed"] in (-1, None):  # a random one; in a job one that depends on it and the line
            assert one.served[0] == one.ran[0] == 200
        else:
            assert one.ran == one.served, one.body


def test_every_field_is_taken_and_refused(both: tuple[str, list[Compared]]) -> None:
    """So that the comparison is not one of nothings."""
    path, results = both
    assert {one.served[0] for one in results} == {200, 400}
    for name in schemas.BODIES[path].model_fields.keys() - {"model"}:  # which is not looked at
        assert {one.served[0] for one in results if one.about == name} == {200, 400}, name


def test_what_only_a_server_can_give(server: Server, tmp_path: Path) -> None:
    body = {"prompt": "the", "max_tokens": 2, "stream": True}
    assert server.post(COMPLETIONS, body).status_code == 200
    line = {"custom_id": "x", "method": "POST", "url": COMPLETIONS, "body": body}
    (tmp_path / "in").write_text(json.dumps(line))
    run_batch(server.model, tmp_path / "in", tmp_path / "out", n_threads=1)
    error = json.loads((tmp_path / "out").read_bytes())["response"]["body"]["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "stream")
    assert "only a server" in error["message"]
