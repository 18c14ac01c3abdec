"""What the events of a stream hold: the parts of an answer, as they become known."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ..generation import Completion, Piece
from ..openai_api.answer import ChatAnswer, CompletionAnswer, add_end

__all__ = ["WRITERS", "Writer"]


class Writer(ABC):
    """Makes the events of one choice: what is said of a piece, and what at the beginning and the end."""

    def begin(self) -> dict[str, Any] | None:
        """An event before the first token."""
        return None

    def opening(self) -> list[dict[str, Any]] | None:
        """Events that are known only later, but come before the first token; None while they are not."""
        return []

    @abstractmethod
    def piece(self, piece: Piece) -> dict[str, Any] | None:
        """That of a token."""

    @abstractmethod
    def end(self, completion: Completion) -> dict[str, Any]:
        """The last one, but for what all have."""


class _CompletionWriter(Writer):
    def __init__(self, answer: CompletionAnswer, index: int) -> None:
        request = answer.request
        self._answer = answer
        self._index = index
        self._echo = answer.prompt_text(index) if request.echo else None
        self._opened = self._echo is None or request.logprobs is None
        self._logprobs = None if request.logprobs is None else answer.logprobs(index, len(self._echo or ""))

    def begin(self) -> dict[str, Any] | None:
        return self._opening(None) if self._opened and self._echo is not None else None

    def opening(self) -> list[dict[str, Any]] | None:
        if self._opened:
            return []
        lists = self._answer.prompt_logprobs(self._index)
        if lists is None:
            return None
        self._opened = True
        return [self._opening(lists)]

    def _opening(self, lists: dict[str, list[Any]] | None) -> dict[str, Any]:
        opening: dict[str, Any] = {"text": self._echo, "logprobs": lists}
        if self._answer.request.return_token_ids:
            opening["prompt_token_ids"] = self._answer.leader(self._index).prompt_ids
        return opening

    def piece(self, piece: Piece) -> dict[str, Any] | None:
        if self._answer.request.only_prompt:
            return None
        if self._logprobs is not None:
            self._logprobs.add(piece.token_id, piece.logprob)
        choice = {"text": piece.text, "logprobs": self._logprobs and self._logprobs.take()}
        return {**choice, "token_ids": [piece.token_id]} if self._answer.request.return_token_ids else choice

    def end(self, completion: Completion) -> dict[str, Any]:
        lists = None
        if self._logprobs is not None and completion.stop_logprob is not None and not self._answer.request.only_prompt:
            add_end(self._logprobs, completion)
            lists = self._logprobs.take()
        return {"text": "", "logprobs": lists}


class _ChatWriter(Writer):
    def __init__(self, answer: ChatAnswer, index: int) -> None:
        self._answer = answer

    def begin(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = None if piece.logprob is None else self._answer.logprobs([piece.logprob])
        choice = {"delta": {"content": piece.text}, "logprobs": logprobs}
        return {**choice, "token_ids": [piece.token_id]} if self._answer.request.return_token_ids else choice

    def end(self, completion: Completion) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}


WRITERS: Mapping[Any, Any] = {CompletionAnswer: _CompletionWriter, ChatAnswer: _ChatWriter}
