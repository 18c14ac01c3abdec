"""Answers and requests against the published description of OpenAI's interface, as far as it is implemented.

Answers: openai_description.py, strictly. Requests: the package `openai`, which is generated from the description, says
what fields there are; each means something, is refused by its name, or is ignored and docs/serving.md says so.
"""

import asyncio
import contextlib
import json
import re
import struct
import threading
import types
import typing
from base64 import b64decode
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai_description as described
import pytest
import typing_extensions as ext
from servers import Server, httpx

import fixmin_cpp

serve = pytest.importorskip("fixmin_cpp.serve")

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "the"}]
PROMPTS = {COMPLETIONS: {"prompt": "the a"}, CHAT: {"messages": MESSAGES}, EMBEDDINGS: {"input": "the"}}
DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def conforms(answer: Any, schema: dict[str, Any]) -> None:
    """JSON has one kind of numbers: 1.0 is an integer in a schema, but not what a client's type says."""
    for number in numbers(answer, schema):
        assert type(number) is int
    jsonschema.Draft202012Validator(schema).validate(answer)


def numbers(value: Any, schema: dict[str, Any]) -> Iterator[Any]:
    """What stands where an integer must."""
    for one in schema.get("anyOf", [schema]):
        if one.get("type") == "integer" and isinstance(value, (int, float)):
            yield value
        elif one.get("type") == "array" and isinstance(value, list):
            for item in value:
                yield from numbers(item, one["items"])
        elif one.get("type") == "object" and isinstance(value, dict):
            for name, item in value.items():
                yield from numbers(item, one.get("properties", {}).get(name, {}))


