"""One request's generations, from the body to the JSON of its answer, whole or as a stream of events."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from ..arguments import as_text
from ..errors import ArgumentError, ContextLengthError
from ..generation import AsyncTextStream, Batch, Completion, Piece, Run, TokenLogprob
from ..model import Model
from ..openai_fields import ALIASES, USUAL
from ..text import IncrementalDecoder
from .errors import NOTHING_LEFT, TOO_LARGE, APIError, as_api_error
from .host import ModelHost
from .metrics import Metrics
from .record import Record
from .schemas import ChatRequest, CompletionRequest, GenerationRequest
from .token_names import TokenNames

__all__ = ["ChatJob", "CompletionJob", "Job"]

_MAX_LOGPROBS = 1 << 19  # of an answer with several generations: 100 bytes of memory each
_MEAN_PROMPT = 256  # tokens, when it is not yet known
_MAX_ENTRIES = 1 << 20  # of the lists of a request's generations
_MAX_BREAKERS = 1 << 17  # sequences of tokens: 200 bytes each
_MAX_BREAKER = 64  # characters: at each of them one may begin in a token
_RULING_OUT = ("banned_ids", "bad_ids", "allowed_ids", "allowed_token_ids", "logit_bias", "regex", "grammar")
_ADDING = (
    "logit_bias",
    "repeat_penalty",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "dry_multiplier",
)
_PER_GENERATION = ("allowed_ids", "banned_ids", "logit_bias", "dry_sequence_breakers")
_FINISH = {"eos": "stop"}  # others have the same name


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _n_entries(value: Any) -> int:
    """Of a list and the lists in it."""
    if isinstance(value, str):
        return 1
    return len(value) + sum(len(one) for one in value if isinstance(one, list))


def _check_breakers(model: Model, arguments: Mapping[str, Any], n_sequences: int) -> None:
    """A short string begins and ends in many tokens: each such way is kept for each generation."""
    if not arguments.get("dry_multiplier"):
        return
    tokenizer = model._require_tokenizer()
    n = 0
    for one in arguments.get("dry_sequence_breakers", ()):
        if isinstance(one, str) and len(one) > _MAX_BREAKER:
            raise ArgumentError(
                f"dry_sequence_breakers has a text of {len(one)} characters, at most {_MAX_BREAKER} are taken"
            )
        if isinstance(one, str) and one:
            n += n_sequences * len(tokenizer.sequences_with(as_text("dry_sequence_breakers", one)))
        if n > _MAX_BREAKERS:
            raise ArgumentError(
                f"dry_sequence_breakers are met by more than {_MAX_BREAKERS} sequences of tokens, counted for each of "
                f"{n_sequences} generations: ask for fewer, or for longer ones"
            )


class Job(ABC):
    """The generations of one request. Made by prepare(); run once, by answer() or events()."""

    prefix: str  # of ids
    object: str  # of answers
    chunk_object: str
    request: GenerationRequest

    def __init__(self, host: ModelHost, metrics: Metrics, facts: dict[str, Any]) -> None:
        """`facts`: for the log, see Record."""
        self.record = Record(facts)
        self.host = host
        self.metrics = metrics
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._begin = time.perf_counter()
        self._batch: Batch
        self.names: TokenNames  # where log-probabilities are asked for
        self._n = 1
        self._best_of = 1
        self.only_prompt = False  # whether what is generated is not part of the answer

    async def _prepare(self, prompts: Any, arguments: Mapping[str, Any], n: int, best_of: int | None) -> None:
        """Checks everything and tokenises; raises what the client is told with a status of 4xx."""
        settings = self.host.settings
        for name, value in (("n", n), ("best_of", best_of)):
            if value is not None and not 1 <= value <= settings.max_n:
                raise ArgumentError(f"{name} must be between 1 and {settings.max_n}, got {value}")
        if self.request.stream and best_of is not None and best_of > n:
            raise ArgumentError("best_of cannot be streamed: which ones are the best is known at the end")
        if self.request.stream_options is not None and not self.request.stream:
            raise ArgumentError("stream_options is for answers that are streamed")
        self._n, self._best_of = n, n if best_of is None else best_of
        timeout = arguments.get("timeout")
        limited = settings.timeout if timeout is None else min(timeout, settings.timeout)
        model = self.host.model
        constrained = any(name in arguments for name in ("json_schema", "regex", "grammar", "choices"))
        self.host.check_texts("prompt", [prompts] if isinstance(prompts, str) else prompts)
        n_prompts = 1 if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else len(prompts)
        n_sequences = n_prompts * self._best_of
        self.host.require_room(n_sequences)
        try:
            self._check_lists(arguments, n_sequences)
        except ArgumentError as error:
            raise self._failed(error) from None
        self._check_logprobs(arguments, n_sequences)
        if "logprobs" in arguments:
            self.names = await self.host.compute(TokenNames.of, model)
        try:
            by = "grammar" if constrained else "prepare"
            given = {**USUAL, **arguments, "timeout": limited}
            await self.host.compute(_check_breakers, model, arguments, n_sequences)
            self._batch = await self.host.compute(model._batch, prompts, given, n, best_of, equal=True, by=by)
        except (ArgumentError, ContextLengthError) as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> APIError:
        """What the client is told, in the names of its own fields."""
        request = self.request
        given = [(name, field) for field, name in ALIASES.items() if getattr(request, field, None) is not None]
        fields = dict(reversed(given))  # of several the one that counts
        told = as_api_error(self.host.told(error), fields)
        for reason, names in ((NOTHING_LEFT, _RULING_OUT), (TOO_LARGE, _ADDING)):
            if str(error).startswith(reason):
                told.param = next((name for name in names if getattr(request, name) is not None), None)
        if told.param == "json_schema" and request.json_schema is None:
            told.param = "response_format"
        elif told.param == "prompt" and isinstance(request, ChatRequest):
            told.param = "messages"
        return told

    @staticmethod
    def _check_lists(arguments: Mapping[str, Any], n_sequences: int) -> None:
        """Each generation goes through them at every step."""
        for name, value in arguments.items():
            if name in _PER_GENERATION and n_sequences * _n_entries(value) > _MAX_ENTRIES:
                raise ArgumentError(
                    f"{name} has {_n_entries(value)} entries for each of {n_sequences} generations, at most "
                    f"{_MAX_ENTRIES} are taken together: ask for fewer generations"
                )

    def _check_logprobs(self, arguments: Mapping[str, Any], n_sequences: int) -> None:
        n_ctx, asked = self.host.model.info["n_ctx"], arguments["max_new_tokens"]
        n = (arguments.get("logprobs", -1) + 1) * (asked if 0 <= asked <= n_ctx else n_ctx)
        n += (arguments.get("prompt_logprobs", -1) + 1) * min(n_ctx, _MEAN_PROMPT)
        if n_sequences > 1 and n_sequences * n > _MAX_LOGPROBS:
            raise ArgumentError(
                f"logprobs of {n_sequences} generations would be up to {n_sequences * n} numbers, at most "
                f"{_MAX_LOGPROBS} are given: ask for fewer generations, tokens or logprobs"
            )

    @property
    def n_sequences(self) -> int:
        """Generations that this takes."""
        return len(self._batch.runs)

    # --- running -----------------------------------------------------------------------------------------------------

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece | Completion], None]:
        """(number of the run, its pieces one by one and then its completion), as they come.

        Closing it cancels what has not ended.
        """
        model = self.host.model
        news: asyncio.Queue[tuple[int, Piece | Completion | Exception]] = asyncio.Queue()

        async def read(number: int, run: Run) -> None:
            try:
                async with self.host.turns.turn(self, self.n_sequences):
                    self._count_wait(run)
                    await follow(number, AsyncTextStream(run, model._start_async), self._seconds())
            except Exception as error:
                news.put_nowait((number, error))

        async def follow(number: int, stream: AsyncTextStream, waited: float) -> None:
            last = 0.0
            async with stream:
                async for piece in stream:
                    now = self._seconds()
                    if last:
                        self.metrics.between_tokens.observe(now - last)
                    else:
                        self.metrics.first_token.observe(now)
                    last = now
                    self.record.token(number, now)
                    news.put_nowait((number, piece))
                    if stream.behind:
                        await asyncio.sleep(0)  # others' turn in the event loop
                completion = stream.completion
                assert completion is not None
                queue_s = waited + completion.timings.queued_s
                self.metrics.queued.observe(queue_s)
                n_tokens = 0 if self.only_prompt else completion.n_drawn
                self.record.ended(number, self._reason(completion), n_tokens, self._seconds(), queue_s)
                news.put_nowait((number, completion))

        self.record.begin(self.n_sequences, sum(len(run._ids) for run in self._batch.runs[:: self._best_of]))
        # Tasks begin in this order, so that a prompt's first run is queued before those that follow it.
        tasks = [asyncio.create_task(read(i, run)) for i, run in enumerate(self._batch.runs)]
        try:
            left = len(tasks)
            while left:
                number, item = await news.get()
                if isinstance(item, Exception):
                    self.record.failed()
                    raise self._failed(item) from item
                if isinstance(item, Completion):
                    left -= 1
                    self.metrics.ended(item)
                    self.host.check_open(item.finish_reason)
                yield number, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.metrics.whole.observe(self._seconds())
            if self.record.n_left:
                self.metrics.count_end(self.record.close(), self.record.n_left)
            else:
                self.record.close()

    def _seconds(self) -> float:
        """Since the request."""
        return time.perf_counter() - self._begin

    def _count_wait(self, run: Run) -> None:
        """The time that a run waited for its turn is part of its timeout."""
        options = run._options
        if options.timeout is not None:
            left = options.timeout - self._seconds()
            run._options = dataclasses.replace(options, timeout=max(left, 1e-3))

    async def answer(self) -> bytes:
        """The whole answer as JSON."""
        completions: dict[int, Completion] = {}
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for number, item in pieces:
                if isinstance(item, Completion):
                    completions[number] = item
        chosen = self._batch.result()
        per_prompt = chosen if isinstance(chosen, list) else [chosen]
        every = [one for each in per_prompt for one in each.candidates or [each]]
        return await self.host.compute(self._render, every, self._usage(completions))

    def _render(self, completions: Sequence[Completion], usage: dict[str, Any]) -> bytes:
        # Choice by choice: the objects of all of them would take many times the memory of the text.
        choices = (_json(self._choice(i, one)) for i, one in enumerate(completions))
        head, end = _json(self._head(self.object)), _json({"usage": usage})
        return head[:-1] + b',"choices":[' + b",".join(choices) + b"]," + end[1:]

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. Errors after the first one become an event too."""
        usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        head = self._head(self.chunk_object)
        completions: dict[int, Completion] = {}

        def event(choices: list[dict[str, Any]], total: dict[str, Any] | None = None) -> bytes:
            data = {**head, "choices": choices, **({"usage": total} if usage else {})}
            return b"data: " + _json(data) + b"\n\n"

        pieces = self._pieces()
        try:
            writers = [self._writer(i) for i in range(self.n_sequences)]
            held: dict[int, list[Piece | Completion]] = {}
            for i, writer in enumerate(writers):
                if (first := writer.begin()) is not None:
                    yield event([{"index": i, **first, "finish_reason": None}])
            async for number, news in pieces:
                held.setdefault(number, []).append(news)
                for i in sorted(held):
                    writer = writers[i]
                    if (opening := writer.opening()) is None:
                        continue
                    for choice in opening:
                        yield event([{"index": i, **choice, "finish_reason": None}])
                    for item in held.pop(i):
                        if isinstance(item, Piece):
                            if (said := writer.piece(item)) is not None:
                                yield event([{"index": i, **said, "finish_reason": None}])
                            continue
                        completions[i] = item
                        end = {"finish_reason": self._reason(item), "seed": item.seed}
                        yield event([{"index": i, **writer.end(item), **end}])
            if usage:
                yield event([], self._usage(completions))
        except Exception as error:
            yield b"data: " + json.dumps(as_api_error(error).body()).encode() + b"\n\n"
        finally:
            await pieces.aclose()
        yield b"data: [DONE]\n\n"

    # --- the parts of an answer --------------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.host.settings.name}

    def _usage(self, completions: Mapping[int, Completion]) -> dict[str, Any]:
        """`completions` by their runs. A prompt counts once, however many continuations it has."""
        first = [completions[i].timings for i in range(0, self.n_sequences, self._best_of)]
        n_prompt = sum(timings.n_prompt for timings in first)
        n_generated = 0
        if not self.only_prompt:  # the end-of-text token was generated too
            n_generated = sum(one.n_drawn for one in completions.values())
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": sum(timings.n_cached for timings in first)},
        }

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        end = {"finish_reason": self._reason(completion), "seed": completion.seed}
        choice = {"index": index, **self._content(index, completion), **end}
        if self.request.return_token_ids:
            choice["token_ids"] = [] if self.only_prompt else completion.token_ids
        return choice

    def _reason(self, completion: Completion) -> str:
        if self.only_prompt and completion.finish_reason in ("eos", "stop"):
            return "length"  # of the token that is not asked for
        return _FINISH.get(completion.finish_reason, completion.finish_reason)

    @abstractmethod
    def _content(self, index: int, completion: Completion) -> dict[str, Any]:
        """What a choice of a whole answer holds: text and log-probabilities."""

    @abstractmethod
    def _writer(self, index: int) -> "_Writer":
        """Makes the events of one choice."""


