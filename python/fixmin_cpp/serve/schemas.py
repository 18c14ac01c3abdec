"""Bodies of requests: fields and types. Ranges are checked where fixmin_cpp checks its arguments."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ArgumentError

__all__ = [
    "FIELDS",
    "ChatRequest",
    "CodesRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "TokenizeRequest",
]

_Ids = list[int]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added.")


class JsonSchema(_Body):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama-server's place for a schema.")

    def constraint(self) -> dict[str, Any] | None:
        """The schema that is asked for; None: any text will do."""
        inner = None if self.json_schema is None else self.json_schema.json_schema
        if inner is not None and self.schema_ is not None:
            raise ArgumentError("response_format.schema and response_format.json_schema.schema are the same: give one")
        schema = self.schema_ if inner is None else inner
        if self.type == "text":
            if schema is not None:
                raise ArgumentError("response_format has a schema, but its type is 'text': say 'json_schema'")
            return None
        if self.type == "json_schema" and schema is None:
            raise ArgumentError("response_format.json_schema.schema is missing")
        return {"type": "object"} if schema is None else schema


class GenerationRequest(_Body):
    """What completions and chat have in common: OpenAI's fields, then those of fixmin_cpp under its names."""

    model: str | None = Field(None, description="Any name: a server has one model and answers with its name.")
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="By token id.")
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = Field(None, description="Ignored.")

    allowed_ids: _Ids | None = None
    banned_ids: _Ids | None = None
    bad_ids: _Ids | None = None
    choices: list[str] | None = None
    do_sample: bool | None = None
    dry_allowed_length: int | None = None
    dry_base: float | None = None
    dry_multiplier: float | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str | _Ids] | None = None
    dynatemp_exponent: float | None = None
    dynatemp_range: float | None = None
    grammar: str | None = None
    ignore_eos: bool | None = None
    json_schema: dict[str, Any] | str | bool | None = None
    max_new_tokens: int | None = Field(None, description="The same as max_tokens.")
    min_keep: int | None = None
    min_new_tokens: int | None = None
    min_p: float | None = None
    min_tokens: int | None = Field(None, description="The same as min_new_tokens.")
    parse_special: bool | None = Field(
        None,
        description="Whether names of special tokens in the text given, as </s>, are such tokens. By default yes, "
        "but not in the messages of a chat.",
    )
    mirostat: int | None = None
    mirostat_eta: float | None = None
    mirostat_tau: float | None = None
    prefix_cache: bool | None = None
    prompt_lookup_num_tokens: int | None = None
    regex: str | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    stop_ids: _Ids | None = None
    stop_token_ids: _Ids | None = Field(None, description="The same as stop_ids.")
    timeout: float | None = None
    top_k: int | None = None
    top_n_sigma: float | None = None
    typical_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    return_token_ids: bool = Field(False, description="Adds token_ids to each choice.")

    def arguments(self) -> dict[str, Any]:
        """As arguments of Model.generate, under its names, without n and the fields about the answer's form."""
        given = {
            name: value
            for name, value in self.model_dump(exclude=_NOT_ARGUMENTS | {"response_format"}, by_alias=True).items()
            if value is not None
        }
        for field, name in ALIASES.items():
            if field in given:
                if name in given:
                    raise ArgumentError(f"{field} and {name} are the same: give one")
                given[name] = given.pop(field)
        if "logit_bias" in given:
            given["logit_bias"] = _bias(given["logit_bias"])
        if "seed" in given and -(2**63) <= given["seed"] < 0:
            given["seed"] += 2**64  # OpenAI's are signed
        schema = None if self.response_format is None else self.response_format.constraint()
        if schema is not None:
            if "json_schema" in given:
                raise ArgumentError("response_format and json_schema are the same: give one")
            given["json_schema"] = schema
        return given


# Fields with another name than the argument.
ALIASES: Mapping[str, str] = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_token_ids": "stop_ids",
    "max_completion_tokens": "max_new_tokens",
}
_NOT_ARGUMENTS = {
    *("model", "n", "best_of", "stream", "stream_options", "user", "prompt", "messages", "echo", "suffix"),
    *("logprobs", "top_logprobs", "return_token_ids", "add_generation_prompt", "continue_final_message"),
}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | _Ids | list[str] | list[_Ids]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Of a chat. What else a client puts in (name, refusal, ...) is for the operator's template."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, Field(max_length=64)]
    content: str | list[_Part] | None = None

    def plain(self) -> dict[str, Any]:
        """For a template: the content as one text."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    add_generation_prompt: bool | None = Field(
        None, description="Whether the beginning of an answer follows. By default, unless a message is continued."
    )
    continue_final_message: bool | None = Field(
        None, description="Whether the model goes on with the last message. By default, if it is the assistant's."
    )
    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    top_logprobs: int | None = None


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    input: str | _Ids | list[str] | list[_Ids]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    parse_special: bool | None = None
    user: str | None = None


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


_BODIES = (CompletionRequest, ChatRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest, CodesRequest)
FIELDS = frozenset(name for body in _BODIES for name in body.model_fields)  # of all of them


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    for key in given:
        if not key.isdecimal() or not key.isascii() or len(key) > 10:
            raise ArgumentError(f"logit_bias has the key {key[:40]!r}, which is no token id")
    return {int(key): value for key, value in given.items()}
