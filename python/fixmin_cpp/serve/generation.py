"""One request's generations: admitted, run, and answered as a whole or as a stream of events."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ..arguments import split_prompts
from ..errors import FixminError
from ..generation import Completion, Piece, Run
from ..openai_api.answer import ANSWERS, Answer
from ..openai_api.request import GenerationRequest
from ..running import AsyncTextStream
from ..sampling_fields import FORMS
from .errors import APIError, as_api_error
from .events import WRITERS
from .host import ModelHost
from .limits import check_counts, check_generations
from .metrics import Metrics
from .record import Record

__all__ = ["Job"]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Job:
    """The generations of one request. After prepare(), run once, by answer() or events()."""

    def __init__(self, host: ModelHost, metrics: Metrics, facts: dict[str, Any], request: GenerationRequest) -> None:
        """`facts`: for the log, see Record."""
        self.request = request
        self._record = Record(facts)
        self._host = host
        self._metrics = metrics
        self._head: dict[str, Any] = {
            "name": uuid.uuid4().hex,
            "created": int(time.time()),
            "model": host.settings.name,
        }
        self._begin = time.perf_counter()
        self._answer: Answer[Any]

    async def prepare(self, prompt: Any, stop: Sequence[str] = ()) -> "Job":
        """Checks everything and tokenises. Returns itself.

        Args:
            prompt: text, ids, or a list of those.
            stop: what ends an answer besides.

        Raises:
            APIError: with a status of 4xx, or 503.
        """
        request, host = self.request, self._host
        try:
            check_counts(request, host.settings)
            prompts = split_prompts(prompt)[0]
            host.check_texts("prompt", prompts)
            n = len(prompts) * (request.n if request.best_of is None else request.best_of)
            host.require_room(n)
            arguments = request.resolved({}, stop)
            options = await host.compute(check_generations, host.model, arguments, n)
            limit = host.settings.timeout
            arguments["timeout"] = limit if options.timeout is None else min(options.timeout, limit)
            by = "grammar" if any(name in arguments for name in FORMS) else "prepare"
            self._answer = await host.compute(ANSWERS[type(request)], request, host.model, prompt, arguments, by=by)
        except FixminError as error:
            raise self._failed(error) from None
        return self

    def _failed(self, error: Exception) -> APIError:
        """What the client is told, in the names of its own fields."""
        return as_api_error(self._host.told(error), self.request)

    @property
    def n_sequences(self) -> int:
        """Generations that this takes."""
        return len(self._answer.generations.runs)

    # --- running -----------------------------------------------------------------------------------------------------

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece | Completion], None]:
        """(number of the run, its pieces one by one and then its completion), as they come.

        Closing it cancels what has not ended.
        """
        news: asyncio.Queue[tuple[int, Piece | Completion | Exception]] = asyncio.Queue()

        async def read(number: int, run: Run) -> None:
            try:
                async with self._host.turns.turn(self, self.n_sequences):
                    if run.timeout is not None:  # the time that it waited for its turn is part of it
                        run.timeout = max(run.timeout - self._seconds(), 1e-3)
                    await follow(number, self._answer.generations.astream(number), self._seconds())
            except Exception as error:
                news.put_nowait((number, error))

        async def follow(number: int, stream: AsyncTextStream, waited: float) -> None:
            last = 0.0
            async with stream:
                async for piece in stream:
                    now = self._seconds()
                    if last:
                        self._metrics.between_tokens.observe(now - last)
                    else:
                        self._metrics.first_token.observe(now)
                    last = now
                    self._record.token(number, now)
                    news.put_nowait((number, piece))
                    if stream.behind:
                        await asyncio.sleep(0)  # others' turn in the event loop
                completion = stream.completion
                assert completion is not None
                queue_s = waited + completion.timings.queued_s
                self._metrics.queued.observe(queue_s)
                n_tokens = 0 if self.request.only_prompt else completion.n_drawn
                self._record.ended(number, self._answer.reason(completion), n_tokens, self._seconds(), queue_s)
                news.put_nowait((number, completion))

        self._record.begin(self.n_sequences, sum(len(run.prompt_ids) for run in self._answer.leaders))
        # Tasks begin in this order, so that a prompt's first run is queued before those that follow it.
        tasks = [asyncio.create_task(read(i, run)) for i, run in enumerate(self._answer.generations.runs)]
        try:
            left = len(tasks)
            while left:
                number, item = await news.get()
                if isinstance(item, Exception):
                    self._record.failed()
                    raise self._failed(item) from item
                if isinstance(item, Completion):
                    left -= 1
                    self._metrics.ended(item)
                    self._host.check_open(item.finish_reason)
                yield number, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._metrics.whole.observe(self._seconds())
            if self._record.n_left:
                self._metrics.count_end(self._record.close(), self._record.n_left)
            else:
                self._record.close()

    def _seconds(self) -> float:
        """Since the request."""
        return time.perf_counter() - self._begin

    # --- the answer --------------------------------------------------------------------------------------------------

    async def answer(self) -> bytes:
        """The whole answer as JSON."""
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass
        return await self._host.compute(self._render)

    def _render(self) -> bytes:
        # Choice by choice: the objects of all of them would take many times the memory of the text.
        choices = (_json(self._answer.choice(i, one)) for i, one in enumerate(self._answer.completions()))
        head, end = _json(self._answer.head(self._answer.object, **self._head)), _json({"usage": self._usage()})
        return head[:-1] + b',"choices":[' + b",".join(choices) + b"]," + end[1:]

    def _usage(self) -> dict[str, Any]:
        n_cached = sum(run.finished.timings.n_cached for run in self._answer.leaders)
        return {**self._answer.usage(), "prompt_tokens_details": {"cached_tokens": n_cached}}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. Errors after the first one become an event too."""
        answer = self._answer
        head = answer.head(answer.chunk_object, **self._head)
        usage = self.request.include_usage

        def event(choices: list[dict[str, Any]], total: dict[str, Any] | None = None) -> bytes:
            data = {**head, "choices": choices, **({"usage": total} if usage else {})}
            return b"data: " + _json(data) + b"\n\n"

        pieces = self._pieces()
        try:
            writers = [WRITERS[type(answer)](answer, i) for i in range(self.n_sequences)]
            held: dict[int, list[Piece | Completion]] = {}
            for i, one in enumerate(writers):
                if (first := one.begin()) is not None:
                    yield event([{"index": i, **first, "finish_reason": None}])
            async for number, news in pieces:
                held.setdefault(number, []).append(news)
                for i in sorted(held):
                    if (opening := writers[i].opening()) is None:
                        continue
                    for choice in opening:
                        yield event([{"index": i, **choice, "finish_reason": None}])
                    for item in held.pop(i):
                        if isinstance(item, Piece):
                            if (said := writers[i].piece(item)) is not None:
                                yield event([{"index": i, **said, "finish_reason": None}])
                            continue
                        end = {"finish_reason": answer.reason(item), "seed": item.seed}
                        yield event([{"index": i, **writers[i].end(item), **end}])
            if usage:
                yield event([], self._usage())
        except Exception as error:
            yield b"data: " + json.dumps(as_api_error(error).body()).encode() + b"\n\n"
        finally:
            await pieces.aclose()
        yield b"data: [DONE]\n\n"
