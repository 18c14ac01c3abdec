"""Checks of what callers pass, before any of it reaches native code. A message names the argument and its value."""

import math
import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, ArgumentTypeError

TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
# An array may be [1, T], as Hugging Face's tokenizers give it; a mapping is what they give as a whole ("input_ids").
Prompt: TypeAlias = str | TokenIds | Mapping[str, Any]

MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_SEED = 2**64 - 1


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
        raise ArgumentError(f"{name} must be {limits}, got {digits(number)}")
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
        shown = digits(value) if isinstance(value, int) else repr(value)
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
    if not -1 <= seed <= MAX_SEED:
        raise ArgumentError(f"{name} must be between 0 and {MAX_SEED}, or -1 for a random one, got {digits(seed)}")
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
    return as_unicode(name, value)


def as_unicode(name: str, value: Any) -> str:
    """`value`, if it is a str and no character of it is half of a surrogate pair."""
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be a str, got {type(value).__name__}")
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
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.generic) and not isinstance(value, np.integer):
        raise ArgumentTypeError(f"{name} must be token ids, got {_show(value)}")
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, str | bytes | Mapping) and hasattr(value, "__len__") and len(value) == 0:
        return ()
    return tuple(as_token_ids(name, value, vocab_size).tolist())


def as_allowed_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Token ids, at least one."""
    ids = as_id_tuple(name, value, vocab_size)
    if not ids:
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
            raise ArgumentError(f"{name} has token id {digits(token_id)}, but token ids run from 0 to {vocab_size - 1}")
        if token_id in biases:
            raise ArgumentError(f"{name} has token id {token_id} twice")
        biases[token_id] = as_float(f"{name}[{token_id}]", bias, -math.inf, MAX_FLOAT32)
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
        raise ArgumentError(f"{name}[{at}] is {digits(int(array[at]))}, but token ids run from 0 to {vocab_size - 1}")
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


def shortened(value: Any) -> str:
    """repr(value), short enough for a message."""
    return _short.repr(value)


def _show(value: Any) -> str:
    """Type and value, short enough for a message, however large or odd the value is."""
    try:
        text = _short.repr(value)
    except ValueError:  # an integer in it that has more digits than Python writes
        return type(value).__name__
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def digits(number: int) -> str:
    """An integer in full, or how long it is: Python does not write those of more than 4,300 digits."""
    return str(number) if number.bit_length() <= 256 else f"an integer of {number.bit_length()} bits"
