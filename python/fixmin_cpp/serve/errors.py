"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and an HTTP status."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..errors import BusyError, FixminError
from ..logs import Facts, request_id
from ..openai_api.refusal import Refusal, refusal
from ..openai_api.request import GenerationRequest
from .schemas import FIELDS

__all__ = ["APIError", "as_api_error", "install"]

_log = logging.getLogger(__name__)


class APIError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        self.refusal = Refusal(status, message, param, code)
        super().__init__(self.refusal.message)
        self.status = status
        self.headers = headers
        self.extra = extra

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {**self.refusal.body(), **self.extra}

    def response(self) -> Response:
        """The answer itself."""
        return ErrorResponse(self.body(), self.status, self.headers)


class ErrorResponse(JSONResponse):
    """ASCII only: a message may quote what is no valid Unicode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def as_api_error(error: Exception, request: GenerationRequest | None = None) -> APIError:
    """What to answer when `error` was raised, for a `request` if it could be read."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, FixminError):
        told = refusal(error, request, FIELDS)
        headers = {"Retry-After": "10"} if isinstance(error, BusyError) else None
        return APIError(told.status, told.message, param=told.param, code=told.code, headers=headers)
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
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, FixminError):
            return as_api_error(cause).response()
        where = [part for part in first["loc"] if part != "body"]
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
