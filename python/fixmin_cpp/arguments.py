"""Checks of what callers pass, before any of it reaches native code. A message names the argument and its value."""

import difflib
import math
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from . import _core
from .constrain import Constraint
from .errors import ArgumentError, ArgumentTypeError

TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
# An array may be [1, T], as Hugging Face's tokenizers give it; a mapping is what they give as a whole ("input_ids").
Prompt: TypeAlias = str | TokenIds | Mapping[str, Any]

Flag: TypeAlias = bool | None
Int: TypeAlias = int | None
Float: TypeAlias = float | None
Text: TypeAlias = str | None
Texts: TypeAlias = str | Sequence[str] | Set[str] | None
Ids: TypeAlias = int | TokenIds | Set[int] | None
Seeds: TypeAlias = int | Sequence[int | None] | None
Biases: TypeAlias = Mapping[int, float] | Mapping[str, float] | Sequence[tuple[int, float]] | None
Breakers: TypeAlias = Sequence[str | Sequence[int]] | None

_MAX_SEED = 2**64 - 1
_MAX_CANDIDATES = 1024
_MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MIN_FLOAT32 = float(np.finfo(np.float32).tiny)


class GenerationArguments(TypedDict, total=False):
    """How Model.generate and Model.stream continue a prompt. All are optional; docs/sampling.md has the formulas.

    Names, defaults and order are llama.cpp's; None is the same as not given. Without a temperature the most probable
    token is taken: what narrows the choice then has no effect, biases, bans and penalties do.
    """

    # Length
    max_new_tokens: Int  # 128. Upper limit, at least 1; -1: until the context ends. Prompt and answer share its n_ctx
    #                      positions
    min_new_tokens: Int  # 0. Before so many, neither the end-of-text token nor one of stop_ids can be drawn
    stop: Texts  # none. One or several: text ends before the leftmost of these, wherever token borders fall; those
    #              of min_new_tokens are not looked at. May name special tokens
    stop_ids: Ids  # none. Ends at one of these tokens, as at the end-of-text token; it is not part of the result
    ignore_eos: Flag  # False. The end-of-text token is never drawn

    # Chance
    temperature: Float  # None: 0, greedy; with do_sample=True 1
    do_sample: Flag  # None. False: greedy whatever the temperature (as in transformers)
    seed: Seeds  # 0 to 2^64-1; the same seed gives the same tokens. None or -1: a random one, reported in the result.
    #              For a list of prompts also a list, one for each
    dynatemp_range: Float  # 0. The temperature lies between temperature -+ range, the higher the less certain the model
    dynatemp_exponent: Float  # 1. How it depends on the entropy

    # Narrowing the choice, in this order
    top_n_sigma: Float  # -1. Keeps logits within so many standard deviations of the largest; 0 or less: all
    top_k: Int  # 40. Keeps the most probable tokens; 0 or -1: all
    typical_p: Float  # 1. Keeps this share of the probability, tokens of nearly typical surprise first; 1: all, 0: one
    top_p: Float  # 0.95. Keeps the smallest set of tokens that holds this share of the probability; 1: all, 0: one
    min_p: Float  # 0.05. Keeps tokens at least this probable in relation to the most probable one; 0: all
    xtc_probability: Float  # 0. How often all but the least probable of the tokens above xtc_threshold are left out
    xtc_threshold: Float  # 0.1. Above 0.5 it never happens
    min_keep: Int  # 0. typical_p, top_p, min_p and XTC leave at least so many tokens
    mirostat: Int  # 0. 1 or 2: this in place of all the above, aiming at a surprise of mirostat_tau bits
    mirostat_tau: Float  # 5
    mirostat_eta: Float  # 0.1. How fast it is corrected

    # Repetition, in the last repeat_last_n tokens of prompt and answer
    repeat_penalty: Float  # 1. Positive logits of tokens that came up are divided by it, negative ones multiplied
    repetition_penalty: Float  # another name of repeat_penalty
    presence_penalty: Float  # 0. Subtracted from the logits of tokens that came up
    frequency_penalty: Float  # 0. The same, for every time
    repeat_last_n: Int  # 64. -1: all
    openai_penalties: Flag  # False. True: presence and frequency are counted as OpenAI does, over all generated tokens
    #                         and none of the prompt, whatever repeat_last_n says
    dry_multiplier: Float  # 0. DRY: multiplier * base^(n - allowed_length) is taken from the logit of a token that
    dry_base: Float  # 1.75.   would continue a repetition of n tokens, if n is at least allowed_length
    dry_allowed_length: Int  # 2
    dry_penalty_last_n: Int  # -1. Looks for repetitions in the last so many tokens; -1: in all
    dry_sequence_breakers: Breakers  # "\\n", ":", '"', "*". Repetitions do not reach across these

    # Single tokens
    logit_bias: Biases  # none. Ids, or their decimal text, and what is added to their logits; -inf: never drawn
    banned_ids: Ids  # none. Never drawn
    bad_ids: Ids  # another name of banned_ids
    allowed_ids: Ids  # None: all. Else nothing else is drawn

    # Form: at most one; docs/constrained.md. Needs fixmin-cpp[grammar]
    json_schema: Any  # none. A schema as dict or text, a pydantic model class, or True for any JSON value
    regex: Text  # none. The whole output matches it
    grammar: Text  # none. Lark as llguidance reads it, or llama.cpp's GBNF
    choices: Sequence[str] | None  # none. The output is one of these

    # The request
    parse_special: Flag  # True. In a prompt's text, names of special tokens, as "</s>", are those tokens; else text
    logprobs: Int  # None. Log-probability of every generated token, and of so many of the most probable
    prompt_logprobs: Int  # None. The same for the tokens of the prompt but the first; all of it is read then
    prompt_lookup_num_tokens: Int  # 0. Guesses up to so many tokens, at most 31, from how the text went on before, and
    #                                verifies them in one step: the same result, sooner where the text repeats itself
    prefix_cache: Flag  # True. Reads only what no earlier prompt began with, and is remembered itself
    timeout: Float  # None. Ends after so many seconds, those in the queue included; inf: never


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
    seed: int | tuple[int | None, ...] | None = None  # a tuple: one for each prompt; None: a random one
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
    parse_special: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_lookup_num_tokens: int = 0
    prefix_cache: bool = True
    timeout: float | None = None

    @classmethod
    def check(cls, arguments: Mapping[str, Any], vocab_size: int) -> "GenerationOptions":
        """Raises ArgumentError (a ValueError) or ArgumentTypeError (also a TypeError) for anything out of place."""
        given = {name: value for name, value in main_names(arguments).items() if value is not None}
        sample = given.pop("do_sample", None)
        sample = None if sample is None else as_bool("do_sample", sample)
        temperature = given.pop("temperature", None)
        constraint = Constraint.check(**{name: given.pop(name) for name in _FORMS if name in given})
        checked = {name: _CHECKS[name](name, value, vocab_size) for name, value in given.items()}
        options = cls(temperature=_temperature(temperature, sample), constraint=constraint, **checked)
        if options.min_new_tokens > options.max_new_tokens:
            raise ArgumentError(
                f"min_new_tokens is {_digits(options.min_new_tokens)}, above max_new_tokens, which is "
                f"{options.max_new_tokens}"
            )
        options._check_choice(vocab_size)
        return options

    def _check_choice(self, vocab_size: int) -> None:
        """ArgumentError if no token could be drawn from the first step on."""
        never = {*self.banned_ids, *(token_id for token_id, bias in self.logit_bias if bias == -math.inf)}
        n_allowed = len(set(self.allowed_ids) - never) if self.allowed_ids else vocab_size - len(never)
        if n_allowed == 0:
            raise ArgumentError("no token is left to draw: banned_ids, allowed_ids and logit_bias rule out every one")

    def seeds(self, n_prompts: int, many: bool) -> list[int]:
        """One for each prompt; drawn if none was given. `many`: whether the prompts came as a list."""
        if self.seed is None:
            return [_random_seed() for _ in range(n_prompts)]
        if isinstance(self.seed, int):
            return [self.seed] * n_prompts
        if not many:
            raise ArgumentTypeError(
                "seed must be an integer for a single prompt, got several: of n completions the first has it, and the "
                "others have seeds made of it"
            )
        if len(self.seed) != n_prompts:
            raise ArgumentError(f"seed has {len(self.seed)} entries, but there are {n_prompts} prompts")
        return [_random_seed() if seed is None else seed for seed in self.seed]

    def native(self, *, eos_ids: Sequence[int], breakers: list[list[int]]) -> _core.SamplingParams:
        """The same for the engine, but for the seed. eos_ids: those that end a text. breakers: dry_sequence_breakers
        as ids."""
        # Counts beyond what any sequence can reach mean the same as the largest one that fits.
        values = {name: getattr(self, name) for name in _NATIVE}
        numbers = {name: min(value, _MAX_INT32) if isinstance(value, int) else value for name, value in values.items()}
        return _core.SamplingParams(
            **numbers,
            logit_bias=dict(self.logit_bias),
            allowed_ids=self.allowed_ids,
            banned_ids=[*self.banned_ids, *(eos_ids if self.ignore_eos else [])],
            stop_ids=[*self.stop_ids, *([] if self.ignore_eos else eos_ids)],
            dry_sequence_breakers=breakers,
        )