def parsed(text: str) -> Any:
    """JSON as its standard has it: no NaN, no name twice."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_name_twice)


def answered(server: Server, path: str, **fields: Any) -> Any:
    answer = server.post(path, {**PROMPTS[path], **({} if path == EMBEDDINGS else {"max_tokens": 5}), **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return parsed(answer.text)


def events(server: Server, path: str, **fields: Any) -> list[Any]:
    answer = server.post(path, {**PROMPTS[path], "max_tokens": 5, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [parsed(line.removeprefix("data: ")) for line in lines]


# --- answers ------------------------------------------------------------------------------------------------------

ASKED: dict[str, list[dict[str, Any]]] = {
    COMPLETIONS: [
        {},
        {"n": 3, "best_of": 4},
        {"n": 3, "best_of": 3, "temperature": 0},
        {"logprobs": 0},
        {"logprobs": 5, "n": 2},
        {"logprobs": 2, "echo": True, "return_token_ids": True},
        {"logprobs": 2, "echo": True, "max_tokens": 0},
        {"echo": True},
        {"prompt": ["the", "abc"], "stop": ["a", "b"]},
        {"prompt": [[1, 2], [3]], "seed": -(2**63)},
        {"logit_bias": {"0": -100, "7": 100}, "logprobs": 3},
        {"max_tokens": 250, "ignore_eos": True, "logprobs": 20},
        {"stop_token_ids": list(range(40)), "logprobs": 1},
    ],
    CHAT: [
        {},
        {"n": 3},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 5, "n": 2, "return_token_ids": True},
        {"stop": "a", "max_completion_tokens": 40},
        {"messages": [{"role": "system", "content": "a"}, *MESSAGES, {"role": "assistant", "content": "the"}]},
        {"stop_token_ids": list(range(40)), "logprobs": True, "top_logprobs": 1},
    ],
}


@pytest.mark.parametrize(("path", "schema"), [(COMPLETIONS, "COMPLETION"), (CHAT, "CHAT_COMPLETION")])
def test_whole_answers(server: Server, path: str, schema: str) -> None:
    ends = set()
    for fields in ASKED[path]:
        answer = answered(server, path, **fields)
        conforms(answer, getattr(described, schema))
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
        ends |= {choice["finish_reason"] for choice in answer["choices"]}
        for choice in answer["choices"]:
            check_logprobs(choice, fields)
    assert ends == {"stop", "length"}


def check_logprobs(choice: dict[str, Any], fields: dict[str, Any]) -> None:
    """What the description says in words: lists of one length, at most so many entries, null where none were asked."""
    found = choice["logprobs"]
    wanted = fields.get("logprobs") is not None
    assert (found is not None) == wanted
    if not wanted:
        return
    if "text" in choice:
        assert len({len(values) for values in found.values()}) == 1
        for entries in found["top_logprobs"]:
            assert entries is None or len(entries) <= fields["logprobs"] + 1
    else:
        for entry in found["content"]:
            assert len(entry["top_logprobs"]) == fields.get("top_logprobs", 0)


@pytest.mark.parametrize(("path", "schema"), [(COMPLETIONS, "COMPLETION_CHUNK"), (CHAT, "CHAT_CHUNK")])
@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"include_usage": False}])
def test_streams(server: Server, path: str, schema: str, options: dict[str, bool] | None) -> None:
    for fields in ASKED[path]:
        if fields.get("best_of", 0) > fields.get("n", 1):
            continue  # refused
        whole = answered(server, path, **{"seed": 3, **fields})
        chunks = events(server, path, **{"seed": 3, **fields}, **({"stream_options": options} if options else {}))
        for chunk in chunks:
            conforms(chunk, getattr(described, schema))
        for name in ("id", "created", "model", "object"):
            assert len({chunk[name] for chunk in chunks}) == 1
        # With include_usage the last chunk has no choice and the usage of all, and the others have null; else none has.
        if options and options["include_usage"]:
            last = chunks.pop()
            assert last["choices"] == []
            assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
            assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
        else:
            assert not any("usage" in chunk for chunk in chunks)
        assert all(len(chunk["choices"]) == 1 for chunk in chunks)
        check_choices([chunk["choices"][0] for chunk in chunks], whole["choices"])


def check_choices(parts: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    """A choice's finish_reason comes once, with its last chunk; a chat's role first; the text is that of the whole."""
    for choice in whole:
        mine = [part for part in parts if part["index"] == choice["index"]]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if "message" in choice:
            assert mine[0]["delta"]["role"] == "assistant"
            assert not any("role" in part["delta"] for part in mine[1:])
            text = "".join(part["delta"].get("content") or "" for part in mine)
            assert text == choice["message"]["content"]
        else:
            assert "".join(part["text"] for part in mine) == choice["text"]


def test_embeddings(server: Server) -> None:
    for given in ("the", ["the", "abc a"], [1, 2, 3], [[1, 2], [3]]):
        answer = answered(server, EMBEDDINGS, input=given)
        conforms(answer, described.EMBEDDINGS)
        assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
        packed = answered(server, EMBEDDINGS, input=given, encoding_format="base64")
        for entry, same in zip(packed["data"], answer["data"], strict=True):
            data = b64decode(entry["embedding"], validate=True)
            assert list(struct.unpack(f"<{len(data) // 4}f", data)) == same["embedding"]  # float32, little endian
            entry["embedding"] = same["embedding"]
        assert packed == answer


def test_models(server: Server) -> None:
    listed = parsed(server.get("/v1/models").text)
    conforms(listed, described.MODELS)
    (model,) = listed["data"]
    assert parsed(server.get(f"/v1/models/{model['id']}").text) == model


# --- errors -------------------------------------------------------------------------------------------------------


def refused(answer: Any, status: int, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = parsed(answer.text)
    conforms(found, described.ERROR)
    assert found["error"]["param"] == param
    return found["error"]


def test_errors(server: Server) -> None:
    for path in (COMPLETIONS, CHAT, EMBEDDINGS):
        (field,) = PROMPTS[path]
        refused(server.post(path, {}), 400, field)
        refused(server.post(path, {**PROMPTS[path], "no_such_field": 1}), 400, "no_such_field")
        refused(server.post(path, []), 400)
        with server.client() as client:
            refused(client.post(path, content=b"{", headers={"content-type": "application/json"}), 400)
            refused(client.post(path, content=b"{}", headers={"content-type": "text/plain"}), 415)
            refused(client.post(path, content=b'{"a":"' + b"x" * (1 << 22) + b'"}'), 413)
        refused(server.get(path), 405)
    assert refused(server.get("/v1/models/other"), 404)["code"] == "model_not_found"
    refused(server.get("/v1/nothing"), 404)
    long = server.post(COMPLETIONS, {"prompt": "the " * 400})
    assert refused(long, 400, "prompt")["code"] == "context_length_exceeded"


@contextlib.asynccontextmanager
async def in_this_process(path: Path, load_first: bool = True, **settings: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A client of a server, and its host."""
    app = serve.create_app(serve.ServeSettings(model=str(path), **settings), load_first=load_first)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield client, app.state.host


