"""Constrained output: which tokens keep a text within a JSON schema, a regex, a grammar or a list of choices.

`llguidance` keeps the state of the grammar and computes the sets; this module describes constraints, tells llguidance
what bytes a token stands for, and turns every way in which a run could hang or end wrong into an error. It knows
nothing of the engine:

    compiler = Compiler(tokenizer, vocab_size, eos_id)                   # one per model
    matcher = compiler.matcher(Constraint.check(regex="[0-9]{4}"))       # one per request
    while not matcher.finished:
        token_id = sample(logits, allowed=matcher.mask())
        matcher.accept(token_id)                                         # the end-of-text token too

A mask holds exactly the tokens whose text the grammar can continue from, in whatever way the text is cut into tokens.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._core import park_thread
from .arguments import as_unicode
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    BusyError,
    FixminError,
    UnsupportedError,
    raised_by_signal_handler,
)
from .json_schema import literals, prepared
from .tokenizer import TextTokenizer

__all__ = ["Compiler", "Constraint", "Matcher", "token_bytes"]

Kind: TypeAlias = Literal["json_schema", "regex", "grammar", "choices"]

_log = logging.getLogger(__name__)

# Without this, forced text is masked down to the tokens of its one canonical segmentation, which goes wrong where a
# vocabulary has no tokens for single bytes, and calls back into Python. Matcher.forced() does the same on request.
_LARK_OPTIONS = '\n%llguidance {"no_forcing": true}\n'

_MAX_TEXT = 1 << 18  # characters of a description: compiling this much takes seconds at most

# Of GBNF, whose translation takes four times as long for twice the rules: 0.4 s at most.
_MAX_GBNF = 1 << 15
_MAX_RULES = 300

# What compiles at a time. What takes too long cannot be stopped and keeps its place, so as not to take all of the
# machine; others then wait this long for one, seconds.
_MAX_COMPILING = 4
_PATIENCE = 0.5

# llguidance goes down a chain of rules or references by recursion, up to 8 kB each; if its stack ends, so does the
# process. Reserved, not used: enough for as long a chain as _MAX_TEXT holds.
_STACK = 256 << 20
_stack_lock = threading.Lock()  # the size is set for all threads that are made

_PARKING = 10.0  # seconds: milliseconds suffice unless such threads, at the lowest priority, hardly get to run

# A lexer state takes 1 to 2 kB and is kept as long as the compiled grammar: 100 MB at the very most. With llguidance's
# 50,000 items per mask an ambiguous grammar (x: x x | ...) takes minutes to fail; 400 optional properties need 5,000.
_LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "step_max_items": 10_000, "verbose_errors": False}


@dataclass(frozen=True)
class Constraint:
    """What an output must look like. Equal constraints share one compiled form."""

    kind: Kind  # also the name of the argument, for messages
    text: str  # the schema or the choices as JSON, the regex, the grammar in Lark

    @classmethod
    def check(
        cls, *, json_schema: Any = None, regex: Any = None, grammar: Any = None, choices: Any = None
    ) -> "Constraint | None":
        """The constraint that the arguments describe, None if all are None.

        Args:
            json_schema: a dict, its JSON text, a pydantic model class, or True for any JSON value.
            regex: the whole output matches it; syntax of Rust's `regex`, close to Python's, without look-around;
                `\\d` is [0-9].
            grammar: Lark as llguidance reads it (the first rule is `start`), or llama.cpp's GBNF (`root ::= ...`).
            choices: a list of texts, of which the output is one.

        Raises:
            ArgumentError: more than one is given, or one is malformed, or longer than 262,144 characters, or a schema
                says what cannot be kept to. ArgumentTypeError: one has the wrong type.
                What only llguidance can see, Compiler.matcher() raises as an ArgumentError.
        """
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar, "choices": choices}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return None
        if len(given) > 1:
            raise ArgumentError(f"only one of {' and '.join(given)} may constrain an output")
        if json_schema is not None:
            return cls("json_schema", _schema_text(json_schema))
        if choices is not None:
            return cls("choices", _choices_text(choices))
        if regex is not None:
            return cls("regex", _without_anchors(_as_text("regex", regex)))
        return cls("grammar", _lark_text(_as_text("grammar", grammar)))


# --- checking descriptions ---------------------------------------------------------------------------------------


def _as_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be a str, got {type(value).__name__}")
    if not (value if name == "regex" else value.strip()):
        raise ArgumentError(f"{name} is empty")
    _check_length(name, len(value))
    return as_unicode(name, value)


def _check_length(name: str, n: int) -> None:
    if n > _MAX_TEXT:
        raise ArgumentError(f"{name} has {n} characters, but at most {_MAX_TEXT} are compiled")


def _schema_text(value: Any) -> str:
    """The schema as JSON, as llguidance is given it."""
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        schema = value.model_json_schema()
    elif isinstance(value, str):
        try:
            schema = json.loads(_as_text("json_schema", value))
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"json_schema is not JSON: {error}") from None
    else:
        schema = value
    if isinstance(schema, Mapping):
        schema = dict(schema)
    elif schema is True:
        schema = {}
    elif schema is False:
        raise ArgumentError("json_schema=False describes no value at all; True stands for any JSON")
    else:
        raise ArgumentTypeError(
            "json_schema must be a dict, its JSON text, a pydantic model class, or True for any JSON, "
            f"got {type(schema).__name__}"
        )
    try:
        text = json.dumps(schema, ensure_ascii=False)
        _check_length("json_schema", len(text))
        text.encode()
        return json.dumps(prepared(json.loads(text)), ensure_ascii=False, allow_nan=False)
    except ArgumentError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"json_schema cannot be written as JSON: {error}") from None


def _choices_text(choices: Any) -> str:
    if isinstance(choices, str | bytes) or not isinstance(choices, Sequence):
        raise ArgumentTypeError(f"choices must be a list of str, got {type(choices).__name__}")
    if not choices:
        raise ArgumentError("choices is empty")
    _check_length("choices", sum(len(choice) if isinstance(choice, str) else 1 for choice in choices))
    for i, choice in enumerate(choices):
        if choice == "":
            raise ArgumentError(f"choices[{i}] must not be empty, got ''")
        if not isinstance(choice, str) or choice.strip():
            _as_text(f"choices[{i}]", choice)
    return json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False)


def _without_anchors(regex: str) -> str:
    """`regex` without ^ and $ at its ends: the whole output must match anyway, and llguidance has no anchors."""
    start = 1 if regex.startswith("^") else 0
    escaped = (len(regex) - len(regex[:-1].rstrip("\\")) - 1) % 2 == 1
    end = len(regex) - (regex.endswith("$") and not escaped)
    if start >= end:
        raise ArgumentError(f"regex {regex!r} matches no text but the empty one")
    return regex[start:end]


def _lark_text(grammar: str) -> str:
    """The grammar in llguidance's Lark, translated if it is GBNF: only there is a rule written with ::=."""
    n_rules = len(re.findall(r"^[ \t]*[\w-]+[ \t]*::=", grammar, re.MULTILINE))
    if n_rules == 0:
        return grammar
    if len(grammar) > _MAX_GBNF or n_rules > _MAX_RULES:
        raise ArgumentError(
            f"grammar has {n_rules} rules of GBNF in {len(grammar)} characters, "
            f"but at most {_MAX_RULES} in {_MAX_GBNF} are translated: write it in Lark"
        )
    try:
        from llguidance.gbnf_to_lark import gbnf_to_lark
    except ImportError as error:
        raise _missing(error) from error
    try:
        return _LARK_TOKEN.sub(_by_character, gbnf_to_lark(_ESCAPE.sub(_unescaped, grammar)))
    except Exception as error:  # of no narrower type; the message names line and place
        if raised_by_signal_handler(error):
            raise
        raise ArgumentError(f"grammar is not GBNF that can be translated: {error}") from None


