"""What stands before every request, as ASGI middleware: a proxy's prefix, names, keys, sizes of bodies, the log."""

import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from ..logs import Facts, request_id
from .errors import APIError, as_api_error

__all__ = ["Guard", "Log", "Prefix", "facts_of"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# What answers without a key: whether the server lives, and a page that asks for the key itself.
_PUBLIC = ("/health", "/v1/health", "/", "/docs")

_PATIENCE = 8  # bodies of the largest size that are read and forgotten
_CLOSE = {"Connection": "close"}
_GONE = 499  # as nginx counts them
_FACTS = "fixmin.facts"  # of a scope
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_log = logging.getLogger(__name__)
_PORT = re.compile(r":\d*$")


def facts_of(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What the log line of a request will say besides: to be filled while it is answered."""
    facts: dict[str, Any] = scope.get(_FACTS, {})
    return facts


class Prefix:
    """Lets a server be found below a prefix, whether the proxy before it takes that away or passes it on."""

    def __init__(self, app: Any, prefix: str) -> None:
        """`prefix`: as "/llm"; no path of the server's own begins so."""
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, whose path then has the prefix once, as ASGI wants it."""
        if scope["type"] == "http":
            scope = _without_address(scope)
            outer = scope.get("root_path", "")
            path = scope["path"].removeprefix(outer)
            if path != self._prefix and not path.startswith(f"{self._prefix}/"):
                path = self._prefix + path
            elif path == self._prefix:
                path += "/"
            scope = {**scope, "root_path": outer + self._prefix, "path": outer + path}
        await self._app(scope, receive, send)


class Log:
    """Gives each request an id, counts its answer and writes its line when the last of that has been sent."""

    def __init__(self, app: Any, on_answer: Callable[[int], None]) -> None:
        """`on_answer`: told the status of each answer."""
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. What fails in it becomes its answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        given = dict(scope["headers"]).get(b"x-request-id", b"")
        own_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(own_id)
        facts: dict[str, Any] = {}
        scope[_FACTS] = facts
        begin, status, ended, gone = time.monotonic(), 0, False, False

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", own_id.encode())]}
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body"))

        async def hear() -> MutableMapping[str, Any]:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not ended)
            return message

        try:
            await self._app(scope, hear, answer)
        except ClientDisconnect:
            gone = True
        except Exception as error:
            refused = as_api_error(error)
            if status:  # too late for an answer: the server breaks the connection off
                status, ended = refused.status, True
                raise
            await refused.response()(scope, receive, answer)
        finally:
            if gone or not ended:
                status = _GONE
            self._on_answer(status)
            named = {"request_id": own_id, "method": scope["method"][:20], "path": scope["path"][:200]}
            taken = time.monotonic() - begin
            _log.info("request %s", Facts(**named, status=status, duration_s=taken, **facts))


class Guard:
    """Refuses requests without a key (401) or with too large a body (413) before anything of them is parsed."""

    def __init__(self, app: Any, api_keys: tuple[str, ...], max_body_bytes: int, hosts: tuple[str, ...] = ()) -> None:
        """`hosts`: names by which the server may be asked; none: any."""
        self._hosts = frozenset(name.lower() for name in hosts)
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope = _plain(scope)
        headers = dict(scope["headers"])
        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if b"host" in headers or scope.get("http_version") != "1.0":  # which no browser speaks
                self._check_host(headers.get(b"host", b""))
            self._check_key(path, headers.get(b"authorization", b""))
            self._check_length(headers)
            if scope["method"] == "POST":
                _check_kind(headers)
        except APIError as error:
            if b"expect" not in headers and error.headers != _CLOSE:  # who waits for leave sends nothing
                await self._take_the_rest(receive)
            return await error.response()(scope, receive, send)
        counted = _Counted(receive, send, self._max_body_bytes)
        try:
            await self._app(scope, counted.receive, counted.send)
        except _TooLargeError:
            if not counted.answered:
                await self._too_large().response()(scope, receive, send)

    async def _take_the_rest(self, receive: Receive) -> None:
        """Of the body, so that the client sees the answer: what is closed on who still sends is reset."""
        left = _PATIENCE * self._max_body_bytes
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return

    def _check_host(self, header: bytes) -> None:
        """A page of a site whose name is made to lead to this machine must not reach what only this machine may."""
        name = _PORT.sub("", header.decode("latin-1").lower()).removesuffix(".")
        if self._hosts and name not in self._hosts:
            raise APIError(421, f"Host {name[:80]!r} is not served here: --allowed-host names those that are")

    def _check_key(self, path: str, header: bytes) -> None:
        if not self._keys or path in _PUBLIC:
            return
        scheme, _, given = header.partition(b" ")
        # Every key is compared, each in a time that does not depend on where it differs.
        known = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(known):
            is_key = scheme.lower() == b"bearer" and given.strip()
            raise APIError(
                401,
                "the API key is wrong" if is_key else "an API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, headers: Mapping[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # RFC 9112, 6.3: a proxy that believes the other one takes what follows for another request
            raise APIError(400, "Content-Length and Transfer-Encoding contradict each other", headers=_CLOSE)
        # Servers refuse lengths that are no numbers; one too long to be read as such is too large.
        if len(length) > 18 or (length.isdigit() and int(length) > self._max_body_bytes):
            raise self._too_large()

    def _too_large(self) -> APIError:
        # The answer comes at once, however long the body; the rest of it is none of a next request.
        return APIError(413, f"the body is larger than {self._max_body_bytes} bytes", headers=_CLOSE)


def _plain(scope: Scope) -> Scope:
    """The request under its resource's usual path and method: what may be written in several ways.

    GET in place of HEAD (servers send the head only of the answer), no slash at the end (a redirection would need to
    know the address that a proxy shows), no address before the path.
    """
    scope = _without_address(scope)
    root = scope.get("root_path", "")
    path = scope["path"].removeprefix(root).rstrip("/") or "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": root + path}


def _without_address(scope: Scope) -> Scope:
    """The request by its path alone, where it is written with an address before that, as a proxy is asked."""
    root = scope.get("root_path", "")
    path = scope["path"].removeprefix(root)
    if not path.startswith(("http://", "https://")):
        return scope
    authority, slash, path = path.partition("://")[2].partition("/")
    headers = [*scope["headers"], (b"host", authority.encode("latin-1", "replace"))]  # it counts, not the header
    return {**scope, "path": root + slash + path, "headers": headers}


def _check_kind(headers: dict[bytes, bytes]) -> None:
    """Raises APIError 415 for a body that is not said to be plain JSON."""
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b""):
        raise APIError(
            415, f"Content-Encoding {encoding[:40].decode('latin-1')} is not supported: send the body as it is"
        )
    given = headers.get(b"content-type", b"")
    kind = given.partition(b";")[0].strip().lower()
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        said = f"Content-Type is {given[:80].decode('latin-1')}" if given else "Content-Type is missing"
        raise APIError(415, f"{said}: it must be application/json")


class _TooLargeError(Exception):
    pass


class _Counted:
    """receive() and send() of a request whose length is not known before."""

    def __init__(self, receive: Receive, send: Send, limit: int) -> None:
        self._receive = receive
        self._send = send
        self._left = limit
        self._too_large = False
        self.answered = False

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                self._too_large = True
                raise _TooLargeError
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        # What reads the body may make an answer of its own out of the exception.
        if self._too_large and not self.answered:
            raise _TooLargeError
        self.answered = True
        await self._send(message)
