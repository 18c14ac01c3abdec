"""Checks of what callers pass, before any of it reaches native code. A message names the argument and its value."""

import difflib
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from . import _core
from .constrain import Constraint
from .errors import ArgumentError, ArgumentTypeError

TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
Prompt: TypeAlias = str | TokenIds

_MAX_SEED = 2**64 - 1
_MAX_CANDIDATES = 1024
_MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MIN_FLOAT32 = float(np.finfo(np.float32).tiny)


class GenerationArguments(TypedDict, total=False):
    """How Model.generate and Model.stream continue a prompt. All are optional; docs/sampling.md has the formulas.

    Names, defaults and order are llama.cpp's. Without a temperature the most probable token is taken: what narrows the
    choice then has no effect, biases, bans and penalties do.
    """

    # Length
    max_new_tokens: int  # 128. Upper limit, at least 1; prompt and answer share the n_ctx positions of the context
    min_new_tokens: int  # 0. Before so many, neither the end-of-text token nor one of stop_ids can be drawn
    stop: str | Sequence[str] | None  # none. Text ends before the leftmost of these, wherever token borders fall; those
    #                                   of min_new_tokens are not looked at. May name special tokens
    stop_ids: TokenIds  # none. Ends at one of these tokens, as at the end-of-text token; it is not part of the result
    ignore_eos: bool  # False. The end-of-text token is never drawn

    # Chance
    temperature: float | None  # None: 0, greedy; with do_sample=True 1
    do_sample: bool | None  # None. False: greedy whatever the temperature (as in transformers)
    seed: (
        int | Sequence[int] | None
    )  # 0 to 2^64-1; the same seed gives the same tokens. None: a random one, reported in
    #                                   the result. For a list of prompts also a list, one for each
    dynatemp_range: float  # 0. The temperature lies between temperature -+ range, the higher the less certain the model
    dynatemp_exponent: float  # 1. How it depends on the entropy

    # Narrowing the choice, in this order
    top_n_sigma: float  # -1. Keeps logits within so many standard deviations of the largest; 0 or less: all
    top_k: int  # 40. Keeps the most probable tokens; 0: all
    typical_p: float  # 1. Keeps this share of the probability, tokens of nearly typical surprise first; 1: all
    top_p: float  # 0.95. Keeps the smallest set of tokens that holds this share of the probability; 1: all
    min_p: float  # 0.05. Keeps tokens at least this probable in relation to the most probable one; 0: all
    xtc_probability: float  # 0. How often all but the least probable of the tokens above xtc_threshold are left out
    xtc_threshold: float  # 0.1. Above 0.5 it never happens
    min_keep: int  # 0. typical_p, top_p, min_p and XTC leave at least so many tokens
    mirostat: int  # 0. 1 or 2: this in place of all the above, aiming at a surprise of mirostat_tau bits
    mirostat_tau: float  # 5
    mirostat_eta: float  # 0.1. How fast it is corrected

    # Repetition, in the last repeat_last_n tokens of prompt and answer
    repeat_penalty: float  # 1. Positive logits of tokens that came up are divided by it, negative ones multiplied
    repetition_penalty: float  # another name of repeat_penalty
    presence_penalty: float  # 0. Subtracted from the logits of tokens that came up
    frequency_penalty: float  # 0. The same, for every time
    repeat_last_n: int  # 64. -1: all
    openai_penalties: bool  # False. True: presence and frequency are counted as OpenAI does, over all generated tokens
    #                         and none of the prompt, whatever repeat_last_n says
    dry_multiplier: float  # 0. DRY: multiplier * base^(n - allowed_length) is taken from the logit of a token that
    dry_base: float  # 1.75.   would continue a repetition of n tokens, if n is at least allowed_length
    dry_allowed_length: int  # 2
    dry_penalty_last_n: int  # -1. Looks for repetitions in the last so many tokens; -1: in all
    dry_sequence_breakers: Sequence[str | Sequence[int]]  # "\\n", ":", '"', "*". Repetitions do not reach across these

    # Single tokens
    logit_bias: Mapping[int, float]  # none. Added to the logits of these ids; -inf: never drawn
    banned_ids: TokenIds  # none. Never drawn
    bad_ids: TokenIds  # another name of banned_ids
    allowed_ids: TokenIds | None  # None: all. Else nothing else is drawn

    # Form: at most one; docs/constrained.md. Needs fixmin-cpp[grammar]
    json_schema: Any  # none. A schema as dict or text, a pydantic model class, or True for any JSON value
    regex: str | None  # none. The whole output matches it
    grammar: str | None  # none. Lark as llguidance reads it, or llama.cpp's GBNF
    choices: Sequence[str] | None  # none. The output is one of these

    # The request
    logprobs: int | None  # None. Log-probability of every generated token, and of so many of the most probable
    prompt_logprobs: int | None  # None. The same for the tokens of the prompt but the first; all of it is read then
    prompt_lookup_num_tokens: int  # 0. Guesses up to so many tokens, at most 31, from how the text went on before, and
    #                                verifies them in one step: the same result, sooner where the text repeats itself
    prefix_cache: bool  # True. Reads only what no earlier prompt began with, and is remembered itself
    timeout: float | None  # None. Ends after so many seconds, those in the queue included


