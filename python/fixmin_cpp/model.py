"""`Model`: a loaded GGUF file that generates, scores and shows its insides."""

import math
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from . import _core
from .arguments import (
    DEFAULT_BREAKERS,
    GenerationArguments,
    GenerationOptions,
    Prompt,
    TokenIds,
    as_bool,
    as_int,
    as_token_ids,
    split_prompts,
)
from .errors import ArgumentError, ArgumentTypeError, ContextLengthError, FixminError, UnsupportedError
from .text import IncrementalDecoder, StopStrings, TextAssembler
from .tokenizer import TextTokenizer, end_of_text_id

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

__all__ = ["Completion", "Model", "Piece", "Score", "TextStream", "Timings"]

FinishReason: TypeAlias = Literal["length", "stop", "eos", "cancelled"]

_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Timings:
    """How long one generation took, tokenisation excluded."""

    n_prompt: int  # tokens read
    n_generated: int  # tokens produced
    prefill_s: float  # reading the prompt, seconds
    decode_s: float  # everything after that, seconds
    prefill_tok_s: float  # tokens of the prompt per second
    decode_tok_s: float  # tokens computed after the prompt per second; 0 if there was none (the first comes with it)


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with; the prompt is not part of it."""

    text: str  # without special tokens, cut before the stop string; "" if the file has no tokenizer
    token_ids: list[int]  # every token produced, those of a stop string included, the end-of-text token not
    finish_reason: FinishReason
    seed: int  # what the sampler was seeded with
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that became certain with it.

    The text is empty while a character is incomplete or a stop string may have begun; nothing is lost: the texts of all
    pieces concatenate to the text of the Completion.
    """

    text: str
    token_id: int


@dataclass(frozen=True)
class Score:
    """How probable the model finds a text."""

    token_ids: list[int]  # [T]
    logprobs: NDArray[np.float32]  # [T-1], natural: logprobs[i] is that of token_ids[i+1] after token_ids[:i+1]
    nll: float  # mean of -logprobs: nats per token
    perplexity: float  # exp(nll); inf beyond the range of a double


