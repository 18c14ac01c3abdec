"""One generation on its way: from what was asked for to a request in the engine, and from its tokens to text.

A Plan goes in, a Completion comes out; nothing here knows the model that made the plan.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _core
from .constrain import Matcher
from .errors import FixminError
from .generation_options import GenerationOptions, candidate_seed
from .text import IncrementalDecoder, StopStrings, TextAssembler
from .tokenizer import TextTokenizer

__all__ = ["Completion", "OnToken", "Piece", "Plan", "Run", "Timings", "TokenLogprob"]

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


@dataclass(frozen=True)
class Plan:
    """What one generate() asks for, checked and in terms of tokens."""

    prompts: Sequence[NDArray[np.uint32]]  # the ids of each, [T]
    many: bool  # whether the prompts came as a list
    seeds: Sequence[int]  # one for each prompt
    n: int  # completions of each prompt that are wanted
    best_of: int  # and that are generated
    options: GenerationOptions
    params: _core.SamplingParams  # the same for the engine
    tokenizer: TextTokenizer | None  # None: tokens have no text
    matcher: Callable[[], Matcher] | None  # one for each run, if its form is constrained
    on_token: OnToken | None  # called with every piece; False from it ends the run there


class Run:
    """One completion of one prompt of a plan. Used by one thread at a time, but for cancel().

    Args:
        index, candidate: which of the prompts, which of its completions.
        leader: another run of the prompt, which reads it first.
    """

    def __init__(self, plan: Plan, index: int = 0, candidate: int = 0, leader: "Run | None" = None) -> None:
        self._plan = plan
        self._ids = plan.prompts[index]
        self._options = plan.options
        self.timeout: float | None = plan.options.timeout  # seconds from start(), before which it may be changed
        self._on_token = plan.on_token
        self._index = index
        self._candidate = candidate
        self._leader = leader
        self._seed = candidate_seed(plan.seeds[index], candidate)
        self._mask: SimpleNamespace | None = None  # a matcher as the engine calls it, from a thread of its own
        if plan.matcher is not None:
            form = plan.matcher()
            self._mask = SimpleNamespace(allowed=form.mask, accept=form.accept, finished=lambda: form.finished)
        stop = plan.options.stop
        decoder = IncrementalDecoder(plan.tokenizer, self._ids.tolist()) if plan.tokenizer is not None else None
        names = plan.tokenizer.special_tokens if plan.tokenizer is not None and stop else None
        self._assembler = TextAssembler(decoder, StopStrings(stop, names), plan.options.min_new_tokens)
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
        if n_logprobs is None and self._plan.best_of > self._plan.n:  # mean_logprob will be asked for
            n_logprobs = 0
        leads = self._leader is None
        self._request = engine.submit(
            self._ids,
            self._plan.params,
            seed=self._seed,
            mask=self._mask,
            n_logprobs=-1 if n_logprobs is None else n_logprobs,
            n_prompt_logprobs=-1 if n_prompt_logprobs is None or not leads else n_prompt_logprobs,
            n_draft=options.prompt_lookup_num_tokens,
            prefix_cache=options.prefix_cache,
            timeout_s=math.inf if self.timeout is None else self.timeout,
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
            if self._on_token is not None and self._told(self._on_token, pieces[-1]) is False:
                self._refused = True
        return pieces

    @staticmethod
    def _told(on_token: OnToken, piece: Piece) -> object:
        try:
            return on_token(piece)
        except StopAsyncIteration as error:  # would end `async for` as if all were well
            raise RuntimeError("on_token raised StopAsyncIteration") from error

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