class _Writer(ABC):
    """Makes the choices of a stream: what is said of a piece, and what at the beginning and the end."""

    def begin(self) -> dict[str, Any] | None:
        """An event before the first token."""
        return None

    def opening(self) -> list[dict[str, Any]] | None:
        """Events that are known only later, but come before the first token; None while they are not."""
        return []

    @abstractmethod
    def piece(self, piece: Piece) -> dict[str, Any] | None: ...

    @abstractmethod
    def end(self, completion: Completion) -> dict[str, Any]: ...


# --- /v1/completions -------------------------------------------------------------------------------------------------


class _TextLogprobs:
    """The four lists of a completion's log-probabilities, filled token by token."""

    def __init__(self, host: ModelHost, names: TokenNames, context: Sequence[int], offset: int = 0) -> None:
        """`context`: ids before the first token, `offset`: its place in the text."""
        self._names = names
        self._offset = offset  # of the next token
        tokenizer = host.model._tokenizer
        self._special = frozenset() if tokenizer is None else tokenizer.special_ids
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, context)

    def add(
        self, into: dict[str, list[Any]], token_id: int, logprob: TokenLogprob | None, *, echoed: bool = False
    ) -> None:
        """Adds a token; None stands for the first one of a prompt, which has no probability.

        `echoed`: of the prompt, in whose text special tokens are spelled out.
        """
        name = self._names.name
        into["tokens"].append(name(token_id))
        into["text_offset"].append(self._offset)
        into["token_logprobs"].append(None if logprob is None else logprob.logprob)
        top: dict[str, float] | None = None
        if logprob is not None:
            top = {}
            for other, value in (*logprob.top, (token_id, logprob.logprob)):
                top[name(other)] = value
        into["top_logprobs"].append(top)
        if echoed and token_id in self._special:
            self._offset += len(name(token_id))
        elif self._decoder is not None:
            self._offset += len(self._decoder.step(token_id))


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class CompletionJob(Job):
    """POST /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    request: CompletionRequest

    @classmethod
    async def prepare(
        cls, host: ModelHost, metrics: Metrics, facts: dict[str, Any], request: CompletionRequest
    ) -> "CompletionJob":
        """Raises APIError or ArgumentError for what cannot be answered."""
        job = cls(host, metrics, facts)
        job.request = request
        if request.suffix:
            raise APIError(
                400, "suffix is not supported: the model continues texts, it does not fill in", param="suffix"
            )
        arguments = {"max_new_tokens": 16, **request.arguments()}
        # OpenAI's way to ask for the probabilities of a prompt: echo it and generate nothing. One token is generated.
        job.only_prompt = arguments["max_new_tokens"] == 0
        if job.only_prompt:
            if not request.echo:
                raise ArgumentError("max_tokens must be above 0, but with echo")
            arguments |= {"max_new_tokens": 1, "min_new_tokens": 0}
        if request.logprobs is not None:
            _check_logprobs("logprobs", request.logprobs, host)
            arguments["logprobs"] = request.logprobs
            if request.echo:
                arguments["prompt_logprobs"] = request.logprobs
        prompt = request.prompt
        job._prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
        _check_count("prompt", len(job._prompts), host)
        await job._prepare(prompt, arguments, 1 if request.n is None else request.n, request.best_of)
        return job

    _prompts: list[Any]

    def _prompt_text(self, index: int) -> str:
        prompt = self._prompts[index // self._n]
        return prompt if isinstance(prompt, str) else self.host.model.decode(prompt)

    def _prompt_ids(self, index: int) -> list[int]:
        return self._leader(index).prompt_ids

    def _leader(self, index: int) -> Run:
        return self._batch.runs[index // self._n * self._best_of]

    def _prompt_logprobs(self, index: int) -> dict[str, list[Any]] | None:
        """None: not yet known. Tokens that were not read before the end have null."""
        known = self._leader(index).prompt_logprobs
        if known is None:
            return None
        lists, writer = _empty(), _TextLogprobs(self.host, self.names, [])
        ids = self._prompt_ids(index)
        for token_id, logprob in itertools.zip_longest(ids, (None, *known)):
            writer.add(lists, token_id, logprob, echoed=True)
        return lists

    def _end_logprobs(self, writer: _TextLogprobs, lists: dict[str, list[Any]], completion: Completion) -> None:
        """The token that ended the text was drawn too: as OpenAI and vLLM have it, and as lm_eval counts."""
        if completion.stop_logprob is not None:
            writer.add(lists, completion.stop_logprob.token_id, completion.stop_logprob)

    def _content(self, index: int, completion: Completion) -> dict[str, Any]:
        echo = self._prompt_text(index) if self.request.echo else ""
        text = echo if self.only_prompt else echo + completion.text
        lists = None
        if completion.logprobs is not None:
            lists = (self._prompt_logprobs(index) if self.request.echo else None) or _empty()
            if not self.only_prompt:
                writer = _TextLogprobs(self.host, self.names, self._prompt_ids(index), len(echo))
                for token_id, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
                    writer.add(lists, token_id, logprob)
                self._end_logprobs(writer, lists, completion)
        content: dict[str, Any] = {"text": text, "logprobs": lists}
        if self.request.echo and self.request.return_token_ids:
            content["prompt_token_ids"] = self._prompt_ids(index)
        return content

    def _writer(self, index: int) -> "_Writer":
        return _CompletionWriter(self, index)


class _CompletionWriter(_Writer):
    def __init__(self, job: CompletionJob, index: int) -> None:
        self._job = job
        self._index = index
        self._echo = job._prompt_text(index) if job.request.echo else None
        self._opened = self._echo is None or job.request.logprobs is None
        self._logprobs: _TextLogprobs | None = None
        if job.request.logprobs is not None:
            self._logprobs = _TextLogprobs(job.host, job.names, job._prompt_ids(index), len(self._echo or ""))

    def begin(self) -> dict[str, Any] | None:
        return {"text": self._echo, "logprobs": None} if self._opened and self._echo is not None else None

    def opening(self) -> list[dict[str, Any]] | None:
        if self._opened:
            return []
        lists = self._job._prompt_logprobs(self._index)
        if lists is None:
            return None
        self._opened = True
        opening: dict[str, Any] = {"text": self._echo, "logprobs": lists}
        if self._job.request.return_token_ids:
            opening["prompt_token_ids"] = self._job._prompt_ids(self._index)
        return [opening]

    def piece(self, piece: Piece) -> dict[str, Any] | None:
        if self._job.only_prompt:
            return None
        lists = None
        if self._logprobs is not None:
            lists = _empty()
            self._logprobs.add(lists, piece.token_id, piece.logprob)
        choice: dict[str, Any] = {"text": piece.text, "logprobs": lists}
        if self._job.request.return_token_ids:
            choice["token_ids"] = [piece.token_id]
        return choice

    def end(self, completion: Completion) -> dict[str, Any]:
        lists = None
        if self._logprobs is not None and completion.stop_logprob is not None and not self._job.only_prompt:
            lists = _empty()
            self._job._end_logprobs(self._logprobs, lists, completion)
        return {"text": "", "logprobs": lists}


# --- /v1/chat/completions --------------------------------------------------------------------------------------------


class ChatJob(Job):
    """POST /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    request: ChatRequest

    @classmethod
    async def prepare(
        cls,
        host: ModelHost,
        metrics: Metrics,
        facts: dict[str, Any],
        request: ChatRequest,
        prompt: list[int],
        stop: Sequence[str],
    ) -> "ChatJob":
        """`prompt`: ids of what the template made, `stop`: what ends an answer in it."""
        job = cls(host, metrics, facts)
        job.request = request
        arguments = {"max_new_tokens": host.model.info["n_ctx"], **request.arguments()}
        given = arguments.get("stop", [])
        arguments["stop"] = [*([given] if isinstance(given, str) else given), *stop]
        if request.top_logprobs and not request.logprobs:
            raise ArgumentError("top_logprobs needs logprobs to be true")
        if request.logprobs:
            top = request.top_logprobs or 0
            _check_logprobs("top_logprobs", top, host)
            arguments["logprobs"] = top
        await job._prepare(prompt, arguments, 1 if request.n is None else request.n, None)
        return job

    def logprob(self, token: TokenLogprob) -> dict[str, Any]:
        """A token as chat answers have it."""
        top = [self._token(i, value) for i, value in token.top]
        return {**self._token(token.token_id, token.logprob), "top_logprobs": top}

    def _token(self, token_id: int, value: float) -> dict[str, Any]:
        return {"token": self.names.name(token_id), "logprob": value, "bytes": self.names.bytes(token_id)}

    def _content(self, index: int, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if completion.logprobs is not None:
            logprobs = {"content": [self.logprob(token) for token in completion.logprobs], "refusal": None}
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def _writer(self, index: int) -> "_Writer":
        return _ChatWriter(self)


class _ChatWriter(_Writer):
    def __init__(self, job: ChatJob) -> None:
        self._job = job

    def begin(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if piece.logprob is not None:
            logprobs = {"content": [self._job.logprob(piece.logprob)], "refusal": None}
        choice: dict[str, Any] = {"delta": {"content": piece.text}, "logprobs": logprobs}
        if self._job.request.return_token_ids:
            choice["token_ids"] = [piece.token_id]
        return choice

    def end(self, completion: Completion) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}


def _check_logprobs(name: str, value: int, host: ModelHost) -> None:
    if not 0 <= value <= host.settings.max_logprobs:
        raise ArgumentError(f"{name} must be between 0 and {host.settings.max_logprobs}, got {value}")


def _check_count(name: str, n: int, host: ModelHost) -> None:
    if n > host.settings.max_inputs:
        raise ArgumentError(f"{name} has {n} entries, but a request may have {host.settings.max_inputs}")