def candidate_counts(n: Any, best_of: Any, options: GenerationOptions, *, equal: bool = False) -> tuple[int, int]:
    """n and best_of (None: n) of Model.generate, checked. `equal`: they may be all the same, without a temperature."""
    n = 1 if n is None else as_int("n", n, 1, _MAX_CANDIDATES)
    best_of = n if best_of is None else as_int("best_of", best_of, 1, _MAX_CANDIDATES)
    if best_of < n:
        raise ArgumentError(f"best_of is {best_of}, below n, which is {n}")
    if best_of > 1 and options.temperature == 0.0 and not equal:
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


def as_int(name: str, value: Any, low: float, high: int | None = None) -> int:
    """`value` as an int in [low, high]; integers of NumPy and PyTorch are integers, bools and floats are not."""
    value = _scalar(value)
    if isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an integer, got {_show(value)}") from None
    if number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ArgumentError(f"{name} must be {limits}, got {_digits(number)}")
    return number


def as_threads(value: Any) -> int:
    """A number of threads, 0 where it is left to the machine: None, 0 and, as in llama.cpp, -1."""
    return 0 if value is None else max(0, as_int("n_threads", value, -1, 1024))


def as_float(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float in [low, high]; numbers of NumPy and PyTorch are numbers, bools and strings are not."""
    value = _scalar(value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise ArgumentTypeError(f"{name} must be a number, got {_show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if not low <= number <= high:  # NaN fails every comparison
        shown = _digits(value) if isinstance(value, int) else repr(value)
        raise ArgumentError(f"{name} must be between {low:g} and {high:g}, got {shown}")
    return number


def _scalar(value: Any) -> Any:
    """An array or tensor without dimensions as the number that it holds; anything else as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "__array__") and not isinstance(value, np.generic):
        try:
            return value.item()
        except Exception:  # a tensor on a device without memory, or whatever another library says
            return value
    return value


