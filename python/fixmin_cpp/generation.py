"""Generations on their way: from a request in the engine to text, one at a time, many at once, or in an event loop."""

import asyncio
import contextlib
import itertools
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _core
from .arguments import GenerationOptions, candidate_seed
from .constrain import Matcher
from .errors import FixminError
from .text import IncrementalDecoder, StopStrings, TextAssembler

if TYPE_CHECKING:
    from .model import Model

__all__ = [
    "AsyncTextStream",
    "Batch",
    "Completion",
    "Dispatcher",
    "Piece",
    "Run",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "drive",
]

_log = logging.getLogger(__name__)

FinishReason: TypeAlias = Literal["length", "stop", "eos", "cancelled", "timeout"]

# Beyond any number of tokens: waits for the end.
_ALL = 2**63


@dataclass(frozen=True)
class Timings:
    """How long one generation took, tokenisation excluded. Requests that run beside it make it longer."""

    n_prompt: int  # tokens of the prompt
    n_cached: int  # of these, tokens that an earlier request had computed: not read again
    n_generated: int  # tokens produced
    queued_s: float  # from the call until the first step, seconds
    prefill_s: float  # reading the prompt, seconds
    decode_s: float  # everything after that, seconds
    prefill_tok_s: float  # tokens of the prompt that were read, per second
    decode_tok_s: float  # tokens computed after the prompt per second; 0 if there was none (the first comes with it)
    n_drafted: int = 0  # tokens that were guessed from the text so far
    n_accepted: int = 0  # of these, tokens that were right


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a token was, before any sampling setting; natural logarithms."""

    token_id: int
    logprob: float
    rank: int  # 1: no token was more probable
    top: list[tuple[int, float]]  # the most probable tokens and their log-probabilities, falling


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with; the prompt is not part of it."""

    text: str  # without special tokens, cut before the stop string; "" if the file has no tokenizer
    token_ids: list[int]  # every token produced, those of a stop string included, the end-of-text token not
    finish_reason: FinishReason
    seed: int  # what the sampler was seeded with
    timings: Timings
    logprobs: list[TokenLogprob] | None = None  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprob] | None = None  # of the prompt's tokens but the first, if asked for
    stop_id: int | None = None  # the end-of-text token or the one of stop_ids that ended it
    stop_logprob: TokenLogprob | None = None  # its own, if asked for
    candidates: "list[Completion] | None" = None  # if n > 1 were asked for: all n, the first being this one

    @property
    def n_drawn(self) -> int:
        """Tokens that were drawn: those of token_ids, and what ended the text (stop_id). OpenAI's completion_tokens."""
        return self.timings.n_generated + (self.stop_id is not None)


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that became certain with it.

    The text is empty while a character is incomplete or a stop string may have begun; nothing is lost: the texts of all
    pieces concatenate to the text of the Completion.
    """

    text: str
    token_id: int
    logprob: TokenLogprob | None = None  # if asked for
    index: int = 0  # of the prompt in a list
    candidate: int = 0  # of the prompt's completions, if there are several


OnToken: TypeAlias = Callable[[Piece], object]


class _Mask:
    """A matcher as the engine calls it, from a thread of its own."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self.allowed = matcher.mask
        self.accept = matcher.accept

    def finished(self) -> bool:
        return self._matcher.finished


