"""Checks of what callers pass, before any of it reaches native code. A message names the argument and its value."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, ArgumentTypeError

TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
Prompt: TypeAlias = str | TokenIds

_MAX_SEED = 2**64 - 1
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class GenerationOptions:
    """Checked arguments of one generation; see Model.generate for their meaning."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @classmethod
    def check(
        cls,
        *,
        max_new_tokens: Any,
        temperature: Any,
        top_k: Any,
        top_p: Any,
        seed: Any,
        stop: Any,
        ignore_eos: Any,
        do_sample: Any,
    ) -> "GenerationOptions":
        """Raises ArgumentError (a ValueError) or ArgumentTypeError (also a TypeError) for anything out of place."""
        sample = None if do_sample is None else as_bool("do_sample", do_sample)
        if temperature is None:
            temperature = 1.0 if sample else 0.0
        temperature = as_float("temperature", temperature, 0.0, _MAX_FLOAT32)
        if sample and temperature == 0.0:
            raise ArgumentError("do_sample=True needs a temperature above 0, got temperature=0")
        return cls(
            max_new_tokens=as_int("max_new_tokens", max_new_tokens, 1),
            temperature=0.0 if sample is False else temperature,
            top_k=as_int("top_k", top_k, 0),
            top_p=as_share("top_p", top_p),
            seed=None if seed is None else as_int("seed", seed, 0, _MAX_SEED),
            stop=as_stop_strings(stop),
            ignore_eos=as_bool("ignore_eos", ignore_eos),
        )


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
    return number


def as_bool(name: str, value: Any) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(f"{name} must be True or False, got {_show(value)}")
    return bool(value)


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


def split_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """The single prompts in `prompt`, each a str or ids still to be checked, and whether it was a list of prompts."""
    if isinstance(prompt, str) or hasattr(prompt, "__array__"):
        return [prompt], False
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise ArgumentTypeError(f"prompt must be a str, token ids, or a list of those, got {_show(prompt)}")
    if len(prompt) == 0:
        raise ArgumentError("prompt is empty")
    if not isinstance(prompt[0], str | Sequence) and not getattr(prompt[0], "shape", ()):
        return [prompt], False  # numbers: the ids of one prompt
    return list(prompt), True


def _show(value: Any) -> str:
    """Type and value, short enough for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
