"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and an HTTP status."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..errors import ArgumentError, BusyError, ContextLengthError, FixminError, UnsupportedError
from ..logs import Facts, request_id
from .schemas import FIELDS

__all__ = ["APIError", "as_api_error", "install"]

_log = logging.getLogger(__name__)

_FORM = re.compile(r"^(str|bool)$|[\[<]")  # pydantic's names of the forms that a value may have, within its place

_MAX_MESSAGE = 2000  # characters: a message may quote what a request holds
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "unavailable_error"}


class APIError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        message = message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 3]}..."
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers
        self.extra = extra

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, **self.extra}

    def response(self) -> Response:
        """The answer itself."""
        return ErrorResponse(self.body(), self.status, self.headers)


class ErrorResponse(JSONResponse):
    """ASCII only: a message may quote what is no valid Unicode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


# What the engine finds in a run, and what was asked for is to blame.
NOTHING_LEFT = "no token is left to draw"
TOO_LARGE = "the logits are not finite after logit_bias and penalties"


def as_api_error(error: Exception, renamed: Mapping[str, str] | None = None) -> APIError:
    """What to answer when `error` was raised. `renamed`: field of the request by name of the argument."""
    if isinstance(error, APIError):
        return error
    message = str(error)
    in_a_run = isinstance(error, FixminError) and message.startswith((NOTHING_LEFT, TOO_LARGE))
    if isinstance(error, ArgumentError | ContextLengthError | UnsupportedError) or in_a_run:
        for name, field in (renamed or {}).items():
            message = re.sub(rf"\b{name}\b", field, message, count=1)
        first = re.match(r"(?:the |only one of )?(?=json_schema|regex|grammar|choices)(\w+)|(\w+)", message)
        word = first[1] or first[2] if first else None
        param = word if word in FIELDS else None
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        return APIError(400, message, param=param, code=code)
    if isinstance(error, BusyError):
        return APIError(503, str(error), headers={"Retry-After": "10"})
    if isinstance(error, FixminError):
        return APIError(500, str(error))
    _log.error("a request failed %s", Facts(request_id=request_id.get()), exc_info=error)
    return APIError(500, "internal error: the server's log has it")


def install(app: FastAPI) -> None:
    """Makes every error of `app` an answer in this form."""

    @app.exception_handler(APIError)
    @app.exception_handler(FixminError)
    @app.exception_handler(Exception)
    async def _any(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [part for part in first["loc"] if part != "body" and not _FORM.search(str(part))]
        if first["type"] == "json_invalid":
            return APIError(
                400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'it ends too early')}"
            ).response()
        param = str(where[0]) if where else None
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)[1:] or "the body"
        return APIError(400, f"{place}: {first['msg']}", param=param).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        message = error.detail
        if error.status_code == 404:
            message = f"there is nothing at {request.url.path}"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        return APIError(error.status_code, message, headers=error.headers).response()