DEFAULT_BREAKERS = ("\n", ":", '"', "*")  # of DRY, llama.cpp's
_FORMS = ("json_schema", "regex", "grammar", "choices")
_OF_GENERATE = ("n", "best_of", "on_token", "progress")
_ALIASES = {"repetition_penalty": "repeat_penalty", "bad_ids": "banned_ids"}


@dataclass(frozen=True)
class GenerationOptions:
    """Checked arguments of one generation; their meaning is that of GenerationArguments."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int | tuple[int, ...] | None = None  # a tuple: one for each prompt
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_n_sigma: float = -1.0
    top_k: int = 40
    typical_p: float = 1.0
    top_p: float = 0.95
    min_p: float = 0.05
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_keep: int = 0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    openai_penalties: bool = False
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str | tuple[int, ...], ...] | None = None  # None: the default ones, if there is text
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_ids: tuple[int, ...] = ()
    allowed_ids: tuple[int, ...] = ()  # empty: all
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_lookup_num_tokens: int = 0
    prefix_cache: bool = True
    timeout: float | None = None

    @classmethod
    def check(cls, arguments: Mapping[str, Any], vocab_size: int) -> "GenerationOptions":
        """Raises ArgumentError (a ValueError) or ArgumentTypeError (also a TypeError) for anything out of place."""
        given = main_names(arguments)
        sample = given.pop("do_sample", None)
        sample = None if sample is None else as_bool("do_sample", sample)
        temperature = given.pop("temperature", None)
        constraint = Constraint.check(**{name: given.pop(name) for name in _FORMS if name in given})
        checked = {name: _CHECKS[name](name, value, vocab_size) for name, value in given.items()}
        options = cls(temperature=_temperature(temperature, sample), constraint=constraint, **checked)
        if options.min_new_tokens > options.max_new_tokens:
            raise ArgumentError(
                f"min_new_tokens is {options.min_new_tokens}, above max_new_tokens, which is {options.max_new_tokens}"
            )
        return options

    def seeds(self, n_prompts: int, many: bool) -> list[int]:
        """One for each prompt; drawn if none was given. `many`: whether the prompts came as a list."""
        if self.seed is None:
            return [int.from_bytes(os.urandom(4), "little") for _ in range(n_prompts)]
        if isinstance(self.seed, int):
            return [self.seed] * n_prompts
        if not many:
            raise ArgumentTypeError("seed must be an integer for a single prompt, got several")
        if len(self.seed) != n_prompts:
            raise ArgumentError(f"seed has {len(self.seed)} entries, but there are {n_prompts} prompts")
        return list(self.seed)

    def native(self, *, seed: int, eos_id: int | None, breakers: list[list[int]]) -> _core.SamplingParams:
        """The same for the engine. `breakers`: dry_sequence_breakers as ids."""
        params = _core.SamplingParams()
        for name in _NATIVE:
            value = getattr(self, name)
            # Counts beyond what any sequence can reach mean the same as the largest one that fits.
            setattr(params, name, min(value, _MAX_INT32) if isinstance(value, int) else value)
        params.seed = seed
        params.logit_bias = dict(self.logit_bias)
        params.allowed_ids = list(self.allowed_ids)
        end = [] if eos_id is None else [eos_id]
        params.banned_ids = [*self.banned_ids, *(end if self.ignore_eos else [])]
        params.stop_ids = [*self.stop_ids, *([] if self.ignore_eos else end)]
        params.dry_sequence_breakers = breakers
        return params


def candidate_counts(n: Any, best_of: Any, options: GenerationOptions) -> tuple[int, int]:
    """n and best_of (None: n) of Model.generate, checked."""
    n = as_int("n", n, 1, _MAX_CANDIDATES)
    best_of = n if best_of is None else as_int("best_of", best_of, 1, _MAX_CANDIDATES)
    if best_of < n:
        raise ArgumentError(f"best_of is {best_of}, below n, which is {n}")
    if best_of > 1 and options.temperature == 0.0:
        name, value = ("n", n) if n > 1 else ("best_of", best_of)
        raise ArgumentError(f"{name}={value} needs a temperature above 0: without one all completions are the same")
    return n, best_of


def candidate_seed(seed: int, candidate: int) -> int:
    """The seed of completion 0, 1, ... of a prompt: the given one, then number 8i + 7 of its SplitMix64 sequence.

    Of eight numbers of the sequence a step draws from the first ones only. The upper 53 bits: other readers of JSON
    hold numbers as doubles.
    """
    if candidate == 0:
        return seed
    z = (seed + (8 * candidate + 8) * 0x9E3779B97F4A7C15) & _MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MAX_SEED
    return (z ^ (z >> 31)) >> 11


def as_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]; NumPy integers are integers, bools and floats are not."""
    if isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an integer, got {_show(value)}") from None
    if number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ArgumentError(f"{name} must be {limits}, got {number}")
    return number


