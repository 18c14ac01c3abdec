"""What is said of a request that is not answered: in the words of its own fields."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, BusyError, ContextLengthError, FixminError, UnsupportedError
from .fields import OF_CHATS, OF_COMPLETIONS, FieldError
from .request import GenerationRequest

__all__ = ["Refusal", "refusal"]

# What the engine finds in a run, and which fields can be to blame.
_IN_A_RUN = {
    "no token is left to draw": (
        *("banned_ids", "bad_ids", "allowed_ids", "allowed_token_ids", "logit_bias", "regex", "grammar"),
    ),
    "the logits are not finite after logit_bias and penalties": (
        *("logit_bias", "repeat_penalty", "repetition_penalty"),
        *("frequency_penalty", "presence_penalty", "dry_multiplier"),
    ),
}
_NAMES = OF_COMPLETIONS | OF_CHATS
_FIRST = re.compile(r"(?:the |only one of )?(?=json_schema|response_format|regex|grammar|choices)(\w+)|(\w+)")
_MAX_MESSAGE = 2000  # characters: a message may quote what a request holds
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "unavailable_error"}


@dataclass(frozen=True)
class Refusal:
    """An error as OpenAI's clients expect it."""

    status: int  # of HTTP
    message: str
    param: str | None = None  # the field that is wrong
    code: str | None = None

    def __post_init__(self) -> None:
        if len(self.message) > _MAX_MESSAGE:
            object.__setattr__(self, "message", f"{self.message[: _MAX_MESSAGE - 3]}...")

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refusal(
    error: FixminError, request: GenerationRequest | None = None, names: Collection[str] = frozenset()
) -> Refusal:
    """What is told of `error`. `request`: for which it was raised, if it could be read; `names`: more of fields."""
    if isinstance(error, BusyError):
        return Refusal(503, str(error))
    if isinstance(error, FieldError):
        return Refusal(400, str(error), error.field)
    message = str(error)
    blamed = next((fields for reason, fields in _IN_A_RUN.items() if message.startswith(reason)), None)
    if blamed is None and not isinstance(error, ArgumentError | ContextLengthError | UnsupportedError):
        return Refusal(500, message)
    renamed = {} if request is None else request.renamed
    for name, field in renamed.items():
        message = re.sub(rf"\b{name}\b", field, message, count=1)
    first = _FIRST.match(message)
    word = first[1] or first[2] if first else None
    param = word if word in _NAMES or word in names else None
    if request is not None and blamed is not None:
        param = next((name for name in blamed if name in request.fields), None)
    elif request is not None and param == "prompt":
        param = request.prompt_field
    return Refusal(400, message, param, "context_length_exceeded" if isinstance(error, ContextLengthError) else None)
