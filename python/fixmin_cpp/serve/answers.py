"""What answers look like, for the description at /openapi.json. They are made elsewhere, and not validated again."""

from typing import Any

from pydantic import BaseModel

__all__ = ["ChatCompletion", "Codes", "Completion", "Detokenized", "Embeddings", "Error", "Tokens"]


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class _Choice(BaseModel):
    index: int
    finish_reason: str
    seed: int
    token_ids: list[int] | None = None


class _TextChoice(_Choice):
    text: str
    logprobs: dict[str, list[Any]] | None


class _ChatChoice(_Choice):
    message: dict[str, str | None]
    logprobs: dict[str, Any] | None


class _Generated(BaseModel):
    id: str
    object: str
    created: int
    model: str
    usage: _Usage


class Completion(_Generated):
    """Of /v1/completions; with `stream` its choices come in events."""

    choices: list[_TextChoice]


class ChatCompletion(_Generated):
    """Of /v1/chat/completions; with `stream` `delta` stands in place of `message`."""

    choices: list[_ChatChoice]


class _Embedding(BaseModel):
    object: str
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Of /v1/embeddings."""

    object: str
    data: list[_Embedding]
    model: str
    usage: dict[str, int]


class _Piece(BaseModel):
    id: int
    piece: str


class Tokens(BaseModel):
    """Of /tokenize."""

    tokens: list[int] | list[_Piece]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    """Of /detokenize: the text under both names."""

    content: str
    prompt: str


class _Code(BaseModel):
    id: int
    text: str
    bits: list[int] | None
    code: list[float]


class Codes(BaseModel):
    """Of /codes."""

    tokens: list[_Code]


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Whatever goes wrong."""

    error: _Error