async def every_path(client: Any, status: int) -> set[str]:
    """Asks all of OpenAI's paths, which are refused; the codes of why."""
    answers = [await client.post(path, json=fields) for path, fields in PROMPTS.items()]
    answers.append(await client.get("/v1/models"))
    return {refused_also(answer, status)["code"] for answer in answers}


def refused_also(answer: Any, status: int) -> dict[str, Any]:
    """Like refused(), where an answer says more than the description names: how far a model is loaded."""
    found = parsed(answer.text)
    more = found.keys() - {"error"}
    assert more <= {"progress"}
    assert answer.status_code == status
    conforms({"error": found["error"]}, described.ERROR)
    return found["error"]


def test_errors_of_operation(served_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def keys_and_queue() -> None:
        settings = {"api_keys": ("secret",), "max_queue": 0, "n_parallel": 2}
        async with in_this_process(served_path, **settings) as (client, host):
            assert await every_path(client, 401) == {"invalid_api_key"}
            client.headers["authorization"] = "Bearer secret"
            with host.admitted(2):
                for path, fields in PROMPTS.items():
                    refused(await client.post(path, json=fields), 429)
            for path, fields in PROMPTS.items():
                assert (await client.post(path, json=fields)).status_code == 200
            host.stop()
            assert await every_path(client, 503) == {"shutting_down"}

    async def loading() -> None:
        ready = threading.Event()
        load = fixmin_cpp.Model

        def slowly(*arguments: Any, **options: Any) -> fixmin_cpp.Model:
            assert ready.wait(60)
            return load(*arguments, **options)

        monkeypatch.setattr("fixmin_cpp.serve.host.Model", slowly)
        async with in_this_process(served_path, load_first=False) as (client, _):
            assert await every_path(client, 503) == {"model_loading"}
            ready.set()

    async def broken() -> None:
        monkeypatch.undo()
        (tmp_path / "no.gguf").write_bytes(b"GGUF")
        async with in_this_process(tmp_path / "no.gguf", load_first=False) as (client, host):
            while host.error is None:
                await asyncio.sleep(0.01)
            assert await every_path(client, 503) == {"model_not_loaded"}

    for one in (keys_and_queue, loading, broken):
        asyncio.run(one())


# --- requests -----------------------------------------------------------------------------------------------------

BASE = {"seed": 1, "temperature": 1.0}
#: Fields that mean something: a value that must show in an answer to BASE. Of messages and prompts: see PROMPTS.
MEANT: dict[str, dict[str, Any]] = {
    COMPLETIONS: {
        "prompt": "abc",
        "best_of": 20,
        "echo": True,
        "frequency_penalty": 2,
        "logit_bias": {"7": 100},
        "logprobs": 2,
        "max_tokens": 3,
        "n": 2,
        "presence_penalty": 2,
        "seed": 2,
        "stop": list("abcdefghijklmnopqrstuvwxyz"),
        "stream": True,
        "temperature": 0,
        "top_p": 0.01,
    },
    CHAT: {
        "messages": [{"role": "user", "content": "abc"}],
        "frequency_penalty": 2,
        "logit_bias": {"7": 100},
        "logprobs": True,
        "max_completion_tokens": 3,
        "max_tokens": 3,
        "n": 2,
        "presence_penalty": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": {"const": True}}},
        "seed": 2,
        "stop": list("abcdefghijklmnopqrstuvwxyz"),
        "stream": True,
        "temperature": 0,
        "top_p": 0.01,
    },
    EMBEDDINGS: {"input": "abc", "encoding_format": "base64"},
}
#: What must be refused by its name, since it asks for what there is not.
REFUSED: dict[str, dict[str, list[Any]]] = {
    COMPLETIONS: {"suffix": ["x"]},
    CHAT: {
        "audio": [{"format": "wav", "voice": "alloy"}],
        "function_call": [{"name": "f"}],
        "functions": [[{"name": "f"}]],
        "modalities": [["audio"], ["text", "audio"]],
        "moderation": [{"model": "m"}],
        "prediction": [{"type": "content", "content": "the"}],
        "store": [True],
        "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
        "tools": [[{"type": "function", "function": {"name": "f"}}]],
        "web_search_options": [{}, {"search_context_size": "low"}],
    },
    EMBEDDINGS: {"dimensions": [8]},
}
#: What needs another field: with that one.
TOGETHER = {
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "top_logprobs": ({"logprobs": True}, 3),
}
#: What changes nothing, whatever it says: docs/serving.md names each.
IGNORED = {
    COMPLETIONS: {"model", "user"},
    CHAT: {
        *("model", "user", "metadata", "safety_identifier", "service_tier", "reasoning_effort", "verbosity"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "parallel_tool_calls"),
    },
    EMBEDDINGS: {"model", "user"},
}


def without_chance(answer: Any) -> Any:
    """What does not differ from one request to the next that says the same."""
    text = re.sub(r"(cmpl|chatcmpl)-[0-9a-f]{32}", "ID", answer.text)
    return re.sub(r'"created":\d+|"cached_tokens":\d+', "", text)


def asked(client: Any, path: str, **fields: Any) -> Any:
    base = {} if path == EMBEDDINGS else {**BASE, "max_tokens": 12}
    if "max_completion_tokens" in fields:
        del base["max_tokens"]
    return client.post(path, json={**base, **PROMPTS[path], **fields})


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with server.client() as made:
        yield made


@pytest.mark.parametrize("path", PROMPTS)
def test_a_field_that_means_something_shows(client: Any, path: str) -> None:
    plain = asked(client, path)
    assert without_chance(asked(client, path)) == without_chance(plain)
    for name, value in MEANT[path].items():
        answer = asked(client, path, **{name: value})
        assert answer.status_code == 200, answer.text
        assert without_chance(answer) != without_chance(plain), f"{name} changes nothing"
    for name, (others, value) in TOGETHER.items():
        if path == EMBEDDINGS or (path == COMPLETIONS and name == "top_logprobs"):
            continue
        both, one = asked(client, path, **others, **{name: value}), asked(client, path, **others)
        assert both.status_code == one.status_code == 200
        assert without_chance(both) != without_chance(one), f"{name} changes nothing"


@pytest.mark.parametrize("path", PROMPTS)
def test_what_there_is_not_is_refused_by_name(client: Any, path: str) -> None:
    for name, values in REFUSED[path].items():
        for value in values:
            assert name in refused(asked(client, path, **{name: value}), 400, name)["message"]


# --- and that is all of the description ---------------------------------------------------------------------------


def parameters() -> dict[str, dict[str, Any]]:
    """Fields of requests with their types, by path, of the package."""
    types = pytest.importorskip("openai").types
    from openai.types.chat import completion_create_params as chat

    classes = {
        COMPLETIONS: (
            types.completion_create_params.CompletionCreateParamsNonStreaming,
            types.completion_create_params.CompletionCreateParamsStreaming,
        ),
        CHAT: (chat.CompletionCreateParamsNonStreaming, chat.CompletionCreateParamsStreaming),
        EMBEDDINGS: (types.embedding_create_params.EmbeddingCreateParams,),
    }
    found: dict[str, dict[str, Any]] = {}
    for path, several in classes.items():
        for one in several:
            for name, kind in ext.get_type_hints(one, include_extras=True).items():
                before = found.setdefault(path, {}).get(name)
                found[path][name] = kind if before is None else before | kind
    return found


def values(kind: Any) -> list[Any]:
    """Values of a type of the package: of each alternative, with each single field that may be there."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (ext.Required, ext.NotRequired, ext.Annotated):
        return values(inner[0])
    if origin is typing.Literal:
        return list(inner)
    if origin in (typing.Union, types.UnionType):
        return [value for one in inner for value in values(one)]
    if ext.is_typeddict(kind):
        hints = ext.get_type_hints(kind, include_extras=True)
        least = {name: values(hints[name])[0] for name in sorted(kind.__required_keys__)}
        more = [{**least, name: value} for name in sorted(hints) for value in values(hints[name])]
        return [least, *more]
    if origin is dict or kind is dict:
        return [{}, *({"7": value} for value in values(inner[1]))]
    if origin is not None and issubclass(origin, Iterable):
        return [[value] for value in values(inner[0])]
    simple = {str: ["x", ""], int: [1], float: [0.5], bool: [True, False], type(None): [None], object: [{}]}
    return simple[kind]


def test_the_values_are_of_all_kinds() -> None:
    class Inner(ext.TypedDict, total=False):
        a: ext.Required[typing.Literal["x", "y"]]
        b: int | None

    assert values(list[Inner]) == [
        [{"a": "x"}],
        [{"a": "x"}],
        [{"a": "y"}],
        [{"a": "x", "b": 1}],
        [{"a": "x", "b": None}],
    ]


@pytest.mark.external
def test_every_field_of_a_request_is_accounted_for() -> None:
    for path, found in parameters().items():
        kinds = [MEANT[path].keys(), REFUSED[path].keys(), IGNORED[path]]
        if path != EMBEDDINGS:
            kinds.append({"stream_options"} | ({"top_logprobs"} if path == CHAT else set()))
        listed = [name for names in kinds for name in names]
        assert sorted(listed) == sorted(set(listed)), "a field is listed twice"
        assert set(listed) == found.keys()


@pytest.mark.external
@pytest.mark.parametrize("path", PROMPTS)
def test_every_value_of_a_request_is_taken_or_refused_by_name(client: Any, path: str) -> None:
    """And one that is ignored is named in docs/serving.md, and changes nothing."""
    statuses: set[int] = set()
    short = {} if path == EMBEDDINGS else {"max_tokens": 1}
    plain = without_chance(asked(client, path, **short))
    for name, kind in parameters()[path].items():
        together = TOGETHER.get(name, ({}, None))[0]
        for value in values(kind):
            answer = asked(client, path, **{**short, **together, name: value})
            statuses.add(answer.status_code)
            if answer.status_code == 200:
                assert value is None or name not in REFUSED[path] or value in NOTHING[name], (name, value)
                if name in IGNORED[path]:
                    assert without_chance(answer) == plain
            else:
                error = refused(answer, 400, name)
                assert name in error["message"] or error["code"], error
                assert name not in IGNORED[path], error
    assert statuses == {200, 400}


#: Values of what there is not that ask for nothing.
NOTHING: dict[str, list[Any]] = {
    "suffix": [""],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "store": [False],
    "tool_choice": ["none", "auto"],
}


def test_what_is_ignored_or_added_is_documented() -> None:
    added = {
        *described.OURS,
        "prompt_token_ids",
        *described.MODEL["properties"].keys() - described.MODEL["description"],
    }
    for name in set().union(*IGNORED.values()) | added | {"progress"}:
        assert f"`{name}`" in DOCS, name


def classes(schema: dict[str, Any], kind: Any, place: str) -> None:
    """Compares a schema with a class of the package: fields, whether they must be there, types, values."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union:
        inner = tuple(one for one in inner if one is not type(None))
        (kind,), origin = inner, typing.get_origin(inner[0])
        inner = typing.get_args(kind)
    for one in schema.get("anyOf", [schema]):
        if one == described.NULL:
            continue
        if "enum" in one or "const" in one:
            assert origin is typing.Literal, place
            assert set(one.get("enum", [one.get("const")])) == set(inner), place
        elif one["type"] == "array":
            assert origin is list, place
            classes(one["items"], inner[0], f"{place}[]")
        elif one["type"] == "object" and "properties" not in one:
            assert origin is dict, place
        elif one["type"] == "object":
            named = one["description"]
            assert set(named) <= kind.model_fields.keys(), place
            needed = {name for name, field in kind.model_fields.items() if field.is_required()}
            assert needed <= set(one["required"]), place
            for name in named:
                classes(one["properties"][name], kind.model_fields[name].annotation, f"{place}.{name}")
        else:
            assert kind is {"string": str, "integer": int, "number": float}[one["type"]], place


@pytest.mark.external
def test_the_schemas_are_those_of_the_package() -> None:
    types = pytest.importorskip("openai").types
    end = types.CompletionChoice.model_fields["finish_reason"].annotation
    assert set(typing.get_args(end)) == set(described.TEXT_END["enum"])
    classes(described.COMPLETION, types.Completion, "Completion")
    classes(described.CHAT_COMPLETION, types.chat.ChatCompletion, "ChatCompletion")
    classes(described.CHAT_CHUNK, types.chat.ChatCompletionChunk, "ChatCompletionChunk")
    classes(described.EMBEDDINGS, types.CreateEmbeddingResponse, "CreateEmbeddingResponse")
    classes(described.MODEL, types.Model, "Model")
    classes(described.ERROR["properties"]["error"], types.shared.ErrorObject, "ErrorObject")
    # Completions' events are read into the class of whole answers, whose finish_reason is only there not null.
    assert described.COMPLETION_CHUNK["required"] == described.COMPLETION["required"]