class Run:
    """One generation. Used by one thread at a time, but for cancel()."""

    def __init__(
        self,
        model: "Model",
        ids: NDArray[np.uint32],
        options: GenerationOptions,
        seed: int,
        *,
        index: int = 0,
        candidate: int = 0,
        leader: "Run | None" = None,
        ranked: bool = False,
        on_token: OnToken | None = None,
        params: _core.SamplingParams | None = None,
    ) -> None:
        """`leader`: of the same prompt, which it reads first. `ranked`: mean_logprob will be asked for. `on_token`:
        called with every piece; False from it ends the run there. `params`: those of the options, if there are others
        that share them.
        """
        self._ids = ids
        self._options = options
        self._index = index
        self._candidate = candidate
        self._leader = leader
        self._ranked = ranked
        self._on_token = on_token
        self._seed = seed
        self._params = params or model._sampling_params(options)
        self._mask = None if options.constraint is None else _Mask(model._compile(options.constraint))
        tokenizer = model._require_tokenizer() if options.stop else model._tokenizer
        decoder = IncrementalDecoder(tokenizer, ids.tolist()) if tokenizer is not None else None
        names = tokenizer.special_tokens if tokenizer is not None and options.stop else None
        self._assembler = TextAssembler(decoder, StopStrings(options.stop, names), options.min_new_tokens)
        self._texts: list[str] = []  # of the pieces
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._request: _core.Request | None = None
        self._cancelled = False
        self._refused = False  # by on_token
        self._failed = False
        self.completion: Completion | None = None

    @property
    def number(self) -> int:
        """Of its request, once started."""
        return self._started.number

    @property
    def _started(self) -> _core.Request:
        if self._request is None:
            raise RuntimeError("the run has not been started")
        return self._request

    def start(self, engine: _core.Engine, mailbox: _core.Mailbox | None = None) -> None:
        """Queues the request; that of the leader must have been queued before."""
        options = self._options
        n_logprobs, n_prompt_logprobs = options.logprobs, options.prompt_logprobs
        if n_logprobs is None and self._ranked:
            n_logprobs = 0
        leads = self._leader is None
        self._request = engine.submit(
            self._ids,
            self._params,
            seed=self._seed,
            mask=self._mask,
            n_logprobs=-1 if n_logprobs is None else n_logprobs,
            n_prompt_logprobs=-1 if n_prompt_logprobs is None or not leads else n_prompt_logprobs,
            n_draft=options.prompt_lookup_num_tokens,
            prefix_cache=options.prefix_cache,
            timeout_s=math.inf if options.timeout is None else options.timeout,
            mailbox=mailbox,
            after=None if self._leader is None or not options.prefix_cache else self._leader._request,
        )
        if self._cancelled:
            self._request.cancel()

    def cancel(self) -> None:
        """Ends the run within one layer, or as soon as it starts; callable from any thread."""
        self._cancelled = True
        if self._request is not None:
            self._request.cancel()

    def wait(self, *, for_end: bool = False) -> None:
        """Returns when there are new tokens, or at the end. Raises what a signal handler raises."""
        while not self._started.wait(_ALL if for_end or self._done else len(self._token_ids), 3600.0):
            pass

    def take(self) -> list[Piece]:
        """The pieces that have become complete since the last call; the last ones come with `completion`.

        Raises:
            FixminError: what ended the run, if something went wrong. What on_token raises.
        """
        if self.ended:
            return []
        ids, logprobs, ended = self._started.read(len(self._token_ids))
        pieces: list[Piece] = []
        for token_id, logprob in itertools.zip_longest(ids, logprobs):
            if self._done:
                break  # the engine did not wait for what the text said
            self._token_ids.append(token_id)
            if logprob is not None:
                self._logprobs.append(TokenLogprob(*logprob))
            pieces += self._pieces(self._assembler.push(token_id))
        if self._done:
            self._started.cancel()
        if ended:
            pieces += self._pieces(self._assembler.finish())
            self._complete()
        return pieces

    @property
    def _done(self) -> bool:
        """Whether no further token is wanted."""
        return self._assembler.stopped or self._refused

    def _pieces(self, pairs: list[tuple[int, str]]) -> list[Piece]:
        pieces = []
        for token_id, text in pairs:
            if self._refused:
                break
            logprob = self._logprobs[len(self._texts)] if self._options.logprobs is not None else None
            self._texts.append(text)
            pieces.append(Piece(text, token_id, logprob, self._index, self._candidate))
            if self._on_token is not None and self._on_token(pieces[-1]) is False:
                self._refused = True
        return pieces

    @property
    def prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Those of the completion, as soon as the prompt has been read; None until then."""
        if self._request is None or not (self._request.prompt_scored or self.completion is not None):
            return None
        return [TokenLogprob(*token) for token in self._request.prompt_top_logprobs()]

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt."""
        ids: list[int] = self._ids.tolist()
        return ids

    @property
    def mean_logprob(self) -> float:
        """Of the generated tokens, nats, before any sampling setting; an end-of-text token is not counted."""
        return math.fsum(t.logprob for t in self._logprobs) / len(self._logprobs) if self._logprobs else -math.inf

    @property
    def watched(self) -> bool:
        """Whether somebody looks at its text while it grows; else it is made at the end."""
        return bool(self._options.stop) or self._on_token is not None

    @property
    def finished(self) -> Completion:
        """The completion of a run that has ended well."""
        if self.completion is None:
            raise FixminError("the stream was closed before its end")
        return self.completion

    @property
    def ended(self) -> bool:
        """Whether take() has given the last pieces, or raised."""
        return self._failed or self.completion is not None

    def _complete(self) -> None:
        try:
            result = self._started.result()
        except BaseException:
            self._failed = True
            raise
        if self._refused:  # tokens whose pieces were not asked for any more
            del self._token_ids[len(self._texts) :], self._logprobs[len(self._texts) :]
        # A stop string may turn up only at the end, where nothing can precede it any more.
        reason: Any = "stop" if self._done else result["finish_reason"]
        timings = _timings(result, len(self._token_ids), reason)
        last = TokenLogprob(*result["last"]) if result["last"] is not None and reason == "eos" else None
        self.completion = Completion(
            "".join(self._texts),
            self._token_ids,
            reason,
            self._seed,
            timings,
            self._logprobs if self._options.logprobs is not None else None,
            [TokenLogprob(*token) for token in self._started.prompt_top_logprobs()]
            if self._options.prompt_logprobs is not None
            else None,
            None if last is None else last.token_id,
            None if self._options.logprobs is None else last,
        )
        _log.debug("request %d ended: %s, %s", self.number, reason, timings)


