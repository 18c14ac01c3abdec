"""Answers in OpenAI's form: made of a request and of what its generations gave, whole or a token at a time."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from ..generation import Completion, Run, TokenLogprob
from ..model import Model
from ..running import Generations
from ..text import IncrementalDecoder
from .request import ChatRequest, CompletionRequest, GenerationRequest
from .token_names import TokenNames

__all__ = ["ANSWERS", "Answer", "ChatAnswer", "CompletionAnswer", "TextLogprobs", "add_end"]

_Request = TypeVar("_Request", bound=GenerationRequest)


class Answer(ABC, Generic[_Request]):
    """The answer to a request, part by part.

    Args:
        request: it.
        model: what the generations run on.
        prompt: as the model reads it: text, ids, or a list of those.
        arguments: of Model.generate, request.resolved().

    Raises:
        ArgumentError, ContextLengthError: what Model.generate raises before anything runs.
    """

    prefix: ClassVar[str]  # of ids
    object: ClassVar[str]
    chunk_object: ClassVar[str]  # of a stream's events

    def __init__(self, request: _Request, model: Model, prompt: Any, arguments: Mapping[str, Any]) -> None:
        self.request = request
        self.model = model
        self.generations: Generations = model.prepare(
            prompt, arguments, n=request.n, best_of=request.best_of, allow_equal=True
        )
        self.best_of = request.n if request.best_of is None else request.best_of
        self.names: Any = None if request.logprobs is None else TokenNames.of(model)

    def head(self, kind: str, name: str, created: int, model: str | None) -> dict[str, Any]:
        """What an answer begins with. kind: object or chunk_object; name: its own; created: seconds since 1970."""
        return {"id": f"{self.prefix}-{name}", "object": kind, "created": created, "model": model}

    def completions(self) -> list[Completion]:
        """Those of the answer, in the order of their choices, once all runs have ended."""
        chosen = self.generations.result()
        per_prompt = chosen if isinstance(chosen, list) else [chosen]
        return [one for each in per_prompt for one in each.candidates or [each]]

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """A choice of a whole answer."""
        end = {"finish_reason": self.reason(completion), "seed": completion.seed}
        choice = {"index": index, **self._content(index, completion), **end}
        if self.request.return_token_ids:
            choice["token_ids"] = [] if self.request.only_prompt else completion.token_ids
        return choice

    def usage(self) -> dict[str, int]:
        """Of all runs. A prompt counts once, however many continuations it has; what ended a text was generated too."""
        n_prompt = sum(run.finished.timings.n_prompt for run in self.leaders)
        n_generated = 0 if self.request.only_prompt else sum(run.finished.n_drawn for run in self.generations.runs)
        total = n_prompt + n_generated
        return {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": total}

    def reason(self, completion: Completion) -> str:
        """finish_reason: the end-of-text token is a "stop"."""
        if self.request.only_prompt and completion.finish_reason in ("eos", "stop"):
            return "length"  # of the token that is not asked for
        return "stop" if completion.finish_reason == "eos" else completion.finish_reason

    @property
    def leaders(self) -> list[Run]:
        """The first run of each prompt."""
        return self.generations.runs[:: self.best_of]

    @abstractmethod
    def _content(self, index: int, completion: Completion) -> dict[str, Any]:
        """Text and log-probabilities."""


class TextLogprobs:
    """The four lists of a completion's log-probabilities, filled token by token."""

    def __init__(self, model: Model, names: TokenNames, context: Sequence[int], offset: int = 0) -> None:
        """`context`: ids before the first token, `offset`: its place in the text."""
        self._names = names
        self._offset = offset  # of the next token
        tokenizer = model.text_tokenizer
        self._special = frozenset() if tokenizer is None else tokenizer.special_ids
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, context)
        self._lists = self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token_id: int, logprob: TokenLogprob | None, *, echoed: bool = False) -> None:
        """Adds a token; None stands for the first one of a prompt, which has no probability.

        `echoed`: of the prompt, in whose text special tokens are spelled out.
        """
        name = self._names.name
        lists = self._lists
        lists["tokens"].append(name(token_id))
        lists["text_offset"].append(self._offset)
        lists["token_logprobs"].append(None if logprob is None else logprob.logprob)
        top: dict[str, float] | None = None
        if logprob is not None:
            top = {name(other): value for other, value in (*logprob.top, (token_id, logprob.logprob))}
        lists["top_logprobs"].append(top)
        if echoed and token_id in self._special:
            self._offset += len(name(token_id))
        elif self._decoder is not None:
            self._offset += len(self._decoder.step(token_id))

    def take(self) -> dict[str, list[Any]]:
        """What was added since the last call."""
        lists, self._lists = self._lists, self._empty()
        return lists