class Model:
    """A model in memory, ready to run. Safe to use from several threads; requests are served one after the other.

    A process that forks may use it in the child too, unless the fork fell into a call of another thread.

    Args:
        path: a GGUF file of architecture "fixmin", as `fixmin convert` writes it.
        n_threads: worker threads; None: the smallest of CPU affinity, cgroup quota and physical cores.
        n_ctx: positions of the context, prompt and answer together; None: what the model was trained with, which is
            also the most it can be.
        kv_type: type of the KV cache: "f16", "f32", or "q8_0", 8 bits and a scale for 32 values.
        n_batch: prompt tokens that are processed at a time. Results do not depend on it.
        progress: called with the loaded fraction, above 0.0 and rising to 1.0, after each matrix; by the thread that
            constructs. False from it (no other value) ends the loading; an exception from it ends it too.

    Raises:
        FixminError: `progress` returned False.
        OSError: the file cannot be opened.
        GGUFError: it is malformed or incomplete. UnsupportedError: it needs what this build lacks.
        ArgumentError: an argument is out of range (a ValueError; ArgumentTypeError, also a TypeError, for its type).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_threads: int | None = None,
        n_ctx: int | None = None,
        kv_type: str = "f16",
        n_batch: int = 512,
        progress: Callable[[float], object] | None = None,
    ) -> None:
        self._closed = True  # until everything below has worked
        if not isinstance(path, str | os.PathLike):
            raise ArgumentTypeError(f"path must be a str or a path, got {type(path).__name__}")
        if kv_type not in ("f16", "f32", "q8_0"):
            raise ArgumentError(f'kv_type must be "f16", "f32" or "q8_0", got {kv_type!r}')
        if progress is not None and not callable(progress):
            raise ArgumentTypeError(f"progress must be callable, got {type(progress).__name__}")
        self.path = os.fspath(path)
        self._engine = _core.Engine(
            self.path,
            n_threads=0 if n_threads is None else as_int("n_threads", n_threads, 1, 1024),
            n_ctx=0 if n_ctx is None else as_int("n_ctx", n_ctx, 1, _MAX_INT32),
            kv_type=kv_type,
            n_batch=as_int("n_batch", n_batch, 1, _MAX_INT32),
            progress=progress,
        )
        self._info = dict(self._engine.info)
        self._vocab_size: int = self._info["vocab_size"]
        self._n_ctx: int = self._info["n_ctx"]
        metadata = _core.GgufFile(self.path).metadata
        self._tokenizer = TextTokenizer.from_metadata(metadata)
        self._eos_id = end_of_text_id(metadata, self._vocab_size)
        self._reset_lock()
        self._closed = False
        _models.add(self)

    # --- generation ------------------------------------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; the first one counts
        self, prompt: Prompt, **arguments: "Unpack[GenerationArguments]"
    ) -> Completion: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], **arguments: "Unpack[GenerationArguments]") -> list[Completion]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], **arguments: "Unpack[GenerationArguments]"
    ) -> Completion | list[Completion]:
        """Continues a prompt; greedy unless a temperature is given.

        Args:
            prompt: text, token ids (a list or an integer array [T]), or a list of those. A list is answered by a list
                in the same order; its prompts run one after the other, each as if it were alone (same seed).
            **arguments: max_new_tokens, temperature, top_k, seed, stop and many more: see
                fixmin_cpp.GenerationArguments and docs/sampling.md.

        Returns:
            A Completion, or a list of them. finish_reason: "length" (max_new_tokens or the context is used up),
            "stop" (a stop string), "eos" (the end-of-text token or one of stop_ids), "cancelled" (the model was closed
            meanwhile).

        Raises:
            ArgumentError, ArgumentTypeError, ContextLengthError (all ValueErrors): before anything runs.
            FixminError: no token is left to draw.
            KeyboardInterrupt: Ctrl-C ends a run in the main thread within one layer.
        """
        options = GenerationOptions.check(arguments, self._vocab_size)
        prompts, many = split_prompts(prompt)
        names = [f"prompt[{i}]" for i in range(len(prompts))] if many else ["prompt"]
        runs = [_Run(self, self._ids_in_context(n, p, room=1), options) for n, p in zip(names, prompts, strict=True)]
        completions = [run.execute() for run in runs]
        return completions if many else completions[0]

    def stream(self, prompt: Prompt, **arguments: "Unpack[GenerationArguments]") -> "TextStream":
        """Like generate() for one prompt, but gives each token as soon as it is there.

        Arguments are checked at the call; the run starts with the first piece asked for, in a thread of its own, and
        does not wait for a slow reader. Leaving the loop, close(), or Ctrl-C cancels it.
        """
        options = GenerationOptions.check(arguments, self._vocab_size)
        prompts, many = split_prompts(prompt)
        if many:
            raise ArgumentTypeError("prompt of stream() must be one prompt, got a list of prompts")
        return TextStream(_Run(self, self._ids_in_context("prompt", prompts[0], room=1), options))

    # --- scores and insides ----------------------------------------------------------------------------------------

    def logits(self, ids: Prompt, last: bool = False) -> NDArray[np.float32]:
        """Logits after each token, float32 [T, V], or after the last one only, [V]. `ids` may be text."""
        last = as_bool("last", last)
        checked = self._ids_in_context("ids", ids)
        with self._running() as engine:
            return engine.logits(checked, last)

    def hidden_states(self, ids: Prompt, layer: int) -> NDArray[np.float32]:
        """The residual stream, float32 [T, D]: layer 0 is the lifted code, layer i what block i-1 leaves."""
        layer = as_int("layer", layer, 0, self._info["block_count"])
        checked = self._ids_in_context("ids", ids)
        with self._running() as engine:
            return engine.hidden_states(checked, layer)

    def score(self, text: Prompt) -> Score:
        """Log-probability of every token of `text` (or ids) but the first; never holds T x V logits."""
        ids = self._ids_in_context("text", text)
        if len(ids) < 2:
            raise ArgumentError("text to score must have at least 2 tokens, got 1: the first one has no probability")
        with self._running() as engine:
            logprobs = engine.score(ids)
        nll = -float(np.mean(logprobs, dtype=np.float64))
        perplexity = math.exp(nll) if nll < 700 else math.inf
        return Score(ids.tolist(), logprobs, nll, perplexity)

    def codes(self, ids: Prompt) -> NDArray[np.uint8]:
        """The K-bit code of each token, uint8 [T, K] of 0 and 1; column i is the bit with lift index i."""
        checked = self._ids("ids", ids)
        with self._running() as engine:
            return engine.codes(checked)

    # --- text ------------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; by default without a start token or anything else added."""
        self._check_open()
        return self._require_tokenizer().encode(
            text, add_special_tokens=as_bool("add_special_tokens", add_special_tokens)
        )

    def decode(self, ids: TokenIds | int, *, skip_special_tokens: bool = False) -> str:
        """Text of token ids, special tokens such as "</s>" spelled out unless they are to be skipped."""
        self._check_open()
        tokenizer = self._require_tokenizer()
        skip = as_bool("skip_special_tokens", skip_special_tokens)
        if isinstance(ids, Sequence) and len(ids) == 0:
            return ""
        one = isinstance(ids, int | np.integer)
        checked = as_token_ids("ids", [ids] if one else ids, self._vocab_size)
        return tokenizer.decode(checked.tolist(), skip_special_tokens=skip)

    # --- life ------------------------------------------------------------------------------------------------------

    @property
    def info(self) -> dict[str, Any]:
        """What is loaded and how: hyper-parameters, sizes and settings; stays readable after close().

        "bytes" holds what the model takes when loaded:

            weights           in memory, in all
            weights_by_role   the same: attention, mlp, output, norms, codes (code map and folded layer 0)
            weights_by_type   the same: "Q8_0", "F32" (also biases, norms, the fold), "I32" (code map), ...
            kv_cache          reserved for n_ctx positions; becomes resident as positions are used
            buffers           of activations, for n_batch tokens
            memory            sum of weights, kv_cache and buffers
            mapped            of the file, left there: a learned embedding
            file              size of the file

        "bytes_per_token" and "kv_bytes_per_position" are what decoding reads: weights, and for each cached position.
        """
        return {**self._info, "path": self.path, "eos_token_id": self._eos_id, "tokenizer": self._tokenizer is not None}

    @property
    def closed(self) -> bool:
        """Whether close() has been called."""
        return self._closed

    def close(self) -> None:
        """Cancels generations, waits until calls of other threads return, frees the memory. May be called again."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            for run in list(self._runs):
                run.cancel()
            self._idle.wait_for(lambda: self._n_running == 0)
            self._engine.close()

    def __enter__(self) -> "Model":
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<fixmin_cpp.Model {self.path!r} n_ctx={self._n_ctx}{' closed' if self._closed else ''}>"

    def _reset_lock(self) -> None:
        """Also called in the child of a fork, where the threads that were counted do not exist."""
        self._idle = threading.Condition()
        self._n_running = 0
        self._runs: weakref.WeakSet[_Run] = weakref.WeakSet()  # those that close() must cancel

    @contextmanager
    def _running(self, run: "_Run | None" = None) -> Iterator[_core.Engine]:
        """The engine, which close() does not take away inside the with block."""
        with self._idle:
            self._check_open()
            self._n_running += 1
            if run is not None:
                self._runs.add(run)
        try:
            yield self._engine
        finally:
            with self._idle:
                self._n_running -= 1
                self._idle.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise FixminError(f"the model {self.path} is closed")

    def _require_tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise UnsupportedError(
                f"{self.path} holds no tokenizer (key tokenizer.huggingface.json): pass token ids instead of text and "
                "no stop strings, or convert the checkpoint again with its tokenizer.json"
            )
        return self._tokenizer

    def _ids(self, name: str, prompt: Any) -> NDArray[np.uint32]:
        """Text or ids as checked ids, uint32 [T], T >= 1."""
        self._check_open()
        if isinstance(prompt, str):
            prompt = self._require_tokenizer().encode(prompt)
        return as_token_ids(name, prompt, self._vocab_size)

    def _ids_in_context(self, name: str, prompt: Any, room: int = 0) -> NDArray[np.uint32]:
        """Checked ids that leave `room` positions of the context free."""
        ids = self._ids(name, prompt)
        if len(ids) > self._n_ctx - room:
            raise ContextLengthError(
                f"{name} has {len(ids)} tokens, but the context holds {self._n_ctx}"
                + (", the answer included" if room else "")
                + ": shorten it"
                + (" or load the model with a larger n_ctx" if self._n_ctx < self._info["context_length"] else "")
            )
        return ids


class _Run:
    """One generation. As the engine's on_token callback it assembles text, watches for stop strings and cancels."""

    def __init__(self, model: Model, ids: NDArray[np.uint32], options: GenerationOptions) -> None:
        self._model = model
        self._ids = ids
        self._options = options
        self._seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
        tokenizer = model._require_tokenizer() if options.stop else model._tokenizer
        decoder = IncrementalDecoder(tokenizer, ids.tolist()) if tokenizer is not None else None
        self._assembler = TextAssembler(decoder, StopStrings(options.stop))
        self._texts: list[str] = []
        self._emit: Callable[[Piece], None] | None = None
        self._params = self._native_params()
        self._cancel = _core.CancelToken()

    def cancel(self) -> None:
        """Ends the run within one layer, or at once if it has not begun; callable from any thread."""
        self._cancel.cancel()

    def execute(self, emit: Callable[[Piece], None] | None = None) -> Completion:
        """Runs to the end. `emit`, if given, gets every piece as soon as it is complete."""
        self._emit = emit
        # The decoding loop stays in native code where nothing needs to look at the tokens.
        watched = emit is not None or bool(self._options.stop)
        with self._model._running(self) as engine:
            result = engine.generate(self._ids, self._params, self._on_token if watched else None, self._cancel)
        token_ids = result.token_ids.tolist()
        if not watched:
            for token_id in token_ids:
                self._take(self._assembler.push(token_id))
        self._take(self._assembler.finish())
        # A stop string may turn up only at the end, where nothing can precede it any more.
        reason: Any = "stop" if self._assembler.stopped else result.finish_reason
        return Completion("".join(self._texts), token_ids, reason, self._seed, _timings(result))

    def _native_params(self) -> _core.SamplingParams:
        breakers: list[list[int]] = []
        if self._options.dry_multiplier > 0:
            strings = self._options.dry_sequence_breakers
            if strings is None:
                strings = DEFAULT_BREAKERS if self._model._tokenizer is not None else ()
            for item in strings:
                if isinstance(item, str):
                    breakers += self._model._require_tokenizer().sequences_with(item)
                else:
                    breakers.append(list(item))
        return self._options.native(seed=self._seed, eos_id=self._model._eos_id, breakers=breakers)

    def _on_token(self, token_id: int) -> bool:
        """False ends the run: a stop string is complete."""
        self._take(self._assembler.push(token_id))
        if not threading.main_thread().is_alive():
            self.cancel()  # the interpreter is shutting down and waits for this thread only
        return not self._assembler.stopped

    def _take(self, pairs: list[tuple[int, str]]) -> None:
        for token_id, text in pairs:
            self._texts.append(text)
            if self._emit is not None:
                self._emit(Piece(text, token_id))