class Batch:
    """The runs of one generate(): n of best_of completions for each prompt.

    Args:
        prompts: the ids of each, uint32 [T].
        seeds: one for each.
        many: whether the prompts came as a list.
    """

    def __init__(
        self,
        model: "Model",
        prompts: Sequence[NDArray[np.uint32]],
        options: GenerationOptions,
        seeds: Sequence[int],
        many: bool,
        n: int = 1,
        best_of: int = 1,
        on_token: OnToken | None = None,
    ) -> None:
        self._many = many
        self._n = n
        self._best_of = best_of
        self.runs: list[Run] = []  # those of one prompt next to each other
        params = model._sampling_params(options)
        for index, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            leader: Run | None = None
            for i in range(best_of):
                run = Run(
                    model,
                    ids,
                    options,
                    candidate_seed(seed, i),
                    index=index,
                    candidate=i,
                    leader=leader,
                    ranked=best_of > n,
                    on_token=on_token,
                    params=params,
                )
                leader = leader or run
                self.runs.append(run)

    def result(self) -> Completion | list[Completion]:
        """What generate() returns, once all runs have ended."""
        size = self._best_of
        completions = [self._chosen(self.runs[i : i + size]) for i in range(0, len(self.runs), size)]
        return completions if self._many else completions[0]

    def _chosen(self, runs: Sequence[Run]) -> Completion:
        """The completion of a prompt: its best candidate, or the first if none had to be left out."""
        prompt_logprobs = runs[0].finished.prompt_logprobs  # computed once
        if self._best_of > self._n:
            runs = sorted(runs, key=lambda run: -run.mean_logprob)[: self._n]  # stable: equal ones stay in order
        completions = [replace(run.finished, prompt_logprobs=prompt_logprobs) for run in runs]
        if self._n == 1:
            return completions[0]
        return replace(completions[0], candidates=completions)