class CompletionAnswer(Answer[CompletionRequest]):
    """Of POST /v1/completions."""

    prefix = "cmpl"
    object = chunk_object = "text_completion"

    def prompt_text(self, index: int) -> str:
        """The prompt of a choice, as it is echoed."""
        prompt = self.request.prompts[index // self.request.n]
        return prompt if isinstance(prompt, str) else self.model.decode(prompt)

    def leader(self, index: int) -> Run:
        """The first run of a choice's prompt."""
        return self.generations.runs[index // self.request.n * self.best_of]

    def prompt_logprobs(self, index: int) -> dict[str, list[Any]] | None:
        """None: not yet known. Tokens that were not read before the end have null."""
        leader = self.leader(index)
        known = leader.prompt_logprobs
        if known is None:
            return None
        lists = TextLogprobs(self.model, self.names, [])
        for token_id, logprob in itertools.zip_longest(leader.prompt_ids, (None, *known)):
            lists.add(token_id, logprob, echoed=True)
        return lists.take()

    def logprobs(self, index: int, offset: int) -> TextLogprobs:
        """For the tokens that a choice generates, whose text begins at `offset`."""
        return TextLogprobs(self.model, self.names, self.leader(index).prompt_ids, offset)

    def _content(self, index: int, completion: Completion) -> dict[str, Any]:
        echo = self.prompt_text(index) if self.request.echo else ""
        content: dict[str, Any] = {
            "text": echo if self.request.only_prompt else echo + completion.text,
            "logprobs": None,
        }
        if self.request.logprobs is not None:
            lists = self.prompt_logprobs(index) if self.request.echo else None
            if not self.request.only_prompt:
                own = self.logprobs(index, len(echo))
                for token_id, logprob in zip(completion.token_ids, completion.logprobs or (), strict=True):
                    own.add(token_id, logprob)
                add_end(own, completion)
                generated = own.take()
                lists = generated if lists is None else {name: lists[name] + generated[name] for name in lists}
            content["logprobs"] = lists
        if self.request.echo and self.request.return_token_ids:
            content["prompt_token_ids"] = self.leader(index).prompt_ids
        return content


def add_end(lists: TextLogprobs, completion: Completion) -> None:
    """The token that ended the text was drawn too: as OpenAI and vLLM have it, and as lm_eval counts."""
    if completion.stop_logprob is not None:
        lists.add(completion.stop_logprob.token_id, completion.stop_logprob)


class ChatAnswer(Answer[ChatRequest]):
    """Of POST /v1/chat/completions."""

    prefix = "chatcmpl"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Tokens as chat answers have them."""
        return {
            "content": [
                {**self._token(one.token_id, one.logprob), "top_logprobs": [self._token(*other) for other in one.top]}
                for one in tokens
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, value: float) -> dict[str, Any]:
        return {"token": self.names.name(token_id), "logprob": value, "bytes": self.names.bytes(token_id)}

    def _content(self, index: int, completion: Completion) -> dict[str, Any]:
        logprobs = None if self.request.logprobs is None else self.logprobs(completion.logprobs or ())
        return {"message": {"role": "assistant", "content": completion.text, "refusal": None}, "logprobs": logprobs}


ANSWERS: Mapping[type[GenerationRequest], Any] = {CompletionRequest: CompletionAnswer, ChatRequest: ChatAnswer}