def as_share(name: str, value: Any) -> float:
    """`value` as a float in (0, 1]; 0 is the smallest one there is, a share that one token exceeds."""
    return max(as_float(name, value, 0.0, 1.0), _MIN_FLOAT32)


def as_bool(name: str, value: Any) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(f"{name} must be True or False, got {_show(value)}")
    return bool(value)


def as_seeds(name: str, value: Any) -> int | tuple[int | None, ...] | None:
    """A seed, or a tuple of them. None and -1 (llama.cpp's) stand for a random one."""
    if (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or getattr(value, "ndim", 0) == 1:
        return tuple(None if one is None else _as_seed(f"{name}[{i}]", one) for i, one in enumerate(value))
    return None if value is None else _as_seed(name, value)


def _as_seed(name: str, value: Any) -> int | None:
    seed = as_int(name, value, -math.inf)
    if not -1 <= seed <= _MAX_SEED:
        raise ArgumentError(f"{name} must be between 0 and {_MAX_SEED}, or -1 for a random one, got {_digits(seed)}")
    return None if seed == -1 else seed


def as_stop_strings(stop: Any) -> tuple[str, ...]:
    """None, one string or several, as a tuple of non-empty strings."""
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence | Set) or isinstance(strings, bytes):
        raise ArgumentTypeError(f"stop must be a str or a list of str, got {_show(stop)}")
    return tuple(as_text(f"stop[{i}]", string) for i, string in enumerate(strings))