class TextStream(Iterator[Piece]):
    """The pieces of one generation, in order; made by Model.stream(). A context manager: leaving it cancels the run.

    One thread may read while another one closes.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run
        # Not bounded by a size: a run that waited for its reader would keep the engine from everyone else, also from
        # the reader's own calls. It holds n_ctx pieces at the most; a Completion or an error comes last and stays in.
        self._queue: queue.SimpleQueue[Piece | Completion | BaseException] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._thread: threading.Thread | None = None
        self._done = False
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion | None:
        """The whole result, once the last piece was given or the stream was closed after it had begun."""
        return self._completion

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> Piece:
        with self._lock:
            if self._done:
                raise StopIteration
            if self._thread is None:
                # The thread knows the run and the queue but not this object, whose end is what cancels the run.
                self._thread = threading.Thread(target=_work, args=(self._run, self._queue), name="fixmin-stream")
                self._thread.start()
        try:
            item = self._queue.get()
        except BaseException:  # Ctrl-C while waiting
            self.close()
            raise
        if isinstance(item, Piece):
            return item
        if self._finish(item) and isinstance(item, BaseException):
            raise item
        raise StopIteration

    def close(self) -> None:
        """Cancels the run, if it has not ended, and waits for its thread. May be called again."""
        self._run.cancel()
        with self._lock:
            if self._thread is None:
                self._done = True
            if self._done:
                return
        while isinstance(item := self._queue.get(), Piece):
            pass
        self._finish(item)

    def _finish(self, last: Completion | BaseException) -> bool:
        """Whether this call is the one that ended the stream."""
        self._queue.put(last)  # wakes whoever else waits
        with self._lock:
            first, self._done = not self._done, True
            if first and self._thread is not None:
                self._thread.join()  # it has nothing left to do
            if isinstance(last, Completion):
                self._completion = last
            return first

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._run.cancel()  # does not wait: this may run in any thread


def _work(run: _Run, results: "queue.SimpleQueue[Piece | Completion | BaseException]") -> None:
    """The thread of a stream: pieces, then the completion or what went wrong."""
    try:
        results.put(run.execute(emit=results.put))
    except BaseException as error:
        results.put(error)


def _timings(result: _core.GenerationResult) -> Timings:
    n_generated = len(result.token_ids)
    # The first token comes from the prompt's last logits; an end-of-text token is computed but not part of the result.
    n_decoded = n_generated if result.finish_reason == "eos" else max(0, n_generated - 1)
    return Timings(
        n_prompt=result.n_prompt,
        n_generated=n_generated,
        prefill_s=result.prefill_s,
        decode_s=result.decode_s,
        prefill_tok_s=result.n_prompt / result.prefill_s if result.prefill_s > 0 else 0.0,
        decode_tok_s=n_decoded / result.decode_s if n_decoded and result.decode_s > 0 else 0.0,
    )


_models: "weakref.WeakSet[Model]" = weakref.WeakSet()


def _reset_locks_after_fork() -> None:
    for model in list(_models):
        model._reset_lock()


os.register_at_fork(after_in_child=_reset_locks_after_fork)