def drive(runs: Sequence[Run], engine: _core.Engine, on_end: Callable[[int, int], object] | None = None) -> None:
    """Runs all of them together to their ends; `on_end` is told how many have got there, and of how many."""
    mailbox = _core.Mailbox() if len(runs) > 1 else None
    try:
        for run in runs:
            run.start(engine, mailbox)
        left = {run.number: run for run in runs}
        while left:
            if mailbox is None:
                runs[0].wait(for_end=not runs[0].watched)
                news = list(left)
            else:
                news = mailbox.wait(0.05)  # returns often: Ctrl-C is noticed in between
            for number in news:
                one = left.get(number)
                if one is None:
                    continue
                one.take()
                if one.completion is not None:
                    del left[number]
                    if on_end is not None:
                        on_end(len(runs) - len(left), len(runs))
    except BaseException:
        for run in runs:
            run.cancel()
        raise


class TextStream(Iterator[Piece]):
    """The pieces of one generation, in order; made by Model.stream(). A context manager: leaving it cancels the run.

    The engine does not wait for a slow reader. One thread may read while another one closes.
    """

    def __init__(self, run: Run, start: Callable[[Run], None]) -> None:
        self._run = run
        self._start = start
        self._lock = threading.Lock()  # guards what follows
        self._holder: int | None = None  # the thread that has it
        self._process = os.getpid()  # that it was started in
        self._pieces: deque[Piece] = deque()
        self._started = False
        self._closed = False

    @property
    def completion(self) -> Completion | None:
        """The whole result, once the last piece was given or the stream was closed after it had begun."""
        return None if self._pieces else self._run.completion

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> Piece:
        self._notice_fork()
        while True:
            with self._locked():
                if self._closed:
                    raise StopIteration
                try:
                    self._read()
                except BaseException:
                    self._closed = True
                    raise
                if self._pieces:
                    return self._pieces.popleft()
                if self._run.ended:
                    self._closed = True
                    raise StopIteration
            try:
                self._run.wait()
            except BaseException:  # Ctrl-C while waiting
                self.close()
                raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def _notice_fork(self) -> None:
        """A started run stays in the parent, as does a thread that may hold the lock."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._lock = threading.Lock()
            self._holder = None

    def _read(self) -> None:
        if not self._started:
            self._start(self._run)
            self._started = True
        if not self._pieces:
            self._pieces.extend(self._run.take())

    def close(self) -> None:
        """Cancels the run, if it has not ended, and waits for its end. May be called again."""
        self._run.cancel()
        if self._holder == threading.get_ident():  # a signal handler in the midst of a read, which ends after it
            self._closed = True
            return
        self._notice_fork()
        with self._locked():
            self._closed = True
            self._pieces.clear()
            # What went wrong nobody wants to know any more; in a forked child nothing is there to wait for.
            with contextlib.suppress(FixminError):
                while self._started and not self._run.ended:
                    self._run.wait(for_end=True)
                    self._run.take()

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._run.cancel()  # does not wait: this may run in any thread


class Dispatcher:
    """The thread that tells event loops of news: one for all the asynchronous requests of a model."""

    def __init__(self) -> None:
        self._mailbox = _core.Mailbox()
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self.closed = False
        # No daemon: Python would end it inside a native call when the interpreter ends, which ends the process.
        arguments = (weakref.ref(self), self._mailbox)
        threading.Thread(target=_dispatch, args=arguments, name="fixmin-async").start()

    def start(self, run: Run, engine: _core.Engine, listener: Callable[[], None]) -> None:
        """Starts a run; `listener` is called in the running event loop whenever there is news of it."""
        loop = asyncio.get_running_loop()
        with self._lock:  # news that come before the listener is known wait for it
            run.start(engine, self._mailbox)
            self._listeners[run.number] = (loop, listener)

    def forget(self, run: Run) -> None:
        """No further news are wanted."""
        with self._lock:
            self._listeners.pop(run.number, None)

    def wake_all(self) -> None:
        """In a forked child, without the lock: who waits for news there learns that none will come."""
        for loop, listener in list(self._listeners.values()):
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon(listener)

    def close(self) -> None:
        """Ends the thread."""
        self.closed = True
        self._mailbox.close()

    def tell(self, numbers: list[int]) -> None:
        """Passes news on to the event loops."""
        with self._lock:
            known = [self._listeners[n] for n in numbers if n in self._listeners]
        for loop, listener in known:
            try:
                loop.call_soon_threadsafe(listener)
            except RuntimeError:  # the loop has been closed: nobody listens any more
                continue

    def __del__(self) -> None:
        self.close()


def _dispatch(dispatcher: "weakref.ref[Dispatcher]", mailbox: _core.Mailbox) -> None:
    while threading.main_thread().is_alive():  # else the interpreter waits for this thread before it ends
        numbers = mailbox.wait(0.2)
        target = dispatcher()
        if target is None or (target.closed and not numbers):
            return
        target.tell(numbers)
        del target  # else it would live as long as this waits


class AsyncTextStream(AsyncIterator[Piece]):
    """The pieces of one generation for `async for`; made by Model.astream(). Leaving `async with` cancels the run."""

    def __init__(self, run: Run, start: Callable[[Run, Callable[[], None]], Dispatcher]) -> None:
        self._run = run
        self._start = start
        self._dispatcher: Dispatcher | None = None
        self._news = asyncio.Event()
        self._process = os.getpid()  # that it was started in
        self._pieces: deque[Piece] = deque()
        self._closed = False

    @property
    def completion(self) -> Completion | None:
        """The whole result, once the last piece was given."""
        return None if self._pieces else self._run.completion

    @property
    def behind(self) -> bool:
        """Whether pieces are there that were not yet read: the next ones come without waiting."""
        return bool(self._pieces)

    def __aiter__(self) -> "AsyncTextStream":
        return self

    async def __anext__(self) -> Piece:
        while not self._closed:
            if self._dispatcher is None:
                self._process = os.getpid()
                self._dispatcher = self._start(self._run, self._news.set)
            if self._pieces:
                return self._pieces.popleft()
            if self._run.ended:
                break
            try:
                if self._process == os.getpid():  # else the run stays in the parent, as take() says
                    await self._news.wait()
                self._news.clear()
                self._pieces.extend(self._run.take())
            except BaseException:  # the task was cancelled, or the run failed
                self._end()
                raise
        self._end()
        raise StopAsyncIteration

    async def complete(self) -> Completion:
        """Reads to the end."""
        async for _ in self:
            pass
        return self._run.finished

    def _end(self) -> None:
        self._closed = True
        self._run.cancel()
        if self._dispatcher is not None and self._process == os.getpid():
            self._dispatcher.forget(self._run)

    async def aclose(self) -> None:
        """Cancels the run, if it has not ended; the engine notices within one step."""
        self._end()

    async def __aenter__(self) -> "AsyncTextStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def __del__(self) -> None:
        self._run.cancel()


def _timings(result: dict[str, Any], n_generated: int, reason: str) -> Timings:
    # The first token comes from the prompt's last logits; an end-of-text token is computed but not part of the result.
    n_decoded = n_generated if reason == "eos" else max(0, n_generated - 1)
    prefill_s, decode_s = result["prefill_s"], result["decode_s"]
    return Timings(
        n_prompt=result["n_prompt"],
        n_cached=result["n_cached"],
        n_generated=n_generated,
        queued_s=result["queued_s"],
        prefill_s=prefill_s,
        decode_s=decode_s,
        prefill_tok_s=(result["n_prompt"] - result["n_cached"]) / prefill_s if prefill_s > 0 else 0.0,
        decode_tok_s=n_decoded / decode_s if n_decoded and decode_s > 0 else 0.0,
        n_drafted=result["n_drafted"],
        n_accepted=result["n_accepted"],
    )
