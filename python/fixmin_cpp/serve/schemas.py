"""Bodies of requests: fields and types. Ranges are checked where fixmin_cpp checks its arguments."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from ..errors import ArgumentError
from ..openai_fields import ALIASES, FieldError, as_arguments, breakers, without_no_ops

__all__ = [
    "ALIASES",
    "FIELDS",
    "ChatRequest",
    "CodesRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "TokenizeRequest",
]


def _whole(value: Any) -> Any:
    """JSON's 16.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _breakers(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return breakers(value)
    except ArgumentError as error:
        raise PydanticCustomError("breakers", "{reason}", {"reason": str(error).partition(" ")[2]}) from None


def _count_of_logprobs(value: Any) -> Any:
    """`false` is what clients send that know only chat's field."""
    if value is True:
        raise PydanticCustomError("logprobs", "must be a number here, of the most probable tokens (true is for chats)")
    return None if value is False else _whole(value)


_Int = Annotated[int, BeforeValidator(_whole)]
_Ids = Annotated[list[int], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True)]
_IdLists = Annotated[list[_Ids], Field(fail_fast=True)]


def _kind(value: Any) -> str:
    """Which of several forms a value was meant to have, so that an error is about that one."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else 0
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"


def _one_or_more(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


_Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[_Ids, Tag("<ids>")]
    | Annotated[_Texts, Tag("<texts>")]
    | Annotated[_IdLists, Tag("<lists>")],
    Discriminator(_kind),
]
_Stop = Annotated[Annotated[str, Tag("<text>")] | Annotated[_Texts, Tag("<list>")], Discriminator(_one_or_more)]


class _Body(BaseModel):
    """Strict: true is no number, "1" is none either. null stands for a field that is not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        try:
            return without_no_ops(body, {field.alias or name for name, field in cls.model_fields.items()})
        except FieldError as error:
            kind = PydanticCustomError("field", "{reason}", {"reason": str(error)})
            details = InitErrorDetails(type=kind, loc=(error.field,), input=None)
            raise ValidationError.from_exception_data(cls.__name__, [details]) from None


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added.")
    continuous_usage_stats: Literal[False] | None = Field(None, description="vLLM's; true is not supported.")


class JsonSchema(_Body):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama-server's place for a schema.")


class GenerationRequest(_Body):
    """What completions and chat have in common: OpenAI's fields, then those of fixmin_cpp under its names."""

    model: str | None = Field(None, description="Any name: a server has one model and answers with its name.")
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="By token id.")
    max_tokens: _Int | None = None
    n: _Int | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None
    seed: _Int | None = None
    stop: _Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None

    allowed_ids: _Ids | None = None
    allowed_token_ids: _Ids | None = Field(None, description="The same as allowed_ids.")
    banned_ids: _Ids | None = None
    bad_ids: _Ids | None = None
    cache_prompt: bool | None = Field(None, description="The same as prefix_cache.")
    choices: _Texts | None = None
    do_sample: bool | None = None
    dry_allowed_length: _Int | None = None
    dry_base: float | None = None
    dry_multiplier: float | None = None
    dry_penalty_last_n: _Int | None = None
    dry_sequence_breakers: Annotated[list[str | _Ids] | None, BeforeValidator(_breakers)] = None
    dynatemp_exponent: float | None = None
    dynatemp_range: float | None = None
    grammar: str | None = None
    ignore_eos: bool | None = None
    json_schema: dict[str, Any] | str | bool | None = None
    max_completion_tokens: _Int | None = Field(None, description="The same as max_tokens; it wins.")
    max_new_tokens: _Int | None = Field(None, description="The same as max_tokens.")
    min_keep: _Int | None = None
    min_new_tokens: _Int | None = None
    min_p: float | None = None
    min_tokens: _Int | None = Field(None, description="The same as min_new_tokens.")
    parse_special: bool | None = Field(
        None,
        description="Whether names of special tokens in the text given, as </s>, are such tokens. By default yes, "
        "but not in the messages of a chat.",
    )
    mirostat: _Int | None = None
    mirostat_eta: float | None = None
    mirostat_tau: float | None = None
    n_predict: _Int | None = Field(None, description="The same as max_tokens; -1: as many as fit.")
    openai_penalties: bool | None = Field(
        None,
        description="Whether presence and frequency are counted over the generated tokens, and over all of them. "
        "Unless repeat_last_n is given they are.",
    )
    prefix_cache: bool | None = None
    prompt_lookup_num_tokens: _Int | None = None
    regex: str | None = None
    repeat_last_n: _Int | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    stop_ids: _Ids | None = None
    stop_token_ids: _Ids | None = Field(None, description="The same as stop_ids.")
    timeout: float | None = None
    top_k: _Int | None = None
    top_n_sigma: float | None = None
    typical_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    return_token_ids: bool = Field(False, description="Adds token_ids to each choice.")

    def arguments(self) -> dict[str, Any]:
        """As arguments of Model.generate, under its names, without n and the fields about the answer's form."""
        given = {
            name: value
            for name, value in self.model_dump(exclude=_NOT_ARGUMENTS, by_alias=True).items()
            if value is not None
        }
        return as_arguments(given)


_NOT_ARGUMENTS = {
    *("model", "n", "best_of", "stream", "stream_options", "prompt", "messages", "echo", "suffix"),
    *("logprobs", "top_logprobs", "return_token_ids", "add_generation_prompt", "continue_final_message"),
}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: _Prompt
    best_of: _Int | None = None
    echo: bool | None = None
    logprobs: Annotated[int | None, BeforeValidator(_count_of_logprobs)] = None
    suffix: str | None = None


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError("part", "{kind} is not supported: the model reads texts", {"kind": kind[:64]})
        return part


_Parts = Annotated[list[_Part], Field(fail_fast=True)]
_Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[_Parts, Tag("<list>")], Discriminator(_one_or_more)]


class Message(BaseModel):
    """Of a chat. What else a client puts in (name, refusal, ...) is for the operator's template."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Annotated[str, Field(max_length=64)]
    content: _Content | None = None

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
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    logprobs: bool | None = None
    top_logprobs: _Int | None = None


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    input: _Prompt
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: _Int | None = None
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


_BODIES = (CompletionRequest, ChatRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest, CodesRequest)
FIELDS = frozenset(name for body in _BODIES for name in body.model_fields)  # of all of them