def as_text(name: str, value: Any) -> str:
    """`value`, if it is a str of at least one character and none of them is half of a surrogate pair."""
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be a str, got {_show(value)}")
    if not value:
        raise ArgumentError(f"{name} must not be empty, got ''")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{name} is not valid Unicode: lone surrogate {value[error.start]!a} at character {error.start}"
        ) from None
    return value


def as_path(name: str, value: Any) -> str:
    """`value` as the name of a file."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise ArgumentTypeError(f"{name} must be a str or a path, got {type(value).__name__}")
    path = os.fspath(value)
    try:
        os.fsencode(path or "\ud800")  # bytes that are no UTF-8 are surrogates in it, which is fine
    except UnicodeEncodeError:
        as_text(name, path)
    if "\0" in path:
        raise ArgumentError(f"{name} must not hold a NUL character, got {_short.repr(path)}")
    return path


def as_id_tuple(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Any number of token ids, also none: one id, a sequence, a set or an integer array."""
    if isinstance(value, Set):
        value = list(value)
        return tuple(sorted(as_token_ids(name, value, vocab_size).tolist())) if value else ()
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, str | bytes | Mapping) and hasattr(value, "__len__") and len(value) == 0:
        return ()
    return tuple(as_token_ids(name, value, vocab_size).tolist())


def as_allowed_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Token ids, at least one; None gives none, which stands for all."""
    ids = () if value is None else as_id_tuple(name, value, vocab_size)
    if value is not None and not ids:
        raise ArgumentError(f"{name} is empty: nothing could be drawn (None allows all)")
    return ids


def as_logit_bias(name: str, value: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Token ids and what is added to their logits: finite, or -inf. A mapping, or pairs; an id may be decimal text."""
    if isinstance(value, Mapping):
        value = list(value.items())
    elif not isinstance(value, Sequence) or not all(isinstance(item, Sequence) and len(item) == 2 for item in value):
        raise ArgumentTypeError(f"{name} must be a dict of token id to bias, got {_show(value)}")
    biases: dict[int, float] = {}
    for key, bias in value:
        if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20:
            key = int(key)  # JSON has only texts as keys
        token_id = as_int(f"{name} key", key, 0)
        if token_id >= vocab_size:
            raise ArgumentError(
                f"{name} has token id {_digits(token_id)}, but token ids run from 0 to {vocab_size - 1}"
            )
        if token_id in biases:
            raise ArgumentError(f"{name} has token id {token_id} twice")
        biases[token_id] = as_float(f"{name}[{token_id}]", bias, -math.inf, _MAX_FLOAT32)
    return tuple(biases.items())