_ESCAPE = re.compile(r"\\\\|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})")


def _unescaped(match: re.Match[str]) -> str:
    """\\uXXXX as the character itself, or as \\xXX: gbnf_to_lark of llguidance 1.9 drops leading zeros."""
    digits = match[1] or match[2]
    if digits is None:
        return match[0]
    return chr(int(digits, 16)) if int(digits, 16) >= 0x80 else f"\\x{digits[-2:]}"


_LARK_TOKEN = re.compile(
    r"""//[^\n]* | /\./ | /(?:\\.|[^/\\])*/ | "(?:\\.|[^"\\])*" | \b[A-Z][A-Z0-9_]*\b | [*+?]{2,}""", re.VERBOSE
)


def _by_character(match: re.Match[str]) -> str:
    """A part of a translated grammar with one character to a lexeme, and of one repetition of another one.

    GBNF means characters, but lexemes are greedy: with ws ::= [ \\n]* as one lexeme, what ends in ws "\\n" never ends.
    """
    part = match[0]
    if part == "/./":
        return "/(?s:.)/"
    if part.startswith('"'):
        letters = re.findall(r"\\x..|\\.|[^\\]", part[1:-1])
        return part if len(letters) < 2 else "(" + " ".join(f'"{letter}"' for letter in letters) + ")"
    if part[0] in "*+?":  # ("a"?)+ comes without its parentheses
        return part[0] if len(set(part)) == 1 else "*"
    return f"{part.lower()}_" if part[0].isalpha() else part  # in capitals it would be a terminal, that is one lexeme


