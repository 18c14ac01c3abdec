"""How much a request may carry and ask for.

What it carries is checked on its bytes and on its JSON before anything is made of it: a body of the allowed size may
hold a million elements, each of which costs far more than its bytes once it is an object, a validation error or a stop
string. What is not named here has the usual limits, so that no field is without.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ArgumentError
from ..generation_options import GenerationOptions
from ..json_schema import walk
from ..model import Model
from ..openai_api.request import CompletionRequest, GenerationRequest
from ..sampling_fields import FORMS
from .errors import APIError
from .settings import ServeSettings

__all__ = ["MAX_DEPTH", "MAX_ELEMENTS", "check_breakers", "check_counts", "check_generations", "read_body"]

MAX_ELEMENTS = 200_000  # list elements and fields of objects in a body: 40 MB as Python objects at the very most
_MAX_PARTS = 40_000  # fields of objects, lists and objects in a body: each costs more than an element of a list
MAX_DEPTH = 100  # of lists and objects in each other
_MAX_FIELDS = 200  # of a request
_MAX_LIST, _MAX_TEXT = 1024, 1 << 18  # elements, characters, of fields that are not named below
_TEXTS = ("prompt", "input", "content", "text")
_LISTS: Mapping[str, int] = {
    # ids of texts; how many texts a request may have is a setting
    **dict.fromkeys(("prompt", "input", "tokens"), MAX_ELEMENTS),
    **dict.fromkeys(("allowed_ids", "banned_ids", "bad_ids"), 1 << 16),
    "logit_bias": 8192,
    "messages": 2048,
    "stop": 128,
    "dry_sequence_breakers": 64,
}
_STRINGS: Mapping[str, int] = {
    **dict.fromkeys(_TEXTS, 1 << 20),
    "stop": 1024,
    "dry_sequence_breakers": 256,
    "regex": 1 << 14,
    "grammar": 1 << 16,
}
_ALL_ELEMENTS: Mapping[str, int] = {"json_schema": 8000, "response_format": 8000, "messages": 40_000}
_MAX_DIGITS = 100  # of an integer

# Of all generations of a request together
_MAX_LOGPROBS = 1 << 19  # of an answer with several generations: 100 bytes of memory each
_MEAN_PROMPT = 256  # tokens, when it is not yet known
_MAX_ENTRIES = 1 << 20  # of lists that each of them goes through at every step
_MAX_BREAKERS = 1 << 17  # sequences of tokens: 200 bytes each
_MAX_BREAKER = 64  # characters: at each of them one may begin in a token

_STRUCTURE = re.compile(rb'"[^"]*"|[\[\]{},:]')  # of a body without escapes


def read_body(body: bytes) -> Any:
    """The JSON of a request's body, within the limits.

    Raises:
        APIError: 400, it is no JSON or exceeds a limit; the message says which.
    """
    if not body:
        raise APIError(400, "the body is empty: it must be a JSON object")
    try:  # json.loads would take UTF-16 too, in which bytes that look like JSON's signs are parts of letters
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is not JSON: it is not UTF-8 at byte {error.start}") from None
    _check_structure(body)
    try:
        value = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body is not JSON: {error}") from None
    if isinstance(value, dict):
        if len(value) > _MAX_FIELDS:
            raise APIError(400, f"the body has {len(value)} fields, more than any request has")
        for name, field in value.items():
            _check_field(name, field)
    else:
        raise APIError(400, "the body must be a JSON object")
    return value


def _integer(digits: str) -> int:
    """Python's takes a time that grows with the square."""
    if len(digits) > _MAX_DIGITS:
        raise APIError(400, f"the body has an integer of {len(digits)} digits: {digits[:20]}...")
    return int(digits)


def _check_structure(body: bytes) -> None:
    """Counts elements and depth without making anything of them."""
    opened = body.count(b"[") + body.count(b"{")
    if opened <= MAX_DEPTH and body.count(b",") + opened <= MAX_ELEMENTS and body.count(b":") + opened <= _MAX_PARTS:
        return  # however much of it lies within strings
    depth = n = n_parts = 0
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    for match in _STRUCTURE.finditer(body):
        sign = body[match.start()]
        if sign == 0x22:  # a string
            continue
        if sign in b":[{":
            n_parts += 1
            if n_parts > _MAX_PARTS:
                raise APIError(400, f"the body has more than {_MAX_PARTS} fields, lists and objects")
            if sign == 0x3A:
                continue
        if sign in b"]}":
            depth -= 1
            continue
        n += 1
        if sign in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise APIError(400, f"the body is nested more than {MAX_DEPTH} deep")
        if n > MAX_ELEMENTS:
            raise APIError(400, f"the body has more than {MAX_ELEMENTS} elements")