def as_float(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float in [low, high]; bools and strings are not numbers."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise ArgumentTypeError(f"{name} must be a number, got {_show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high:  # NaN fails every comparison
        raise ArgumentError(f"{name} must be between {low:g} and {high:g}, got {value!r}")
    return number


def as_share(name: str, value: Any) -> float:
    """`value` as a float in (0, 1]."""
    number = as_float(name, value, 0.0, 1.0)
    if number == 0.0:
        raise ArgumentError(f"{name} must be above 0, got {value!r}: a share of nothing leaves no token")
    return max(number, _MIN_FLOAT32)


def as_bool(name: str, value: Any) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(f"{name} must be True or False, got {_show(value)}")
    return bool(value)


def as_seeds(name: str, value: Any) -> int | tuple[int, ...] | None:
    """A seed, a tuple of them, or None."""
    if value is None:
        return None
    if (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or getattr(value, "ndim", 0) == 1:
        return tuple(as_int(f"{name}[{i}]", one, 0, _MAX_SEED) for i, one in enumerate(value))
    return as_int(name, value, 0, _MAX_SEED)


def as_stop_strings(stop: Any) -> tuple[str, ...]:
    """None, one string or several, as a tuple of non-empty strings."""
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise ArgumentTypeError(f"stop must be a str or a list of str, got {_show(stop)}")
    for i, string in enumerate(strings):
        if not isinstance(string, str):
            raise ArgumentTypeError(f"stop[{i}] must be a str, got {_show(string)}")
        if not string:
            raise ArgumentError(f"stop[{i}] must not be empty, got ''")
    return tuple(strings)


def as_id_tuple(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Any number of token ids, also none: a sequence, a set or an integer array."""
    if isinstance(value, Set):
        value = sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 0:
        return ()
    return tuple(as_token_ids(name, value, vocab_size).tolist())


def as_allowed_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Token ids, at least one; None gives none, which stands for all."""
    ids = () if value is None else as_id_tuple(name, value, vocab_size)
    if value is not None and not ids:
        raise ArgumentError(f"{name} is empty: nothing could be drawn (None allows all)")
    return ids


def as_logit_bias(name: str, value: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """A mapping from token ids to what is added to their logits: finite, or -inf."""
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(f"{name} must be a dict of token id to bias, got {_show(value)}")
    pairs = []
    for key, bias in value.items():
        token_id = as_int(f"{name} key", key, 0)
        if token_id >= vocab_size:
            raise ArgumentError(f"{name} has token id {token_id}, but token ids run from 0 to {vocab_size - 1}")
        pairs.append((token_id, as_float(f"{name}[{token_id}]", bias, -math.inf, _MAX_FLOAT32)))
    return tuple(pairs)


def as_breakers(name: str, value: Any, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """Sequence breakers: each a non-empty string or token ids."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ArgumentTypeError(f"{name} must be a list of str or token ids, got {_show(value)}")
    for i, item in enumerate(value):
        if isinstance(item, str) and not item:
            raise ArgumentError(f"{name}[{i}] must not be empty, got ''")
    return tuple(
        item if isinstance(item, str) else tuple(as_token_ids(f"{name}[{i}]", item, vocab_size).tolist())
        for i, item in enumerate(value)
    )


def as_token_ids(name: str, value: Any, vocab_size: int) -> NDArray[np.uint32]:
    """Token ids as uint32 [T]: from a sequence of integers or anything NumPy reads as an integer array [T]."""
    if isinstance(value, str | bytes | bytearray):
        raise ArgumentTypeError(f"{name} must be token ids, got {_show(value)}")
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim != 1:
            raise ArgumentError(f"{name} must have one dimension, got shape {array.shape}; pass list(...) for several")
        if array.dtype.kind not in "iu":
            if array.size == 0:  # np.array([]) is float64
                raise ArgumentError(f"{name} is empty")
            raise ArgumentTypeError(f"{name} must be an array of integers, got dtype {array.dtype}")
    elif isinstance(value, Sequence):
        for kind in set(map(type, value)):
            if not issubclass(kind, int | np.integer) or issubclass(kind, bool):
                at = next(i for i, item in enumerate(value) if type(item) is kind)
                raise ArgumentTypeError(f"{name}[{at}] must be an integer, got {_show(value[at])}")
        array = np.array(value, dtype=object)  # keeps integers of any size for the check of the range
    else:
        raise ArgumentTypeError(f"{name} must be token ids, got {_show(value)}")
    if array.size == 0:
        raise ArgumentError(f"{name} is empty")
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ArgumentError(f"{name}[{at}] is {array[at]}, but token ids run from 0 to {vocab_size - 1}")
    return array.astype(np.uint32)


def split_prompts(prompt: Any, name: str = "prompt") -> tuple[list[Any], bool]:
    """The single prompts in `prompt`, each a str or ids still to be checked, and whether it was a list of prompts."""
    if isinstance(prompt, str) or hasattr(prompt, "__array__"):
        return [prompt], False
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise ArgumentTypeError(f"{name} must be a str, token ids, or a list of those, got {_show(prompt)}")
    if len(prompt) == 0:
        raise ArgumentError(f"{name} is empty")
    if not isinstance(prompt[0], str | Sequence) and not getattr(prompt[0], "shape", ()):
        return [prompt], False  # numbers: the ids of one prompt
    return list(prompt), True


def _show(value: Any) -> str:
    """Type and value, short enough for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def main_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments under their main names. ArgumentTypeError for a name that there is not."""
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        main = _ALIASES.get(name, name)
        if name in _OF_GENERATE:
            raise ArgumentTypeError(f"{name} is an argument of Model.generate() only: here a prompt has one completion")
        if main not in _CHECKS and main not in ("temperature", "do_sample", *_FORMS):
            known = GenerationArguments.__annotations__
            similar = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {similar[0]!r}?" if similar else f"; there are {', '.join(known)}"
            raise ArgumentTypeError(f"there is no argument {name!r}{hint}")
        if main in named:
            raise ArgumentError(f"{name} and {main} are one argument: give it once")
        named[main] = value
    return named


def _temperature(value: Any, sample: bool | None) -> float:
    if value is None:
        value = 1.0 if sample else 0.0
    temperature = as_float("temperature", value, 0.0, _MAX_FLOAT32)
    if sample and temperature == 0.0:
        raise ArgumentError("do_sample=True needs a temperature above 0, got temperature=0")
    return 0.0 if sample is False else temperature


_Check: TypeAlias = Callable[[str, Any, int], Any]  # name, value, vocabulary size -> the checked value


def _int(low: int, high: int | None = None) -> _Check:
    return lambda name, value, vocab_size: as_int(name, value, low, high)


def _float(low: float, high: float) -> _Check:
    return lambda name, value, vocab_size: as_float(name, value, low, high)


def _positive(name: str, value: Any, vocab_size: int) -> float:
    number = as_float(name, value, 0.0, _MAX_FLOAT32)
    if number == 0.0:
        raise ArgumentError(f"{name} must be above 0, got {value!r}")
    return max(number, _MIN_FLOAT32)


_share: _Check = lambda name, value, vocab_size: as_share(name, value)  # noqa: E731
_not_negative = _float(0.0, _MAX_FLOAT32)
_any_float = _float(-_MAX_FLOAT32, _MAX_FLOAT32)
_probability = _float(0.0, 1.0)


def _optional(check: _Check) -> _Check:
    return lambda name, value, vocab_size: None if value is None else check(name, value, vocab_size)


_CHECKS: dict[str, _Check] = {
    "max_new_tokens": _int(1),
    "min_new_tokens": _int(0),
    "stop": lambda name, value, vocab_size: as_stop_strings(value),
    "stop_ids": as_id_tuple,
    "ignore_eos": lambda name, value, vocab_size: as_bool(name, value),
    "seed": lambda name, value, vocab_size: as_seeds(name, value),
    "dynatemp_range": _not_negative,
    "dynatemp_exponent": _not_negative,
    "top_n_sigma": _any_float,
    "top_k": _int(0),
    "typical_p": _share,
    "top_p": _share,
    "min_p": _probability,
    "xtc_probability": _probability,
    "xtc_threshold": _probability,
    "min_keep": _int(0),
    "mirostat": _int(0, 2),
    "mirostat_tau": _not_negative,
    "mirostat_eta": _not_negative,
    "repeat_penalty": _positive,
    "presence_penalty": _any_float,
    "frequency_penalty": _any_float,
    "repeat_last_n": _int(-1),
    "openai_penalties": lambda name, value, vocab_size: as_bool(name, value),
    "dry_multiplier": _not_negative,
    "dry_base": _float(1.0, _MAX_FLOAT32),
    "dry_allowed_length": _int(0),
    "dry_penalty_last_n": _int(-1),
    "dry_sequence_breakers": as_breakers,
    "logit_bias": as_logit_bias,
    "banned_ids": as_id_tuple,
    "allowed_ids": as_allowed_ids,
    "logprobs": _optional(_int(0, 1024)),
    "prompt_logprobs": _optional(_int(0, 1024)),
    "prompt_lookup_num_tokens": _int(0, 31),
    "prefix_cache": lambda name, value, vocab_size: as_bool(name, value),
    "timeout": _optional(_float(0.0, _MAX_FLOAT32)),
}

# Fields that the engine takes under the same name and as they are.
_CHANGED = {
    "stop",
    "stop_ids",
    "ignore_eos",
    "seed",
    "dry_sequence_breakers",
    "logit_bias",
    "banned_ids",
    "allowed_ids",
    "constraint",
    "logprobs",
    "prompt_logprobs",
    "prompt_lookup_num_tokens",
    "prefix_cache",
    "timeout",
}
_NATIVE = [field.name for field in fields(GenerationOptions) if field.name not in _CHANGED]