def _missing(error: ImportError) -> UnsupportedError:
    return UnsupportedError(f"constrained output needs llguidance: pip install 'fixmin-cpp[grammar]' ({error})")


# --- what tokens stand for ---------------------------------------------------------------------------------------


def token_bytes(tokenizer: TextTokenizer) -> dict[int, bytes]:
    """The bytes that each token adds to a text, by id; special tokens, which add none, are left out.

    Raises UnsupportedError for a tokenizer whose tokens stand for different text at different places.
    """
    if tokenizer.spelling is None:
        raise UnsupportedError(
            "constrained output needs a tokenizer whose tokens stand for the same text everywhere; "
            "the decoder of this one puts spaces between tokens, or drops what repeats"
        )
    ids = tokenizer.backend.get_vocab(with_added_tokens=True).values()
    return {i: tokenizer.token_bytes(i) for i in ids if i not in tokenizer.special_ids}


class _Vocabulary:
    """The tokens of one model, as llguidance wants them and as this module asks about them.

    Without an end-of-text token the id V, which the model does not have, stands for the end.
    """

    is_tokenizer_wrapper = True  # by this llguidance knows the attributes below, which have its names
    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, eos_id: int | None, others: Collection[int]) -> None:
        self._tokenizer = tokenizer
        ends = {*others, *(() if eos_id is None else (eos_id,))}
        spelled = {i: text for i, text in token_bytes(tokenizer).items() if i < vocab_size and i not in ends}
        special = {i for i in tokenizer.special_ids if i < vocab_size} | ends
        names = {i: (tokenizer.backend.id_to_token(i) or "<end>").encode() for i in special}
        self.eos_token_id = vocab_size if eos_id is None else eos_id
        self.n_ids = vocab_size + (eos_id is None)
        self.tokens = [spelled.get(i, names.get(i, b"")) for i in range(self.n_ids)]
        self.special_token_ids = sorted(special)  # only a grammar that names one can produce it
        self.real = np.zeros(32 * -(-self.n_ids // 32), bool)  # ids that the tokenizer knows
        self.real[[i for i, text in spelled.items() if text] + self.special_token_ids] = True
        self._ids_of = spelled
        self._sorted = sorted(set(spelled.values()) - {b""})
        self._texts = set(self._sorted)
        self._longest = max(map(len, self._sorted), default=0)

    def __call__(self, text: str) -> list[int]:
        """llguidance's way to force text, which is switched off."""
        raise NotImplementedError("forced text is tokenized by Matcher.forced()")

    def can_spell(self, text: bytes) -> bool:
        """Whether some sequence of tokens stands for these bytes."""
        if len(text) > 64 and all(self.can_spell(letter.encode()) for letter in set(text.decode())):
            return True
        ends = {0}  # lengths of the beginnings of `text` that can be spelled
        for end in range(1, len(text) + 1):
            starts = range(max(0, end - self._longest), end)
            if any(start in ends and text[start:end] in self._texts for start in starts):
                ends.add(end)
        return len(text) in ends

    def settled(self, data: bytes) -> list[int]:
        """Tokens of the beginning of `data`, as the tokenizer cuts it, up to where a longer token may yet take over."""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:  # ends within a character
            text = data[: error.start].decode()
        ids = self._tokenizer.encode(text, parse_special=False)
        spelled = [self._ids_of.get(i, b"") for i in ids]
        if b"".join(spelled) != text.encode():
            return []  # a letter without a token, a special token's name, a space put before a text
        limit = self._first_open(data)
        settled, length = [], 0
        for token_id, part in zip(ids, spelled, strict=True):
            length += len(part)
            if length > limit:
                break
            settled.append(token_id)
        return settled

    def _first_open(self, data: bytes) -> int:
        """The first place in `data` from which a token could reach beyond its end."""
        for start in range(max(0, len(data) - self._longest), len(data)):
            rest = data[start:]
            at = bisect_right(self._sorted, rest)
            if at < len(self._sorted) and self._sorted[at].startswith(rest):
                return start
        return len(data)


# --- the end of the interpreter ----------------------------------------------------------------------------------

# Native ids of the threads that compile. Each adds and removes its own, one operation under the GIL: a lock might be
# held by another thread at a fork.
_compiling: set[int] = set()
_ending = threading.Event()


def _park_compiling() -> None:
    """Sees to it that no thread that compiles comes back to an interpreter that is being taken down.

    There CPython up to 3.13 ends it, which the frames of llguidance turn into a crash of the process.
    """
    _ending.set()  # which a thread looks at after it has added itself: none is missed
    deadline = time.monotonic() + _PARKING
    while _compiling and time.monotonic() < deadline:
        from llguidance import LLMatcher

        for thread_id in tuple(_compiling):
            parked = park_thread(thread_id, LLMatcher)
            if parked is None:
                return
            if parked:
                _compiling.discard(thread_id)
        time.sleep(0.001)  # one that waits for the GIL comes to its end


atexit.register(_park_compiling)


# --- a fork ------------------------------------------------------------------------------------------------------

_compilers: "weakref.WeakSet[Compiler]" = weakref.WeakSet()
_of_the_parent: list[Any] = []


def _reset_after_fork() -> None:
    """In the child, where threads that held a lock do not exist."""
    global _stack_lock
    _compiling.clear()
    _stack_lock = threading.Lock()
    for compiler in list(_compilers):
        compiler.after_fork()


os.register_at_fork(after_in_child=_reset_after_fork)


# --- compiling ---------------------------------------------------------------------------------------------------


class Compiler:
    """Compiles constraints for one model and keeps the compiled forms. Safe to use from several threads.

    Args:
        tokenizer: the model's.
        vocab_size: V, the number of the model's logits; ids that the tokenizer does not know are never allowed.
        eos_id: the id that ends a text, None if the model has none.
        other_eos_ids: further ids that end one as well.
        n_threads: how many threads fill_masks() may use for several matchers.
        cache_size: how many compiled constraints are kept.
        compile_timeout: seconds after which a constraint counts as too complex.

    Raises:
        UnsupportedError: llguidance is not installed, or tokens of this tokenizer stand for no fixed text.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        vocab_size: int,
        eos_id: int | None = None,
        *,
        other_eos_ids: Collection[int] = (),
        n_threads: int = 1,
        cache_size: int = 64,
        compile_timeout: float = 10.0,
    ) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise _missing(error) from error
        self._llguidance = llguidance
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.eos_ids = frozenset(() if eos_id is None else (eos_id, *other_eos_ids))
        self.n_words = -(-vocab_size // 32)  # of a mask
        self._n_threads = n_threads
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, eos_id, other_eos_ids)
        self._native = llguidance.LLTokenizer(self._vocabulary)  # type: ignore[arg-type]
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        real = np.packbits(self._vocabulary.real, bitorder="little").view("<u4").astype(np.uint32)
        self._real: NDArray[np.uint32] | None = None if self._vocabulary.real[:vocab_size].all() else real
        self._cache_size = cache_size
        self._compile_timeout = compile_timeout
        self._too_complex: set[Constraint] = set()
        self._reset()
        _compilers.add(self)

    def after_fork(self) -> None:
        """In the child: locks and threads are made anew, and constraints compiled anew. All matchers of one share a
        lexer, whose lock a thread of the parent may have held, as it may those that end the threads."""
        _of_the_parent.append((self._cache, self._executor))  # not ended
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._cache: OrderedDict[Constraint, Any] = OrderedDict()
        self._places = threading.BoundedSemaphore(_MAX_COMPILING)
        self._executor: Any = None

    def matcher(self, constraint: Constraint) -> "Matcher":
        """A matcher at the beginning of the text; a constraint that was used before needs no compiling.

        Raises ArgumentError, with llguidance's message, for a constraint that cannot be compiled, is too complex, or
        allows no output; BusyError while others that take too long are still being compiled. Compiling takes
        milliseconds, for large schemas up to a second, without the GIL.
        """
        return Matcher(self, constraint, self._compiled(constraint))

    def fill_masks(self, matchers: Sequence["Matcher"], out: NDArray[np.uint32]) -> list[FixminError | None]:
        """The masks of several matchers at once, without the GIL and with up to n_threads threads.

        Args:
            matchers: of this compiler, each one once; none may be used elsewhere meanwhile.
            out: uint32 [len(matchers), ceil(V/32)], C-contiguous; row i becomes the mask of matchers[i].

        Returns:
            For each matcher None, or why it cannot go on; its row is then zero.
        """
        if out.shape != (len(matchers), self.n_words) or out.dtype != np.uint32 or not out.flags.c_contiguous:
            raise ArgumentError(
                f"out must be a C-contiguous uint32 array of shape {(len(matchers), self.n_words)}, "
                f"got {out.dtype} of shape {out.shape}"
            )
        n_words = -(-self._vocabulary.n_ids // 32)
        rows = out if n_words == self.n_words else np.zeros((len(matchers), n_words), np.uint32)
        jobs = [(matcher._native, i) for i, matcher in enumerate(matchers) if not matcher._closed]
        if len(jobs) == 1 or self._n_threads == 1:
            for native, i in jobs:
                native.unsafe_compute_mask_ptr(rows[i].ctypes.data, rows[i].nbytes)
        elif jobs:
            self._pool().unsafe_compute_mask_ptr(jobs, rows.ctypes.data, 4 * n_words, len(matchers))
        errors = [matcher._complete(row) for matcher, row in zip(matchers, rows, strict=True)]
        if rows is not out:
            out[:] = rows[:, : self.n_words]
        return errors

    def _compiled(self, constraint: Constraint) -> Any:
        """llguidance's matcher at the beginning of a text, to be copied."""
        with self._lock:
            if constraint in self._too_complex:
                raise self._complexity(constraint)
            compiled = self._cache.get(constraint)
            if compiled is not None:
                self._cache.move_to_end(constraint)
                return compiled
        compiled = self._compile(constraint)
        with self._lock:
            self._cache[constraint] = compiled
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return compiled

    def _compile(self, constraint: Constraint) -> Any:
        self._check_letters(constraint)
        native = self._compile_in_time(constraint)
        if native.is_error():
            raise ArgumentError(f"{constraint.kind} cannot be used: {_reason(native)}")
        for warning in native.get_grammar_warnings():
            if "oneOf" not in str(warning):  # which means anyOf here: see json_schema.py
                _log.warning("%s: %s", constraint.kind, warning)
        try:
            mask = Matcher(self, constraint, native).mask()
        except FixminError as error:
            raise ArgumentError(f"{constraint.kind} allows no output: {error}") from None
        for end_id in self.eos_ids:
            mask[end_id // 32] &= ~np.uint32(1 << end_id % 32)
        if not mask.any():
            raise ArgumentError(f"{constraint.kind} allows no output but the empty text")
        return native

    def _compile_in_time(self, constraint: Constraint) -> Any:
        """llguidance's matcher, made by a thread that is left alone when the time is up.

        Most of what compiling does has limits of its own, not all of it, and nothing interrupts it. Such a thread goes
        on at the lowest priority, at most until the interpreter ends.
        """
        source, results = self._source(constraint), queue.SimpleQueue[Any]()
        if not self._places.acquire(timeout=_PATIENCE):
            raise BusyError(
                f"{constraint.kind} was not compiled: {_MAX_COMPILING} others that take long are; try again later"
            )

        def work() -> None:
            thread_id = threading.get_native_id()
            _compiling.add(thread_id)
            try:
                if _ending.is_set():
                    raise FixminError(f"{constraint.kind} was not compiled: the interpreter is ending")
                results.put(self._llguidance.LLMatcher(self._native, source, log_level=0, limits=self._limits))
            except BaseException as error:
                results.put(error)
            finally:
                _compiling.discard(thread_id)
                self._places.release()

        thread = threading.Thread(target=work, name="fixmin-grammar", daemon=True)
        with _stack_lock:
            usual = threading.stack_size(_STACK)
            try:
                thread.start()
            except BaseException:
                self._places.release()
                raise
            finally:
                threading.stack_size(usual)
        try:
            result = results.get(timeout=self._compile_timeout)
        except queue.Empty:
            with self._lock:
                if len(self._too_complex) >= self._cache_size:
                    self._too_complex.clear()
                self._too_complex.add(constraint)
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread.native_id or 0, 19)
            raise self._complexity(constraint) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def _complexity(self, constraint: Constraint) -> ArgumentError:
        return ArgumentError(f"{constraint.kind} is too complex: not compiled within {self._compile_timeout:g} s")

    def _source(self, constraint: Constraint) -> str:
        """What llguidance compiles."""
        if constraint.kind == "json_schema":
            schema = {"name": "schema", "json_schema": json.loads(constraint.text)}
            return json.dumps({"grammars": [{"lark_grammar": "start: @schema" + _LARK_OPTIONS}, schema]})
        if constraint.kind == "regex":
            return f"start: /{self._llguidance.regex_to_lark(constraint.text, 'd')}/{_LARK_OPTIONS}"
        if constraint.kind == "choices":
            # One terminal, that is one regex: alternatives in a rule would cost the parser an item each.
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(constraint.text))
            return f"start: CHOICE\nCHOICE: {' | '.join(choices)}{_LARK_OPTIONS}"
        return constraint.text + _LARK_OPTIONS  # at the end, so that lines keep their numbers

    def _check_letters(self, constraint: Constraint) -> None:
        """What is demanded literally must be there to be written: a model with few letters would get stuck in it."""
        given = json.loads(constraint.text) if constraint.kind in ("choices", "json_schema") else {}
        if constraint.kind == "choices":
            texts = [(f"choices[{i}] {choice!r}", choice) for i, choice in enumerate(given)]
        else:
            texts = [(f"json_schema has {text:.60} at {place}, which", text) for place, text in literals(given)]
        for name, text in texts:
            if not self._vocabulary.can_spell(text.encode()):
                missing = [letter for letter in text if not self._vocabulary.can_spell(letter.encode())]
                raise ArgumentError(
                    f"{name} cannot be written with this model's tokens"
                    + (f": there is none for {missing[0]!r}" if missing else "")
                )

    def _pool(self) -> Any:
        """llguidance's threads."""
        with self._lock:
            if self._executor is None:
                self._executor = self._llguidance.LLExecutor(self._n_threads)
            return self._executor

    def _forget(self, constraint: Constraint, compiled: Any) -> None:
        """Drops this compiled form, unless another has taken its place already."""
        with self._lock:
            if self._cache.get(constraint) is compiled:
                del self._cache[constraint]


# --- matching ----------------------------------------------------------------------------------------------------


class Matcher:
    """How far a text has got in its grammar; made by Compiler.matcher(). One thread at a time may use it."""

    def __init__(self, compiler: Compiler, constraint: Constraint, compiled: Any) -> None:
        self._compiler = compiler
        self._constraint = constraint
        self._compiled = compiled
        self._native = compiled.deep_copy()  # shares the lexer, and so the states that others have met
        self._ids: list[int] = []  # accepted, without the end-of-text token
        self._ended = False  # the end-of-text token was accepted
        self._error: FixminError | None = None

    @property
    def finished(self) -> bool:
        """Whether the output is complete: nothing but the end of the text may follow.

        For a model without an end-of-text token, which could not end a text otherwise: as soon as the text may end.
        """
        if self._error is not None:
            return False
        return self._ended or self._native.is_stopped() or (self._compiler.eos_id is None and self.may_end)

    @property
    def may_end(self) -> bool:
        """Whether the text so far is a complete output."""
        return self._ended or (self._error is None and self._native.is_accepting())

    def mask(self) -> NDArray[np.uint32]:
        """The tokens that may follow, uint32 [ceil(V/32)]: id i is bit i%32 of word i//32.

        Holds the end-of-text token exactly where the text may end. Empty only after the end.
        Raises ArgumentError where no token of the vocabulary fits, or where the grammar exceeds llguidance's limits.
        """
        out = np.empty((1, self._compiler.n_words), np.uint32)
        error = self._compiler.fill_masks([self], out)[0]
        if error is not None:
            raise error
        return out[0]

    def accept(self, token_id: int) -> None:
        """Adds a token to the text. Raises FixminError if it may not follow; the matcher is then of no more use."""
        if self._error is not None:
            raise self._error
        if not 0 <= token_id < self._compiler.vocab_size:
            raise ArgumentError(f"token_id is {token_id}, but token ids run from 0 to {self._compiler.vocab_size - 1}")
        if self._ended:
            raise self._fail(FixminError, f"token {token_id} cannot follow the end-of-text token")
        if token_id in self._compiler.eos_ids:
            if not self._native.is_accepting():
                raise self._fail(FixminError, f"the {self._constraint.kind} is not complete, yet the text ends")
            self._ended = True
        elif self._native.is_stopped() or not self._consume(token_id):
            reason = _reason(self._native)
            if reason.startswith("Parser Error"):  # one of llguidance's limits, not the token
                raise self._fail(ArgumentError, f"{self._constraint.kind} is too complex: {reason}")
            raise self._fail(FixminError, f"token {token_id} does not fit the {self._constraint.kind}: {reason}")
        else:
            self._ids.append(token_id)

    def forced(self) -> list[int]:
        """Tokens that must come next, if any: the text that alone fits, as the tokenizer itself would cut it.

        They are not accepted yet. An engine may append them in one step instead of sampling each.
        """
        if self._closed or self.may_end:
            return []
        return self._compiler._vocabulary.settled(self._native.compute_ff_bytes())

    def rollback(self, n_tokens: int) -> None:
        """Takes back the last tokens that were accepted, as after drafts that the model rejected."""
        if self._error is not None:
            raise self._error
        if self._ended and n_tokens > 0:
            self._ended, n_tokens = False, n_tokens - 1
        if n_tokens and not self._native.rollback(n_tokens):
            raise self._fail(FixminError, f"cannot take back {n_tokens} tokens: {_reason(self._native)}")
        del self._ids[len(self._ids) - n_tokens :]

    def clone(self) -> "Matcher":
        """A copy that goes on independently."""
        copy = Matcher(self._compiler, self._constraint, self._compiled)
        copy._native, copy._ids = self._native.deep_copy(), self._ids.copy()
        copy._ended, copy._error = self._ended, self._error
        return copy

    @property
    def _closed(self) -> bool:
        """Whether llguidance need not be asked."""
        return self._ended or self._error is not None

    def _complete(self, row: NDArray[np.uint32]) -> FixminError | None:
        """Checks and corrects a mask that llguidance has filled; an error leaves it zero."""
        if self._closed:
            row[:] = 0
            return self._error
        eos_id = self._compiler._vocabulary.eos_token_id
        if self._native.is_error() and self._recover():
            self._native.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._native.is_error():  # llguidance's mask is then the end of the text, as if all were well
            row[:] = 0
            reason = _reason(self._native)
            return self._fail(ArgumentError, f"the {self._constraint.kind} leaves no way to go on: {reason}")
        if not self._native.is_accepting() or self._compiler.eos_id is None:
            row[eos_id // 32] &= ~np.uint32(1 << eos_id % 32)
        may_end = np.uint32(self._native.is_accepting())
        for other in self._compiler.eos_ids - {eos_id}:  # llguidance knows of one; all others go with it
            row[other // 32] = row[other // 32] & ~np.uint32(1 << other % 32) | may_end << np.uint32(other % 32)
        if self._compiler._real is not None:
            row &= self._compiler._real
        if not row.any() and not self.finished:
            return self._fail(ArgumentError, f"the {self._constraint.kind} leaves no way to go on: no token fits")
        return None

    def _consume(self, token_id: int) -> bool:
        return self._native.consume_token(token_id) or (self._recover() and self._native.consume_token(token_id))

    def _recover(self) -> bool:
        """Whether the trouble was only that the shared lexer is full; this matcher then goes on with one of its own.

        So what a request may write does not depend on what others have written under the same constraint.
        """
        if "too many states" not in self._native.get_error():
            return False
        self._compiler._forget(self._constraint, self._compiled)
        native = self._compiler._compile(self._constraint)
        if not native.consume_tokens(self._ids):
            return False
        self._native = native
        return True

    def _fail(self, kind: type[FixminError], message: str) -> FixminError:
        self._error = kind(message)
        return self._error


def _reason(native: Any) -> str:
    """llguidance's message without the marks around the details that it was told to leave out."""
    message = native.get_error().replace("<non-verbose/>", "")
    message = re.sub(r"\n *\d+ \| %llguidance \{\"no_forcing.*", "", message, flags=re.DOTALL).strip()  # not the user's
    if "NoExtensionBias" in message:
        return "no token of the vocabulary continues the text"
    lines = [line if len(line) <= 120 else line[:117] + "..." for line in message.splitlines()[:12]]
    return "\n".join(lines) or "nothing may follow"
