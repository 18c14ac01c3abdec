"""Bodies of requests: fields and types, for the description at /openapi.json and for what has no range to be checked.

Those of completions and chats are only described here: fixmin_cpp.openai_api reads them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import Body
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SkipValidation,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from ..openai_api.fields import ALIASES, asked
from ..openai_api.request import ChatRequest, CompletionRequest, GenerationRequest
from ..sampling_fields import FIELDS as ROWS
from ..sampling_fields import Biases, Breakers, Choices, Flag, Float, Ids, Int, Seeds, Text, Texts

__all__ = [
    "BODIES",
    "FIELDS",
    "ChatBody",
    "CodesRequest",
    "CompletionBody",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "TokenizeRequest",
]

_Ids = Annotated[list[int], Field(fail_fast=True)]
_Prompt: TypeAlias = str | list[str] | list[int] | list[list[int]]


class _Body(BaseModel):
    """Strict: true is no number, "1" is none either. null stands for a field that is not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, body: Any) -> Any:
        return asked(body, cls.model_fields)


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    input: SkipValidation[_Prompt]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Any = None
    parse_special: bool | None = None
    user: Any = None


class TokenizeRequest(_Body):
    """POST /tokenize, in llama-server's and in vLLM's spelling."""

    content: str | None = None
    prompt: str | None = None
    model: str | None = None
    add_special: bool = False
    add_special_tokens: bool = False
    with_pieces: bool = False
    parse_special: bool | None = Field(None, description="false: names of special tokens are text like any other.")


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    tokens: _Ids
    model: str | None = None


class CodesRequest(_Body):
    """POST /codes: text or token ids."""

    parse_special: bool | None = None
    text: str | None = None
    tokens: _Ids | None = None


# --- completions and chats: described ------------------------------------------------------------------------------


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added.")
    continuous_usage_stats: Literal[False] | None = Field(None, description="vLLM's; true is not supported.")


class JsonSchema(BaseModel):
    name: Any = None
    description: Any = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: Any = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema", description="llama-server's place for it.")


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Of a chat. What else a client puts in (name, refusal, ...) is for the operator's template."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, Field(max_length=64)]
    content: str | list[Part] | None = None


# What JSON has for the types of arguments.
_JSON: Mapping[Any, Any] = {
    **{Flag: bool, Int: int, Float: float, Text: str, Texts: str | list[str], Choices: list[str], Ids: list[int]},
    **{Seeds: int, Biases: dict[str, float], Breakers: list[str | list[int]], Any: dict[str, Any] | str | bool},
}
_KINDS: Mapping[str, Any] = {
    **{name: _JSON[row.kind] for name, row in ROWS.items()},
    **dict.fromkeys(("n", "best_of", "top_logprobs"), int),
    **dict.fromkeys(("stream", "return_token_ids", "echo", "add_generation_prompt", "continue_final_message"), bool),
    "model": str,
    "response_format": ResponseFormat,
    "stream_options": StreamOptions,
    "prompt": _Prompt,
    "messages": Annotated[list[Message], Field(min_length=1)],
}
_HELP = {
    **{name: row.help for name, row in ROWS.items()},
    **{name: f"The same as {main}." for name, main in ALIASES.items()},
    "max_completion_tokens": "The same as max_tokens; it wins.",
    "parse_special": f"{ROWS['parse_special'].help} By default they are, but not in the messages of a chat.",
    "openai_penalties": f"{ROWS['openai_penalties'].help} By default, unless repeat_last_n is given.",
    "model": "Any name: a server has one model and answers with its name.",
    "return_token_ids": "Adds token_ids to each choice.",
    "add_generation_prompt": "Whether the beginning of an answer follows. By default, unless a message is continued.",
    "continue_final_message": "Whether the model goes on with the last message. By default, if it is the assistant's.",
}


class _Described:
    """A type that pydantic lets read bodies itself, and how it is described."""

    def __init__(self, request: type[GenerationRequest], **kinds: Any) -> None:
        needed = request.prompt_field
        fields: dict[str, Any] = {needed: (_KINDS[needed], ...)}
        for name in sorted(request.known - {needed}):
            kind = kinds.get(name) or _KINDS[ALIASES.get(name, name)]
            row = None if name in kinds else ROWS.get(ALIASES.get(name, name))
            bounds: dict[str, Any] = {} if row is None else {"ge": row.low, "le": row.high}
            fields[name] = (kind | None, Field(None, description=_HELP.get(name), **bounds))
        self.model = create_model(request.__name__, __doc__=request.__doc__, **fields)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(source)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(self.model.__pydantic_core_schema__)


_completion, _chat = _Described(CompletionRequest, logprobs=int), _Described(ChatRequest, logprobs=bool)
CompletionBody: TypeAlias = Annotated[CompletionRequest, _completion, Body()]
ChatBody: TypeAlias = Annotated[ChatRequest, _chat, Body()]

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/completions": _completion.model,
    "/v1/chat/completions": _chat.model,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/codes": CodesRequest,
}
FIELDS = frozenset(name for body in BODIES.values() for name in body.model_fields)  # of all of them
