"""`Model`: a loaded GGUF file that generates, scores and shows its insides."""

import asyncio
import functools
import hashlib
import inspect
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from . import _core
from .arguments import Prompt, TokenIds, as_bool, as_float, as_int, as_path, as_token_ids, split_prompts
from .atomic_file import refuse_inputs
from .beam import Beam, beam_search
from .constrain import Compiler
from .errors import ArgumentError, ArgumentTypeError, ContextLengthError, FixminError, UnsupportedError, naming
from .generation import Completion, OnToken, Plan
from .generation_options import DEFAULT_BREAKERS, GenerationOptions, candidate_counts
from .hub import find
from .load_options import LOAD_FIELDS, LoadArguments, LoadOptions
from .progress import bar
from .recognise import refuse_wrong_model
from .running import AsyncTextStream, Generations, Runner, TextStream, wait_all
from .sampling_fields import GenerationArguments
from .state import read_state, write_state
from .tokenizer import TextTokenizer, end_of_text_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Unpack  # in typing from Python 3.11

__all__ = ["Model", "Score"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """How probable the model finds a text."""

    token_ids: list[int]  # [T]
    logprobs: NDArray[np.float32]  # [T-start], natural: that of token_ids[start+i] after those before it
    ranks: NDArray[np.uint32]  # [T-start], the same: 1 where the token was the most probable one
    nll: float  # mean of -logprobs: nats per token
    perplexity: float  # exp(nll); inf beyond the range of a double


class Model:
    """A model in memory, ready to run. Safe to use from several threads and event loops: requests meet in one
    scheduler, which computes a step of all of them together. What one gives does not depend on what runs beside it.

    A process that forks may use it in the child too; requests that were running stay in the parent.

    Args:
        path: a GGUF file of architecture "fixmin", as `fixmin convert` writes it.
        {options}
        progress: called with the loaded fraction, above 0.0 and rising to 1.0, after each matrix; by the thread that
            constructs. False from it (no other value) ends the loading; an exception from it ends it too.

    Raises:
        FixminError: `progress` returned False.
        OSError: the file cannot be opened.
        GGUFError: it is malformed or incomplete. UnsupportedError: it needs what this build lacks.
        ArgumentError: an argument is out of range (a ValueError; ArgumentTypeError, also a TypeError, for its type).
        MemoryError: for weights, cache or buffers; it says what for.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        progress: Callable[[float], object] | None = None,
        **options: "Unpack[LoadArguments]",
    ) -> None:
        self._runner: Runner | None = None  # until everything below has worked
        with naming(path):
            self._load(path, LoadOptions.check(options), progress)

    def _load(self, path: Any, options: LoadOptions, progress: Any) -> None:
        self.path = as_path("path", path)
        if progress is not None and not callable(progress):
            raise ArgumentTypeError(f"progress must be callable, got {type(progress).__name__}")
        self._options = options
        refuse_wrong_model(path)
        begin = time.monotonic()
        file_name: Any = os.fsencode(self.path)  # which need not be UTF-8
        engine = _core.Engine(file_name, progress=progress, **options.given())
        self._info = dict(engine.info)
        self._vocab_size: int = self._info["vocab_size"]
        self._n_ctx: int = self._info["n_ctx"]
        metadata = engine.take_metadata()  # of the bytes that were loaded, whatever the path names by now
        self._tokenizer = TextTokenizer.from_metadata(metadata)
        # What else the file says; its vocabulary, a hundred thousand strings, is in the tokenizer.
        self._metadata = {
            key: value for key, value in metadata.items() if not key.startswith("tokenizer.") or isinstance(value, int)
        }
        self._hash: str | None = None  # of the file, when it is first needed
        self._compiler: Compiler | None = None  # of grammars, likewise
        self._eos_ids = end_of_text_ids(metadata, self._vocab_size)
        bos_id = metadata.get("tokenizer.ggml.bos_token_id")
        self._bos_id = bos_id if isinstance(bos_id, int) and 0 <= bos_id < self._vocab_size else None
        self._runner = Runner(engine, self.path)
        _log.debug(
            "loaded %s in %.2f s: %.1f MB of weights, KV cache of %d positions, %s, %d threads, %s",
            self.path,
            time.monotonic() - begin,
            self._info["bytes"]["weights"] / 1e6,
            self._info["n_kv"],
            self._info["device"],
            self._info["n_threads"],
            self._info["isa"],
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        dtype: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        log: Callable[[str], object] | None = None,
        progress: Callable[[float], object] | None = None,
        **options: "Unpack[LoadArguments]",
    ) -> "Model":
        """A model by its name: a repository of the Hugging Face hub, a checkpoint folder or a GGUF file.

        What is not GGUF yet is converted and certified once, by a process of its own, and kept in a cache
        (`fixmin cache list`).

        >>> Model.from_pretrained("owner/name", "q8_0", trust_remote_code=True)

        Args:
            model, dtype, revision, token, trust_remote_code, local_files_only, log: see fixmin_cpp.hub.find. dtype is
                "q8_0" where the model has none yet.
            progress, **options: see Model.

        Raises:
            What fixmin_cpp.hub.find and Model() raise.
        """
        found = find(
            model,
            dtype=dtype,
            revision=revision,
            token=token,
            trust_remote_code=as_bool("trust_remote_code", trust_remote_code),
            local_files_only=local_files_only,
            log=log,
        )
        return cls(found.path, progress=progress, **options)

    # --- generation ------------------------------------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; the first one counts
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        best_of: int | None = None,
        on_token: OnToken | None = None,
        progress: bool = False,
        **arguments: "Unpack[GenerationArguments]",
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        *,
        n: int = 1,
        best_of: int | None = None,
        on_token: OnToken | None = None,
        progress: bool = False,
        **arguments: "Unpack[GenerationArguments]",
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *unnamed: Any,
        n: int = 1,
        best_of: int | None = None,
        on_token: OnToken | None = None,
        progress: bool = False,
        **arguments: "Unpack[GenerationArguments]",
    ) -> Completion | list[Completion]:
        """Continues a prompt; greedy unless a temperature is given.

        Args:
            prompt: text, token ids (a list, an integer array [T] or [1, T], or what a tokenizer of Hugging Face gives),
                or a list of those. A list is answered by a list in the same order; its prompts run together, each with
                the result that it has alone (same seed).
            unnamed: none; all other arguments have names.
            n: completions of each prompt, up to 1024; they need a temperature above 0. The prompt is read once. The
                first has the given seed, the others have seeds made of it (docs/sampling.md): candidates[i].seed.
            best_of: so many are generated, at least n, and the n with the highest mean log-probability per token are
                given, the best first. None: n, in the order of their seeds.
            on_token: called with every Piece as soon as its text is certain, in the calling thread (agenerate: in the
                event loop). Piece.index says which prompt of a list it belongs to, Piece.candidate which of its
                completions. False from it (no other value) ends that completion with this piece, finish_reason
                "stop"; an exception from it ends all and goes on to the caller.
            progress: True shows a bar on stderr, if that is a terminal or a notebook.
            **arguments: max_new_tokens, temperature, top_k, seed, stop and many more: see
                fixmin_cpp.GenerationArguments and docs/sampling.md.

        Returns:
            A Completion, or a list of them; with n > 1 its `candidates` are the n. finish_reason: "length"
            (max_new_tokens or the context is used up), "stop" (a stop string, or on_token), "eos" (an end-of-text
            token, one of stop_ids, or a grammar that is complete), "timeout", "cancelled" (the model was closed
            meanwhile).

        Raises:
            ArgumentError, ArgumentTypeError, ContextLengthError (all ValueErrors): before anything runs.
            FixminError: no token is left to draw.
            KeyboardInterrupt: Ctrl-C ends a run in the main thread within one layer.
        """
        _check_unnamed("generate", unnamed)
        generations = self.prepare(prompt, arguments, n=n, best_of=best_of, on_token=on_token)
        with bar("generating", not as_bool("progress", progress)) as update:
            generations.run(update)
        return generations.result()

    def stream(self, prompt: Prompt, *unnamed: Any, **arguments: "Unpack[GenerationArguments]") -> "TextStream":
        """Like generate() for one prompt, but gives each token as soon as it is there.

        Arguments are checked at the call; the run starts with the first piece asked for and does not wait for a slow
        reader. Leaving the loop, close(), or Ctrl-C cancels it.
        """
        _check_unnamed("stream", unnamed)
        return self._single("stream", prompt, arguments).stream()

    async def agenerate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *unnamed: Any,
        n: int = 1,
        best_of: int | None = None,
        on_token: OnToken | None = None,
        **arguments: "Unpack[GenerationArguments]",
    ) -> Completion | list[Completion]:
        """generate() for an event loop: does not block it. Cancelling the task cancels the generation."""
        _check_unnamed("agenerate", unnamed)
        generations = self.prepare(prompt, arguments, n=n, best_of=best_of, on_token=on_token)
        # Tasks begin in this order, so that a prompt's first run is queued before those that follow it.
        streams = [generations.astream(i) for i in range(len(generations.runs))]
        tasks = [asyncio.ensure_future(stream.complete()) for stream in streams]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return generations.result()

    def astream(self, prompt: Prompt, *unnamed: Any, **arguments: "Unpack[GenerationArguments]") -> AsyncTextStream:
        """stream() for `async for`. Arguments are checked at the call; the first piece asked for starts the run."""
        _check_unnamed("astream", unnamed)
        return self._single("astream", prompt, arguments).astream()

    def prepare(
        self,
        prompt: Prompt | Sequence[Prompt],
        arguments: GenerationArguments | Mapping[str, Any],
        *,
        n: int = 1,
        best_of: int | None = None,
        on_token: OnToken | None = None,
        allow_equal: bool = False,
    ) -> Generations:
        """generate() up to where it would run: everything is checked and compiled, nothing has begun.

        For programs that run the completions in their own way, as the server does. allow_equal: without a temperature
        several completions of a prompt, which are all the same, are no error.

        Raises:
            As generate().
        """
        options = GenerationOptions.check(arguments, self._vocab_size)
        n, best_of = candidate_counts(n, best_of, options, equal=allow_equal)
        if on_token is not None and not callable(on_token):
            raise ArgumentTypeError(f"on_token must be callable, got {type(on_token).__name__}")
        prompts, many = split_prompts(prompt)
        seeds = options.seeds(len(prompts), many)
        ids = list(self._named_ids("prompt", prompts, many, 1, options.parse_special).values())
        params = options.native(eos_ids=self._eos_ids, breakers=self._breakers(options))
        form = options.constraint
        matcher = None if form is None else functools.partial(self._grammars().matcher, form)
        tokenizer = self.require_tokenizer() if options.stop else self._tokenizer
        plan = Plan(ids, many, seeds, n, best_of, options, params, tokenizer, matcher, on_token)
        return Generations(plan, self._runner_open())

    def _single(self, method: str, prompt: Any, arguments: GenerationArguments) -> Generations:
        if split_prompts(prompt)[1]:
            raise ArgumentTypeError(f"prompt of {method}() must be one prompt, got a list of prompts")
        return self.prepare(prompt, arguments)

    def _grammars(self) -> Compiler:
        with self._runner_open().lock:
            if self._compiler is None:
                first, others = next(iter(self._eos_ids), None), self._eos_ids[1:]
                self._compiler = Compiler(self.require_tokenizer(), self._vocab_size, first, other_eos_ids=others)
            return self._compiler

    def _breakers(self, options: GenerationOptions) -> list[list[int]]:
        """DRY's sequence breakers as sequences of ids."""
        if options.dry_multiplier == 0:
            return []
        breakers: list[list[int]] = []
        strings = options.dry_sequence_breakers
        if strings is None:
            strings = DEFAULT_BREAKERS if self._tokenizer is not None else ()
        for item in strings:
            if isinstance(item, str):
                breakers += self.require_tokenizer().sequences_with(item)
            else:
                breakers.append(list(item))
        return breakers

    def beam_search(
        self,
        prompt: Prompt,
        *,
        num_beams: int = 4,
        max_new_tokens: int = 128,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        ignore_eos: bool = False,
        parse_special: bool = True,
    ) -> list[Beam]:
        """The most probable continuations as a whole, best first, at most num_beams.

        Args:
            prompt: text or token ids.
            num_beams: continuations that are followed, 1 to 512.
            max_new_tokens: longest continuation; the context bounds it too.
            length_penalty: a score is the log-probability divided by length ** length_penalty, as in transformers.
            early_stopping: ends as soon as num_beams continuations have ended, else when none is likely to do better.
            ignore_eos: goes on after the end-of-text token.
            parse_special: as in encode().
        """
        num_beams = as_int("num_beams", num_beams, 1, 512)
        max_new_tokens = as_int("max_new_tokens", max_new_tokens, 1)
        penalty = as_float("length_penalty", length_penalty, -100.0, 100.0)
        early = as_bool("early_stopping", early_stopping)
        eos_ids = frozenset[int]() if as_bool("ignore_eos", ignore_eos) else frozenset(self._eos_ids)
        ids = self.token_ids(prompt, name="prompt", room=1, parse_special=parse_special)
        with self.native() as engine:
            return beam_search(
                engine,
                ids,
                n_beams=num_beams,
                max_new_tokens=min(max_new_tokens, self._n_ctx - len(ids)),
                length_penalty=penalty,
                early_stopping=early,
                eos_ids=eos_ids,
            )

    # --- scores and insides ----------------------------------------------------------------------------------------

    def logits(
        self,
        ids: Prompt,
        last: bool = False,
        *,
        rows: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        parse_special: bool = True,
    ) -> NDArray[np.float32]:
        """Logits after each token, float32 [T, V]; after the last one only, [V]; or after those at `rows`, [n, V].

        `ids` may be text, for which parse_special is as in encode(). Negative rows count from the end, as NumPy's
        indices do. Nothing is computed or kept that the rows do not need: no logits of others, no tokens behind the
        last of them.
        """
        last = as_bool("last", last)
        checked = self.token_ids(ids, name="ids", room=0, parse_special=parse_special)
        if rows is None:
            with self.native() as engine:
                return engine.logits(checked, last)
        if last:
            raise ArgumentError("last and rows are two ways to say the same: give one")
        n = len(checked)
        if not isinstance(rows, Sequence) and getattr(rows, "ndim", 0) != 1:
            raise ArgumentTypeError(f"rows must be a list of integers, got {type(rows).__name__}")
        wanted = np.array([as_int(f"rows[{i}]", row, -n, n - 1) % n for i, row in enumerate(rows)], np.uint32)
        rising, back = np.unique(wanted, return_inverse=True)
        if not len(rising):
            return np.empty((0, self._vocab_size), np.float32)
        with self.native() as engine:
            logits = engine.logits(checked[: rising[-1] + 1], rows=rising.tolist())
        return logits if np.array_equal(rising, wanted) else logits[back]

    def hidden_states(self, ids: Prompt, layer: int, *, parse_special: bool = True) -> NDArray[np.float32]:
        """The residual stream, float32 [T, D]: layer 0 is the lifted code, layer i what block i-1 leaves."""
        layer = as_int("layer", layer, 0, self._info["block_count"])
        checked = self.token_ids(ids, name="ids", room=0, parse_special=parse_special)
        with self.native() as engine:
            return engine.hidden_states(checked, layer)

    @overload
    def score(  # type: ignore[overload-overlap]
        self, text: Prompt, *, start: int = 1, progress: bool = False, parse_special: bool = True
    ) -> Score: ...
    @overload
    def score(
        self,
        text: Sequence[Prompt],
        *,
        start: int | Sequence[int] = 1,
        progress: bool = False,
        parse_special: bool = True,
    ) -> list[Score]: ...
    def score(
        self,
        text: Prompt | Sequence[Prompt],
        *,
        start: int | Sequence[int] = 1,
        progress: bool = False,
        parse_special: bool = True,
    ) -> Score | list[Score]:
        """Log-probability of every token of `text` (or ids) but the first; never holds T x V logits.

        Args:
            text: up to n_ctx + 1 tokens, since the last one is predicted and not read; or a list of such texts, which
                is answered by a list in the same order and read together.
            start: the first token that is scored, from 1. Those before it are only read, or found in the prefix cache;
                texts of a list that are equal up to there read them once. For a list of texts also a list.
            progress: as in generate(). parse_special: as in encode().
        """
        silent = not as_bool("progress", progress)
        texts, many = split_prompts(text, "text")
        named = self._named_ids("text", texts, many, -1, parse_special)
        ids = list(named.values())
        starts = _starts(start if many else [start], named)
        with bar("scoring", silent) as update, self.native() as engine:
            requests = self._submit_scores(engine, ids, starts)
            wait_all(requests, update)
            scores = [_score(one.tolist(), request) for one, request in zip(ids, requests, strict=True)]
        return scores if many else scores[0]

    def _submit_scores(
        self, engine: _core.Engine, ids: list[NDArray[np.uint32]], starts: list[int]
    ) -> list[_core.Request]:
        params = _core.SamplingParams(max_new_tokens=0)
        requests: list[_core.Request] = []
        first: dict[bytes, _core.Request] = {}  # by what it reads before it scores
        for one, start in zip(ids, starts, strict=True):
            # Shorter ones are read again with less trouble than waited for.
            context = one[:start].tobytes() if start >= self._info["kv_block_tokens"] else b""
            request = engine.submit(
                one[:-1],
                params,
                n_prompt_logprobs=0,
                first_row=start - 1,
                next=int(one[-1]),
                after=first.get(context),
            )
            if context:
                first.setdefault(context, request)
            requests.append(request)
        return requests

    def codes(self, ids: Prompt, *, parse_special: bool = True) -> NDArray[np.uint8]:
        """The K-bit code of each token, uint8 [T, K] of 0 and 1; column i is the bit with lift index i."""
        checked = self.token_ids(ids, name="ids", parse_special=parse_special)
        with self.native() as engine:
            return engine.codes(checked)

    # --- state ------------------------------------------------------------------------------------------------------

    def save_state(self, path: str | os.PathLike[str], text: Prompt, *, parse_special: bool = True) -> int:
        """Writes the keys and values of `text` (or ids) to a file: what has been computed of it, and the rest now.

        Returns:
            How many of its tokens have theirs in the file: whole blocks of the cache. load_state() of the same model
            file and cache type makes them known; the rest is computed when it is needed.

        Raises:
            ArgumentError: it is the file of the model. CheckpointError: it is a folder or a device. OSError: it cannot
                be written.
        """
        path = as_path("path", path)
        refuse_inputs(path, self.path)
        ids = self.token_ids(text, name="text", room=0, parse_special=parse_special)
        params = _core.SamplingParams(max_new_tokens=0)
        with self.native() as engine:
            request = engine.submit(ids, params)
            wait_all([request])
            request.result()  # raises what went wrong
            blocks = engine.export_prefix(ids)
            write_state(path, self.file_sha256(), self._info, ids, blocks)
        return len(blocks) // self._info["kv_block_bytes"] * self._info["kv_block_tokens"]

    def load_state(self, path: str | os.PathLike[str]) -> list[int]:
        """Makes what save_state() wrote known to this model, and returns all its token ids.

        A prompt that begins with these tokens is then read from where they end.

        Raises:
            ArgumentError: the file is damaged, or belongs to another model file or cache type. OSError.
            FixminError: the model file has been written to since it was loaded. (Replacing it does no harm.)
        """
        path = as_path("path", path)
        with self.native() as engine:
            ids, blocks = read_state(path, self.file_sha256(), self._info)
            ids = as_token_ids(f"{path}: token ids", ids, self._vocab_size)
            n = len(blocks) // self._info["kv_block_bytes"] * self._info["kv_block_tokens"]
            if n:
                engine.import_prefix(ids[:n], blocks)
        return ids.tolist()

    def file_sha256(self) -> str:
        """Of the bytes that were loaded, hexadecimal: also if the path names another file by now.

        Raises:
            FixminError: the file has been written to since it was loaded.
        """
        with self.native() as engine, self._runner_open().lock:
            if self._hash is None:
                digest, position = hashlib.sha256(), 0
                while not engine.file_changed and (part := engine.read_file(position, 1 << 22)):
                    digest.update(part)
                    position += len(part)
                if engine.file_changed:
                    raise FixminError(
                        f"{self.path} has been written to since it was loaded, so that what was loaded is no longer "
                        "known: load the model again"
                    )
                self._hash = digest.hexdigest()
            return self._hash

    # --- text ------------------------------------------------------------------------------------------------------

    @overload
    def encode(  # type: ignore[overload-overlap]  # as in generate()
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> list[int]: ...
    @overload
    def encode(
        self, text: Sequence[str], *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> list[list[int]]: ...
    def encode(
        self, text: str | Sequence[str], *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> list[int] | list[list[int]]:
        """Token ids of `text`, or of each of a list of texts; by default without a start token or anything else added.

        parse_special: whether the name of a special token in the text, such as "</s>", stands for that token. False,
            for text of strangers: it is text like any other, and decode() of the ids gives it back.

        Raises:
            ArgumentError, ArgumentTypeError: no str, or half of a surrogate pair. UnsupportedError: no tokenizer.
        """
        self._runner_open()
        tokenizer = self.require_tokenizer()
        add = as_bool("add_special_tokens", add_special_tokens)
        special = as_bool("parse_special", parse_special)
        if isinstance(text, str) or not isinstance(text, Sequence) or isinstance(text, bytes | bytearray):
            return tokenizer.encode(  # which checks it
                text,  # type: ignore[arg-type]
                add_special_tokens=add,
                parse_special=special,
            )
        for i, one in enumerate(text):
            if not isinstance(one, str):
                raise ArgumentTypeError(f"text[{i}] must be a str, got {type(one).__name__}")
        return [tokenizer.encode(one, add_special_tokens=add, parse_special=special) for one in text]

    @overload
    def decode(self, ids: TokenIds | int, *, skip_special_tokens: bool = False) -> str: ...
    @overload
    def decode(
        self, ids: Sequence[Sequence[int] | NDArray[np.integer[Any]]], *, skip_special_tokens: bool = False
    ) -> list[str]: ...
    def decode(
        self,
        ids: TokenIds | int | Sequence[Sequence[int] | NDArray[np.integer[Any]]],
        *,
        skip_special_tokens: bool = False,
    ) -> str | list[str]:
        """Text of token ids, special tokens such as "</s>" spelled out unless they are to be skipped.

        Args:
            ids: one id, ids (a list or an integer array [T]); or several texts' ids, a list of those or an array
                [n, T], which give a list of n texts.
        """
        self._runner_open()
        tokenizer = self.require_tokenizer()
        skip = as_bool("skip_special_tokens", skip_special_tokens)
        n_dimensions = getattr(ids, "ndim", None)
        many = n_dimensions == 2 or (isinstance(ids, list | tuple) and len(ids) > 0 and _is_row(ids[0]))
        rows = list(ids) if many else [[ids] if isinstance(ids, int) or n_dimensions == 0 else ids]  # type: ignore[arg-type]
        texts = []
        for i, row in enumerate(rows):
            none = hasattr(row, "__len__") and len(row) == 0
            checked = [] if none else as_token_ids(f"ids[{i}]" if many else "ids", row, self._vocab_size).tolist()
            texts.append(tokenizer.decode(checked, skip_special_tokens=skip))
        return texts if many else texts[0]

    def token_ids(
        self, text: Prompt, *, name: str = "text", room: int | None = None, parse_special: bool = True
    ) -> NDArray[np.uint32]:
        """Text or ids as checked ids, uint32 [T], T >= 1.

        Args:
            text: text, or ids in any form that a prompt may have.
            name: of it in errors.
            room: positions of the context that it has to leave free; -1: one token more than the context fits. None: it
                may be longer than the context.
            parse_special: as in encode().

        Raises:
            ArgumentError, ArgumentTypeError, ContextLengthError (too long for `room`). UnsupportedError: text, but the
            file holds no tokenizer.
        """
        self._runner_open()
        special = as_bool("parse_special", parse_special)
        given: Any = text
        if isinstance(text, str):
            given = self.require_tokenizer().encode(text, parse_special=special, name=name)
        elif isinstance(text, int):
            raise ArgumentTypeError(f"{name} must be a str or token ids, got {text!r}")
        elif isinstance(text, list | tuple) and text and all(isinstance(part, str | list | tuple) for part in text):
            raise ArgumentTypeError(f"{name} must be one text, as a str or its token ids, got a list of {len(text)}")
        ids = as_token_ids(name, given, self._vocab_size)
        if room is not None and len(ids) > self._n_ctx - room:
            holds = f"the context holds {self._n_ctx}" + (", the answer included" if room > 0 else "")
            raise ContextLengthError(
                f"{name} has {len(ids)} tokens, but "
                + (holds if room >= 0 else f"at most {self._n_ctx - room} can be scored (perplexity takes longer ones)")
                + ": shorten it"
                + (" or load the model with a larger n_ctx" if self._n_ctx < self._info["context_length"] else "")
            )
        return ids

    def _named_ids(
        self, name: str, texts: Sequence[Any], many: bool, room: int, parse_special: bool
    ) -> dict[str, NDArray[np.uint32]]:
        """token_ids() of each text, by what errors call it. `many`: whether the texts came as a list."""
        names = [f"{name}[{i}]" for i in range(len(texts))] if many else [name]
        pairs = zip(names, texts, strict=True)
        return {each: self.token_ids(one, name=each, room=room, parse_special=parse_special) for each, one in pairs}

    @property
    def text_tokenizer(self) -> TextTokenizer | None:
        """What encode(), decode() and prompts use, None if the file holds no tokenizer. Not to be changed."""
        return self._tokenizer

    def require_tokenizer(self) -> TextTokenizer:
        """text_tokenizer. UnsupportedError: the file holds none."""
        if self._tokenizer is None:
            raise UnsupportedError(
                f"{self.path} holds no tokenizer (key tokenizer.huggingface.json): pass token ids instead of text and "
                "no stop strings, or convert the checkpoint again with its tokenizer.json"
            )
        return self._tokenizer

    # --- life ------------------------------------------------------------------------------------------------------

    @property
    def info(self) -> dict[str, Any]:
        """What is loaded and how: hyper-parameters, sizes and settings; stays readable after close().

        "bytes" holds what the model takes when loaded:

            weights           in memory, in all
            weights_by_role   the same: attention, mlp, output, norms, codes (code map and folded layer 0)
            weights_by_type   the same: "Q8_0", "F32" (also biases, norms, the fold), "I32" (code map), ...
            kv_cache          reserved for n_kv positions; becomes resident as they are used
            buffers           of activations, for n_batch tokens
            memory            sum of weights, kv_cache and buffers
            mapped            of the file, left there: a learned embedding
            file              size of the file

        "eos_token_ids" are the tokens that end a text, "eos_token_id" the first of them (None: the file names none).
        "bytes_per_token" and "kv_bytes_per_position" are what decoding reads: weights, and for each cached position.
        """
        eos = {"eos_token_id": self.eos_token_id, "eos_token_ids": self.eos_token_ids}
        return {**self._info, "path": self.path, **eos, "tokenizer": self._tokenizer is not None}

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's keys and values, but for those of its vocabulary."""
        return self._metadata

    @property
    def vocab_size(self) -> int:
        """V: token ids run from 0 to V - 1."""
        return self._vocab_size

    @property
    def n_ctx(self) -> int:
        """Positions of the context, prompt and answer together."""
        return self._n_ctx

    @property
    def bos_token_id(self) -> int | None:
        """The token that the file says begins a text, None if it names none. Nothing here puts it before a prompt."""
        return self._bos_id

    @property
    def eos_token_id(self) -> int | None:
        """The first of the tokens that end a text, None if the file names none."""
        return next(iter(self._eos_ids), None)

    @property
    def eos_token_ids(self) -> list[int]:
        """All tokens that end a text."""
        return list(self._eos_ids)

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """The file's tokenizer as one of the package `tokenizers`, None if it holds none.

        It is a copy, the same at every call: whatever is changed on it, encode() and prompts do not change.
        """
        return None if self._tokenizer is None else self._tokenizer.copy()

    def native(self) -> AbstractContextManager[_core.Engine]:
        """The native engine (see _core.pyi), which stays usable inside the with block: for measurements and tools.

        close() ends what it runs. Raises FixminError if that has been called.
        """
        return self._runner_open().lease()

    def stats(self) -> dict[str, int]:
        """What the scheduler is doing and has done.

        n_running, n_waiting: requests. n_blocks, n_free_blocks, n_cached_blocks: of the KV cache, 32 positions each;
        cached: kept for later prompts that begin alike; n_evictable_blocks: of these, those that no request uses. Since
        loading: n_steps, n_rows (tokens computed),
        n_extracts (tokens drawn of what a GPU said of the logits, which stayed there),
        n_prompt_tokens and, of these, n_cached_prompt_tokens (found in the prefix cache), n_generated,
        n_drafted and n_accepted (guessed tokens), n_preempted (requests sent back for lack of room), n_finished.
        """
        with self.native() as engine:
            return engine.stats()

    def clear_prefix_cache(self) -> None:
        """Forgets what earlier requests have computed. Waits until no request is running."""
        with self.native() as engine:
            engine.clear_prefix_cache()

    @property
    def closed(self) -> bool:
        """Whether close() has been called."""
        return self._runner is None or self._runner.closed

    def close(self) -> None:
        """Ends all requests within a layer and returns; the memory is free once the last call has returned too.

        From any thread, any callback (on_token), a signal handler or __del__; a second call waits for the first one's
        end. It waits for no caller, so no caller's lock can hold it up. What becomes of calls that are under way, in
        this thread or in others: generate(), agenerate() and streams end with finish_reason "cancelled" and what there
        was, beam_search() gives the best so far; score(), logits(), hidden_states() and the rest raise FixminError.
        Later calls raise FixminError.
        """
        if self._runner is not None and self._runner.close():  # else it never was open
            _log.debug("closed %s", self.path)

    def __enter__(self) -> "Model":
        self._runner_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        facts = ["closed"] if self.closed else []
        if hasattr(self, "_n_ctx"):  # it has been loaded
            facts.append(f"vocab_size={self._vocab_size} n_ctx={self._n_ctx} kv_type={self._options.kv_type!r}")
        return f"<fixmin_cpp.Model {getattr(self, 'path', None)!r} {' '.join(facts)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds where the file is and how it was loaded; reading it loads the file again, as copy.copy() does.

        Raises:
            FixminError: the model is closed.
        """
        self._runner_open()
        return _load, (type(self), os.path.abspath(self.path), self._options.given())

    def _runner_open(self) -> Runner:
        if self._runner is None:
            raise FixminError("the model has not been loaded")
        self._runner.check_open()
        return self._runner


def _load(cls: type[Model], path: str, options: dict[str, Any]) -> Model:
    return cls(path, **options)


def _check_unnamed(method: str, unnamed: tuple[Any, ...]) -> None:
    if unnamed:
        raise ArgumentTypeError(
            f"{method}() takes the prompt alone without a name, got {unnamed[0]!r} too: write for instance "
            "max_new_tokens=16"
        )


def _is_row(value: Any) -> bool:
    """Whether this item of a list is itself a list or an array of ids."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def _starts(given: Any, ids: Mapping[str, NDArray[np.uint32]]) -> list[int]:
    """Where scoring begins in each text: one number for all of them, or a list."""
    given = [given] * len(ids) if isinstance(given, int) else given
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ArgumentTypeError(f"start must be an integer or a list of them, got {type(given).__name__}")
    if len(given) != len(ids):
        raise ArgumentError(f"start has {len(given)} entries, but there are {len(ids)} texts")
    for name, one in ids.items():
        if len(one) < 2:
            raise ArgumentError(f"{name} to score must have at least 2 tokens, got 1: the first one has no probability")
    pairs = zip(ids.items(), given, strict=True)
    return [as_int(f"start of {name}", start, 1, len(one) - 1) for (name, one), start in pairs]


def _score(ids: list[int], request: _core.Request) -> Score:
    if request.result()["finish_reason"] == "cancelled":
        raise FixminError("the model was closed while it was scoring")
    logprobs = request.prompt_logprobs()
    nll = -float(np.mean(logprobs, dtype=np.float64))
    return Score(ids, logprobs, request.prompt_ranks(), nll, math.exp(nll) if nll < 700 else math.inf)


def _show_load_options() -> None:
    """In help() and in signatures Model has the options of the table as arguments of their own."""
    rows = [f"{name}: {row.help}" for name, row in LOAD_FIELDS.items()]
    Model.__doc__ = str(Model.__doc__).replace("{options}", "\n        ".join(rows))
    signature = inspect.signature(Model.__init__)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=row.default, annotation=row.kind) for name, row in LOAD_FIELDS.items()
    ]
    Model.__init__.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]


_show_load_options()
