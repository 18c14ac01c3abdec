"""What the published OpenAPI description of OpenAI's interface says of the answers that are made here, as JSON schemas.

In our words: required fields, types, enumerations, what may be null, and no field that is not named. What this project
adds to an answer is kept apart (`ours`). test_openai_description.py compares this with the package `openai`, whose
classes are generated from the description.
"""

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
NULL = {"type": "null"}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def fields(
    required: Mapping[str, Schema], optional: Mapping[str, Schema] = {}, ours: Mapping[str, Schema] = {}
) -> Schema:
    """An object with these fields and no others."""
    named = {**required, **optional}
    assert not named.keys() & ours.keys()
    return {
        "type": "object",
        "properties": {**named, **ours},
        "required": list(required),
        "additionalProperties": False,
        "description": sorted(named),  # without ours
    }


USAGE = fields(
    {"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER},
    {"prompt_tokens_details": fields({}, {"cached_tokens": INTEGER})},
)
# Of both kinds of answers: the seed that repeats a choice, and ids where they were asked for.
OURS = {"seed": INTEGER, "token_ids": array(INTEGER)}

# An echoed prompt's first token has no probability: null, as OpenAI answers too.
TEXT_LOGPROBS = fields(
    {
        "tokens": array(STRING),
        "token_logprobs": array(nullable(NUMBER)),
        "top_logprobs": array(nullable({"type": "object", "additionalProperties": NUMBER})),
        "text_offset": array(INTEGER),
    }
)
TEXT_END = one_of("stop", "length", "content_filter")
CHAT_END = one_of("stop", "length", "tool_calls", "content_filter", "function_call")


def text_choice(end: Schema) -> Schema:
    required = {"index": INTEGER, "text": STRING, "logprobs": nullable(TEXT_LOGPROBS), "finish_reason": end}
    return fields(required, {}, {**OURS, "prompt_token_ids": array(INTEGER)})


def generated(kind: str, choice: Schema, optional: Mapping[str, Schema]) -> Schema:
    required = {"id": STRING, "object": {"const": kind}, "created": INTEGER, "model": STRING, "choices": array(choice)}
    return fields(required, optional)


COMPLETION = generated("text_completion", text_choice(TEXT_END), {"usage": USAGE})
# The description has no schema for the events of a completion: they have its form, and end but once.
COMPLETION_CHUNK = generated("text_completion", text_choice(nullable(TEXT_END)), {"usage": nullable(USAGE)})

TOKEN = {
    "token": STRING,
    "logprob": NUMBER,
    "bytes": nullable(array({"type": "integer", "minimum": 0, "maximum": 255})),
}
CHAT_LOGPROBS = fields(
    {
        "content": nullable(array(fields({**TOKEN, "top_logprobs": array(fields(TOKEN))}))),
        "refusal": nullable(array(fields({**TOKEN, "top_logprobs": array(fields(TOKEN))}))),
    }
)
MESSAGE = fields({"role": {"const": "assistant"}, "content": nullable(STRING), "refusal": nullable(STRING)})
CHAT_COMPLETION = generated(
    "chat.completion",
    fields(
        {"index": INTEGER, "message": MESSAGE, "logprobs": nullable(CHAT_LOGPROBS), "finish_reason": CHAT_END}, {}, OURS
    ),
    {"usage": USAGE},
)
DELTA = fields({}, {"role": one_of("developer", "system", "user", "assistant", "tool"), "content": nullable(STRING)})
CHAT_CHUNK = generated(
    "chat.completion.chunk",
    fields(
        {"index": INTEGER, "delta": DELTA, "finish_reason": nullable(CHAT_END)},
        {"logprobs": nullable(CHAT_LOGPROBS)},
        OURS,
    ),
    {"usage": nullable(USAGE)},
)

EMBEDDINGS = fields(
    {
        "object": {"const": "list"},
        "model": STRING,
        "data": array(fields({"object": {"const": "embedding"}, "index": INTEGER, "embedding": array(NUMBER)})),
        "usage": fields({"prompt_tokens": INTEGER, "total_tokens": INTEGER}),
    }
)

MODEL = fields(
    {"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING},
    {},
    {"max_model_len": INTEGER, "meta": {"type": "object", "additionalProperties": INTEGER}},
)
MODELS = fields({"object": {"const": "list"}, "data": array(MODEL)})

ERROR = fields(
    {
        "error": fields(
            {"message": STRING, "type": STRING, "param": nullable(STRING), "code": nullable(STRING)},
        )
    }
)