def as_breakers(name: str, value: Any, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """Sequence breakers: each a non-empty string or token ids."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ArgumentTypeError(f"{name} must be a list of str or token ids, got {_show(value)}")
    return tuple(
        as_text(f"{name}[{i}]", item)
        if isinstance(item, str)
        else tuple(as_token_ids(f"{name}[{i}]", item, vocab_size).tolist())
        for i, item in enumerate(value)
    )


def as_token_ids(name: str, value: Any, vocab_size: int) -> NDArray[np.uint32]:
    """Token ids as uint32 [T]: from a sequence of integers, an integer array [T] or [1, T], or an encoding of one text.

    An encoding is what a tokenizer gives: a mapping with "input_ids" (and perhaps "attention_mask"), or an object with
    `ids`.
    """
    if _is_encoding(value):
        rows, many = split_prompts(value, name)
        if many:
            raise ArgumentError(f"{name} must be one text, got the ids of {len(rows)}")
        value = rows[0]
    if hasattr(value, "__array__"):
        array = _as_array(name, value)
        if array.ndim == 2 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 1:
            raise ArgumentError(
                f"{name} must have one dimension, or be [1, T], got shape {array.shape}; for several texts pass a list "
                "of their ids, without padding"
            )
        if array.dtype.kind not in "iu":
            if array.size == 0:  # np.array([]) is float64
                raise ArgumentError(f"{name} is empty")
            raise ArgumentTypeError(f"{name} must be an array of integers, got dtype {array.dtype}")
    else:
        array = np.array(_integers(name, value), dtype=object)  # keeps integers of any size for the check of the range
    if array.size == 0:
        raise ArgumentError(f"{name} is empty")
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ArgumentError(f"{name}[{at}] is {_digits(int(array[at]))}, but token ids run from 0 to {vocab_size - 1}")
    return array.astype(np.uint32)


def _integers(name: str, value: Any) -> Sequence[Any]:
    """A sequence, if all of it is integers; arrays without dimensions (as in list(tensor)) count as such."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise ArgumentTypeError(f"{name} must be a list or an integer array of token ids, got {_show(value)}")
    odd = {kind for kind in set(map(type, value)) if not issubclass(kind, int | np.integer) or issubclass(kind, bool)}
    if not odd:
        return value
    numbers = []
    for at, item in enumerate(value):
        if type(item) in odd:
            array = _as_array(f"{name}[{at}]", item) if hasattr(item, "__array__") else np.empty(1)
            if array.ndim != 0 or array.dtype.kind not in "iu":
                raise ArgumentTypeError(f"{name}[{at}] must be an integer, got {_show(item)}")
            item = int(array)
        numbers.append(item)
    return numbers


def split_prompts(prompt: Any, name: str = "prompt") -> tuple[list[Any], bool]:
    """The single prompts in `prompt`, each a str or ids still to be checked, and whether it was a list of prompts."""
    if _is_encoding(prompt):
        return _split_encoding(prompt, name) if isinstance(prompt, Mapping) else ([prompt.ids], False)
    if isinstance(prompt, str):
        return [prompt], False
    if hasattr(prompt, "__array__"):
        array = _as_array(name, prompt)
        if array.ndim == 1 and array.dtype.kind in "UO" and array.size and isinstance(array[0], str):
            return array.tolist(), True  # a column of texts
        return [prompt], False
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        hint = ": pass a list" if isinstance(prompt, Iterable) and not isinstance(prompt, Mapping | bytes) else ""
        raise ArgumentTypeError(f"{name} must be a str, token ids, or a list of those, got {_show(prompt)}{hint}")
    if len(prompt) == 0:
        raise ArgumentError(f"{name} is empty")
    if not isinstance(prompt[0], str | Sequence | Mapping) and not getattr(prompt[0], "shape", ()):
        return [prompt], False  # numbers: the ids of one prompt
    return list(prompt), True


def _is_encoding(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "input_ids" in value
    return isinstance(getattr(value, "ids", None), list)  # tokenizers.Encoding


def _split_encoding(encoding: Mapping[str, Any], name: str) -> tuple[list[Any], bool]:
    """The ids in what a tokenizer of Hugging Face gives, without those that its attention mask calls padding."""
    ids, mask = encoding["input_ids"], encoding.get("attention_mask")
    is_array = hasattr(ids, "__array__")
    if not is_array and (not isinstance(ids, Sequence) or isinstance(ids, str | bytes)):
        raise ArgumentTypeError(f"{name} has input_ids that are no token ids: {_show(ids)}")
    nested = _as_array(name, ids).ndim == 2 if is_array else len(ids) > 0 and not isinstance(ids[0], int | np.integer)
    rows, masks = (list(ids), mask) if nested else ([ids], None if mask is None else [mask])
    if any(isinstance(row, str | bytes) for row in rows):
        raise ArgumentTypeError(f"{name} has input_ids that are no token ids: {_show(ids)}")
    if masks is not None:
        if len(masks) != len(rows):
            raise ArgumentError(f"{name} has {len(rows)} rows of input_ids, but {len(masks)} of attention_mask")
        rows = [_unmasked(name, row, kept) for row, kept in zip(rows, masks, strict=True)]
    return rows, nested and not (is_array and len(rows) == 1)


def _unmasked(name: str, ids: Any, mask: Any) -> Any:
    kept = _as_array(name, mask)
    if kept.shape != (len(ids),):
        raise ArgumentError(f"{name} has {len(ids)} input_ids, but an attention_mask of shape {kept.shape}")
    return ids if kept.all() else [one for one, keep in zip(ids, kept, strict=True) if keep]


def _as_array(name: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except Exception as error:  # whatever another library says of a tensor that is elsewhere, sparse or ragged
        raise ArgumentTypeError(f"{name} cannot be read as an array of token ids: {error}") from None


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def _show(value: Any) -> str:
    """Type and value, short enough for a message, however large or odd the value is."""
    try:
        text = _short.repr(value)
    except ValueError:  # an integer in it that has more digits than Python writes
        return type(value).__name__
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _digits(number: int) -> str:
    """An integer in full, or how long it is: Python does not write those of more than 4,300 digits."""
    return str(number) if number.bit_length() <= 256 else f"an integer of {number.bit_length()} bits"


def _random_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


def main_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments under their main names. ArgumentTypeError for a name that there is not."""
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        main = _ALIASES.get(name, name)
        if name in _OF_GENERATE:
            raise ArgumentTypeError(f"{name} is an argument of Model.generate() only: here a prompt has one completion")
        if main not in _CHECKS and main not in ("temperature", "do_sample", *_FORMS):
            raise ArgumentTypeError(f"there is no argument {_show_name(name)}{_hint(name)}")
        if main in named:
            raise ArgumentError(f"{name} and {main} are one argument: give it once")
        named[main] = value
    return named


# What other programs call an argument that there is here: llama.cpp, transformers, vLLM, OpenAI.
_ELSEWHERE = {
    "max_new_tokens": "max_tokens max_completion_tokens max_length max_len n_predict num_predict n_tokens",
    "min_new_tokens": "min_tokens min_length",
    "n": "num_return_sequences n_completions",
    "stop_ids": "eos_token_id stop_token_ids stop_tokens",
    "stop": "stop_strings stop_sequences stop_words antiprompt reverse_prompt",
    "ignore_eos": "skip_eos",
    "temperature": "temp",
    "do_sample": "sample sampling",
    "seed": "rng_seed random_seed manual_seed random_state generator",
    "typical_p": "typical",
    "top_n_sigma": "top_nsigma",
    "dynatemp_exponent": "dynatemp_exp",
    "repeat_last_n": "penalty_last_n last_n_tokens_size",
    "repeat_penalty": "penalty_repeat rep_pen",
    "presence_penalty": "penalty_present",
    "frequency_penalty": "penalty_freq",
    "dry_multiplier": "no_repeat_ngram_size",
    "banned_ids": "bad_words_ids suppress_tokens bad_words",
    "allowed_ids": "allowed_token_ids prefix_allowed_tokens_fn",
    "logit_bias": "sequence_bias logits_processor",
    "json_schema": "guided_json response_format schema",
    "regex": "guided_regex",
    "choices": "guided_choice choice",
    "grammar": "guided_grammar",
    "logprobs": "top_logprobs n_probs output_scores output_logits return_dict_in_generate",
    "prompt_logprobs": "echo",
    "prompt_lookup_num_tokens": "num_assistant_tokens n_draft draft",
    "prefix_cache": "cache_prompt use_cache",
    "timeout": "max_time time_limit t_max_predict_ms",
    "on_token": "streamer stopping_criteria callback",
}
_OTHER_NAMES = {other: name for name, others in _ELSEWHERE.items() for other in others.split()}
_OTHER_WAYS = {
    **dict.fromkeys(
        ("num_beams", "length_penalty", "early_stopping", "beam_size"),
        "Model.beam_search(prompt, num_beams=...) looks for the most probable text",
    ),
    "stream": "Model.stream(prompt) gives one token after the other",
    **dict.fromkeys(("prompts", "inputs", "input_ids", "prompt_token_ids"), "the prompt comes first, without a name"),
    **dict.fromkeys(("attention_mask", "pad_token_id"), "prompts of a list need no padding"),
    **dict.fromkeys(("n_threads", "n_ctx", "kv_type", "n_batch", "num_ctx"), "that belongs to Model(path, ...)"),
}


def _hint(name: Any) -> str:
    """What to write in place of an argument that there is not."""
    if name in _OTHER_WAYS:
        return f": {_OTHER_WAYS[name]}"
    meant = _OTHER_NAMES.get(name)
    if meant is None and isinstance(name, str) and len(name) < 100:
        meant = next(
            iter(difflib.get_close_matches(name, [*GenerationArguments.__annotations__, *_OF_GENERATE], 1)), None
        )
    return "; fixmin_cpp.GenerationArguments lists all" if meant is None else f": did you mean {meant!r}?"


def _show_name(name: Any) -> str:
    return _short.repr(name)


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


def _length(name: str, value: Any, vocab_size: int) -> int:
    """A number of tokens from 1 on; -1, and llama.cpp's -2, for as many as the context holds."""
    number = as_int(name, value, -math.inf)
    if number < 1 and number not in (-1, -2):
        raise ArgumentError(f"{name} must be at least 1, or -1: until the context ends, got {_digits(number)}")
    return _MAX_INT32 if number < 0 else number


def _count_or_all(name: str, value: Any, vocab_size: int) -> int:
    return max(as_int(name, value, -1), 0)


def _seconds(name: str, value: Any, vocab_size: int) -> float | None:
    number = as_float(name, value, 0.0, math.inf)
    return None if number == math.inf else min(number, _MAX_FLOAT32)


_share: _Check = lambda name, value, vocab_size: as_share(name, value)  # noqa: E731
_not_negative = _float(0.0, _MAX_FLOAT32)
_any_float = _float(-_MAX_FLOAT32, _MAX_FLOAT32)
_probability = _float(0.0, 1.0)


_CHECKS: dict[str, _Check] = {
    "max_new_tokens": _length,
    "min_new_tokens": _int(0),
    "stop": lambda name, value, vocab_size: as_stop_strings(value),
    "stop_ids": as_id_tuple,
    "ignore_eos": lambda name, value, vocab_size: as_bool(name, value),
    "seed": lambda name, value, vocab_size: as_seeds(name, value),
    "dynatemp_range": _not_negative,
    "dynatemp_exponent": _not_negative,
    "top_n_sigma": _any_float,
    "top_k": _count_or_all,
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
    "parse_special": lambda name, value, vocab_size: as_bool(name, value),
    "logprobs": _int(0, 1024),
    "prompt_logprobs": _int(0, 1024),
    "prompt_lookup_num_tokens": _int(0, 31),
    "prefix_cache": lambda name, value, vocab_size: as_bool(name, value),
    "timeout": _seconds,
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
    "parse_special",
    "logprobs",
    "prompt_logprobs",
    "prompt_lookup_num_tokens",
    "prefix_cache",
    "timeout",
}
_NATIVE = [field.name for field in fields(GenerationOptions) if field.name not in _CHANGED]