def _check_field(name: str, value: Any) -> None:
    longest = _STRINGS.get(name, _MAX_TEXT)
    _check_text(name, value, longest)
    if isinstance(value, list | dict):
        limit = _LISTS.get(name, _MAX_LIST)
        if len(value) > limit:
            raise _refused(name, f"{name} has {len(value)} entries, at most {limit} are taken")
    if name == "json_schema" and isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):  # the library says what is wrong with it
            value = json.loads(value, parse_int=_integer)
    if name in _ALL_ELEMENTS:
        enough = _ALL_ELEMENTS[name]
        if any(True for _ in itertools.islice(walk(value), enough, None)):
            raise _refused(name, f"{name} has more than {enough} elements")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            _check_text(name, one, longest, i)


def _check_text(name: str, value: Any, longest: int, index: int | None = None) -> None:
    if isinstance(value, str) and len(value) > longest:
        place = name if index is None else f"{name}[{index}]"
        raise _refused(name, f"{place} has {len(value)} characters, at most {longest} are taken")


def _refused(name: str, message: str) -> APIError:
    return APIError(400, message, param=name if name.isascii() and len(name) <= 64 else None)


# --- what a request asks for ---------------------------------------------------------------------------------------


def check_counts(request: GenerationRequest, settings: ServeSettings) -> None:
    """Raises ArgumentError for more completions, log-probabilities or prompts than the operator allows."""
    for name, value, low, high in (
        ("n", request.n, 1, settings.max_n),
        ("best_of", request.best_of, 1, settings.max_n),
        (request.logprobs_field, request.logprobs, 0, settings.max_logprobs),
    ):
        if value is not None and value > high:
            raise ArgumentError(f"{name} must be between {low} and {high}, got {value}")
    n = len(request.prompts) if isinstance(request, CompletionRequest) else 1
    if n > settings.max_inputs:
        raise ArgumentError(f"prompt has {n} entries, but a request may have {settings.max_inputs}")


def check_generations(model: Model, arguments: Mapping[str, Any], n: int) -> GenerationOptions:
    """The arguments but for the constraint, checked.

    Raises:
        ArgumentError: one is wrong, or `n` generations would take too much memory for lists and log-probabilities.
    """
    given: Any = {name: value for name, value in arguments.items() if name not in FORMS}
    options = GenerationOptions.check(given, model.vocab_size)
    breakers = options.dry_sequence_breakers or ()
    n_breakers = len(breakers) + sum(len(one) for one in breakers if not isinstance(one, str))
    for name, n_entries in (
        ("allowed_ids", len(options.allowed_ids)),
        ("banned_ids", len(options.banned_ids)),
        ("logit_bias", len(options.logit_bias)),
        ("dry_sequence_breakers", n_breakers),
    ):
        if n * n_entries > _MAX_ENTRIES:
            raise ArgumentError(
                f"{name} has {n_entries} entries for each of {n} generations, at most {_MAX_ENTRIES} are taken "
                "together: ask for fewer generations"
            )
    _check_logprobs(options, n, model.n_ctx)
    if options.dry_multiplier:
        check_breakers(model, breakers, n)
    return options


def _check_logprobs(options: GenerationOptions, n: int, n_ctx: int) -> None:
    per_token, per_prompt = (0 if top is None else top + 1 for top in (options.logprobs, options.prompt_logprobs))
    n_numbers = n * (per_token * min(options.max_new_tokens, n_ctx) + per_prompt * min(n_ctx, _MEAN_PROMPT))
    if n > 1 and n_numbers > _MAX_LOGPROBS:
        raise ArgumentError(
            f"logprobs of {n} generations would be up to {n_numbers} numbers, at most {_MAX_LOGPROBS} are given: ask "
            "for fewer generations, tokens or logprobs"
        )


def check_breakers(model: Model, breakers: Iterable[Any], n: int) -> None:
    """A short string begins and ends in many tokens: each such way is kept for each of `n` generations."""
    n_sequences = 0
    for one in breakers:
        if not isinstance(one, str):
            continue
        if len(one) > _MAX_BREAKER:
            raise ArgumentError(
                f"dry_sequence_breakers has a text of {len(one)} characters, at most {_MAX_BREAKER} are taken"
            )
        n_sequences += n * len(model.require_tokenizer().sequences_with(one))
        if n_sequences > _MAX_BREAKERS:
            raise ArgumentError(
                f"dry_sequence_breakers are met by more than {_MAX_BREAKERS} sequences of tokens, counted for each of "
                f"{n} generations: ask for fewer, or for longer ones"
            )
